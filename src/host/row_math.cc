#include "host/row_math.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <emmintrin.h>
#endif

#include "base/types.h"

namespace moe {
namespace {

// The loops below are compiled twice, for any x86-64 and for AVX2; which of the two runs makes no difference to a bit.
#if defined(__x86_64__)
#define MOE_AVX2 __attribute__((target("avx2,f16c")))
bool haveAvx2() {
  // clang 14's __builtin_cpu_supports does not know f16c.
  static const bool have = [] {
    unsigned eax, ebx, ecx = 0, edx;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  }();
  return have;
}
#endif
#define MOE_INLINE inline __attribute__((always_inline))

struct Bf16 {
  using Raw = uint16_t;
  static MOE_INLINE float load(Raw x) { return bf16ToFloat(x); }
  static MOE_INLINE Raw store(float x) { return floatToBf16(x); }
};
struct Fp16 {
  using Raw = uint16_t;
  static MOE_INLINE float load(Raw x) { return fp16ToFloat(x); }
  static MOE_INLINE Raw store(float x) { return floatToFp16(x); }
};
struct Fp32 {
  using Raw = float;
  static MOE_INLINE float load(Raw x) { return x; }
  static MOE_INLINE Raw store(float x) { return x; }
};

// Adds m elements of each row, from element `at` on, to sum.
template <class Type>
MOE_INLINE void addRows(size_t at, size_t m, const void* const* rows, const float* weights, size_t nRows, float* sum) {
  using Raw = typename Type::Raw;
  for (size_t r = 0; r < nRows; r++) {
    const Raw* row = static_cast<const Raw*>(rows[r]) + at;
    if (weights == nullptr) {
      for (size_t i = 0; i < m; i++) sum[i] += Type::load(row[i]);
    } else {
      const float weight = weights[r];
      for (size_t i = 0; i < m; i++) sum[i] += weight * Type::load(row[i]); // compiled without contraction to FMA
    }
  }
}

template <class Type>
MOE_INLINE void sumLoop(size_t n, const void* const* rows, const float* weights, size_t nRows, void* out) {
  using Raw = typename Type::Raw;
  constexpr size_t kBlock = 512; // the sums stay in the first-level cache
  alignas(64) float sum[kBlock];
  for (size_t at = 0; at < n; at += kBlock) {
    const size_t m = std::min(kBlock, n - at);
    for (size_t i = 0; i < m; i++) sum[i] = 0.0f;
    addRows<Type>(at, m, rows, weights, nRows, sum);
    Raw* to = static_cast<Raw*>(out) + at;
    for (size_t i = 0; i < m; i++) to[i] = Type::store(sum[i]);
  }
}

MOE_INLINE void sumAny(ncclDataType_t type, size_t n, const void* const* rows, const float* weights, size_t nRows,
                       void* out) {
  if (type == ncclBfloat16) return sumLoop<Bf16>(n, rows, weights, nRows, out);
  if (type == ncclFloat16) return sumLoop<Fp16>(n, rows, weights, nRows, out);
  return sumLoop<Fp32>(n, rows, weights, nRows, out);
}

MOE_INLINE void castSumLoop(size_t n, const void* const* rows, const float* weights, size_t nRows,
                            uint8_t* __restrict out, uint8_t* __restrict scales) {
  constexpr size_t kBlock = NCCL_MOE_SCALE_BLOCK;
  for (size_t at = 0; at < n; at += kBlock, scales += sizeof(float)) {
    const size_t m = std::min(kBlock, n - at);
    float sum[kBlock] = {};
    addRows<Bf16>(at, m, rows, weights, nRows, sum);
    uint32_t largest = 0; // magnitudes are ordered as their bits; NaNs do not count
    for (size_t i = 0; i < m; i++) {
      const uint32_t magnitude = floatBits(sum[i]) & 0x7fffffff;
      const uint32_t counted = magnitude > 0x7f800000 ? 0 : magnitude;
      largest = largest > counted ? largest : counted;
    }
    const BlockScale scale = blockScaleFp32(blockMax(kMinBlockMax, bitsFloat(largest)));
    memcpy(scales, &scale.scale, sizeof(float));
    uint32_t wide[kBlock];
    for (size_t i = 0; i < m; i++) wide[i] = floatToE4m3Wide(sum[i] * scale.factor);
    for (size_t i = 0; i < m; i++) out[at + i] = static_cast<uint8_t>(wide[i]);
  }
}

MOE_INLINE void sumCastsLoop(size_t n, const void* const* rows, size_t nRows, size_t scaleAt,
                             uint16_t* __restrict out) {
  constexpr size_t kBlock = NCCL_MOE_SCALE_BLOCK;
  for (size_t at = 0; at < n; at += kBlock) {
    const size_t m = std::min(kBlock, n - at);
    float sum[kBlock] = {};
    for (size_t r = 0; r < nRows; r++) {
      const uint8_t* row = static_cast<const uint8_t*>(rows[r]);
      float scale;
      memcpy(&scale, row + scaleAt + at / kBlock * sizeof(float), sizeof(float));
      for (size_t i = 0; i < m; i++) sum[i] += e4m3ToFloat(row[at + i]) * scale;
    }
    for (size_t i = 0; i < m; i++) out[at + i] = floatToBf16(sum[i]);
  }
}

MOE_INLINE void castLoop(ncclMoeQuant_t quant, const uint16_t* __restrict x, int hidden, uint8_t* __restrict out,
                         uint8_t* __restrict scales) {
  int block = 0;
  for (int at = 0; at < hidden; at += NCCL_MOE_SCALE_BLOCK, block++) {
    const int m = std::min(NCCL_MOE_SCALE_BLOCK, hidden - at);
    int largest = 0; // magnitudes of BF16 are ordered as their bits
    for (int i = 0; i < m; i++) {
      const int magnitude = x[at + i] & 0x7fff;
      const int counted = magnitude > 0x7f80 ? 0 : magnitude;
      largest = largest > counted ? largest : counted;
    }
    const float amax = blockMax(kMinBlockMax, bf16ToFloat(static_cast<uint16_t>(largest)));
    BlockScale scale;
    if (quant == ncclMoeQuantFp8) {
      scale = blockScaleFp32(amax);
      memcpy(scales + static_cast<size_t>(block) * sizeof(float), &scale.scale, sizeof(float));
    } else {
      scale = blockScaleUe8m0(amax);
      scales[block] = scale.exponent;
    }
    const float factor = scale.factor;
    uint32_t wide[NCCL_MOE_SCALE_BLOCK];
    for (int i = 0; i < m; i++) wide[i] = floatToE4m3Wide(bf16ToFloat(x[at + i]) * factor);
    for (int i = 0; i < m; i++) out[at + i] = static_cast<uint8_t>(wide[i]);
  }
  if (quant == ncclMoeQuantFp8Ue8m0) {
    const int bytes = NCCL_MOE_QUANT_SCALE_BYTES(ncclMoeQuantFp8Ue8m0, hidden);
    for (; block < bytes; block++) scales[block] = 0;
  }
}

#if defined(__x86_64__)
MOE_AVX2 void sumAvx2(ncclDataType_t type, size_t n, const void* const* rows, const float* weights, size_t nRows,
                      void* out) {
  sumAny(type, n, rows, weights, nRows, out);
}
MOE_AVX2 void castSumAvx2(size_t n, const void* const* rows, const float* weights, size_t nRows, uint8_t* out,
                          uint8_t* scales) {
  castSumLoop(n, rows, weights, nRows, out, scales);
}
MOE_AVX2 void sumCastsAvx2(size_t n, const void* const* rows, size_t nRows, size_t scaleAt, uint16_t* out) {
  sumCastsLoop(n, rows, nRows, scaleAt, out);
}
MOE_AVX2 void castAvx2(ncclMoeQuant_t quant, const uint16_t* x, int hidden, uint8_t* out, uint8_t* scales) {
  castLoop(quant, x, hidden, out, scales);
}
#endif

} // namespace

void copyRow(void* to, const void* from, size_t bytes, bool streaming) {
#if defined(__x86_64__)
  if (streaming) {
    auto* out = static_cast<__m128i*>(to); // rows are aligned to 16 bytes and a multiple of them
    const auto* in = static_cast<const __m128i*>(from);
    for (size_t i = 0; i < bytes / sizeof(__m128i); i++) _mm_stream_si128(out + i, _mm_loadu_si128(in + i));
    return;
  }
#endif
  memcpy(to, from, bytes);
}

void streamFence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

void sumRows(ncclDataType_t type, size_t n, const void* const* rows, const float* weights, size_t nRows, void* out) {
#if defined(__x86_64__)
  if (haveAvx2()) return sumAvx2(type, n, rows, weights, nRows, out);
#endif
  sumAny(type, n, rows, weights, nRows, out);
}

void castSum(size_t n, const void* const* rows, const float* weights, size_t nRows, void* out, void* scales) {
  auto* to = static_cast<uint8_t*>(out);
  auto* scalesTo = static_cast<uint8_t*>(scales);
#if defined(__x86_64__)
  if (haveAvx2()) return castSumAvx2(n, rows, weights, nRows, to, scalesTo);
#endif
  castSumLoop(n, rows, weights, nRows, to, scalesTo);
}

void sumCasts(size_t n, const void* const* rows, size_t nRows, size_t scaleAt, void* out) {
#if defined(__x86_64__)
  if (haveAvx2()) return sumCastsAvx2(n, rows, nRows, scaleAt, static_cast<uint16_t*>(out));
#endif
  sumCastsLoop(n, rows, nRows, scaleAt, static_cast<uint16_t*>(out));
}

void castRow(ncclMoeQuant_t quant, const void* x, int hidden, void* out, void* scales) {
  const auto* from = static_cast<const uint16_t*>(x);
#if defined(__x86_64__)
  if (haveAvx2()) return castAvx2(quant, from, hidden, static_cast<uint8_t*>(out), static_cast<uint8_t*>(scales));
#endif
  castLoop(quant, from, hidden, static_cast<uint8_t*>(out), static_cast<uint8_t*>(scales));
}

} // namespace moe
