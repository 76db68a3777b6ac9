// Ranks that are left out of latency mode's calls and come back.
//
// Processes, for ncclMoeCommMaskRanks waits until the process's device is idle, and then for the other ranks: ranks of
// one process must not share a device there.
#include <gtest/gtest.h>

#include <signal.h>

#include <chrono>
#include <cstring>
#include <thread>
#include <tuple>

#include "gpu/exchange_case.h"
#include "gpu/latency_case.h"

namespace moe::test {
namespace {

constexpr size_t kArenaBytes = size_t{64} << 20;
constexpr int kTimeLimitMs = 60000;
constexpr int kRanks = 3, kLost = 2, kTokens = 48, kTimeoutMs = 4000;

// What an exchange has besides its layout.
enum class With { gradients, fp8Cast, ue8m0Cast, fp8Rows, fp8Sums };
constexpr const char* kWithNames[] = {"Gradients", "Fp8Cast", "Ue8m0Cast", "Fp8Rows", "Fp8Sums"};
constexpr const char* kLayoutNames[] = {"RankMajor", "ExpertMajor", "ExpertPadded"};

DecodeShape shapeOf(ncclMoeLayout_t layout, With with) {
  DecodeShape s;
  s.nRanks = kRanks;
  s.nTokens = kTokens;
  s.hidden = 688; // no whole number of the blocks that share a scale; in BF16 more than one segment of a record
  s.layout = layout;
  if (layout == ncclMoeLayoutExpertMajor) s.alignment = 16;
  s.weighted = layout != ncclMoeLayoutRankMajor;
  switch (with) {
  case With::gradients:
    s.withGrads = true;
    break;
  case With::fp8Cast:
    s.quant = ncclMoeQuantFp8;
    break;
  case With::ue8m0Cast:
    s.quant = ncclMoeQuantFp8Ue8m0, s.scaleLayout = ncclMoeScaleColumnMajor;
    break;
  case With::fp8Rows:
    s.type = ncclMoeFloat8e4m3, s.scaleBytes = 24;
    break;
  case With::fp8Sums:
    s.combineCast = s.withGrads = true;
    break;
  }
  return s;
}

// Each rank has any number of tokens.
ExchangeCase exchangeOf(uint64_t seed, const DecodeShape& shape) {
  DecodeCase drawn = makeDecode(seed, shape);
  ExchangeCase e;
  e.world = shape.world();
  e.routing = shape.routing();
  e.reference = std::move(drawn.reference);
  e.combine = std::move(drawn.combine);
  return e;
}

// The case as it is without a rank: none of its tokens, and none of the selections of its experts.
ExchangeCase without(const ExchangeCase& whole, uint64_t seed, int lost = kLost) {
  ExchangeCase rest;
  rest.world = whole.world;
  rest.routing = whole.routing;
  DispatchProblem p = whole.reference->problem();
  for (int r = 0; r < kRanks; r++) {
    Source& source = p.sources[static_cast<size_t>(r)];
    for (int64_t& expert : source.topkIdx) {
      if (expert >= 0 && whole.world.expertToRank[static_cast<size_t>(expert)] == lost) expert = -1;
    }
  }
  p.sources[static_cast<size_t>(lost)] = Source();
  rest.reference = std::make_unique<Reference>(p);
  rest.combine = whole.combine;
  Random random(seed);
  fillCombine(random, *rest.reference, false, &rest.combine);
  return rest;
}

// Selections of this rank's tokens whose experts are on the lost rank.
uint64_t selectionsOfLost(const ExchangeCase& whole, int rank, int lost) {
  uint64_t n = 0;
  for (int t = 0; t < whole.reference->problem().sources[static_cast<size_t>(rank)].nTokens; t++) {
    for (int k = 0; k < whole.routing.topK; k++) n += whole.reference->rankOf(rank, t, k) == lost ? 1 : 0;
  }
  return n;
}

std::string setIds(GpuRank& rank, const DispatchCall& dispatch, const std::vector<int64_t>& ids) {
  if (ids.empty()) return "";
  RANK_CUDA(cudaMemcpyAsync(const_cast<void*>(dispatch.args().topkIdx), ids.data(), sizeof(int64_t) * ids.size(),
                            cudaMemcpyHostToDevice, rank.stream()));
  return "";
}

// A dispatch and a combine of the case, checked.  ids: what topkIdx says instead of the case's.
std::string exchange(GpuRank& rank, ncclMoeRouting_t routing, const ExchangeCase& e, const std::vector<int64_t>* ids) {
  DispatchStyle style;
  style.slack = 64;
  CallPair calls(rank, e, style);
  RANK_TRY(calls.upload(rank, false));
  if (ids != nullptr) RANK_TRY(setIds(rank, calls.dispatch, *ids));
  RANK_TRY(calls.enqueue(rank, routing));
  RANK_TRY(asyncIs(rank, ncclSuccess));
  RANK_TRY(rank.download());
  RANK_TRY(calls.verify());
  rank.forget();
  return "";
}

// Calls that wait for the lost rank, one behind the other.  The first of one of the others, if that has tokens, names
// an expert that there is not.
std::string lostRankIsNamed(GpuRank& rank, ncclMoeRouting_t routing, const ExchangeCase& e, int lost) {
  DispatchCall dispatch(*e.reference, rank.rank(), DispatchStyle());
  CombineCall combine(*e.reference, e.combine, rank.rank(), false, 0);
  RANK_TRY(rank.upload(dispatch, false));
  RANK_TRY(rank.upload(combine, false));
  if (rank.rank() == (lost == 0 ? 1 : 0) && dispatch.args().nTokens > 0) {
    const int64_t bad = 1 << 30;
    RANK_CUDA(cudaMemcpyAsync(const_cast<void*>(dispatch.args().topkIdx), &bad, sizeof(bad), cudaMemcpyHostToDevice,
                              rank.stream()));
  }
  for (int i = 0; i < 3; i++) {
    RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
    RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
  }
  RANK_CUDA(cudaStreamSynchronize(rank.stream()));
  RANK_TRY(rank.download());
  RANK_TRY(combine.verifyUntouched());
  RANK_TRY(asyncIs(rank, ncclRemoteError, format("from rank %d", lost)));
  rank.forget();
  return "";
}

ncclMoeConfig_t latencyConfig(const ExchangeCase& e) {
  ncclMoeConfig_t config = e.world.config();
  config.mode = ncclMoeModeLatency;
  config.numSms = 8;
  config.timeoutMs = kTimeoutMs;
  return config;
}

// The ranks but one go on without it, after they have missed it in one of the shapes, and then with it again.
void othersGoOnWithout(int lost, ncclMoeLayout_t layout, With with) {
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  const ExchangeCase whole = exchangeOf(seed, shapeOf(layout, with)), rest = without(whole, seed + 1, lost);
  // To wait until a rank is missed costs kTimeoutMs: once is enough.
  const bool missed = layout == ncclMoeLayoutExpertMajor && with == With::gradients;
  const bool exactAllowed = layout != ncclMoeLayoutRankMajor && !whole.combine.cast;
  const std::string wrong =
    runGpu(kRanks, RanksAs::processes, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      GpuRank rank(r, kRanks, r % nDevices);
      const ncclMoeConfig_t config = latencyConfig(whole);
      RANK_TRY(rank.init(config, meeting, kArenaBytes));
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &whole.routing), rank.comm());
      for (int i = 0; i < 3; i++) RANK_TRY(exchange(rank, routing, whole, nullptr));
      const int all[kRanks] = {}, self[kRanks] = {r == 0, r == 1, r == 2};
      int withoutLost[kRanks] = {}, odd[kRanks] = {};
      withoutLost[lost] = 1;
      odd[lost] = -1;
      RANK_TRY(expectResult("mask of NULL", ncclMoeCommMaskRanks(rank.comm(), nullptr, 1), ncclInvalidArgument,
                            rank.comm(), "masked"));
      RANK_TRY(expectResult("mask of itself", ncclMoeCommMaskRanks(rank.comm(), self, 1), ncclInvalidArgument,
                            rank.comm(), "own"));
      if (r != lost) {
        RANK_TRY(expectResult("mask of -1", ncclMoeCommMaskRanks(rank.comm(), odd, 1), ncclInvalidArgument, rank.comm(),
                              format("masked[%d]", lost)));
        if (missed) RANK_TRY(lostRankIsNamed(rank, routing, whole, lost));
        RANK_OK(ncclMoeCommMaskRanks(rank.comm(), withoutLost, 1), rank.comm());
        std::vector<uint64_t> waitedNs(kRanks);
        ncclMoeCommStats_t waited = NCCL_MOE_COMM_STATS_INITIALIZER;
        waited.waitNs = waitedNs.data();
        RANK_OK(ncclMoeCommGetStats(rank.comm(), &waited), rank.comm());
        RANK_TRY(expectResult("an old generation", ncclMoeCommMaskRanks(rank.comm(), withoutLost, 1),
                              ncclInvalidArgument, rank.comm(), "generation"));
        ncclMoeRouting_t another = nullptr;
        RANK_TRY(expectResult("a routing while masked", ncclMoeRoutingCreate(&another, rank.comm(), &whole.routing),
                              ncclInvalidUsage, rank.comm(), "masked"));
        CombineCall early(*whole.reference, whole.combine, r, false, 0);
        RANK_TRY(rank.upload(early, false));
        RANK_TRY(expectResult("combine of what was given up",
                              ncclMoeCombine(&early.args(), routing, rank.comm(), rank.stream()), ncclInvalidUsage,
                              rank.comm(), "no dispatch"));
        rank.forget();
        const std::vector<int64_t>& ids = whole.reference->problem().sources[static_cast<size_t>(r)].topkIdx;
        for (int i = 0; i < 3; i++) RANK_TRY(exchange(rank, routing, rest, &ids));
        DispatchStyle half;
        half.flags = NCCL_MOE_SEND_ONLY;
        half.slack = 64;
        DispatchCall sent(*rest.reference, r, half); // given up by the next ncclMoeCommMaskRanks
        RANK_TRY(rank.upload(sent, false));
        RANK_OK(ncclMoeDispatch(&sent.args(), routing, rank.comm(), rank.stream()), rank.comm());
        int64_t nRows = 0;
        RANK_TRY(expectResult("counts between the halves",
                              ncclMoeRoutingGetCounts(routing, rank.comm(), &nRows, nullptr), ncclInvalidUsage,
                              rank.comm(), "ncclMoeComplete"));
        RANK_CUDA(cudaStreamSynchronize(rank.stream()));
        rank.forget();
        RANK_OK(ncclMoeCommMaskRanks(rank.comm(), withoutLost, 2), rank.comm());
        RANK_TRY(exchange(rank, routing, rest, &ids));
        if (exactAllowed) {
          CombineCall exact(*rest.reference, rest.combine, r, false, NCCL_MOE_EXACT);
          RANK_TRY(rank.upload(exact, false));
          RANK_TRY(expectResult("EXACT while masked",
                                ncclMoeCombine(&exact.args(), routing, rank.comm(), rank.stream()), ncclInvalidUsage,
                                rank.comm(), "masked"));
          rank.forget();
        }
        ncclMoeCommStats_t stats = NCCL_MOE_COMM_STATS_INITIALIZER;
        std::vector<uint64_t> waitNs(kRanks), expertTokens(static_cast<size_t>(whole.world.nExperts / kRanks));
        stats.waitNs = waitNs.data();
        stats.expertTokens = expertTokens.data();
        RANK_OK(ncclMoeCommGetStats(rank.comm(), &stats), rank.comm());
        const uint64_t leftOut = 4 * selectionsOfLost(whole, r, lost);
        RANK_CHECK(stats.leftOut == leftOut, "left out %llu selections instead of %llu",
                   (unsigned long long)stats.leftOut, (unsigned long long)leftOut);
        // The wait that is counted is one of several that end together, when the first of them has lasted that long.
        constexpr uint64_t kMissedNs = uint64_t{kTimeoutMs} * 1000000 / 10 * 9;
        RANK_CHECK(!missed || waitedNs[lost] >= kMissedNs, "waited %llu ns for the rank that was missed",
                   (unsigned long long)waitedNs[lost]);
        RANK_CHECK(waitNs[lost] == waitedNs[lost], "waited %llu ns for the masked rank",
                   (unsigned long long)(waitNs[lost] - waitedNs[lost]));
        for (size_t l = 0; l < expertTokens.size(); l++) {
          const uint64_t want = 3 * static_cast<uint64_t>(whole.reference->delivery(r).expertCounts[l]) +
                                4 * static_cast<uint64_t>(rest.reference->delivery(r).expertCounts[l]);
          RANK_CHECK(expertTokens[l] == want, "expert %zu had %llu tokens instead of %llu", l,
                     (unsigned long long)expertTokens[l], (unsigned long long)want);
        }
      }
      RANK_TRY(meetAll(rank, *meeting, kRanks));
      RANK_OK(ncclMoeCommMaskRanks(rank.comm(), all, 3), rank.comm());
      for (int i = 0; i < 3; i++) RANK_TRY(exchange(rank, routing, whole, nullptr));
      return rank.destroy();
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed << ", " << describe(whole.reference->problem()) << ", "
                       << describe(whole.combine);
}

class GpuMaskShapes : public testing::TestWithParam<std::tuple<ncclMoeLayout_t, With>> {};

TEST_P(GpuMaskShapes, OthersGoOnWithoutARankAndThenWithIt) {
  NEED_GPUS(1);
  const auto [layout, with] = GetParam();
  othersGoOnWithout(kLost, layout, with);
}
INSTANTIATE_TEST_SUITE_P(
  Shapes, GpuMaskShapes,
  testing::Combine(testing::Values(ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded, ncclMoeLayoutRankMajor),
                   testing::Values(With::gradients, With::fp8Cast, With::ue8m0Cast, With::fp8Rows, With::fp8Sums)),
  [](const auto& info) {
    const std::string layout = kLayoutNames[std::get<0>(info.param)];
    return layout + kWithNames[static_cast<int>(std::get<1>(info.param))];
  });

TEST(GpuMask, OthersGoOnWithoutRankZeroAndThenWithIt) {
  NEED_GPUS(1);
  othersGoOnWithout(0, ncclMoeLayoutExpertMajor, With::gradients);
}

// What needs every rank is refused while one is masked, and works when all are in again; and there are calls after
// which ranks cannot be masked.
TEST(GpuMask, WhatDoesNotGoWithMasksIsRefused) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  const DecodeShape decode = shapeOf(ncclMoeLayoutExpertMajor, With::gradients);
  DecodeShape prefill = decode, exactDecode = decode;
  prefill.nTokens = 600; // more than latency mode serves
  prefill.hidden = 128;
  prefill.exact = exactDecode.exact = true;
  const ExchangeCase large = exchangeOf(seed, prefill), small = exchangeOf(seed + 1, decode),
                     rest = without(small, seed + 2), exact = exchangeOf(seed + 3, exactDecode);
  const std::string wrong =
    runGpu(kRanks, RanksAs::processes, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      ncclMoeConfig_t config = latencyConfig(large);
      config.mode = ncclMoeModeAuto;
      config.timeoutMs = 10000; // nobody is missed
      const int without2[kRanks] = {0, 0, 1}, all[kRanks] = {0, 0, 0};
      {
        GpuRank rank(r, kRanks, r % nDevices);
        RANK_TRY(rank.init(config, meeting, kArenaBytes));
        ncclMoeRouting_t throughput = nullptr, latency = nullptr;
        RANK_OK(ncclMoeRoutingCreate(&throughput, rank.comm(), &large.routing), rank.comm());
        RANK_OK(ncclMoeRoutingCreate(&latency, rank.comm(), &small.routing), rank.comm());
        RANK_TRY(exchange(rank, throughput, large, nullptr)); // EXACT, which matters in latency mode alone
        RANK_TRY(exchange(rank, latency, small, nullptr));
        if (r != kLost) {
          RANK_OK(ncclMoeCommMaskRanks(rank.comm(), without2, 1), rank.comm());
          DispatchStyle keep;
          keep.flags = NCCL_MOE_KEEP_ROUTING;
          DispatchCall kept(*small.reference, r, keep);
          RANK_TRY(rank.upload(kept, false));
          RANK_TRY(expectResult("KEEP_ROUTING of what was given up",
                                ncclMoeDispatch(&kept.args(), latency, rank.comm(), rank.stream()), ncclInvalidUsage,
                                rank.comm(), "NCCL_MOE_KEEP_ROUTING,no dispatch"));
          CallPair calls(rank, large);
          RANK_TRY(calls.upload(rank, false));
          RANK_TRY(expectResult("a throughput dispatch while masked",
                                ncclMoeDispatch(&calls.dispatch.args(), throughput, rank.comm(), rank.stream()),
                                ncclInvalidUsage, rank.comm(), "masked"));
          RANK_TRY(expectResult("a throughput combine while masked",
                                ncclMoeCombine(&calls.combine.args(), throughput, rank.comm(), rank.stream()),
                                ncclInvalidUsage, rank.comm(), "no dispatch"));
          rank.forget();
          void* memory = nullptr;
          RANK_TRY(expectResult("memory while masked", ncclMoeMemAlloc(&memory, 4096, rank.comm()), ncclInvalidUsage,
                                rank.comm(), "masked"));
          const std::vector<int64_t>& ids = small.reference->problem().sources[static_cast<size_t>(r)].topkIdx;
          RANK_TRY(exchange(rank, latency, rest, &ids));
        }
        RANK_TRY(meetAll(rank, *meeting, kRanks));
        RANK_OK(ncclMoeCommMaskRanks(rank.comm(), all, 2), rank.comm());
        void* memory = nullptr;
        RANK_OK(ncclMoeMemAlloc(&memory, 4096, rank.comm()), rank.comm());
        RANK_TRY(exchange(rank, throughput, large, nullptr));
        RANK_TRY(exchange(rank, latency, exact, nullptr));
        RANK_TRY(expectResult("masks after EXACT", ncclMoeCommMaskRanks(rank.comm(), all, 3), ncclInvalidUsage,
                              rank.comm(), "NCCL_MOE_EXACT"));
        RANK_TRY(exchange(rank, latency, small, nullptr));
        RANK_TRY(rank.destroy());
      }
      GpuRank rank(r, kRanks, r % nDevices);
      RANK_TRY(rank.init(config, meeting, 0));
      RANK_OK(ncclMoeCommAbort(rank.comm()), rank.comm());
      RANK_TRY(expectResult("masks after an abort", ncclMoeCommMaskRanks(rank.comm(), all, 1), ncclRemoteError,
                            rank.comm(), "aborted"));
      return rank.destroy();
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

// A rank that is killed between two calls: the others' next call names it, and they go on without it to the end.
TEST(GpuMask, OthersGoOnWithoutADeadRank) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  const ExchangeCase whole = makeExchange(seed, kRanks, kTokens, kTokens), rest = without(whole, seed + 1);
  const std::vector<std::string> said =
    runGpuRanks(kRanks, RanksAs::processes, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      GpuRank rank(r, kRanks, r % nDevices);
      const ncclMoeConfig_t config = latencyConfig(whole);
      RANK_TRY(rank.init(config, meeting, kArenaBytes));
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &whole.routing), rank.comm());
      for (int i = 0; i < 2; i++) RANK_TRY(exchange(rank, routing, whole, nullptr));
      if (r == kLost) raise(SIGKILL);
      DispatchCall dispatch(*whole.reference, r, DispatchStyle());
      RANK_TRY(rank.upload(dispatch, false));
      RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
      RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 2"));
      rank.forget();
      const int without2[kRanks] = {0, 0, 1};
      RANK_OK(ncclMoeCommMaskRanks(rank.comm(), without2, 1), rank.comm());
      const std::vector<int64_t>& ids = whole.reference->problem().sources[static_cast<size_t>(r)].topkIdx;
      for (int i = 0; i < 5; i++) RANK_TRY(exchange(rank, routing, rest, &ids));
      return rank.destroy();
    });
  EXPECT_EQ(said[0], "") << "with MOE_TEST_SEED=" << seed;
  EXPECT_EQ(said[1], "") << "with MOE_TEST_SEED=" << seed;
  EXPECT_NE(said[kLost], "");
}

