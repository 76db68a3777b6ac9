// The GPU roofline: a kernel that does nothing but store rows to peers.
#pragma once

#include <cuda_runtime.h>

namespace moe::perf {

// Row i of source [nRows, rowBytes] goes to target[i]; rows are multiples of 16 bytes.
cudaError_t launchRowCopy(const void* source, void* const* target, int nRows, size_t rowBytes, int nBlocks,
                          cudaStream_t stream);

} // namespace moe::perf
