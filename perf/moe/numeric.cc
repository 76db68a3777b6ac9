#include "perf/moe/numeric.h"

#include <algorithm>
#include <cmath>

namespace moe::perf {

namespace {

// Rounds |f| to a multiple of 2^(e - mantissaBits), where 2^e <= |f|, but e is minExponent at least.
float roundMagnitude(float magnitude, int mantissaBits, int minExponent) {
  const int e = std::max(static_cast<int>(bitsOfFloat(magnitude) >> 23) - 127, minExponent);
  const float step = floatOfBits(static_cast<uint32_t>(e - mantissaBits + 127) << 23);
  return std::nearbyintf(magnitude / step) * step;
}

} // namespace

float halfToFloat(uint16_t v) {
  const int exponent = (v >> 10) & 31;
  const int mantissa = v & 1023;
  float magnitude = 0;
  if (exponent == 31) {
    magnitude = mantissa != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  } else {
    magnitude = floatOfBits(static_cast<uint32_t>(exponent + 112) << 23 | static_cast<uint32_t>(mantissa) << 13);
  }
  return (v & 0x8000) != 0 ? -magnitude : magnitude;
}

uint16_t floatToHalf(float f) {
  const uint16_t sign = static_cast<uint16_t>((bitsOfFloat(f) >> 16) & 0x8000u);
  if (std::fabs(f) >= 65520.0f) return sign | 0x7c00;
  const float magnitude = roundMagnitude(std::fabs(f), 10, -14);
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(magnitude * 0x1p24f);
  const uint32_t bits = bitsOfFloat(magnitude);
  return static_cast<uint16_t>(sign | (((bits >> 23) - 112) << 10) | ((bits >> 13) & 1023));
}

uint8_t floatToE4m3(float f) {
  const uint8_t sign = static_cast<uint8_t>((bitsOfFloat(f) >> 24) & 0x80u);
  const float magnitude = roundMagnitude(std::min(std::fabs(f), 448.0f), 3, -6);
  if (magnitude < 0x1p-6f) return sign | static_cast<uint8_t>(magnitude * 0x1p9f);
  const uint32_t bits = bitsOfFloat(magnitude);
  return static_cast<uint8_t>(sign | (((bits >> 23) - 120) << 3) | ((bits >> 20) & 7));
}

float e4m3ToFloat(uint8_t v) {
  const int exponent = (v >> 3) & 15;
  const int mantissa = v & 7;
  float magnitude = 0;
  if (exponent == 15 && mantissa == 7) {
    magnitude = NAN;
  } else if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-9f;
  } else {
    magnitude = std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  }
  return (v & 0x80) != 0 ? -magnitude : magnitude;
}

size_t typeBytes(ncclDataType_t type) {
  if (type == ncclFloat32) return 4;
  return type == ncclMoeFloat8e4m3 ? 1 : 2;
}

const char* typeName(ncclDataType_t type) {
  if (type == ncclBfloat16) return "bfloat16";
  if (type == ncclFloat16) return "half";
  if (type == ncclFloat32) return "float";
  return "fp8";
}

void rowToFloat(ncclDataType_t type, const void* row, int n, float* out) {
  if (type == ncclFloat32) {
    memcpy(out, row, static_cast<size_t>(n) * 4);
  } else if (type == ncclBfloat16) {
    const auto* in = static_cast<const uint16_t*>(row);
    for (int i = 0; i < n; i++) out[i] = bf16ToFloat(in[i]);
  } else if (type == ncclFloat16) {
    const auto* in = static_cast<const uint16_t*>(row);
    for (int i = 0; i < n; i++) out[i] = halfToFloat(in[i]);
  } else {
    const auto* in = static_cast<const uint8_t*>(row);
    for (int i = 0; i < n; i++) out[i] = e4m3ToFloat(in[i]);
  }
}

void rowFromFloat(ncclDataType_t type, const float* row, int n, void* out) {
  if (type == ncclFloat32) {
    memcpy(out, row, static_cast<size_t>(n) * 4);
  } else if (type == ncclBfloat16) {
    auto* to = static_cast<uint16_t*>(out);
    for (int i = 0; i < n; i++) to[i] = floatToBf16(row[i]);
  } else if (type == ncclFloat16) {
    auto* to = static_cast<uint16_t*>(out);
    for (int i = 0; i < n; i++) to[i] = floatToHalf(row[i]);
  } else {
    auto* to = static_cast<uint8_t*>(out);
    for (int i = 0; i < n; i++) to[i] = floatToE4m3(row[i]);
  }
}