TEST(GpuMask, ARankThatIsLeftInButDoesNotComeIsNamed) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  const ExchangeCase e = makeExchange(seed, kRanks, kTokens, kTokens);
  const std::string wrong =
    runGpu(kRanks, RanksAs::processes, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      GpuRank rank(r, kRanks, r % nDevices);
      const ncclMoeConfig_t config = latencyConfig(e);
      RANK_TRY(rank.init(config, meeting, kArenaBytes));
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &e.routing), rank.comm());
      const int all[kRanks] = {0, 0, 0};
      if (r != kLost) {
        RANK_TRY(expectResult("mask without rank 2", ncclMoeCommMaskRanks(rank.comm(), all, 5), ncclRemoteError,
                              rank.comm(), "ncclMoeCommMaskRanks from rank 2"));
      }
      RANK_TRY(meetAll(rank, *meeting, kRanks));
      RANK_OK(ncclMoeCommMaskRanks(rank.comm(), all, 6), rank.comm());
      RANK_TRY(exchange(rank, routing, e, nullptr));
      return rank.destroy();
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

// Captured with all ranks in, a graph leaves out those that are masked when it is launched.  Each launch has other
// tokens and selections.
class GpuMaskLayouts : public testing::TestWithParam<ncclMoeLayout_t> {};

