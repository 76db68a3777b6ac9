// What a communicator has counted, in either mode.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "gpu/exchange_case.h"

namespace moe::test {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kArenaBytes = size_t{64} << 20;
constexpr int kTimeLimitMs = 60000;
constexpr int kRanks = 3, kTokens = 48;

ncclMoeConfig_t configOf(const ExchangeCase& e, ncclMoeMode_t mode) {
  ncclMoeConfig_t config = configFor(e);
  config.mode = mode;
  return config;
}

// Ranks wait for a rank whose host comes late, to dispatches or to combines, and the counters say for whom.
void nameTheStraggler(ncclMoeMode_t mode) {
  constexpr int kLate = 1, kCalls = 4, kLateMs = 40;
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  const ExchangeCase e = makeExchange(seed, kRanks, kTokens, kTokens);
  const std::string wrong =
    runGpu(kRanks, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      GpuRank rank(r, kRanks, r % nDevices);
      const ncclMoeConfig_t config = configOf(e, mode);
      RANK_TRY(rank.init(config, meeting, kArenaBytes));
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &e.routing), rank.comm());
      std::vector<uint64_t> waitNs(kRanks, 1);
      ncclMoeCommStats_t stats = NCCL_MOE_COMM_STATS_INITIALIZER;
      stats.waitNs = waitNs.data();
      RANK_OK(ncclMoeCommGetStats(rank.comm(), &stats), rank.comm());
      for (const uint64_t ns : waitNs) RANK_CHECK(ns == 0, "%llu ns before any call", (unsigned long long)ns);
      for (const bool lateToCombine : {false, true}) {
        const std::vector<uint64_t> earlier = waitNs;
        Clock::duration took{};
        for (int i = 0; i < kCalls; i++) {
          CallPair calls(rank, e);
          RANK_TRY(calls.upload(rank, false));
          RANK_TRY(meetAll(rank, *meeting, kRanks));
          const Clock::time_point start = Clock::now();
          const auto comeLate = [&](bool toCombine) {
            if (r != kLate || toCombine != lateToCombine) return;
            std::this_thread::sleep_for(std::chrono::milliseconds(kLateMs));
          };
          comeLate(false);
          RANK_OK(ncclMoeDispatch(&calls.dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
          comeLate(true);
          RANK_OK(ncclMoeCombine(&calls.combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
          RANK_TRY(asyncIs(rank, ncclSuccess));
          took += Clock::now() - start;
          rank.forget();
          const std::vector<uint64_t> before = waitNs;
          RANK_OK(ncclMoeCommGetStats(rank.comm(), &stats), rank.comm());
          for (int peer = 0; peer < kRanks; peer++) RANK_CHECK(waitNs[peer] >= before[peer]);
        }
        if (r == kLate) continue;
        const uint64_t late = waitNs[kLate] - earlier[kLate];
        const uint64_t other = waitNs[kRanks - 1 - r] - earlier[kRanks - 1 - r];
        RANK_CHECK(late >= kCalls * uint64_t{kLateMs} * 500000 && late > other,
                   "late to %s: %llu ns for the late rank, %llu for the other", lateToCombine ? "combine" : "dispatch",
                   (unsigned long long)late, (unsigned long long)other);
        // Several blocks wait at the same time, of which one counts.
        const auto ns = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(took).count());
        RANK_CHECK(late < 2 * ns, "%llu ns for the late rank in calls that took %llu", (unsigned long long)late,
                   (unsigned long long)ns);
      }
      return rank.destroy();
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

TEST(GpuStats, StragglerIsNamedInThroughputMode) {
  NEED_GPUS(1);
  nameTheStraggler(ncclMoeModeThroughput);
}
TEST(GpuStats, StragglerIsNamedInLatencyMode) {
  NEED_GPUS(1);
  nameTheStraggler(ncclMoeModeLatency);
}

// The dispatches of a case in another layout.
ExchangeCase inLayout(uint64_t seed, ncclMoeLayout_t layout) {
  ExchangeCase e = makeExchange(seed, kRanks, kTokens, kTokens);
  DispatchProblem p = e.reference->problem();
  e.routing.layout = p.layout = layout;
  if (layout != ncclMoeLayoutExpertMajor) e.routing.expertAlignment = p.expertAlignment = 1;
  e.reference = std::make_unique<Reference>(p);
  return e;
}

// Tokens are counted once for each dispatch that goes ahead, also with a kept routing, and not for one that is refused.
void countTokens(ncclMoeMode_t mode) {
  const uint64_t seed = testSeed();
  const int nDevices = gpuCount();
  const std::string wrong =
    runGpu(kRanks, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      GpuRank rank(r, kRanks, r % nDevices);
      const ExchangeCase any = makeExchange(seed, kRanks, kTokens, kTokens);
      const ncclMoeConfig_t config = configOf(any, mode);
      RANK_TRY(rank.init(config, meeting, kArenaBytes));
      std::vector<uint64_t> want(static_cast<size_t>(any.world.nExperts / kRanks)), got(want.size(), 1);
      ncclMoeCommStats_t stats = NCCL_MOE_COMM_STATS_INITIALIZER;
      stats.expertTokens = got.data();
      uint64_t draw = seed;
      for (const ncclMoeLayout_t layout :
           {ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded}) {
        ncclMoeRouting_t routing = nullptr;
        const ExchangeCase first = inLayout(draw++, layout), second = inLayout(draw++, layout);
        RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &first.routing), rank.comm());
        enum class As { usual, kept, refused };
        const auto dispatch = [&](const ExchangeCase& e, As as) -> std::string {
          DispatchStyle style;
          if (as == As::kept) style.flags = NCCL_MOE_KEEP_ROUTING;
          DispatchCall call(*e.reference, r, style);
          RANK_TRY(rank.upload(call, false));
          if (as == As::refused && r == 1) call.args().recvCapacity = e.reference->rowsNeeded(r) - 1;
          RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
          RANK_TRY(as == As::refused ? asyncIs(rank, ncclInvalidUsage, "rank 1") : asyncIs(rank, ncclSuccess));
          rank.forget();
          for (size_t l = 0; as != As::refused && l < want.size(); l++) {
            want[l] += static_cast<uint64_t>(e.reference->delivery(r).expertCounts[l]);
          }
          RANK_OK(ncclMoeCommGetStats(rank.comm(), &stats), rank.comm());
          for (size_t l = 0; l < want.size(); l++) {
            RANK_CHECK(got[l] == want[l], "layout %d: expert %zu had %llu tokens instead of %llu", layout, l,
                       (unsigned long long)got[l], (unsigned long long)want[l]);
          }
          return "";
        };
        RANK_TRY(dispatch(first, As::usual));
        RANK_TRY(dispatch(second, As::usual));
        RANK_TRY(dispatch(second, As::kept));
        if (layout != ncclMoeLayoutExpertPadded) RANK_TRY(dispatch(first, As::refused)); // it has room for any rows
        RANK_TRY(dispatch(first, As::usual));
      }
      return rank.destroy();
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

TEST(GpuStats, TokensAreCountedInThroughputMode) {
  NEED_GPUS(1);
  countTokens(ncclMoeModeThroughput);
}
TEST(GpuStats, TokensAreCountedInLatencyMode) {
  NEED_GPUS(1);
  countTokens(ncclMoeModeLatency);
}

} // namespace
} // namespace moe::test
