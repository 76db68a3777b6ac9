// Every layout with every cast, once each, in either mode: few enough calls for compute-sanitizer (tests/gpu/sanitize).
#include <gtest/gtest.h>

#include "gpu/latency_case.h"

namespace moe::test {
namespace {

constexpr int kRanks = 3, kTokens = 20;

DecodeShape shapeOf(ncclMoeMode_t mode, ncclMoeLayout_t layout, ncclMoeQuant_t quant) {
  const bool rankMajor = layout == ncclMoeLayoutRankMajor, cast = quant != ncclMoeQuantNone;
  DecodeShape s;
  s.nRanks = kRanks;
  s.nTokens = kTokens;
  // Not a whole number of the blocks that share a scale, nor of a latency packet's segments.  In throughput mode rows
  // of three pieces, the last of them shorter.
  s.hidden = mode == ncclMoeModeThroughput ? 2032 : 688;
  s.layout = layout;
  if (layout == ncclMoeLayoutExpertMajor) s.alignment = 8;
  s.quant = quant;
  if (!cast) s.scaleBytes = 16;
  if (quant == ncclMoeQuantFp8Ue8m0) s.scaleLayout = ncclMoeScaleColumnMajor;
  s.combineCast = cast && mode == ncclMoeModeLatency;
  s.exact = !cast && !rankMajor;
  s.weighted = !rankMajor;
  s.withGrads = true;
  return s;
}

void everyLayoutAndCast(ncclMoeMode_t mode) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  DecodeShape most;
  most.nRanks = kRanks;
  most.nTokens = kTokens;
  DecodeRun run;
  run.nRanks = kRanks;
  run.mode = mode;
  const std::string wrong = runDecode(most.world(), run, [&](GpuRank& rank, Meeting&) -> std::string {
    for (const ncclMoeLayout_t layout : {ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded}) {
      for (const ncclMoeQuant_t quant : {ncclMoeQuantNone, ncclMoeQuantFp8, ncclMoeQuantFp8Ue8m0}) {
        const DecodeShape shape = shapeOf(mode, layout, quant);
        ncclMoeRouting_t routing = nullptr;
        const ncclMoeRoutingConfig_t config = shape.routing();
        RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
        for (uint64_t call = 0; call < 3; call++) {
          const DecodeCase e = makeDecode(seed + call, shape);
          const std::string bad = exchangeOnce(rank, routing, e);
          if (!bad.empty()) return bad + " in " + describe(e.reference->problem()) + ", " + describe(e.combine);
        }
        RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
      }
    }
    return "";
  });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

TEST(GpuLayouts, ThroughputMode) { everyLayoutAndCast(ncclMoeModeThroughput); }
TEST(GpuLayouts, LatencyMode) { everyLayoutAndCast(ncclMoeModeLatency); }

} // namespace
} // namespace moe::test
