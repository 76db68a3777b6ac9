// args.numSms changes how many blocks a call has, and nothing else.
#include <gtest/gtest.h>

#include <climits>

#include "gpu/latency_case.h"

namespace moe::test {
namespace {

// Dispatch and combine with the default first, then with other numbers in every call and on every rank: what they
// deliver is the default's, to the bit.  A graph tells how many blocks its kernels have.
std::string everyNumber(GpuRank& rank, Meeting& meeting, const DecodeShape& shape, const DecodeCase& e,
                        const std::vector<int>& numbers, bool asGraph) {
  ncclMoeRouting_t routing = nullptr;
  const ncclMoeRoutingConfig_t config = shape.routing();
  RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
  DispatchImage received;
  CombineImage sums;
  const int n = static_cast<int>(numbers.size());
  for (int call = 0; call <= n; call++) {
    DispatchStyle style;
    style.flags = call % 3 == 2 ? NCCL_MOE_SEND_ONLY : 0u;
    CallPair calls(rank, e, style);
    RANK_TRY(calls.upload(rank, call % 2 == 0));
    int& dispatchSms = calls.dispatch.args().numSms;
    int& combineSms = calls.combine.args().numSms;
    if (call > 0) {
      dispatchSms = numbers[static_cast<size_t>((call + rank.rank()) % n)];
      combineSms = asGraph ? dispatchSms : numbers[static_cast<size_t>((call + 2 * rank.rank() + 1) % n)];
    }
    cudaGraphExec_t graph = nullptr;
    if (asGraph) {
      int mostBlocks = 0;
      RANK_TRY(capture(
        rank, &graph, [&] { return calls.enqueue(rank, routing); }, &mostBlocks));
      RANK_CHECK(mostBlocks > 0 && (call == 0 || mostBlocks <= dispatchSms), "a kernel of %d blocks on %d SMs",
                 mostBlocks, dispatchSms);
      RANK_CUDA(cudaGraphUpload(graph, rank.stream()));
      RANK_CUDA(cudaStreamSynchronize(rank.stream()));
      RANK_TRY(meetAll(rank, meeting, shape.nRanks)); // nobody's kernels run while a graph is made or destroyed
      RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
    } else {
      RANK_TRY(calls.enqueue(rank, routing));
    }
    RANK_TRY(asyncIs(rank, ncclSuccess));
    if (asGraph) {
      RANK_TRY(meetAll(rank, meeting, shape.nRanks));
      RANK_CUDA(cudaGraphExecDestroy(graph));
    }
    RANK_TRY(rank.download());
    std::string bad;
    if (call == 0) {
      bad = calls.verify();
      received = calls.dispatch.image();
      sums = calls.combine.image();
    } else {
      const CombineImage now = calls.combine.image();
      bad = compareDispatch(*e.reference, rank.rank(), received, calls.dispatch.image());
      // The whole comparison takes long.
      const bool same = now.out == sums.out && now.gradTopkWeights == sums.gradTopkWeights;
      if (bad.empty() && !same) bad = "other sums: " + compareCombine(*e.reference, e.combine, rank.rank(), sums, now);
    }
    if (!bad.empty()) return bad + format(" in call %d, on %d and %d SMs", call, dispatchSms, combineSms);
    rank.forget();
  }
  RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
  return "";
}

void anyNumberOfSms(ncclMoeMode_t mode) {
  NEED_GPUS(1);
  // Every layout, outside graphs and in them; more rows than an SM has warps.
  constexpr int kShapes = 6, kTokens = 64;
  const uint64_t seed = testSeed();
  for (const int nRanks : {1, 2, 3}) {
    std::vector<DecodeShape> shapes;
    std::vector<DecodeCase> cases;
    for (int i = 0; i < kShapes; i++) {
      DecodeShape s = randomShape(seed + static_cast<uint64_t>(i), nRanks);
      s.nTokens = kTokens;
      s.layout = static_cast<ncclMoeLayout_t>(i % 3);
      s.alignment = s.layout == ncclMoeLayoutExpertMajor ? 8 : 1;
      if (s.layout == ncclMoeLayoutRankMajor) s.exact = s.weighted = false;
      if (mode == ncclMoeModeThroughput) s.combineCast = false;
      shapes.push_back(s);
      cases.push_back(makeDecode(seed + static_cast<uint64_t>(i), s));
    }
    DecodeShape most;
    most.nRanks = nRanks;
    most.nTokens = kTokens;
    most.topK = 8;
    DecodeRun run;
    run.nRanks = nRanks;
    run.mode = mode;
    // Ranks that share a GPU must fit beside each other there.
    const bool alone = nRanks <= gpuCount();
    const std::vector<int> numbers = alone ? std::vector<int>{1, INT_MAX, 2, 5, 40} : std::vector<int>{1, 13, 2, 5};
    if (alone) run.numSms = 0;
    const std::string wrong = runDecode(most.world(), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
      for (int i = 0; i < kShapes; i++) {
        const DecodeCase& e = cases[static_cast<size_t>(i)];
        const std::string bad =
          everyNumber(rank, meeting, shapes[static_cast<size_t>(i)], e, numbers, i >= kShapes / 2);
        if (!bad.empty()) return bad + " of " + describe(e.reference->problem()) + ", " + describe(e.combine);
      }
      return "";
    });
    ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

TEST(GpuNumSms, ThroughputMode) { anyNumberOfSms(ncclMoeModeThroughput); }
TEST(GpuNumSms, LatencyMode) { anyNumberOfSms(ncclMoeModeLatency); }

} // namespace
} // namespace moe::test
