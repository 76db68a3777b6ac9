// Peers that die, abort, never call or leave: whoever waits for them learns it quickly, by rank.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "host/job.h"

namespace moe::test {
namespace {

using Clock = std::chrono::steady_clock;

int millisecondsSince(Clock::time_point start) {
  return static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start).count());
}

constexpr int kExperts = 6;
constexpr int kLongTimeoutMs = 60000; // so that only noticing ends a wait
constexpr int kQuicklyMs = 4000 * kSlow;

ncclMoeConfig_t config(int timeoutMs) { return makeConfig(kExperts, 64, 2, 1024, timeoutMs); }

// Exchanges until something fails; returns what did.
ncclResult_t exchangeUntilFailure(Rank& rank, int* rounds) {
  ncclMoeRoutingConfig_t routingConfig = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  routingConfig.topK = 2;
  ncclMoeRouting_t routing = nullptr;
  ncclResult_t result = ncclMoeRoutingCreate(&routing, rank.comm(), &routingConfig);
  if (result != ncclSuccess) return result;
  const size_t nTokens = 64;
  GuardedBuffer x(nTokens * 1024), idx(nTokens * 2 * 8);
  GuardedBuffer recvX(nTokens * 1024 * static_cast<size_t>(rank.nRanks())), out(nTokens * 1024);
  for (size_t i = 0; i < nTokens; i++) {
    idx.as<int64_t>()[2 * i] = static_cast<int64_t>(i % kExperts);
    idx.as<int64_t>()[2 * i + 1] = static_cast<int64_t>((i + 3) % kExperts);
  }
  ncclMoeDispatchArgs_t dispatch = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  dispatch.x = x.data();
  dispatch.type = ncclFloat32;
  dispatch.hidden = 256;
  dispatch.nTokens = nTokens;
  dispatch.topkIdx = idx.data();
  dispatch.recvX = recvX.data();
  dispatch.recvCapacity = static_cast<int64_t>(nTokens) * rank.nRanks();
  ncclMoeCombineArgs_t combine = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
  combine.x = recvX.data();
  combine.type = ncclFloat32;
  combine.hidden = 256;
  combine.out = out.data();
  for (*rounds = 0;; ++*rounds) {
    result = ncclMoeDispatch(&dispatch, routing, rank.comm(), nullptr);
    if (result == ncclSuccess) result = ncclMoeCombine(&combine, routing, rank.comm(), nullptr);
    if (result != ncclSuccess) return result;
  }
}

// What a survivor must see: a remote error that names the rank, also afterwards and as the asynchronous error.
std::string expectRemoteError(Rank& rank, ncclResult_t result, const std::string& words) {
  RANK_TRY(expectResult("a collective with a lost peer", result, ncclRemoteError, rank.comm(), words));
  ncclResult_t async = ncclSuccess;
  RANK_OK(ncclMoeCommGetAsyncError(rank.comm(), &async), rank.comm());
  RANK_CHECK(async == ncclRemoteError, "async error %s", resultName(async));
  const Clock::time_point start = Clock::now();
  int rounds = 0;
  RANK_TRY(expectResult("a collective after that", exchangeUntilFailure(rank, &rounds), ncclRemoteError, rank.comm()));
  RANK_CHECK(rounds == 0);
  RANK_CHECK(millisecondsSince(start) < kQuicklyMs, "%d ms", millisecondsSince(start));
  return "";
}

const Place kPlaces[] = {{"oneHost", 1, 0}, {"twoHosts", 1, 2}, {"threeHosts", 1, 3}};

class Failure : public testing::TestWithParam<Place> {
 protected:
  ClusterOptions options(int nRanks) const {
    ClusterOptions options;
    options.nRanks = nRanks;
    options.ranksPerProcess = 1;
    options.nHosts = GetParam().nHosts;
    return options;
  }
};
INSTANTIATE_TEST_SUITE_P(Places, Failure, testing::ValuesIn(kPlaces), testing::PrintToStringParamName());

TEST_P(Failure, KilledPeer) {
  Random random(testSeed());
  const int nTrials = kSanitized ? 2 : 5;
  for (int trial = 0; trial < nTrials; trial++) {
    const int nRanks = pick(random, 2, 4);
    const int victim = pick(random, 0, nRanks - 1);
    const int afterMs = pick(random, 0, 60) * kSlow;
    const ClusterResult result = runRanks(
      options(nRanks),
      [&](Rank& rank) -> std::string {
        RANK_OK(rank.init(config(kLongTimeoutMs)), nullptr);
        if (rank.rank() == victim) {
          std::thread([=] {
            sleepMs(afterMs);
            raise(SIGKILL);
          }).detach();
        }
        int rounds = 0;
        const ncclResult_t result = exchangeUntilFailure(rank, &rounds);
        RANK_TRY(expectRemoteError(rank, result, "rank " + std::to_string(victim)));
        RANK_OK(rank.destroy(), nullptr);
        return "";
      },
      [](const std::vector<pid_t>&) {});
    for (int rank = 0; rank < nRanks; rank++) {
      if (rank == victim) {
        EXPECT_NE(result.ranks[rank].find("signal 9"), std::string::npos) << result.ranks[rank];
      } else {
        EXPECT_EQ(result.ranks[rank], "") << "rank " << rank << ", victim " << victim << " after " << afterMs << " ms";
      }
    }
    ASSERT_LT(result.elapsedMs, kQuicklyMs + afterMs) << "victim " << victim << " of " << nRanks;
  }
}

