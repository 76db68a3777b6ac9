#include "perf/moe/row_copy.h"

namespace moe::perf {

namespace {

// One warp a row, 16 bytes a lane.
__global__ void __launch_bounds__(1024)
  rowCopyKernel(const uint4* source, void* const* target, int nRows, int rowVecs) {
  const int lane = threadIdx.x % 32;
  const int nWarps = gridDim.x * blockDim.x / 32;
  for (int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32; row < nRows; row += nWarps) {
    const uint4* from = source + static_cast<size_t>(row) * rowVecs;
    uint4* to = static_cast<uint4*>(target[row]);
#pragma unroll 4
    for (int i = lane; i < rowVecs; i += 32) to[i] = from[i];
  }
}

// The ranks meet: thread r tells rank r of this round and waits until rank r has told of it.  Gives up after ten
// seconds.
__global__ void meetKernel(unsigned* const* slots, int rank, int nRanks, unsigned round) {
  const int r = threadIdx.x;
  if (r >= nRanks) return;
  volatile unsigned* theirs = slots[r] + rank;
  volatile unsigned* mine = slots[rank] + r;
  *theirs = round;
  const long long start = clock64();
  while (static_cast<int>(*mine - round) < 0 && clock64() - start < 20000000000ll) {
  }
}

} // namespace

cudaError_t launchMeet(unsigned* const* slots, int rank, int nRanks, unsigned round, cudaStream_t stream) {
  meetKernel<<<1, (nRanks + 31) / 32 * 32, 0, stream>>>(slots, rank, nRanks, round);
  return cudaGetLastError();
}

cudaError_t launchRowCopy(const void* source, void* const* target, int nRows, size_t rowBytes, int nBlocks,
                          cudaStream_t stream) {
  rowCopyKernel<<<nBlocks, 1024, 0, stream>>>(static_cast<const uint4*>(source), target, nRows,
                                              static_cast<int>(rowBytes / 16));
  return cudaGetLastError();
}

} // namespace moe::perf
