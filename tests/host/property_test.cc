// Random shapes through every layout, type, cast and flag, against the reference.
#include <gtest/gtest.h>

#include "host/job.h"

namespace moe::test {
namespace {

// Runs jobs from consecutive seeds; stops at the first that fails, whose seed alone repeats it.
void runJobs(int nJobs, int nRoutings, int nRounds, const WorldLimits& limits, ClusterOptions options) {
  nJobs = nJobs / kFewer > 0 ? nJobs / kFewer : 1;
  for (int i = 0; i < nJobs; i++) {
    const uint64_t seed = testSeed() + static_cast<uint64_t>(i);
    const Job job = randomJob(seed, nRoutings, nRounds, limits);
    options.nRanks = job.world.nRanks;
    options.seed = seed;
    const ClusterResult result = runRanks(options, [&](Rank& rank) { return runJob(rank, job); });
    ASSERT_EQ(result.failures(), "") << "with MOE_TEST_SEED=" << seed << " (job " << i << "): " << job.describe();
  }
}

TEST(Property, ThreadsOfOneProcess) { runJobs(60, 2, 3, WorldLimits(), ClusterOptions()); }

TEST(Property, OneRank) {
  WorldLimits limits;
  limits.maxRanks = 1;
  runJobs(12, 2, 3, limits, ClusterOptions());
}

TEST(Property, OneProcessPerRank) {
  WorldLimits limits;
  limits.minRanks = 2;
  limits.maxRanks = 8;
  ClusterOptions options;
  options.ranksPerProcess = 1;
  runJobs(20, 2, 2, limits, options);
}

TEST(Property, SeveralHosts) {
  WorldLimits limits;
  limits.minRanks = 2;
  limits.maxRanks = 6;
  ClusterOptions options;
  options.ranksPerProcess = 1;
  options.nHosts = 3;
  runJobs(20, 2, 2, limits, options);
}

TEST(Property, EveryRankItsOwnHost) {
  WorldLimits limits;
  limits.minRanks = 2;
  limits.maxRanks = 5;
  ClusterOptions options;
  options.ranksPerProcess = 1;
  options.nHosts = 16;
  runJobs(12, 1, 2, limits, options);
}

TEST(Property, ProcessesOfThreadsOnHosts) {
  WorldLimits limits;
  limits.minRanks = 5;
  limits.maxRanks = 12;
  ClusterOptions options;
  options.ranksPerProcess = 3;
  options.nHosts = 2;
  runJobs(8, 2, 2, limits, options);
}

// What random jobs rarely have together: sums as FP8 across rings and sockets, with gradients, and a rank without rows.
TEST(Property, SumsAsFp8) {
  World world;
  world.nRanks = 3;
  world.nExperts = 4;
  world.explicitMap = true;
  world.expertToRank = {0, 1, 0, 1};
  world.maxTokens = 24;
  world.maxTopK = 3;
  world.maxRowBytes = 288;
  for (const int hidden : {16, 144}) {
    const uint64_t seed = testSeed() + static_cast<uint64_t>(hidden);
    Random random(seed);
    Job job;
    job.world = world;
    job.latency = true;
    for (const ncclMoeLayout_t layout : {ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded}) {
      DispatchProblem problem = randomDispatch(random, world);
      while (problem.layout != layout || problem.topK < 2) problem = randomDispatch(random, world);
      Round round;
      round.styles.resize(static_cast<size_t>(world.nRanks));
      round.reference = std::make_unique<Reference>(problem);
      CombineRound combine;
      combine.problem.type = ncclBfloat16;
      combine.problem.hidden = hidden;
      combine.problem.cast = true;
      combine.problem.weighted = layout != ncclMoeLayoutRankMajor;
      combine.problem.withGradWeights = true;
      fillCombine(random, *round.reference, true, &combine.problem);
      round.combines.push_back(std::move(combine));
      RoutingJob routing;
      routing.config = routingConfig(world, problem, false);
      routing.rounds.push_back(std::move(round));
      job.routings.push_back(std::move(routing));
    }
    for (const int nHosts : {1, 3}) {
      ClusterOptions options;
      options.nRanks = world.nRanks;
      options.seed = seed;
      if (nHosts > 1) options.ranksPerProcess = 1;
      options.nHosts = nHosts;
      const ClusterResult result = runRanks(options, [&](Rank& rank) { return runJob(rank, job); });
      ASSERT_EQ(result.failures(), "") << "with MOE_TEST_SEED=" << testSeed();
    }
  }
}

// As many ranks as the one machine of a test bears: 64 keep 4032 rings.
TEST(Property, ManyRanks) {
  WorldLimits limits;
  limits.minRanks = 40;
  limits.maxRanks = 64;
  limits.maxTokens = 40;
  ClusterOptions options;
  options.ranksPerProcess = 8;
  options.timeLimitMs = 90000 * kSlow;
  runJobs(1, 1, 2, limits, options);
  options.nHosts = 2;
  runJobs(1, 1, 2, limits, options);
}

TEST(Property, TcpRendezvous) {
  WorldLimits limits;
  limits.minRanks = 2;
  limits.maxRanks = 6;
  ClusterOptions options;
  options.ranksPerProcess = 2;
  options.rendezvous = "tcp://127.0.0.1:" + std::to_string(freePort());
  runJobs(6, 1, 1, limits, options);
}

// Rings as small as they can be, so that they fill and wrap, and rows written past the caches.
TEST(Property, SmallRingsAndStreamingStores) {
  WorldLimits limits;
  limits.minRanks = 2;
  limits.maxRanks = 8;
  ClusterOptions options;
  options.environment = {{"NCCL_MOE_HOST_RING_BYTES", "4K"}, {"NCCL_MOE_HOST_STREAM_BYTES", "0"}};
  runJobs(14, 2, 2, limits, options);
  options.ranksPerProcess = 2;
  options.nHosts = 2;
  runJobs(10, 2, 2, limits, options);
}

TEST(Property, WithShuffledTiming) {
  ClusterOptions options;
  options.jitter = true;
  runJobs(10, 2, 2, WorldLimits(), options);
}

} // namespace
} // namespace moe::test
