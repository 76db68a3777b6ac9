// The row loops against element-wise readings of nccl_moe.h.
#include "host/row_math.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/types.h"
#include "gtest/gtest.h"

namespace {

using namespace moe;

float load(ncclDataType_t type, const uint8_t* row, size_t i) {
  uint16_t half = 0;
  float single = 0;
  memcpy(&half, row + 2 * i, sizeof(half));
  if (type == ncclFloat32) memcpy(&single, row + 4 * i, sizeof(single));
  return type == ncclFloat32 ? single : type == ncclBfloat16 ? bf16ToFloat(half) : fp16ToFloat(half);
}

uint32_t stored(ncclDataType_t type, float value) {
  return type == ncclFloat32 ? floatBits(value) : type == ncclBfloat16 ? floatToBf16(value) : floatToFp16(value);
}

TEST(RowMath, SumsInTheOrderGiven) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  for (const ncclDataType_t type : {ncclBfloat16, ncclFloat16, ncclFloat32}) {
    const auto bytes = static_cast<size_t>(typeBytes(type));
    for (const size_t n : {8, 16, 504, 512, 520, 7168}) {
      for (const size_t nRows : {0, 1, 2, 3, 8, 32}) {
        for (const bool weighted : {false, true}) {
          std::vector<std::vector<uint8_t>> rows(nRows, std::vector<uint8_t>(n * bytes));
          std::vector<const void*> at;
          std::vector<float> weights;
          for (auto& row : rows) {
            for (size_t i = 0; i < n; i++) {
              const uint32_t code = stored(type, normal(random) * (i % 7 == 0 ? 1e4f : 1.0f));
              memcpy(row.data() + i * bytes, &code, bytes);
            }
            at.push_back(row.data());
            weights.push_back(normal(random));
          }
          std::vector<uint8_t> out(n * bytes, 0xab);
          sumRows(type, n, at.data(), weighted ? weights.data() : nullptr, nRows, out.data());
          for (size_t i = 0; i < n; i++) {
            float sum = 0;
            for (size_t r = 0; r < nRows; r++) {
              const float value = load(type, rows[r].data(), i);
              const volatile float product = weighted ? weights[r] * value : value; // not fused with the sum
              sum += product;
            }
            uint32_t got = 0;
            memcpy(&got, out.data() + i * bytes, bytes);
            ASSERT_EQ(got, stored(type, sum)) << "type " << type << " n " << n << " rows " << nRows << " at " << i;
          }
        }
      }
    }
  }
}

TEST(RowMath, CastsByBlocks) {
  std::mt19937 random(12);
  std::normal_distribution<float> normal;
  for (const int hidden : {16, 112, 128, 144, 640, 7168}) {
    for (const auto quant : {ncclMoeQuantFp8, ncclMoeQuantFp8Ue8m0}) {
      std::vector<uint16_t> x(hidden);
      for (int i = 0; i < hidden; i++) {
        x[i] = floatToBf16(normal(random) * std::exp(3 * normal(random)));
        if (random() % 50 == 0) x[i] = static_cast<uint16_t>(random()); // anything, NaNs and infinities too
        if (i / 128 == 2) x[i] = 0;                                     // a block of zeros
      }
      const int scaleBytes = NCCL_MOE_QUANT_SCALE_BYTES(quant, hidden);
      std::vector<uint8_t> out(hidden + 1, 0xab), scales(scaleBytes + 1, 0xab);
      castRow(quant, x.data(), hidden, out.data(), scales.data());
      EXPECT_EQ(out[hidden], 0xab);
      EXPECT_EQ(scales[scaleBytes], 0xab);
      const int blocks = (hidden + 127) / 128;
      for (int b = 0; b < blocks; b++) {
        float amax = 0x1p-64f;
        for (int i = b * 128; i < std::min(hidden, b * 128 + 128); i++) {
          const float v = std::fabs(bf16ToFloat(x[i]));
          if (v > amax) amax = v;
        }
        float factor = 448.0f / amax;
        if (quant == ncclMoeQuantFp8) {
          float scale = 0;
          memcpy(&scale, &scales[b * 4], 4);
          EXPECT_EQ(floatBits(scale), floatBits(amax / 448.0f));
        } else {
          EXPECT_EQ(scales[b], blockScaleUe8m0(amax).exponent);
          factor = std::ldexp(1.0f, 127 - scales[b]);
        }
        for (int i = b * 128; i < std::min(hidden, b * 128 + 128); i++) {
          const float product = bf16ToFloat(x[i]) * factor;
          if (std::isnan(product)) {
            EXPECT_EQ(out[i] & 0x7f, 0x7f);
          } else {
            EXPECT_EQ(out[i], floatToE4m3(product));
          }
        }
      }
      for (int b = blocks; quant == ncclMoeQuantFp8Ue8m0 && b < scaleBytes; b++) EXPECT_EQ(scales[b], 0);
    }
  }
}

