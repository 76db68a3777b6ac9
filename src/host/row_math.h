// The arithmetic on rows of the host backend: bound by memory, and exactly what nccl_moe.h defines.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nccl_moe.h"

namespace moe {

// Copies a row.  streaming: past the caches, for rows that nobody reads soon; then streamFence() before anybody does.
void copyRow(void* to, const void* from, size_t bytes, bool streaming);
void streamFence();

// out = the sum of n-element rows, each times its weight if there are weights, in FP32: starting from 0, in the order
// given, every product and sum rounded, the result rounded to type.
void sumRows(ncclDataType_t type, size_t n, const void* const* rows, const float* weights, size_t nRows, void* out);

// The same sum of BF16 rows, cast to FP8 without being rounded to BF16: n elements, and an FP32 scale for each block.
void castSum(size_t n, const void* const* rows, const float* weights, size_t nRows, void* out, void* scales);
// out = the sum of n-element FP8 rows, each element times its block's scale, which lie scaleAt bytes behind the row's
// first: starting from 0, every product and sum rounded to FP32, the result to BF16.
void sumCasts(size_t n, const void* const* rows, size_t nRows, size_t scaleAt, void* out);

// The fused cast of a BF16 row.  scales: NCCL_MOE_QUANT_SCALE_BYTES.
void castRow(ncclMoeQuant_t quant, const void* x, int hidden, void* out, void* scales);

} // namespace moe
