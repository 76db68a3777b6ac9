// Kernels of the measurements: the GPU roofline, which does nothing but store rows to peers, and a meeting of the
// ranks.
#pragma once

#include <cuda_runtime.h>

namespace moe::perf {

// Row i of source [nRows, rowBytes] goes to target[i]; rows are multiples of 16 bytes.
cudaError_t launchRowCopy(const void* source, void* const* target, int nRows, size_t rowBytes, int nBlocks,
                          cudaStream_t stream);

// The stream goes on when every rank's stream has come here.  slots[r]: an array of nRanks zeroed words on rank r;
// round counts the meetings from 1.
cudaError_t launchMeet(unsigned* const* slots, int rank, int nRanks, unsigned round, cudaStream_t stream);

} // namespace moe::perf
