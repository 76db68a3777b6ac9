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