// Sums cast, and such sums added up.
TEST(RowMath, CastsSumsAndAddsThem) {
  std::mt19937 random(14);
  std::normal_distribution<float> normal;
  for (const size_t n : {16, 112, 128, 144, 640, 7168}) {
    const size_t blocks = (n + 127) / 128, scaleAt = n + 16, stride = scaleAt + 4 * blocks;
    for (const size_t nRows : {1, 2, 8}) {
      for (const bool weighted : {false, true}) {
        std::vector<std::vector<uint16_t>> rows(nRows, std::vector<uint16_t>(n));
        std::vector<const void*> at;
        std::vector<float> weights;
        for (auto& row : rows) {
          for (size_t i = 0; i < n; i++) {
            row[i] = floatToBf16(normal(random) * std::exp(3 * normal(random)));
            if (random() % 200 == 0) row[i] = static_cast<uint16_t>(random()); // anything, NaNs and infinities too
            if (i / 128 == 2) row[i] = 0;                                      // a block of zeros
          }
          at.push_back(row.data());
          weights.push_back(normal(random));
        }
        std::vector<uint8_t> cast(stride + 1, 0xab);
        castSum(n, at.data(), weighted ? weights.data() : nullptr, nRows, cast.data(), &cast[scaleAt]);
        EXPECT_EQ(std::vector<uint8_t>(&cast[n], &cast[scaleAt]), std::vector<uint8_t>(16, 0xab));
        EXPECT_EQ(cast[stride], 0xab);
        for (size_t b = 0; b < blocks; b++) {
          std::vector<float> sums;
          float amax = 0x1p-64f;
          for (size_t i = b * 128; i < std::min(n, b * 128 + 128); i++) {
            float sum = 0;
            for (size_t r = 0; r < nRows; r++) {
              const volatile float product = (weighted ? weights[r] : 1.0f) * bf16ToFloat(rows[r][i]);
              sum += product;
            }
            sums.push_back(sum);
            if (std::fabs(sum) > amax) amax = std::fabs(sum);
          }
          float scale = 0;
          memcpy(&scale, &cast[scaleAt + 4 * b], sizeof(scale));
          EXPECT_EQ(floatBits(scale), floatBits(amax / 448.0f));
          for (size_t i = 0; i < sums.size(); i++) {
            const float product = sums[i] * (448.0f / amax);
            if (std::isnan(product)) {
              EXPECT_EQ(cast[b * 128 + i] & 0x7f, 0x7f);
            } else {
              EXPECT_EQ(cast[b * 128 + i], floatToE4m3(product));
            }
          }
        }
        // Of the same row and another, two of it.
        std::vector<uint8_t> other = cast;
        for (size_t i = 0; i < n; i++) other[i] = static_cast<uint8_t>(random());
        const void* const three[] = {cast.data(), other.data(), cast.data()};
        std::vector<uint16_t> out(n + 1, 0xabab);
        sumCasts(n, three, 3, scaleAt, out.data());
        EXPECT_EQ(out[n], 0xabab);
        for (size_t i = 0; i < n; i++) {
          float sum = 0;
          for (const void* row : three) {
            const auto* bytes = static_cast<const uint8_t*>(row);
            float scale = 0;
            memcpy(&scale, bytes + scaleAt + i / 128 * 4, sizeof(scale));
            const volatile float product = e4m3ToFloat(bytes[i]) * scale;
            sum += product;
          }
          if (std::isnan(sum)) {
            EXPECT_TRUE(std::isnan(bf16ToFloat(out[i])));
          } else {
            ASSERT_EQ(out[i], floatToBf16(sum)) << "n " << n << " at " << i;
          }
        }
      }
    }
  }
}

// What docs/performance.md says of sums that travel as FP8, or as BF16: the error's root mean square over the values',
// normally distributed.
TEST(RowMath, ErrorOfTheCastIsAsDocumented) {
  constexpr int kHidden = 7168, kRows = 20;
  std::mt19937 random(13);
  std::normal_distribution<float> normal;
  double squares = 0, ofFp8 = 0, ofBf16 = 0;
  for (int row = 0; row < kRows; row++) {
    std::vector<float> values(kHidden);
    std::vector<uint16_t> x(kHidden);
    for (int i = 0; i < kHidden; i++) x[i] = floatToBf16(values[i] = normal(random));
    std::vector<uint8_t> out(kHidden), scales(NCCL_MOE_QUANT_SCALE_BYTES(ncclMoeQuantFp8, kHidden));
    castRow(ncclMoeQuantFp8, x.data(), kHidden, out.data(), scales.data());
    for (int i = 0; i < kHidden; i++) {
      float scale = 0;
      memcpy(&scale, &scales[i / 128 * 4], sizeof(scale));
      squares += std::pow(values[i], 2);
      ofFp8 += std::pow(e4m3ToFloat(out[i]) * scale - values[i], 2);
      ofBf16 += std::pow(bf16ToFloat(x[i]) - values[i], 2);
    }
  }
  EXPECT_NEAR(std::sqrt(ofFp8 / squares), 0.026, 0.001);
  EXPECT_NEAR(std::sqrt(ofBf16 / squares), 0.0017, 0.0001);
}

TEST(RowMath, CopiesRowsEitherWay) {
  alignas(16) uint8_t from[256], to[272];
  for (int i = 0; i < 256; i++) from[i] = static_cast<uint8_t>(i * 5 + 1);
  for (const bool streaming : {false, true}) {
    memset(to, 0, sizeof(to));
    copyRow(to, from, sizeof(from), streaming);
    streamFence();
    EXPECT_EQ(memcmp(to, from, sizeof(from)), 0);
    EXPECT_EQ(to[256], 0);
  }
}

} // namespace
