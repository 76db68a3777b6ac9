// The checker must see every kind of fault; and the conversions that it relies on must be right.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "perf/moe/checker.h"
#include "perf/moe/numeric.h"
#include "perf/moe/perf_error.h"

namespace moe::perf {
namespace {

TEST(PerfNumeric, HalfAndE4m3RoundToTheNearest) {
  for (uint32_t v = 0; v < 0x7c00; v++) {
    const float f = halfToFloat(static_cast<uint16_t>(v));
    EXPECT_EQ(floatToHalf(f), v);
    EXPECT_EQ(floatToHalf(-f), v | 0x8000);
    if (v + 1 == 0x7c00) break;
    const float middle = (f + halfToFloat(static_cast<uint16_t>(v + 1))) / 2;
    EXPECT_EQ(floatToHalf(middle), v + (v & 1)); // ties to even
    EXPECT_EQ(floatToHalf(std::nextafter(middle, 1e9f)), v + 1);
    EXPECT_EQ(floatToHalf(std::nextafter(middle, 0.0f)), v);
  }
  for (uint32_t v = 0; v < 0x7e; v++) {
    const float f = e4m3ToFloat(static_cast<uint8_t>(v));
    EXPECT_EQ(floatToE4m3(f), v);
    EXPECT_EQ(floatToE4m3(-f), v | 0x80);
    const float middle = (f + e4m3ToFloat(static_cast<uint8_t>(v + 1))) / 2;
    EXPECT_EQ(floatToE4m3(middle), v + (v & 1));
    EXPECT_EQ(floatToE4m3(std::nextafter(middle, 1e9f)), v + 1);
  }
  EXPECT_EQ(floatToE4m3(1e30f), 0x7e);
  EXPECT_EQ(e4m3ToFloat(0x7e), 448.0f);
  EXPECT_EQ(e4m3ToFloat(0x38), 1.0f);
  EXPECT_EQ(halfToFloat(0x3c00), 1.0f);
  EXPECT_EQ(floatToHalf(1e6f), 0x7c00);
}

TEST(PerfNumeric, QuantizesByTheLargestOfEachBlock) {
  std::vector<uint16_t> row(130, floatToBf16(1.0f));
  row[5] = floatToBf16(-2.0f);
  row[128] = floatToBf16(448.0f * 3);
  row[129] = 0;
  uint8_t q[130];
  float scales[2];
  quantizeRow(ncclMoeQuantFp8, row.data(), 130, q, reinterpret_cast<uint8_t*>(scales));
  EXPECT_EQ(scales[0], 2.0f / 448.0f);
  EXPECT_EQ(scales[1], 3.0f);
  EXPECT_EQ(e4m3ToFloat(q[5]), -448.0f);
  EXPECT_EQ(e4m3ToFloat(q[0]), 224.0f);
  EXPECT_EQ(e4m3ToFloat(q[128]), 448.0f);
  uint8_t exponents[4];
  quantizeRow(ncclMoeQuantFp8Ue8m0, row.data(), 130, q, exponents);
  EXPECT_EQ(exponents[0], 127 - 7); // 2/448 lies between 2^-8 and 2^-7
  EXPECT_EQ(exponents[1], 127 + 2);
  EXPECT_EQ(exponents[2], 0);
  EXPECT_EQ(e4m3ToFloat(q[5]), -256.0f);
  row[128] = floatToBf16(448.0f * 4); // exactly a power of two: not rounded up
  quantizeRow(ncclMoeQuantFp8Ue8m0, row.data(), 130, q, exponents);
  EXPECT_EQ(exponents[1], 127 + 2);
}

// Rank 1 of 3 in host memory, with outputs as a correct library would leave them.
class Checker : public testing::TestWithParam<std::tuple<ncclMoeLayout_t, ncclMoeQuant_t, ncclMoeScaleLayout_t, int>> {
 protected:
  void SetUp() override {
    ASSERT_EQ(makeGroupMemory(1, &memory_), ncclSuccess);
    group_ = makeSharedGroup(memory_.get(), 0, 1, 1000);
    ASSERT_EQ(makeHostDevice(*group_, "", &device_), ncclSuccess);
    Options o;
    o.hidden = 256;
    o.experts = 7;
    o.topK = 3;
    o.layout = std::get<0>(GetParam());
    o.quant = std::get<1>(GetParam());
    o.scaleLayout = std::get<2>(GetParam());
    o.routingTokens = std::get<3>(GetParam());
    o.align = o.layout == ncclMoeLayoutExpertMajor ? 8 : 1;
    o.weightsInside = o.layout != ncclMoeLayoutRankMajor;
    ASSERT_EQ(makeRoutingSource(o, 3, &source_), ncclSuccess);
    shape_ = shapeOf(o, 3, 12);
    routing_ = std::make_unique<Routing>(shape_, *source_);
    delivery_ = deliveryOf(shape_, *routing_, 1);
    slots_ = (slotsOf(shape_, *routing_, 1) + 7) / 4 * 4;
    if (o.layout == ncclMoeLayoutExpertPadded) slots_ = slotsOf(shape_, *routing_, 1);
    const auto take = [&](void** p, size_t bytes) { ASSERT_EQ(device_->alloc(p, bytes + guardBytes), ncclSuccess); };
    take(&b_.recvX, slots_ * shape_.recvRowBytes());
    if (shape_.scaleBytes > 0) take(&b_.recvScales, slots_ * shape_.scaleBytes);
    if (o.layout == ncclMoeLayoutRankMajor) take(&b_.recvTopkIdx, slots_ * 12);
    take(&b_.recvWeights, slots_ * 12);
    take(&b_.recvCount, 4);
    take(&b_.expertCounts, 64);
    if (o.layout == ncclMoeLayoutExpertMajor) take(&b_.expertOffsets, 64);
    take(&b_.out, 12 * shape_.combineRowBytes());
    ASSERT_EQ(poisonDispatch(*device_, b_, aCase()), ncclSuccess);
    ASSERT_EQ(poisonCombine(*device_, b_, aCase()), ncclSuccess);
    deliver();
  }

