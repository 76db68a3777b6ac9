// Random shapes through every layout, type and cast on GPUs, against the reference and against the host backend, to the
// bit.
#include <gtest/gtest.h>

#include "gpu/gpu.h"

namespace moe::test {
namespace {

constexpr size_t kArenaBytes = size_t{96} << 20;
constexpr int kSmsOfAllRanks = 96; // what the ranks of a GPU share, with room for their small kernels

struct Round {
  std::unique_ptr<Reference> reference;
  std::vector<DispatchStyle> styles;
  std::vector<CombineProblem> combines;
  unsigned int combineFlags = 0;
  bool reachable = false;
  bool keep = false;
};

// What the CUDA backend does not take, and says so.
void restrict(DispatchProblem* p) {
  constexpr int kMostScaleBytes = 256;
  if (p->scaleBytes <= kMostScaleBytes) return;
  for (Source& source : p->sources) source.scales.resize(static_cast<size_t>(source.nTokens) * kMostScaleBytes);
  p->scaleBytes = kMostScaleBytes;
}

std::vector<Round> randomRounds(Random& random, const World& world, ncclMoeMode_t mode, ncclMoeLayout_t layout,
                                int nRounds) {
  std::vector<Round> rounds;
  for (int i = 0; i < nRounds; i++) {
    Round round;
    const DispatchProblem* last = rounds.empty() ? nullptr : &rounds.back().reference->problem();
    round.keep = last != nullptr && chance(random, 0.4);
    DispatchProblem problem = randomDispatch(random, world, last);
    while (problem.layout != layout) problem = randomDispatch(random, world, last); // later rounds keep the first's
    if (last != nullptr && !round.keep) {
      for (Source& source : problem.sources) {
        fillSelections(random, world, chance(random, 0.5) ? Selections::uniform : Selections::sparse, problem.topK,
                       &source);
      }
    }
    restrict(&problem);
    // Flags are the same on every rank; the rest of a style is each rank's own.
    const unsigned int flags =
      (round.keep ? NCCL_MOE_KEEP_ROUTING : 0u) | (chance(random, 0.3) ? NCCL_MOE_SEND_ONLY : 0u);
    for (int r = 0; r < world.nRanks; r++) {
      DispatchStyle style = randomStyle(random);
      if (round.keep) style.tokensDev = rounds.back().styles[r].tokensDev;
      if (style.tokensDev) style.emptyNull = false;
      style.flags = flags;
      round.styles.push_back(style);
    }
    round.reachable = chance(random, 0.5);
    round.reference = std::make_unique<Reference>(problem);
    round.combines.push_back(randomCombine(random, world, *round.reference));
    round.combineFlags = chance(random, 0.3) ? NCCL_MOE_SEND_ONLY : 0u;
    CombineProblem& combine = round.combines.back();
    combine.cast = mode == ncclMoeModeLatency && mayBeCast(combine) && chance(random, 0.5);
    rounds.push_back(std::move(round));
  }
  return rounds;
}

std::string runRounds(GpuRank& rank, const World& world, const std::vector<Round>& rounds) {
  const DispatchProblem& first = rounds[0].reference->problem();
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = first.topK;
  config.maxTokens = first.maxTokens == world.maxTokens ? 0 : first.maxTokens;
  config.layout = first.layout;
  config.expertAlignment = first.expertAlignment;
  config.hostCounts = first.topK % 2; // without, a throughput dispatch's two kernels overlap
  ncclMoeRouting_t routing = nullptr;
  RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
  for (const Round& round : rounds) {
    const std::string where = describe(round.reference->problem());
    const DispatchStyle& style = round.styles[rank.rank()];
    DispatchCall call(*round.reference, rank.rank(), style);
    RANK_TRY(rank.upload(call, round.reachable));
    RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
    if ((style.flags & NCCL_MOE_SEND_ONLY) != 0) {
      RANK_OK(ncclMoeComplete(routing, rank.comm(), rank.stream()), rank.comm());
    }
    int64_t nRows = -1;
    const Delivery& delivery = round.reference->delivery(rank.rank());
    std::vector<int> counts(delivery.expertCounts.size());
    if (config.hostCounts != 0) {
      RANK_OK(ncclMoeRoutingGetCounts(routing, rank.comm(), &nRows, counts.data()), rank.comm());
      RANK_CHECK(nRows == delivery.nRows, "GetCounts: %lld rows instead of %lld", (long long)nRows,
                 (long long)delivery.nRows);
      RANK_CHECK(counts == delivery.expertCounts);
    }
    RANK_CUDA(cudaStreamSynchronize(rank.stream()));
    ncclResult_t async = ncclSuccess;
    RANK_OK(ncclMoeCommGetAsyncError(rank.comm(), &async), rank.comm());
    RANK_CHECK(async == ncclSuccess, "dispatch: %s in %s", ncclMoeGetLastError(rank.comm()), where.c_str());
    RANK_TRY(rank.download());
    std::string wrong = call.verify();
    if (!wrong.empty()) return wrong + (round.reachable ? " (reachable) in " : " in ") + where;
    rank.forget();
    for (const CombineProblem& problem : round.combines) {
      CombineCall combine(*round.reference, problem, rank.rank(), style.emptyNull, round.combineFlags);
      RANK_TRY(rank.upload(combine, false));
      RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
      if (round.combineFlags != 0) RANK_OK(ncclMoeComplete(routing, rank.comm(), rank.stream()), rank.comm());
      RANK_CUDA(cudaStreamSynchronize(rank.stream()));
      RANK_OK(ncclMoeCommGetAsyncError(rank.comm(), &async), rank.comm());
      RANK_CHECK(async == ncclSuccess, "combine: %s", ncclMoeGetLastError(rank.comm()));
      RANK_TRY(rank.download());
      wrong = combine.verify();
      const char* halves = round.combineFlags != 0 ? " in halves" : "";
      if (!wrong.empty()) return wrong + " in " + describe(problem) + halves + " after " + where;
      rank.forget();
    }
  }
  RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
  return "";
}

// Jobs from consecutive seeds in one process; the seed of the first that fails repeats it.  maxTokens: of all, or -1.
void runJobs(ncclMoeMode_t mode, int nJobs, int minRanks, int maxRanks, RanksAs as = RanksAs::threads,
             int maxTokens = -1) {
  NEED_GPUS(1);
  const int nDevices = gpuCount();
  const uint64_t seed = testSeed();
  Random sizes(seed);
  for (int done = 0; done < nJobs;) {
    const int nRanks = pick(sizes, minRanks, maxRanks);
    const int batch = std::min(nJobs - done, 12);
    std::vector<World> worlds;
    std::vector<std::vector<std::vector<Round>>> jobs;
    for (int j = 0; j < batch; j++) {
      Random random(seed + 1000003u * static_cast<uint64_t>(done + j));
      WorldLimits limits;
      limits.minRanks = limits.maxRanks = nRanks;
      worlds.push_back(randomWorld(random, limits));
      if (maxTokens >= 0) worlds.back().maxTokens = maxTokens;
      jobs.emplace_back();
      for (int n = 0; n < 2; n++) {
        const auto layout = static_cast<ncclMoeLayout_t>((2 * j + n) % 3); // no number of ranks lacks one
        jobs.back().push_back(randomRounds(random, worlds.back(), mode, layout, 3));
      }
    }
    const std::string failures =
      runGpu(nRanks, as, 120000, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
        for (int j = 0; j < batch; j++) {
          GpuRank rank(r, nRanks, r % nDevices);
          ncclMoeConfig_t config = worlds[j].config();
          config.numSms = std::max(1, kSmsOfAllRanks / ((nRanks + nDevices - 1) / nDevices));
          if (j % 3 == 1) config.numSms = 1;
          config.mode = mode;
          config.timeoutMs = as == RanksAs::threads ? 5000 : 30000; // processes on one GPU take turns
          const std::string at = format("job %d, %s: ", done + j, worlds[j].describe().c_str());
          std::string wrong = rank.init(config, meeting, kArenaBytes);
          for (const auto& rounds : jobs[j]) {
            if (wrong.empty()) wrong = runRounds(rank, worlds[j], rounds);
          }
          if (wrong.empty()) wrong = rank.destroy();
          if (!wrong.empty()) return at + wrong;
        }
        return "";
      });
    ASSERT_EQ(failures, "") << "with MOE_TEST_SEED=" << seed;
    done += batch;
  }
}

// A world of small calls: a long run is to see many shapes.
World smallWorld(Random& random, int nRanks) {
  WorldLimits limits;
  limits.minRanks = limits.maxRanks = nRanks;
  limits.maxTokens = 160;
  limits.maxExperts = 128;
  World world = randomWorld(random, limits);
  world.maxRowBytes = std::max<size_t>(std::min<size_t>(world.maxRowBytes, 2048), 64);
  return world;
}

// Dispatches and combines of changing shapes, a new communicator for every hundred of them.  MOE_TEST_ITERATIONS says
// how many dispatches, over the four numbers of ranks.
void manyIterations(ncclMoeMode_t mode, int nRanks) {
  NEED_GPUS(1);
  constexpr int kRoundsOfRouting = 2, kIterationsOfComm = 100;
  const char* wanted = getenv("MOE_TEST_ITERATIONS");
  const int nIterations = wanted != nullptr ? atoi(wanted) : 160;
  ASSERT_GT(nIterations, 0) << "MOE_TEST_ITERATIONS";
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  const int mine = (nIterations + 3) / 4;
  std::vector<std::vector<Round>> rounds(static_cast<size_t>(nRanks)); // one for each rank to draw
  const std::string failures =
    runGpu(nRanks, RanksAs::threads, 60000 + 100 * mine, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      std::vector<int> all(static_cast<size_t>(nRanks));
      for (int done = 0; done < mine;) {
        Random worlds(seed + 7919u * static_cast<uint64_t>(done + nRanks));
        const World world = smallWorld(worlds, nRanks);
        GpuRank rank(r, nRanks, r % nDevices);
        ncclMoeConfig_t config = world.config();
        config.numSms = pick(worlds, 1, std::max(1, kSmsOfAllRanks / ((nRanks + nDevices - 1) / nDevices)));
        config.mode = mode;
        config.timeoutMs = 10000;
        RANK_TRY(rank.init(config, meeting, kArenaBytes));
        for (const int end = std::min(mine, done + kIterationsOfComm); done < end;) {
          Random random(seed + 1000003u * static_cast<uint64_t>(done + r) + static_cast<uint64_t>(nRanks));
          rounds[static_cast<size_t>(r)] =
            randomRounds(random, world, config.mode, static_cast<ncclMoeLayout_t>(random() % 3), kRoundsOfRouting);
          RANK_CHECK(meet(*meeting, r, &done, sizeof(done), all.data()));
          for (int n = 0; n < nRanks && done < end; n++, done += kRoundsOfRouting) {
            std::string wrong = runRounds(rank, world, rounds[static_cast<size_t>(n)]);
            if (!wrong.empty()) return format("%d ranks, iteration %d: ", nRanks, done) + wrong;
          }
          RANK_CHECK(meet(*meeting, r, &done, sizeof(done), all.data()));
        }
        RANK_TRY(rank.destroy());
      }
      return "";
    });
  ASSERT_EQ(failures, "") << "with MOE_TEST_SEED=" << seed;
}

