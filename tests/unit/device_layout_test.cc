// The part of the CUDA backend's layout that needs no GPU.
#include "device/latency_layout.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "comm/comm.h"
#ifndef NCCL_MOE_NO_CUDA
#include "device/latency.h"
#endif

namespace moe {
namespace {

TEST(DeviceLayout, EpochsAreNeverZeroAndAlternate) {
  uint32_t epoch = 0; // before the first call
  for (const uint32_t from : {0u, 0x7ffffffdu, 0xfffffffcu}) {
    epoch = from;
    for (int call = 0; call < 8; call++) {
      const uint32_t next = nextEpoch(epoch);
      EXPECT_NE(next, 0u) << "after " << epoch;
      EXPECT_EQ(next % 2, 1 - epoch % 2) << "after " << epoch;
      EXPECT_NE(next, epoch);
      epoch = next;
    }
  }
}

TEST(DeviceLayout, TagsOfLatencyCallsAreNeverZero) {
  for (const uint64_t from : {uint64_t{0}, uint64_t{0xfffffff8}, uint64_t{0x1fffffff8}, uint64_t{0xfffffffffffffff0}}) {
    for (uint64_t n = from; n != from + 15; n++) EXPECT_EQ(tagOf(n), n % 0xffffffffu + 1) << "of " << n;
  }
}

// What a latency routing keeps does not overlap, and everything a kernel names lies in its own part.
TEST(DeviceLayout, PartsOfALatencyRoutingAreApart) {
  for (const int ranks : {1, 3, 64}) {
    for (const int tokens : {1, 31, 128}) {
      for (const int k : {1, 8, 13, 32}) {
        for (const size_t rowBytes : {size_t{16}, size_t{1040}, size_t{14336}}) {
          const size_t scaleBytes = scaleRoom(rowBytes);
          const LatencyLayout layout(ranks, tokens, k, rowBytes, scaleBytes);
          const int lastPlane = layout.nPlanes - 1;
          EXPECT_GE(layout.nPlanes, std::max(ranks, k));
          EXPECT_GE(layout.pickPackets * kPicksPerPacket, k);
          EXPECT_GE(static_cast<size_t>(layout.maxSegments) * kSegmentPackets * kPacketBytes, rowBytes);
          // Behind the segments and their extras: the caller's scales, then weights.
          EXPECT_GE(layout.recordBytes, kPacketBytes * static_cast<size_t>(layout.aux()) +
                                          (scaleBytes + kPacketBytes - 1) / kPacketBytes * kPacketBytes + 4u * k);
          EXPECT_LT(layout.extrasOf(layout.maxSegments - 1) + kSegmentExtras - 1, layout.aux());
          EXPECT_LE(layout.header(1, ranks - 1) + kPacketBytes, layout.picks);
          EXPECT_LE(layout.pick(1, ranks - 1, tokens - 1) + size_t{kPacketBytes} * layout.pickPackets, layout.literals);
          EXPECT_LE(layout.literal(1, lastPlane, tokens - 1, layout.maxSegments) + sizeof(uint32_t), layout.records);
          EXPECT_LE(layout.record(1, lastPlane, tokens - 1) + layout.recordBytes, layout.map);
          EXPECT_LE(layout.map + sizeof(int) * ranks * tokens * k, layout.claims);
          EXPECT_LE(layout.claims + sizeof(uint32_t) * kMaxLatencyBlocks * kMaxLatencyWarps, layout.state);
          EXPECT_LE(layout.state + sizeof(LatencyState), layout.bytes);
          for (const size_t part : {layout.picks, layout.literals, layout.records, layout.recordBytes, layout.map,
                                    layout.claims, layout.state}) {
            EXPECT_EQ(part % 128, 0u);
          }
        }
      }
    }
  }
}

// What the host says that latency mode takes is the header's formula, and what its kernel takes.
TEST(DeviceLayout, ListsOfALatencyRouting) {
  for (const int ranks : {1, 3, 64}) {
    for (const int tokens : {0, 1, 32, 33, 4096}) {
      for (const int local : {1, 4, 63}) {
        CommConfig config;
        config.nLocal.assign(ranks, local - 1);
        config.nLocal[ranks / 2] = local;
        config.nExperts = ranks * (local - 1) + 1;
        const int words = (tokens + 31) / 32;
        const int formula = (local + 1) * (ranks * (words + 1) + 1) + config.nExperts + 6 * ranks;
        EXPECT_EQ(latencyListBytes(config, ranks, tokens), size_t{4} * formula);
        config.mode = ncclMoeModeLatency;
        EXPECT_EQ(servedByLatency(config, ranks, tokens), formula <= 24576);
#ifndef NCCL_MOE_NO_CUDA
        EXPECT_EQ(latencyShared(LatencyLayout(ranks, tokens, 8, 64, 256), config.nExperts, local), size_t{4} * formula);
#endif
      }
    }
  }
}

// The figures of docs/performance.md, in whole pages of 2 MiB.
TEST(DeviceLayout, MemoryOfALatencyRouting) {
  const auto mib = [](int tokens) {
    constexpr size_t page = size_t{2} << 20;
    return (LatencyLayout(4, tokens, 8, 14336, scaleRoom(14336)).bytes + page - 1) / page * 2;
  };
  EXPECT_EQ(mib(128), 32u);
  EXPECT_EQ(mib(512), 124u);
}

// The pieces of a row cover it, whatever its size: each vector is in one of them.
TEST(DeviceLayout, PiecesCoverARow) {
  for (int nVec = 1; nVec <= 1200; nVec++) {
    const RowPieces pieces(nVec);
    ASSERT_GE(pieces.n, 1);
    ASSERT_LE(pieces.n, kMaxPieces);
    ASSERT_GE(pieces.n * pieces.nVec, nVec) << "of " << nVec;
    ASSERT_EQ(pieces.nVec % 32, 0);
    EXPECT_EQ(pieces.n, std::max(1, std::min(kMaxPieces, nVec / 64))) << "of " << nVec;
  }
}

} // namespace
} // namespace moe
