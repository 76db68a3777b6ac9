// Number formats of rows, and the scales of the fused FP8 cast.  Written once for host and device: both give the same
// bits.  Every conversion to a narrower type rounds to nearest even.
//
// No floating-point operation depends on a condition, so that loops over these functions vectorise.
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
  const uint32_t finite = floatBits(bitsFloat(magnitude << 13) * 0x1p112f);
  return bitsFloat(sign | finite | (magnitude >= 0x7c00 ? 0x7f800000 : 0));
}

// Rounds a finite magnitude to a float with that many mantissa bits and the given smallest exponent (biased as FP32's),
// and returns its code.  Adding a power of two whose last place is the last place of the result makes the FPU round.
MOE_HD uint32_t roundMagnitude(uint32_t magnitude, uint32_t mantissaBits, uint32_t minExponent) {
  const uint32_t own = magnitude >> 23;
  const uint32_t exponent = own > minExponent ? own : minExponent;
  const uint32_t magic = (exponent + 23 - mantissaBits) << 23;
  const uint32_t places = floatBits(bitsFloat(magnitude) + bitsFloat(magic)) - magic;
  return ((exponent - minExponent) << mantissaBits) + places;
}

// NaNs become 0x7fff, as CUDA's conversion makes them.
MOE_HD uint16_t floatToFp16(float value) {
  const uint32_t bits = floatBits(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t bounded = magnitude < 0x47800000 ? magnitude : 0x47800000; // 2^16 has the code of infinity
  const uint32_t sign = magnitude > 0x7f800000 ? 0 : (bits >> 16) & 0x8000;
  const uint32_t nan = magnitude > 0x7f800000 ? 0x7fff : 0;
  return static_cast<uint16_t>(sign | roundMagnitude(bounded, 10, 113) | nan);
}

MOE_HD float e4m3ToFloat(uint8_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x80) << 24;
  const uint32_t magnitude = value & 0x7f;
  const uint32_t finite = floatBits(bitsFloat(magnitude << 20) * 0x1p120f);
  return bitsFloat(sign | finite | (magnitude == 0x7f ? 0x7fc00000 : 0));
}

// Saturates to +-448, infinities too; a NaN keeps its sign.  Wide: loops that narrow in a second pass are faster.
MOE_HD uint32_t floatToE4m3Wide(float value) {
  const uint32_t bits = floatBits(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t bounded = magnitude < 0x43e00000 ? magnitude : 0x43e00000; // 448
  const uint32_t nan = magnitude > 0x7f800000 ? 0x7f : 0;
  return ((bits >> 24) & 0x80) | roundMagnitude(bounded, 3, 121) | nan;
}

MOE_HD uint8_t floatToE4m3(float value) { return static_cast<uint8_t>(floatToE4m3Wide(value)); }

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

// Bytes of one element; 0 for a type that rows do not have.  An int, for callers may have put anything there.
MOE_HD int typeBytes(int type) {
  switch (type) {
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