class GpuManyIterations : public testing::TestWithParam<int> {};
TEST_P(GpuManyIterations, ThroughputMode) { manyIterations(ncclMoeModeThroughput, GetParam()); }
TEST_P(GpuManyIterations, LatencyMode) { manyIterations(ncclMoeModeLatency, GetParam()); }
INSTANTIATE_TEST_SUITE_P(Ranks, GpuManyIterations, testing::Values(2, 3, 4, 8));
TEST(GpuProperty, OneToken) { runJobs(ncclMoeModeThroughput, 12, 2, 4, RanksAs::threads, 1); }
TEST(GpuProperty, OneRank) { runJobs(ncclMoeModeThroughput, 12, 1, 1); }
TEST(GpuProperty, TwoRanks) { runJobs(ncclMoeModeThroughput, 36, 2, 2); }
TEST(GpuProperty, ThreeAndFourRanks) { runJobs(ncclMoeModeThroughput, 12, 3, 4); }
TEST(GpuProperty, FiveRanks) { runJobs(ncclMoeModeThroughput, 12, 5, 5); }
TEST(GpuProperty, SixRanks) { runJobs(ncclMoeModeThroughput, 12, 6, 6); }
TEST(GpuProperty, SevenRanks) { runJobs(ncclMoeModeThroughput, 12, 7, 7); }
TEST(GpuProperty, EightRanks) { runJobs(ncclMoeModeThroughput, 12, 8, 8); }
TEST(GpuProperty, ManyRanks) { runJobs(ncclMoeModeThroughput, 12, 9, 16); }
TEST(GpuProperty, Processes) { runJobs(ncclMoeModeThroughput, 6, 2, 2, RanksAs::processes); }
TEST(GpuProperty, ThreeAndFourProcesses) {
  NEED_GPUS(2);
  runJobs(ncclMoeModeThroughput, 4, 3, 4, RanksAs::processes);
}
TEST(GpuProperty, EightProcesses) {
  NEED_GPUS(4); // many of them on one GPU take turns for too long
  runJobs(ncclMoeModeThroughput, 6, 8, 8, RanksAs::processes);
}

