// Exhaustive checks of the number formats against the definitions of their values.
#include "base/types.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace {

using namespace moe;

constexpr float kInf = std::numeric_limits<float>::infinity();

// Value of a small float by its definition.
double valueOf(uint32_t code, int exponentBits, int mantissaBits) {
  const int bias = (1 << (exponentBits - 1)) - 1;
  const uint32_t mantissa = code & ((1u << mantissaBits) - 1);
  const int exponent = static_cast<int>((code >> mantissaBits) & ((1u << exponentBits) - 1));
  const double sign = (code >> (exponentBits + mantissaBits)) != 0 ? -1.0 : 1.0;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissaBits);
  return sign * std::ldexp(mantissa + (1u << mantissaBits), exponent - bias - mantissaBits);
}

// Code of the nearest value among the finite non-negative codes 0..last (values rise with codes), ties to even code.
uint32_t nearest(double value, const std::vector<double>& values) {
  uint32_t low = 0, high = static_cast<uint32_t>(values.size()) - 1;
  if (value >= values[high]) return high;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (values[middle] <= value ? low : high) = middle;
  }
  const double below = value - values[low], above = values[high] - value;
  if (below != above) return below < above ? low : high;
  return low % 2 == 0 ? low : high;
}

std::vector<float> interestingFloats(const std::vector<double>& values) {
  std::vector<float> out;
  for (size_t i = 0; i + 1 < values.size(); i++) {
    const float middle = static_cast<float>((values[i] + values[i + 1]) / 2); // exact
    for (const float f :
         {static_cast<float>(values[i]), middle, std::nextafterf(middle, 0), std::nextafterf(middle, kInf)})
      out.push_back(f);
  }
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; i++) {
    const uint32_t bits = random() & 0x7fffffff;
    if (bits < 0x7f800000) out.push_back(bitsFloat(bits));
  }
  return out;
}

TEST(Types, Bf16Exhaustive) {
  for (uint32_t code = 0; code < 65536; code++) {
    const float value = bf16ToFloat(static_cast<uint16_t>(code));
    if ((code & 0x7fff) > 0x7f80) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_EQ(floatToBf16(value), 0x7fff);
      continue;
    }
    if ((code & 0x7fff) == 0x7f80) {
      EXPECT_EQ(value, (code & 0x8000) != 0 ? -kInf : kInf);
    } else {
      EXPECT_EQ(static_cast<double>(value), valueOf(code, 8, 7));
    }
    EXPECT_EQ(floatToBf16(value), code);
  }
}

TEST(Types, Bf16RoundsToNearestEven) {
  std::vector<double> values;
  for (uint32_t code = 0; code <= 0x7f80; code++) values.push_back(valueOf(code, 8, 7)); // "infinity" is 2^128 here
  for (const float f : interestingFloats(values)) {
    ASSERT_EQ(floatToBf16(f), nearest(f, values)) << std::hexfloat << f;
    ASSERT_EQ(floatToBf16(-f), nearest(f, values) | 0x8000) << std::hexfloat << f;
  }
}

TEST(Types, Fp16Exhaustive) {
  for (uint32_t code = 0; code < 65536; code++) {
    const float value = fp16ToFloat(static_cast<uint16_t>(code));
    if ((code & 0x7fff) > 0x7c00) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_EQ(floatToFp16(value), 0x7fff);
      continue;
    }
    if ((code & 0x7fff) == 0x7c00) {
      EXPECT_EQ(value, (code & 0x8000) != 0 ? -kInf : kInf);
    } else {
      EXPECT_EQ(static_cast<double>(value), valueOf(code, 5, 10));
      EXPECT_EQ(std::signbit(value), (code & 0x8000) != 0);
    }
    EXPECT_EQ(floatToFp16(value), code);
  }
}

TEST(Types, Fp16RoundsToNearestEven) {
  std::vector<double> values;
  for (uint32_t code = 0; code <= 0x7c00; code++) values.push_back(valueOf(code, 5, 10));
  for (const float f : interestingFloats(values)) {
    ASSERT_EQ(floatToFp16(f), nearest(f, values)) << std::hexfloat << f;
    ASSERT_EQ(floatToFp16(-f), nearest(f, values) | 0x8000) << std::hexfloat << f;
  }
}

TEST(Types, E4m3Exhaustive) {
  for (uint32_t code = 0; code < 256; code++) {
    const float value = e4m3ToFloat(static_cast<uint8_t>(code));
    if ((code & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value));
    } else {
      EXPECT_EQ(static_cast<double>(value), valueOf(code, 4, 3));
    }
    EXPECT_EQ(std::signbit(value), (code & 0x80) != 0);
    EXPECT_EQ(floatToE4m3(value), code);
  }
  EXPECT_EQ(floatToE4m3(kInf), 0x7e);
  EXPECT_EQ(floatToE4m3(-kInf), 0xfe);
}

TEST(Types, E4m3RoundsToNearestEvenAndSaturates) {
  std::vector<double> values;
  for (uint32_t code = 0; code <= 0x7e; code++) values.push_back(valueOf(code, 4, 3));
  ASSERT_EQ(values.back(), 448.0);
  for (const float f : interestingFloats(values)) {
    ASSERT_EQ(floatToE4m3(f), nearest(f, values)) << std::hexfloat << f;
    ASSERT_EQ(floatToE4m3(-f), nearest(f, values) | 0x80) << std::hexfloat << f;
  }
}

TEST(Types, Ue8m0RoundsTheScaleUp) {
  std::mt19937 random(2);
  for (int i = 0; i < 1000000; i++) {
    float amax = bitsFloat(random() & 0x7fffffff);
    if (!(amax >= kMinBlockMax) || amax == kInf) amax = kMinBlockMax;
    const BlockScale block = blockScaleUe8m0(amax);
    const float scale = amax / 448.0f;
    const double power = std::ldexp(1.0, block.exponent - 127);
    ASSERT_GE(power, scale);
    ASSERT_LT(power / 2, scale);
    ASSERT_EQ(static_cast<double>(block.factor), 1.0 / power);
  }
  EXPECT_EQ(blockScaleUe8m0(448.0f).exponent, 127); // a power of two stays
  EXPECT_EQ(blockScaleUe8m0(std::nextafterf(448.0f, kInf)).exponent, 128);
  EXPECT_EQ(blockScaleUe8m0(kInf).exponent, 255);
  EXPECT_EQ(blockScaleUe8m0(kInf).factor, 0x1p-128f);
  EXPECT_EQ(blockScaleUe8m0(bitsFloat(0x7f7fffff)).factor, 0x1p-120f);
}

TEST(Types, BlockMaxIgnoresNaN) {
  EXPECT_EQ(blockMax(kMinBlockMax, std::nanf("")), kMinBlockMax);
  EXPECT_EQ(blockMax(1.0f, -2.0f), 2.0f);
  EXPECT_EQ(blockMax(1.0f, -kInf), kInf);
}

} // namespace
