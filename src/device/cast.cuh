// The FP8 cast of include/nccl_moe.h, sixteen elements of each lane; eight lanes share a block of NCCL_MOE_SCALE_BLOCK.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace moe {

// By a whole warp.  *scale: the block's; with ue8m0 a power of two, the byte that UE8M0 stores being its exponent field.
__device__ __forceinline__ uint4 castSixteen(const uint4 (&raw)[2], bool ue8m0, float* scale) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(raw);
  float amax = 0x1p-64f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float2 f = __bfloat1622float2(pairs[i]);
    amax = fmaxf(amax, fmaxf(fabsf(f.x), fabsf(f.y)));
  }
#pragma unroll
  for (int d = 1; d < 8; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  *scale = __fdiv_rn(amax, 448.0f);
  float factor;
  if (ue8m0) {
    const unsigned bits = __float_as_uint(*scale);
    const unsigned exponent = min((bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u), 254u);
    factor = exponent == 254u ? 0x1p-127f : __uint_as_float((254u - exponent) << 23);
    *scale = __uint_as_float(exponent << 23);
  } else {
    factor = __fdiv_rn(448.0f, amax);
  }
  uint4 out;
  uint16_t* q = reinterpret_cast<uint16_t*>(&out);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float2 f = __bfloat1622float2(pairs[i]);
    f.x = __fmul_rn(f.x, factor);
    f.y = __fmul_rn(f.y, factor);
    q[i] = __nv_cvt_float2_to_fp8x2(f, __NV_SATFINITE, __NV_E4M3);
  }
  return out;
}

} // namespace moe