namespace {

// 32-bit multiplications only: the compiler vectorises the loops around it.
inline uint32_t elementBits(uint32_t low, uint32_t high, uint32_t i) {
  uint32_t x = low + i * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ high ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

inline float elementFloat(uint32_t low, uint32_t high, uint32_t i) {
  return static_cast<float>(static_cast<int32_t>(elementBits(low, high, i)) >> 8) * 0x1p-23f;
}

} // namespace

void fillRow(ncclDataType_t type, uint64_t key, int n, void* out) {
  const auto low = static_cast<uint32_t>(key);
  const auto high = static_cast<uint32_t>(key >> 32);
  const auto count = static_cast<uint32_t>(n);
  if (type == ncclFloat32) {
    auto* to = static_cast<float*>(out);
    for (uint32_t i = 0; i < count; i++) to[i] = elementFloat(low, high, i);
  } else if (type == ncclBfloat16) {
    auto* to = static_cast<uint16_t*>(out);
    for (uint32_t i = 0; i < count; i++) to[i] = floatToBf16(elementFloat(low, high, i));
  } else if (type == ncclFloat16) {
    auto* to = static_cast<uint16_t*>(out);
    for (uint32_t i = 0; i < count; i++) to[i] = floatToHalf(elementFloat(low, high, i));
  } else {
    auto* to = static_cast<uint8_t*>(out);
    for (uint32_t i = 0; i < count; i++) {
      const uint32_t bits = elementBits(low, high, i);
      const uint32_t magnitude = (bits >> 8) % 127; // 127 is NaN
      to[i] = static_cast<uint8_t>(magnitude | ((bits & 1) << 7));
    }
  }
}

void fillBytes(uint64_t key, size_t n, void* out) {
  auto* to = static_cast<uint8_t*>(out);
  for (size_t i = 0; i < n; i++) to[i] = static_cast<uint8_t>(mix64(key + i));
}

void quantizeRow(ncclMoeQuant_t quant, const uint16_t* row, int n, uint8_t* q, uint8_t* scales) {
  const int nBlocks = (n + NCCL_MOE_SCALE_BLOCK - 1) / NCCL_MOE_SCALE_BLOCK;
  memset(scales, 0, static_cast<size_t>(NCCL_MOE_QUANT_SCALE_BYTES(quant, n)));
  for (int b = 0; b < nBlocks; b++) {
    const int begin = b * NCCL_MOE_SCALE_BLOCK;
    const int end = std::min(n, begin + NCCL_MOE_SCALE_BLOCK);
    float amax = 0x1p-64f;
    for (int i = begin; i < end; i++) amax = std::max(amax, std::fabs(bf16ToFloat(row[i])));
    const float scale = amax / 448.0f;
    if (quant == ncclMoeQuantFp8) {
      memcpy(scales + static_cast<size_t>(b) * 4, &scale, 4);
      const float inverse = 448.0f / amax;
      for (int i = begin; i < end; i++) q[i] = floatToE4m3(bf16ToFloat(row[i]) * inverse);
    } else {
      int exponent = 0;
      // scale = m * 2^exponent with m in [0.5, 1): the power of two at or above it.
      const float m = std::frexp(scale, &exponent);
      if (m == 0.5f) exponent--;
      scales[b] = static_cast<uint8_t>(exponent + 127);
      const float power = std::ldexp(1.0f, exponent);
      for (int i = begin; i < end; i++) q[i] = floatToE4m3(bf16ToFloat(row[i]) / power);
    }
  }
}

void castAndBack(const float* row, int n, float* out) {
  for (int begin = 0; begin < n; begin += NCCL_MOE_SCALE_BLOCK) {
    const int end = std::min(n, begin + NCCL_MOE_SCALE_BLOCK);
    float amax = 0x1p-64f;
    for (int i = begin; i < end; i++) amax = std::max(amax, std::fabs(row[i]));
    const float scale = amax / 448.0f;
    const float inverse = 448.0f / amax;
    for (int i = begin; i < end; i++) out[i] = e4m3ToFloat(floatToE4m3(row[i] * inverse)) * scale;
  }
}

} // namespace moe::perf
