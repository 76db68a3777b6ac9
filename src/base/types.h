// Number formats of rows, and the scales of the fused FP8 cast.  Written once for host and device: both give the same
// bits.  Every conversion to a narrower type rounds to nearest even.
//
// All functions are free of branches on data, so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/hd.h"
#include "nccl_moe.h"

namespace moe {

MOE_HD uint32_t floatBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MOE_HD float bitsFloat(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MOE_HD float bf16ToFloat(uint16_t value) { return bitsFloat(static_cast<uint32_t>(value) << 16); }

// NaNs become 0x7fff, as CUDA's conversion makes them.
MOE_HD uint16_t floatToBf16(float value) {
  const uint32_t bits = floatBits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}

MOE_HD float fp16ToFloat(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t magnitude = value & 0x7fff;
  // The exponent is rebased by an exact multiplication, which is right for subnormals too.
  const float finite = bitsFloat(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000 | (magnitude << 13); // infinity and NaNs
  return bitsFloat(sign | (magnitude >= 0x7c00 ? special : floatBits(finite)));
}

// NaNs become 0x7fff, as CUDA's conversion makes them.
MOE_HD uint16_t floatToFp16(float value) {
  const uint32_t bits = floatBits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Below 2^-14, adding 0.5 (whose last place is 2^-24) makes the FPU round to a multiple of the smallest subnormal.
  const uint32_t subnormal = floatBits(bitsFloat(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t withInf = magnitude >= 0x477ff000 ? 0x7c00 : finite; // 65520 and more round to infinity
  return static_cast<uint16_t>(magnitude > 0x7f800000 ? 0x7fff : (sign | withInf));
}

MOE_HD float e4m3ToFloat(uint8_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x80) << 24;
  const uint32_t magnitude = value & 0x7f;
  const float finite = bitsFloat(magnitude << 20) * 0x1p120f;
  return bitsFloat(sign | (magnitude == 0x7f ? 0x7fc00000 : floatBits(finite)));
}

// Saturates to +-448, infinities too; a NaN keeps its sign.
MOE_HD uint8_t floatToE4m3(float value) {
  const uint32_t bits = floatBits(value);
  const uint32_t sign = (bits >> 24) & 0x80;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0x7ffff + ((magnitude >> 20) & 1) - (120u << 23)) >> 20;
  // As in floatToFp16: the last place of 16384 is 2^-9, the smallest subnormal.
  const uint32_t subnormal = floatBits(bitsFloat(magnitude) + 16384.0f) - 0x46800000;
  const uint32_t finite = magnitude < 0x3c800000 ? subnormal : normal;
  const uint32_t saturated = magnitude >= 0x43e00000 ? 0x7e : finite;
  return static_cast<uint8_t>(sign | (magnitude > 0x7f800000 ? 0x7f : saturated));
}

// ------------------------------------------------------------------------------------------ scales of the FP8 cast --

constexpr float kE4m3Max = 448.0f;
constexpr float kMinBlockMax = 0x1p-64f; // a block's amax counts as this much at least

// Scale of a block, and the factor that its elements are multiplied by before the conversion to e4m3.
struct BlockScale {
  float factor;
  float scale;      // ncclMoeQuantFp8
  uint8_t exponent; // ncclMoeQuantFp8Ue8m0
};

MOE_HD BlockScale blockScaleFp32(float amax) { return BlockScale{kE4m3Max / amax, amax / kE4m3Max, 0}; }

// 2^(127-exponent) is exact, so the product is x / scale rounded once.
MOE_HD BlockScale blockScaleUe8m0(float amax) {
  const uint32_t bits = floatBits(amax / kE4m3Max);
  const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffff) != 0 ? 1 : 0);
  // exponent 254 needs 2^-127 and 255 (amax is infinite) 2^-128, both subnormal.
  const uint32_t factor = exponent < 254 ? (254 - exponent) << 23 : 0x400000u >> (exponent - 254);
  return BlockScale{bitsFloat(factor), 0.0f, static_cast<uint8_t>(exponent)};
}

// Larger of a block's amax so far and |value|; NaNs do not count.
MOE_HD float blockMax(float amax, float value) {
  const float magnitude = bitsFloat(floatBits(value) & 0x7fffffff);
  return magnitude > amax ? magnitude : amax;
}

// Bytes of one element; 0 for a type that rows do not have.
MOE_HD int typeBytes(ncclDataType_t type) {
  switch (static_cast<int>(type)) {
  case static_cast<int>(ncclFloat32):
    return 4;
  case static_cast<int>(ncclBfloat16):
  case static_cast<int>(ncclFloat16):
    return 2;
  case static_cast<int>(ncclMoeFloat8e4m3):
    return 1;
  default:
    return 0;
  }
}

} // namespace moe