TEST_P(Failure, KilledAtAnyPointOfInit) {
  Random random(testSeed() + 1);
  const int nTrials = kSanitized ? 3 : 8;
  for (int trial = 0; trial < nTrials; trial++) {
    const int nRanks = 3;
    const int victim = trial % nRanks;
    const int afterUs = pick(random, 0, 6000) * kSlow;
    const ClusterResult result = runRanks(
      options(nRanks),
      [&](Rank& rank) -> std::string {
        // Init fails (the rank did not come, or went), or the first collective does.
        const ncclResult_t result = rank.init(config(500 * kSlow));
        if (result != ncclSuccess) {
          return expectResult("init with a peer that is killed", result, ncclRemoteError, nullptr, "rank");
        }
        int rounds = 0;
        return expectResult("a collective with a killed peer", exchangeUntilFailure(rank, &rounds), ncclRemoteError,
                            rank.comm(), "rank " + std::to_string(victim));
      },
      [&](const std::vector<pid_t>& pids) {
        usleep(static_cast<useconds_t>(afterUs));
        kill(pids[victim], SIGKILL);
      });
    for (int rank = 0; rank < nRanks; rank++) {
      if (rank != victim) {
        EXPECT_EQ(result.ranks[rank], "") << "rank " << rank << ", victim " << victim << ", " << afterUs;
      }
    }
    ASSERT_LT(result.elapsedMs, kQuicklyMs + 500 * kSlow) << "victim " << victim;
  }
}

TEST_P(Failure, Abort) {
  const int nRanks = 3;
  const ClusterResult result = runRanks(options(nRanks), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(config(kLongTimeoutMs)), nullptr);
    std::thread aborter;
    if (rank.rank() == 1) {
      const ncclMoeComm_t comm = rank.comm();
      aborter = std::thread([comm] {
        sleepMs(30);
        ncclMoeCommAbort(comm);
      });
    }
    int rounds = 0;
    const ncclResult_t result = exchangeUntilFailure(rank, &rounds);
    if (aborter.joinable()) aborter.join();
    return expectRemoteError(rank, result, rank.rank() == 1 ? "abort" : "rank 1");
  });
  EXPECT_EQ(result.failures(), "");
  EXPECT_LT(result.elapsedMs, kQuicklyMs);
}

// Rank 0 waits for a peer that never calls; the abort comes from another thread while it waits.
TEST_P(Failure, AbortWhileWaiting) {
  const ClusterResult result = runRanks(options(2), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(config(kLongTimeoutMs)), nullptr);
    if (rank.rank() == 1) {
      // Stays alive and silent; learns of the abort at its next call.
      sleepMs(1200 * kSlow);
      int rounds = 0;
      return expectResult("a call after the peer's abort", exchangeUntilFailure(rank, &rounds), ncclRemoteError,
                          rank.comm(), "rank 0");
    }
    const ncclMoeComm_t comm = rank.comm();
    const Clock::time_point start = Clock::now();
    std::thread aborter([comm] {
      sleepMs(100);
      ncclMoeCommAbort(comm);
      ncclMoeCommAbort(comm); // twice is fine
    });
    int rounds = 0;
    const ncclResult_t result = exchangeUntilFailure(rank, &rounds);
    const int took = millisecondsSince(start);
    aborter.join();
    RANK_TRY(expectRemoteError(rank, result, "ncclMoeRoutingCreate: the communicator was aborted"));
    RANK_CHECK(took >= 90 && took < 900 * kSlow, "%d ms", took); // before the peer says or does anything
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

std::string rankThatNeverCalls(const ClusterOptions& options, bool inHalves) {
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(config(200 * kSlow)), nullptr);
    ncclMoeRoutingConfig_t routingConfig = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
    routingConfig.topK = 1;
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &routingConfig), rank.comm());
    if (rank.rank() == 2) {
      sleepMs(1000 * kSlow);
      return "";
    }
    alignas(16) uint8_t recv[16 * 64];
    ncclMoeDispatchArgs_t dispatch = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
    dispatch.hidden = 8;
    dispatch.recvX = recv;
    dispatch.recvCapacity = 64;
    dispatch.flags = inHalves ? NCCL_MOE_SEND_ONLY : 0u;
    const Clock::time_point start = Clock::now();
    ncclResult_t result = ncclMoeDispatch(&dispatch, routing, rank.comm(), nullptr);
    if (inHalves && result == ncclSuccess) result = ncclMoeComplete(routing, rank.comm(), nullptr);
    const int took = millisecondsSince(start);
    // Whoever waits names rank 2, or the rank that it learns from.
    const std::string other = "rank " + std::to_string(1 - rank.rank());
    const std::string sentence = ncclMoeGetLastError(rank.comm());
    RANK_TRY(expectResult("dispatch that rank 2 does not call", result, ncclRemoteError, rank.comm(),
                          sentence.find(other) == std::string::npos ? "rank 2" : other));
    // It begins with the function that was called and waited.
    RANK_CHECK(sentence.rfind(inHalves ? "ncclMoeComplete: ncclMoeDispatch (call " : "ncclMoeDispatch (call ", 0) == 0,
               "%s", sentence.c_str());
    RANK_CHECK(took >= 150 * kSlow && took < 900 * kSlow, "after %d ms", took);
    return "";
  });
  return result.failures();
}

