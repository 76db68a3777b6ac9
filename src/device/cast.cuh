// The FP8 cast of include/nccl_moe.h, sixteen elements of each lane; eight lanes share a block of NCCL_MOE_SCALE_BLOCK.
// By a whole warp.  *scale: the block's; with ue8m0 a power of two, the byte that UE8M0 stores being its exponent
// field.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace moe {

__device__ __forceinline__ uint4 castSixteen(const float (&f)[16], bool ue8m0, float* scale) {
  float amax = 0x1p-64f;
#pragma unroll
  for (int i = 0; i < 16; i++) amax = fmaxf(amax, fabsf(f[i]));
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
    const float2 scaled = make_float2(__fmul_rn(f[2 * i], factor), __fmul_rn(f[2 * i + 1], factor));
    q[i] = __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
  }
  return out;
}
__device__ __forceinline__ uint4 castSixteen(const uint4 (&raw)[2], bool ue8m0, float* scale) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(raw);
  float f[16];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float2 two = __bfloat1622float2(pairs[i]);
    f[2 * i] = two.x, f[2 * i + 1] = two.y;
  }
  return castSixteen(f, ue8m0, scale);
}

// Adds sixteen elements that were cast so, each product rounded.
__device__ __forceinline__ void addCast(float (&sum)[16], const uint4& packet, float scale) {
  const uint32_t words[4] = {packet.x, packet.y, packet.z, packet.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const __nv_fp8x2_storage_t two = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2)));
    const float2 q = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
    sum[2 * i] = __fadd_rn(sum[2 * i], __fmul_rn(q.x, scale));
    sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], __fmul_rn(q.y, scale));
  }
}

} // namespace moe
