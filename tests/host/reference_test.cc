// The reference itself, by examples worked out by hand, so that the judge is judged too.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "common/cases.h"
#include "common/reference.h"

namespace moe::test {
namespace {

uint16_t half(ncclDataType_t type, double value) {
  uint16_t bits;
  storeElement(type, value, &bits);
  return bits;
}

TEST(Reference, RoundsToNearestEven) {
  EXPECT_EQ(half(ncclBfloat16, 1.0), 0x3f80);
  EXPECT_EQ(half(ncclBfloat16, 1.0 + 1.0 / 256), 0x3f80); // half way, to even
  EXPECT_EQ(half(ncclBfloat16, 1.0 + 3.0 / 256), 0x3f82); // half way, to even
  EXPECT_EQ(half(ncclBfloat16, 1.0 + 1.0001 / 256), 0x3f81);
  EXPECT_EQ(half(ncclBfloat16, -0.0), 0x8000);
  EXPECT_EQ(half(ncclBfloat16, 3.4e38), 0x7f80);
  EXPECT_EQ(half(ncclBfloat16, std::ldexp(1, -133)), 0x0001);
  EXPECT_EQ(half(ncclBfloat16, std::ldexp(1, -134)), 0x0000); // half way, to even
  EXPECT_EQ(half(ncclFloat16, 65504), 0x7bff);
  EXPECT_EQ(half(ncclFloat16, 65519.9), 0x7bff);
  EXPECT_EQ(half(ncclFloat16, 65520), 0x7c00);
  EXPECT_EQ(half(ncclFloat16, std::ldexp(1, -24)), 0x0001);
  EXPECT_EQ(half(ncclFloat16, std::ldexp(3, -26)), 0x0001);
  EXPECT_EQ(half(ncclFloat16, -1.5), 0xbe00);
  for (uint32_t i = 0; i < 2000; i++) {
    const float value =
      std::ldexp(1.0f + static_cast<float>(i * 4099 % 8388608) / 8388608.0f, static_cast<int>(i % 250) - 140);
    float stored;
    storeElement(ncclFloat32, value, &stored);
    EXPECT_EQ(memcmp(&stored, &value, 4), 0) << value;
  }
}

TEST(Reference, E4m3) {
  EXPECT_EQ(e4m3Value(0x7e), 448);
  EXPECT_EQ(e4m3Value(0x01), std::ldexp(1, -9));
  EXPECT_EQ(e4m3Value(0x38), 1);
  EXPECT_TRUE(std::isnan(e4m3Value(0xff)));
  EXPECT_EQ(nearestE4m3(1), 0x38);
  EXPECT_EQ(nearestE4m3(1e9), 0x7e);
  EXPECT_EQ(nearestE4m3(-INFINITY), 0xfe);
  EXPECT_EQ(nearestE4m3(-0.0), 0x80);
  EXPECT_EQ(nearestE4m3(std::ldexp(1, -10)), 0x00); // half of the smallest, to even
  EXPECT_EQ(nearestE4m3(1.0625), 0x38);             // half way between 1 and 1.125
  EXPECT_EQ(nearestE4m3(1.1875), 0x3a);
  EXPECT_EQ(nearestE4m3(NAN) & 0x7f, 0x7f);
  for (int code = 0; code < 256; code++) {
    if ((code & 0x7f) != 0x7f) {
      EXPECT_EQ(nearestE4m3(e4m3Value(static_cast<uint8_t>(code))), code);
    }
  }
}

// Two ranks, three experts (0 and 1 on rank 0, 2 on rank 1), K 2.
DispatchProblem example(ncclMoeLayout_t layout) {
  DispatchProblem p;
  p.nRanks = 2;
  p.nExperts = 3;
  p.topK = 2;
  p.hidden = 4;
  p.maxTokens = 2;
  p.type = ncclFloat32;
  p.layout = layout;
  p.weighted = true;
  p.expertToRank = blockPlacement(3, 2);
  p.sources.resize(2);
  p.sources[0].nTokens = 2;
  p.sources[0].topkIdx = {1, 0, 2, -1};
  p.sources[0].topkWeights = {10, 11, 12, 13};
  p.sources[1].nTokens = 1;
  p.sources[1].topkIdx = {2, 1};
  p.sources[1].topkWeights = {20, 21};
  float value = 1;
  for (Source& source : p.sources) {
    source.x.resize(static_cast<size_t>(source.nTokens) * 16);
    for (size_t i = 0; i < source.x.size(); i += 4) storeElement(ncclFloat32, value++, &source.x[i]);
  }
  return p;
}

DispatchImage emptyImage(const Reference& reference, int rank, int64_t rows, size_t weightsPerRow) {
  const DispatchProblem& p = reference.problem();
  DispatchImage image;
  image.x.assign(static_cast<size_t>(rows) * p.rowBytes(), 0);
  image.weights.assign(static_cast<size_t>(rows) * weightsPerRow, -1.0f);
  image.count = {-5};
  image.expertCounts.assign(static_cast<size_t>(reference.delivery(rank).nLocal), -5);
  return image;
}

float first(const DispatchImage& image, size_t row) { return loadElement(ncclFloat32, &image.x[row * 16]); }

TEST(Reference, RankMajor) {
  const Reference reference(example(ncclMoeLayoutRankMajor));
  DispatchImage image = emptyImage(reference, 0, 2, 2);
  image.topkIdx.assign(4, -9);
  reference.dispatch(0, 2, &image);
  EXPECT_EQ(image.count, std::vector<int>({2}));
  EXPECT_EQ(image.expertCounts, std::vector<int>({1, 2}));
  EXPECT_EQ(image.topkIdx, std::vector<int>({1, 0, -1, 1}));
  EXPECT_EQ(image.weights, std::vector<float>({10, 11, 0, 21}));
  EXPECT_EQ(first(image, 0), 1);
  EXPECT_EQ(first(image, 1), 9);
  image = emptyImage(reference, 1, 2, 2);
  image.topkIdx.assign(4, -9);
  reference.dispatch(1, 2, &image);
  EXPECT_EQ(image.topkIdx, std::vector<int>({0, -1, 0, -1}));
  EXPECT_EQ(first(image, 0), 5);
  EXPECT_EQ(first(image, 1), 9);
}

TEST(Reference, ExpertMajorAligned) {
  DispatchProblem p = example(ncclMoeLayoutExpertMajor);
  p.expertAlignment = 2;
  const Reference reference(p);
  DispatchImage image = emptyImage(reference, 0, 4, 1);
  image.expertOffsets = {-1, -1, -1};
  reference.dispatch(0, 4, &image);
  EXPECT_EQ(image.count, std::vector<int>({4}));
  EXPECT_EQ(image.expertCounts, std::vector<int>({1, 2}));
  EXPECT_EQ(image.expertOffsets, std::vector<int>({0, 2, 4}));
  EXPECT_EQ(image.weights, std::vector<float>({11, -1, 10, 21}));
  EXPECT_EQ(first(image, 0), 1);
  EXPECT_EQ(first(image, 1), 0);
  EXPECT_EQ(first(image, 2), 1);
  EXPECT_EQ(first(image, 3), 9);
}

TEST(Reference, ExpertPadded) {
  const Reference reference(example(ncclMoeLayoutExpertPadded));
  EXPECT_EQ(reference.rowsNeeded(0), 8);
  DispatchImage image = emptyImage(reference, 0, 8, 1);
  reference.dispatch(0, 0, &image);
  EXPECT_EQ(image.expertCounts, std::vector<int>({1, 2}));
  EXPECT_EQ(image.weights, std::vector<float>({11, -1, -1, -1, 10, 21, -1, -1}));
}

TEST(Reference, Combine) {
  const Reference reference(example(ncclMoeLayoutExpertMajor));
  CombineProblem c;
  c.type = ncclBfloat16;
  c.hidden = 1;
  c.weighted = true;
  c.withGradWeights = true;
  // Rank 0: rows (expert 0: token 0), (expert 1: token 0), (expert 1: rank 1's token); rank 1: two rows of expert 2.
  const auto rows = [](std::vector<double> values) {
    std::vector<uint8_t> bytes(values.size() * 2);
    for (size_t i = 0; i < values.size(); i++) storeElement(ncclBfloat16, values[i], &bytes[2 * i]);
    return bytes;
  };
  c.x = {rows({1, 256, 3}), rows({5, 7})};
  c.weights = {{1, 1, 2}, {1, 0.5}};
  c.gradWeights = {{100, 101, 102}, {103, 104}};
  CombineImage image;
  image.out.resize(4);
  image.gradTopkWeights.resize(4);
  expectCombine(reference, c, 0, &image);
  EXPECT_EQ(loadElement(ncclBfloat16, &image.out[0]), 256.0f); // 257 is half way and rounds to even
  EXPECT_EQ(loadElement(ncclBfloat16, &image.out[2]), 5.0f);
  EXPECT_EQ(image.gradTopkWeights, std::vector<float>({101, 100, 103, 0}));
  EXPECT_EQ(compareCombine(reference, c, 0, image, image), "");
  storeElement(ncclBfloat16, 6, &image.out[2]);
  EXPECT_NE(compareCombine(reference, c, 0, image, image), ""); // the sum in FP64 disagrees
  image.out.resize(2);
  image.gradTopkWeights.resize(2);
  expectCombine(reference, c, 1, &image);
  EXPECT_EQ(loadElement(ncclBfloat16, &image.out[0]), 9.5f);
  EXPECT_EQ(image.gradTopkWeights, std::vector<float>({104, 102}));
}

TEST(Reference, DefaultRoundsPerRankAndExactOnce) {
  // Three experts of rank 0 and one of rank 1: 256 + 1 + 1 on rank 0 is 258 in FP32; with -1.0 from rank 1.
  DispatchProblem p;
  p.nRanks = 2;
  p.nExperts = 3;
  p.topK = 3;
  p.hidden = 8;
  p.maxTokens = 1;
  p.layout = ncclMoeLayoutExpertMajor;
  p.expertToRank = {0, 0, 1};
  p.sources.resize(2);
  p.sources[0].nTokens = 1;
  p.sources[0].topkIdx = {0, 1, 2};
  p.sources[0].x.resize(16);
  const Reference reference(p);
  CombineProblem c;
  c.hidden = 1;
  c.x.resize(2);
  c.x[0].resize(4);
  c.x[1].resize(2);
  storeElement(ncclBfloat16, 256, &c.x[0][0]);
  storeElement(ncclBfloat16, 1, &c.x[0][2]);
  storeElement(ncclBfloat16, 1, &c.x[1][0]);
  CombineImage image;
  image.out.resize(2);
  expectCombine(reference, c, 0, &image);
  EXPECT_EQ(loadElement(ncclBfloat16, &image.out[0]), 256.0f); // 257 -> 256, 257 -> 256
  c.exact = true;
  expectCombine(reference, c, 0, &image);
  EXPECT_EQ(loadElement(ncclBfloat16, &image.out[0]), 258.0f);
}

TEST(Reference, Cast) {
  DispatchProblem p;
  p.hidden = 144; // a whole block and a short one
  p.maxTokens = 1;
  p.expertToRank = {0};
  p.sources.resize(1);
  p.sources[0].nTokens = 1;
  p.sources[0].topkIdx = {0};
  p.sources[0].x.resize(288);
  for (size_t i = 0; i < 144; i++) storeElement(ncclBfloat16, i == 3 ? -896 : i == 130 ? 0 : 1, &p.sources[0].x[2 * i]);
  for (const bool powerOfTwo : {false, true}) {
    p.quant = powerOfTwo ? ncclMoeQuantFp8Ue8m0 : ncclMoeQuantFp8;
    const Reference reference(p);
    DispatchImage image;
    image.x.resize(144);
    image.scales.resize(static_cast<size_t>(p.wireScaleBytes()), 0xcc);
    reference.dispatch(0, 1, &image);
    EXPECT_EQ(image.x[3], 0xfe); // -448
    EXPECT_EQ(image.x[0], 0x30); // 0.5
    EXPECT_EQ(image.x[130], 0x00);
    if (powerOfTwo) {
      EXPECT_EQ(image.scales, std::vector<uint8_t>({128, 119, 0, 0})); // 2; 2^-8 >= 1/448 > 2^-9
      EXPECT_EQ(image.x[128], 0x78);                                   // 256
    } else {
      EXPECT_EQ(loadElement(ncclFloat32, &image.scales[0]), 2.0f);
      EXPECT_EQ(loadElement(ncclFloat32, &image.scales[4]), 1.0f / 448.0f);
      EXPECT_EQ(image.x[128], 0x7e);
    }
  }
}

} // namespace
} // namespace moe::test