TEST_P(Failure, RankThatNeverCalls) { EXPECT_EQ(rankThatNeverCalls(options(3), false), ""); }
TEST_P(Failure, RankThatNeverCallsWhatOthersComplete) { EXPECT_EQ(rankThatNeverCalls(options(3), true), ""); }

// A rank that destroys while others still work gives them an error, and waits for nobody itself.
TEST_P(Failure, DestroyWhileOthersWork) {
  const ClusterResult result = runRanks(options(3), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(config(kLongTimeoutMs)), nullptr);
    if (rank.rank() == 0) {
      sleepMs(50);
      const Clock::time_point start = Clock::now();
      RANK_OK(rank.destroy(), nullptr);
      RANK_CHECK(millisecondsSince(start) < kQuicklyMs, "destroy took %d ms", millisecondsSince(start));
      return "";
    }
    int rounds = 0;
    const ncclResult_t result = exchangeUntilFailure(rank, &rounds);
    return expectRemoteError(rank, result, "rank");
  });
  EXPECT_EQ(result.failures(), "");
  EXPECT_LT(result.elapsedMs, kQuicklyMs);
}

// The work of a SEND_ONLY call is outstanding when the communicator goes.
TEST_P(Failure, DestroyBetweenTheHalves) {
  const ClusterResult result = runRanks(options(2), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(config(5000 * kSlow)), nullptr);
    ncclMoeRoutingConfig_t routingConfig = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
    routingConfig.topK = 1;
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &routingConfig), rank.comm());
    GuardedBuffer x(64 * 16), recv(64 * 2 * 16), idx(64 * 8);
    for (int i = 0; i < 64; i++) idx.as<int64_t>()[i] = i % kExperts;
    ncclMoeDispatchArgs_t dispatch = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
    dispatch.x = x.data();
    dispatch.hidden = 8;
    dispatch.nTokens = 64;
    dispatch.topkIdx = idx.data();
    dispatch.recvX = recv.data();
    dispatch.recvCapacity = 128;
    dispatch.flags = NCCL_MOE_SEND_ONLY;
    // The first to leave may do so before the other has sent.
    const ncclResult_t result = ncclMoeDispatch(&dispatch, routing, rank.comm(), nullptr);
    RANK_CHECK(result == ncclSuccess || result == ncclRemoteError, "%s", ncclMoeGetLastError(rank.comm()));
    RANK_OK(rank.destroy(), nullptr);
    return "";
  });
  EXPECT_EQ(result.failures(), "");
  EXPECT_LT(result.elapsedMs, kQuicklyMs);
}

// A peer that is stopped (not dead) is a timeout, not a hang; one that goes on in time is no error.
TEST_P(Failure, StoppedPeer) {
  const ClusterResult result = runRanks(
    options(2),
    [&](Rank& rank) -> std::string {
      RANK_OK(rank.init(config(300 * kSlow)), nullptr);
      int rounds = 0;
      const ncclResult_t result = exchangeUntilFailure(rank, &rounds);
      return expectResult("a collective with a stopped peer", result, ncclRemoteError, rank.comm(), "rank 1");
    },
    [&](const std::vector<pid_t>& pids) {
      sleepMs(100 * kSlow);
      kill(pids[1], SIGSTOP);
      sleepMs(900 * kSlow);
      kill(pids[1], SIGKILL);
    });
  EXPECT_EQ(result.ranks[0], "");
}

} // namespace
} // namespace moe::test