  Case aCase() const { return Case{shape_, *routing_, delivery_, 1, slots_}; }

  void deliver() {
    const bool rankMajor = shape_.layout == ncclMoeLayoutRankMajor;
    std::vector<uint8_t> scales(shape_.scaleBytes);
    for (size_t slot = 0; slot < delivery_.rowAt.size(); slot++) {
      if (delivery_.rowAt[slot] < 0) continue;
      const DeliveredRow& d = delivery_.rows[delivery_.rowAt[slot]];
      receivedRow(shape_, d.source, d.token, static_cast<uint8_t*>(b_.recvX) + slot * shape_.recvRowBytes(),
                  scales.data());
      for (int w = 0; w < shape_.scaleBytes / 4; w++) memcpy(scaleWord(slot, w), &scales[w * 4], 4);
      const int* idx = routing_->of(d.source, d.token);
      for (int k = 0; k < 3; k++) { // 7 experts over 3 ranks: rank 1 has 3 and 4
        const bool here = idx[k] == 3 || idx[k] == 4;
        const float weight = tokenWeight(shape_, d.source, d.token, k);
        if (rankMajor) {
          static_cast<int*>(b_.recvTopkIdx)[slot * 3 + k] = here ? idx[k] - 3 : -1;
          static_cast<float*>(b_.recvWeights)[slot * 3 + k] = here ? weight : 0.0f;
        } else if (k == d.k) {
          static_cast<float*>(b_.recvWeights)[slot] = weight;
        }
      }
    }
    *static_cast<int*>(b_.recvCount) = static_cast<int>(delivery_.nRows);
    memcpy(b_.expertCounts, delivery_.counts.data(), delivery_.counts.size() * 4);
    if (b_.expertOffsets != nullptr) memcpy(b_.expertOffsets, delivery_.offsets.data(), delivery_.offsets.size() * 4);
    for (int t = 0; t < 12; t++)
      combinedRow(shape_, *routing_, 1, t, static_cast<uint8_t*>(b_.out) + t * shape_.combineRowBytes());
  }

  uint8_t* scaleWord(size_t slot, int word) const {
    auto* base = static_cast<uint8_t*>(b_.recvScales);
    const size_t words = shape_.scaleBytes / 4;
    if (shape_.scaleLayout == ncclMoeScaleRowMajor) return base + (slot * words + word) * 4;
    const size_t ld = shape_.layout == ncclMoeLayoutExpertPadded ? 3 * shape_.maxTokens : slots_;
    return base + ((slot / ld * words + word) * ld + slot % ld) * 4;
  }

  int64_t wrongDispatch() {
    int64_t wrong = 0;
    EXPECT_EQ(checkDispatch(*device_, b_, aCase(), &wrong), ncclSuccess);
    return wrong;
  }
  int64_t wrongCombine() {
    int64_t wrong = 0;
    EXPECT_EQ(checkCombine(*device_, b_, aCase(), &wrong), ncclSuccess);
    return wrong;
  }

  // Changes one byte for the time of a check.
  int64_t withFault(void* tensor, size_t at) {
    uint8_t* byte = static_cast<uint8_t*>(tensor) + at;
    *byte ^= 1;
    const int64_t wrong = wrongDispatch();
    *byte ^= 1;
    return wrong;
  }