// The smallest windows: what is read or written beside a record leaves them.
TEST(GpuLatency, OneToken) { runJobs(ncclMoeModeLatency, 12, 2, 4, RanksAs::threads, 1); }
TEST(GpuLatency, OneRank) { runJobs(ncclMoeModeLatency, 12, 1, 1); }
TEST(GpuLatency, TwoRanks) { runJobs(ncclMoeModeLatency, 36, 2, 2); }
TEST(GpuLatency, ThreeAndFourRanks) { runJobs(ncclMoeModeLatency, 12, 3, 4); }
TEST(GpuLatency, FiveRanks) { runJobs(ncclMoeModeLatency, 12, 5, 5); }
TEST(GpuLatency, SixRanks) { runJobs(ncclMoeModeLatency, 12, 6, 6); }
TEST(GpuLatency, SevenRanks) { runJobs(ncclMoeModeLatency, 12, 7, 7); }
TEST(GpuLatency, EightRanks) { runJobs(ncclMoeModeLatency, 12, 8, 8); }
TEST(GpuLatency, ManyRanks) { runJobs(ncclMoeModeLatency, 12, 9, 16); }
// A GPU has hardware queues for 32 ranks.
TEST(GpuProperty, MoreRanksThanAWarpHasLanes) {
  NEED_GPUS(2);
  runJobs(ncclMoeModeThroughput, 2, 33, 36);
}
TEST(GpuLatency, MoreRanksThanAWarpHasLanes) {
  NEED_GPUS(2);
  runJobs(ncclMoeModeLatency, 2, 33, 36);
}
TEST(GpuLatency, Processes) { runJobs(ncclMoeModeLatency, 6, 2, 2, RanksAs::processes); }

} // namespace
} // namespace moe::test
