// Two runs of the same job are equal bit for bit, NaNs included, whatever the timing.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include "host/job.h"

namespace moe::test {
namespace {

constexpr int kMaxRanks = 16;

uint64_t hash(const std::string& bytes) {
  uint64_t h = 14695981039346656037u;
  for (const char c : bytes) h = (h ^ static_cast<uint8_t>(c)) * 1099511628211u;
  return h;
}

// What the forked ranks leave for the parent.
class SharedHashes {
 public:
  SharedHashes()
    : data_(static_cast<uint64_t*>(
        mmap(nullptr, kMaxRanks * sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {}
  ~SharedHashes() { munmap(data_, kMaxRanks * sizeof(uint64_t)); }
  SharedHashes(const SharedHashes&) = delete;
  SharedHashes& operator=(const SharedHashes&) = delete;
  uint64_t* data() { return data_; }

 private:
  uint64_t* data_;
};

TEST(Determinism, SameBitsWhateverTheTimingAndThePlaces) {
  struct Way {
    int ranksPerProcess, nHosts;
    bool jitter;
  };
  const Way ways[] = {{0, 0, false}, {0, 0, true}, {0, 0, true}, {1, 0, true}, {1, 2, true}};
  const int nJobs = kSanitized ? 1 : 5;
  for (int i = 0; i < nJobs; i++) {
    WorldLimits limits;
    limits.minRanks = 2;
    limits.maxRanks = 6;
    const uint64_t seed = testSeed() + 77000 + static_cast<uint64_t>(i);
    const Job job = randomJob(seed, 2, 2, limits);
    std::vector<uint64_t> first;
    uint64_t timing = 0;
    for (const Way& way : ways) {
      SharedHashes hashes;
      ClusterOptions options;
      options.nRanks = job.world.nRanks;
      options.ranksPerProcess = way.ranksPerProcess;
      options.nHosts = way.nHosts;
      options.jitter = way.jitter;
      options.seed = seed + ++timing;
      const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
        std::string outputs;
        RANK_TRY(runJob(rank, job, &outputs));
        RANK_CHECK(!outputs.empty());
        hashes.data()[rank.rank()] = hash(outputs);
        return "";
      });
      ASSERT_EQ(result.failures(), "") << "MOE_TEST_SEED=" << testSeed();
      const std::vector<uint64_t> now(hashes.data(), hashes.data() + job.world.nRanks);
      if (first.empty()) first = now;
      ASSERT_EQ(first, now) << "MOE_TEST_SEED=" << testSeed() << " job " << i << " run " << timing;
    }
  }
}

} // namespace
} // namespace moe::test
