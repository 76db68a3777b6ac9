// Other work on a GPU.
#pragma once

#include <cuda_runtime.h>

namespace moe::test {

// Takes nSms SMs for so long, each with a block that leaves no shared memory to others.  0 ms: only loads the kernel.
cudaError_t occupySms(int nSms, int ms, cudaStream_t stream);

// Copies after so long, as work does that produces a tensor slowly or still reads it.  A copy of nothing loads the
// kernel.
cudaError_t copyLate(void* to, const void* from, size_t bytes, int ms, cudaStream_t stream);

} // namespace moe::test