  GroupMemoryPtr memory_;
  std::unique_ptr<Group> group_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<RoutingSource> source_;
  Shape shape_;
  std::unique_ptr<Routing> routing_;
  Delivery delivery_;
  int64_t slots_ = 0;
  Buffers b_;
};

TEST_P(Checker, FindsNothingWhereAllIsRightAndEveryFaultElsewhere) {
  ASSERT_EQ(wrongDispatch(), 0);
  ASSERT_EQ(wrongCombine(), 0);
  const size_t rowBytes = shape_.recvRowBytes();
  EXPECT_EQ(withFault(b_.recvX, 0), 1) << "first element";
  for (size_t slot = 0; slot < static_cast<size_t>(slots_); slot++) // delivered rows and those that must not be touched
    EXPECT_EQ(withFault(b_.recvX, slot * rowBytes + 7), 1) << slot;
  EXPECT_EQ(withFault(b_.recvX, slots_ * rowBytes), 1) << "behind the end";
  EXPECT_EQ(withFault(b_.recvWeights, 0), 1);
  EXPECT_EQ(withFault(b_.recvCount, 0), 1);
  EXPECT_EQ(withFault(b_.recvCount, 4), 1);
  EXPECT_EQ(withFault(b_.expertCounts, 4), 1);
  EXPECT_EQ(withFault(b_.expertCounts, 8), 1) << "one expert too many";
  if (b_.recvTopkIdx != nullptr) {
    EXPECT_EQ(withFault(b_.recvTopkIdx, 5), 1);
  }
  if (b_.expertOffsets != nullptr) {
    EXPECT_EQ(withFault(b_.expertOffsets, 8), 1);
  }
  if (b_.recvScales != nullptr) {
    EXPECT_EQ(withFault(b_.recvScales, 4), 1);
  }
  if (b_.recvScales != nullptr) {
    EXPECT_EQ(withFault(b_.recvScales, slots_ * shape_.scaleBytes), 1);
  }
  auto* out = static_cast<uint8_t*>(b_.out);
  out[11 * shape_.combineRowBytes() + 3] ^= 1;
  EXPECT_EQ(wrongCombine(), 1);
  out[11 * shape_.combineRowBytes() + 3] ^= 1;
  out[12 * shape_.combineRowBytes()] ^= 1;
  EXPECT_EQ(wrongCombine(), 1);
}

INSTANTIATE_TEST_SUITE_P(Layouts, Checker,
                         testing::Combine(testing::Values(ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor,
                                                          ncclMoeLayoutExpertPadded),
                                          testing::Values(ncclMoeQuantNone, ncclMoeQuantFp8),
                                          testing::Values(ncclMoeScaleRowMajor, ncclMoeScaleColumnMajor),
                                          testing::Values(0, 20))); // that the routing is made for; 0: 12

// Three ranks, FP32, two selections on one rank and one on another: 1 + (2 + 4) in the order of ranks.
TEST(PerfReference, CombinesInTheDocumentedOrder) {
  struct Fixed : RoutingSource {
    void select(int, int, int* idx) const override {
      idx[0] = 5;
      idx[1] = 0;
      idx[2] = 4;
    }
  };
  Options o;
  o.hidden = 64;
  o.experts = 6;
  o.topK = 3;
  o.type = ncclBfloat16;
  o.layout = ncclMoeLayoutExpertMajor;
  o.weightsInside = true;
  Shape s = shapeOf(o, 3, 1);
  const Routing routing(s, Fixed());
  std::vector<uint16_t> rows[3];
  float w[3];
  for (int k = 0; k < 3; k++) {
    rows[k].resize(64);
    expertRow(s, k == 1 ? 0 : 2, DeliveredRow{1, 0, k}, rows[k].data());
    w[k] = tokenWeight(s, 1, 0, k);
  }
  std::vector<uint16_t> out(64);
  combinedRow(s, routing, 1, 0, out.data());
  s.exact = true;
  std::vector<uint16_t> exact(64);
  combinedRow(s, routing, 1, 0, exact.data());
  int differ = 0;
  for (int h = 0; h < 64; h++) {
    const float v0 = bf16ToFloat(rows[0][h]) * w[0];
    const float v1 = bf16ToFloat(rows[1][h]) * w[1];
    const float v2 = bf16ToFloat(rows[2][h]) * w[2];
    const float onTwo = bf16ToFloat(floatToBf16(v0 + v2));
    EXPECT_EQ(out[h], floatToBf16(bf16ToFloat(floatToBf16(v1)) + onTwo));
    EXPECT_EQ(exact[h], floatToBf16((v0 + v1) + v2));
    differ += out[h] != exact[h] ? 1 : 0;
  }
  EXPECT_GT(differ, 0); // the two orders can be told apart
}

} // namespace
} // namespace moe::perf