TEST_P(GpuMaskLayouts, GraphsFollowTheMasks) {
  NEED_GPUS(1);
  constexpr int kReplays = 4;
  constexpr size_t kPiece = size_t{2} << 20; // the graph keeps addresses
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  const DecodeShape shape = shapeOf(GetParam(), With::gradients);
  const ExchangeCase first = exchangeOf(seed, shape);
  const int64_t mostRows = int64_t{kRanks} * kTokens * first.routing.topK +
                           int64_t{first.world.nExperts / kRanks} * first.routing.expertAlignment;
  const std::string wrong =
    runGpu(kRanks, RanksAs::processes, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      GpuRank rank(r, kRanks, r % nDevices);
      const ncclMoeConfig_t config = latencyConfig(first);
      RANK_TRY(rank.init(config, meeting, kArenaBytes));
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &first.routing), rank.comm());
      cudaGraphExec_t graph = nullptr;
      const auto replay = [&](uint64_t draw, bool masked) -> std::string {
        const ExchangeCase whole = exchangeOf(draw, shape);
        const ExchangeCase rest = without(whole, draw + 1);
        const ExchangeCase& e = masked ? rest : whole;
        DispatchStyle style;
        style.tokensDev = true;                                                // the graph keeps the host's number
        style.slack = static_cast<int>(mostRows - e.reference->rowsNeeded(r)); // the graph keeps the capacity
        rank.forget(kPiece);
        CallPair calls(rank, e, style);
        RANK_TRY(calls.upload(rank, false));
        RANK_TRY(setIds(rank, calls.dispatch, whole.reference->problem().sources[static_cast<size_t>(r)].topkIdx));
        if (graph == nullptr) RANK_TRY(capture(rank, &graph, [&] { return calls.enqueue(rank, routing); }));
        RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
        RANK_TRY(asyncIs(rank, ncclSuccess));
        RANK_TRY(rank.download());
        RANK_TRY(calls.verify());
        rank.forget();
        return "";
      };
      const int without2[kRanks] = {0, 0, 1}, all[kRanks] = {0, 0, 0};
      uint64_t draw = seed;
      for (int i = 0; i < kReplays; i++) RANK_TRY(replay(++draw, false));
      for (uint64_t generation = 1; generation < 5; generation += 2) {
        RANK_TRY(meetAll(rank, *meeting, kRanks));
        if (r != kLost) RANK_OK(ncclMoeCommMaskRanks(rank.comm(), without2, generation), rank.comm());
        for (int i = 0; i < kReplays; i++) {
          draw++;
          if (r != kLost) RANK_TRY(replay(draw, true));
        }
        RANK_TRY(meetAll(rank, *meeting, kRanks));
        RANK_OK(ncclMoeCommMaskRanks(rank.comm(), all, generation + 1), rank.comm());
        for (int i = 0; i < kReplays; i++) RANK_TRY(replay(++draw, false));
      }
      RANK_CUDA(cudaGraphExecDestroy(graph));
      return rank.destroy();
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}
INSTANTIATE_TEST_SUITE_P(Layouts, GpuMaskLayouts,
                         testing::Values(ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded, ncclMoeLayoutRankMajor),
                         [](const auto& info) { return std::string(kLayoutNames[info.param]); });

