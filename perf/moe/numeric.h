// Element types and the data that every rank can recompute from the seed.  Written independently of the library's own
// conversions, against which it checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nccl_moe.h"

namespace moe::perf {

inline uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// One number for a place in the run: what it is for, and up to four coordinates.
enum class Purpose : uint64_t { row = 1, scale, weight, expertOutput, routing, expertOrder };
inline uint64_t keyOf(uint64_t seed, Purpose purpose, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0, uint64_t d = 0) {
  uint64_t key = mix64(seed ^ (static_cast<uint64_t>(purpose) << 56));
  key = mix64(key ^ a);
  key = mix64(key ^ b);
  key = mix64(key ^ c);
  return mix64(key ^ d);
}

inline double unitOf(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53; } // in (0, 1)

inline float floatOfBits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bitsOfFloat(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

inline float bf16ToFloat(uint16_t v) { return floatOfBits(static_cast<uint32_t>(v) << 16); }
inline uint16_t floatToBf16(float f) { // NaN does not occur here
  const uint32_t bits = bitsOfFloat(f);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float halfToFloat(uint16_t v);
uint16_t floatToHalf(float f);
uint8_t floatToE4m3(float f); // nearest even, saturated to 448; NaN does not occur here
float e4m3ToFloat(uint8_t v);

size_t typeBytes(ncclDataType_t type);
const char* typeName(ncclDataType_t type);

// Rows of type from and to FP32; n elements.
void rowToFloat(ncclDataType_t type, const void* row, int n, float* out);
void rowFromFloat(ncclDataType_t type, const float* row, int n, void* out);

// n random elements of type: in [-1, 1), or any finite e4m3.
void fillRow(ncclDataType_t type, uint64_t key, int n, void* out);
void fillBytes(uint64_t key, size_t n, void* out);

// The header's fused cast of one BF16 row to q [n] and its scales [NCCL_MOE_QUANT_SCALE_BYTES].
void quantizeRow(ncclMoeQuant_t quant, const uint16_t* row, int n, uint8_t* q, uint8_t* scales);

// What is left of n FP32 elements after the FP8 cast: q times its block's scale.
void castAndBack(const float* row, int n, float* out);

} // namespace moe::perf
