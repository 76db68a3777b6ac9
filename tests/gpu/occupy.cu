#include "gpu/occupy.h"

namespace moe::test {
namespace {

__global__ void occupyKernel(unsigned long long ns) {
  unsigned long long start = 0, now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < ns);
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

} // namespace moe::test