// A rank that the others have left out is not dead but late: its dispatch, or its combine, sends to them while they go
// on.
TEST(GpuMask, WhatALateRankSendsIsNotTakenForOthers) {
  NEED_GPUS(1);
  constexpr int kRounds = 4, kLateTimeoutMs = 1500, kCalls = 8;
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  std::vector<ExchangeCase> wholes, rests;
  for (int round = 0; round < kRounds; round++) {
    const uint64_t draw = seed + 2 * static_cast<uint64_t>(round);
    wholes.push_back(makeExchange(draw, kRanks, kTokens, kTokens));
    rests.push_back(without(wholes.back(), draw + 1));
  }
  const std::string wrong =
    runGpu(kRanks, RanksAs::processes, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      GpuRank rank(r, kRanks, r % nDevices);
      ncclMoeConfig_t config = latencyConfig(wholes[0]);
      if (r == kLost) config.timeoutMs = kLateTimeoutMs;
      RANK_TRY(rank.init(config, meeting, kArenaBytes));
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &wholes[0].routing), rank.comm());
      const int without2[kRanks] = {0, 0, 1}, all[kRanks] = {0, 0, 0};
      Random random(seed + static_cast<uint64_t>(r));
      for (int round = 0; round < kRounds; round++) {
        const ExchangeCase &whole = wholes[static_cast<size_t>(round)], &rest = rests[static_cast<size_t>(round)];
        const bool lateCombine = round % 2 == 1;
        const uint64_t generation = 2 * static_cast<uint64_t>(round) + 1;
        RANK_TRY(exchange(rank, routing, whole, nullptr));
        CallPair late(rank, whole);
        if (lateCombine) {
          RANK_TRY(late.upload(rank, false));
          RANK_OK(ncclMoeDispatch(&late.dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
          RANK_TRY(asyncIs(rank, ncclSuccess));
          if (r != kLost) rank.forget();
        } else if (r == kLost) {
          RANK_TRY(late.upload(rank, false));
        }
        RANK_TRY(meetAll(rank, *meeting, kRanks));
        if (r != kLost) RANK_OK(ncclMoeCommMaskRanks(rank.comm(), without2, generation), rank.comm());
        RANK_TRY(meetAll(rank, *meeting, kRanks));
        if (r == kLost) {
          std::this_thread::sleep_for(std::chrono::microseconds(pick(random, 0, 20000)));
          if (lateCombine) {
            RANK_OK(ncclMoeCombine(&late.combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
          } else {
            RANK_OK(ncclMoeDispatch(&late.dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
          }
          RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 2 waited"));
          rank.forget();
        } else {
          const std::vector<int64_t>& ids = whole.reference->problem().sources[static_cast<size_t>(r)].topkIdx;
          for (int i = 0; i < kCalls; i++) RANK_TRY(exchange(rank, routing, rest, &ids));
        }
        RANK_TRY(meetAll(rank, *meeting, kRanks));
        RANK_OK(ncclMoeCommMaskRanks(rank.comm(), all, generation + 1), rank.comm());
      }
      RANK_TRY(exchange(rank, routing, wholes[0], nullptr));
      return rank.destroy();
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

} // namespace
} // namespace moe::test
