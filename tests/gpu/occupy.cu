#include "gpu/occupy.h"

namespace moe::test {
namespace {

__device__ void waitNs(unsigned long long ns) {
  unsigned long long start = 0, now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start)::"memory");
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  } while (now - start < ns);
}

__global__ void occupyKernel(unsigned long long ns) { waitNs(ns); }

__global__ void copyLateKernel(char* to, const char* from, size_t bytes, unsigned long long ns) {
  waitNs(ns);
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
}

} // namespace

cudaError_t occupySms(int nSms, int ms, cudaStream_t stream) {
  int device = 0, shared = 0;
  cudaError_t result = cudaGetDevice(&device);
  if (result == cudaSuccess) result = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (result == cudaSuccess)
    result = cudaFuncSetAttribute(occupyKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (result != cudaSuccess || ms == 0) return result;
  occupyKernel<<<nSms, 32, shared, stream>>>(static_cast<unsigned long long>(ms) * 1000000);
  return cudaGetLastError();
}

cudaError_t copyLate(void* to, const void* from, size_t bytes, int ms, cudaStream_t stream) {
  copyLateKernel<<<1, 1024, 0, stream>>>(static_cast<char*>(to), static_cast<const char*>(from), bytes,
                                         static_cast<unsigned long long>(ms) * 1000000);
  return cudaGetLastError();
}

} // namespace moe::test
