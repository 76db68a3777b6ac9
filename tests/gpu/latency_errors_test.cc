// Latency mode when things go wrong: ranks that do not come, ranks that disagree, buffers too small, indices out of
// range, and what it cannot serve.
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <thread>

#include "gpu/latency_case.h"

namespace moe::test {
namespace {

using Clock = std::chrono::steady_clock;

long long millisecondsSince(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start).count();
}

// One whose every rank has a few tokens and receives a few rows.
DecodeCase lively(uint64_t seed, const DecodeShape& shape) {
  for (;; seed += 1000003) {
    DecodeCase e = makeDecode(seed, shape);
    bool fine = true;
    for (int r = 0; r < shape.nRanks; r++) {
      fine = fine && e.reference->problem().sources[r].nTokens >= 4 && e.reference->delivery(r).nRows >= 4;
    }
    if (fine) return e;
  }
}

std::string makeRouting(GpuRank& rank, const DecodeShape& shape, ncclMoeRouting_t* routing) {
  const ncclMoeRoutingConfig_t config = shape.routing();
  RANK_OK(ncclMoeRoutingCreate(routing, rank.comm(), &config), rank.comm());
  return "";
}

// What rank 1 leaves out.
enum class Missing { dispatch, dispatchInPhases, combine, completion };

void rankIsMissing(Missing missing, int nRanks) {
  DecodeShape shape;
  shape.nRanks = nRanks;
  const DecodeCase e = lively(testSeed(), shape);
  DecodeRun run;
  run.nRanks = nRanks;
  run.timeoutMs = 600;
  const std::string wrong = runDecode(shape.world(), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
    ncclMoeRouting_t routing = nullptr;
    RANK_TRY(makeRouting(rank, shape, &routing));
    RANK_TRY(exchangeOnce(rank, routing, e));
    DispatchStyle style;
    if (missing != Missing::dispatch) style.flags = NCCL_MOE_SEND_ONLY;
    DispatchCall dispatch(*e.reference, rank.rank(), style);
    CombineCall combine(*e.reference, e.combine, rank.rank(), false, 0);
    RANK_TRY(rank.upload(dispatch, true));
    RANK_TRY(rank.upload(combine, false));
    RANK_TRY(meetAll(rank, meeting, nRanks));
    if (rank.rank() == 1) {
      if (missing == Missing::completion) {
        RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
      }
      sleepMs(1500);
      return "";
    }
    const auto start = Clock::now();
    if (missing != Missing::combine) {
      RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
      if (missing != Missing::dispatch) RANK_OK(ncclMoeComplete(routing, rank.comm(), rank.stream()), rank.comm());
    }
    if (missing == Missing::completion) RANK_TRY(asyncIs(rank, ncclSuccess)); // rank 1 has sent all that it had to
    if (missing == Missing::completion || missing == Missing::combine) {
      RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
    }
    RANK_CUDA(cudaStreamSynchronize(rank.stream()));
    const long long took = millisecondsSince(start);
    RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 1"));
    RANK_CHECK(took > 500 && took < 1400, "it took %lld ms", took);
    return refusesCalls(rank, routing, e);
  });
  EXPECT_EQ(wrong, "");
}

TEST(GpuLatencyErrors, RankThatNeverDispatchesIsNamed) {
  NEED_GPUS(1);
  rankIsMissing(Missing::dispatch, 3);
}
TEST(GpuLatencyErrors, RankThatNeverSendsIsNamed) {
  NEED_GPUS(1);
  rankIsMissing(Missing::dispatchInPhases, 2);
}
TEST(GpuLatencyErrors, RankThatNeverCombinesIsNamed) {
  NEED_GPUS(1);
  rankIsMissing(Missing::combine, 3);
}
TEST(GpuLatencyErrors, RankThatNeverCompletesIsNamed) {
  NEED_GPUS(1);
  rankIsMissing(Missing::completion, 2);
}

// Later replays end as soon as the first has failed.
TEST(GpuLatencyErrors, RankThatStopsReplayingIsNamed) {
  NEED_GPUS(1);
  DecodeShape shape;
  const DecodeCase e = lively(testSeed(), shape);
  DecodeRun run;
  run.timeoutMs = 600;
  const std::string wrong = runDecode(shape.world(), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
    ncclMoeRouting_t routing = nullptr;
    RANK_TRY(makeRouting(rank, shape, &routing));
    CallPair calls(rank, e);
    RANK_TRY(calls.upload(rank, true));
    cudaGraphExec_t graph = nullptr;
    RANK_TRY(capture(rank, &graph, [&] { return calls.enqueue(rank, routing); }));
    RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
    RANK_TRY(asyncIs(rank, ncclSuccess));
    RANK_TRY(rank.download());
    RANK_TRY(calls.verify());
    RANK_TRY(meetAll(rank, meeting, 2));
    if (rank.rank() == 1) {
      sleepMs(1500);
    } else {
      const auto start = Clock::now();
      for (int replay = 0; replay < 20; replay++) RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
      RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 1"));
      const long long took = millisecondsSince(start);
      RANK_CHECK(took > 500 && took < 1400, "it took %lld ms", took);
    }
    RANK_CUDA(cudaGraphExecDestroy(graph));
    return "";
  });
  EXPECT_EQ(wrong, "");
}

// As far as the host knows of them: it hears of the rows with hostCounts alone, and must not go by what it heard long
// ago.
TEST(GpuLatencyErrors, MissingRowsOfACombineAreRefused) {
  NEED_GPUS(1);
  DecodeShape shape;
  shape.layout = ncclMoeLayoutExpertMajor;
  const DecodeCase e = lively(testSeed(), shape);
  for (const int hostCounts : {1, 0}) {
    const std::string wrong = runDecode(shape.world(), DecodeRun(), [&](GpuRank& rank, Meeting&) -> std::string {
      ncclMoeRouting_t routing = nullptr;
      ncclMoeRoutingConfig_t config = shape.routing();
      config.hostCounts = hostCounts;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
      DispatchCall tight(*e.reference, rank.rank(), DispatchStyle());
      RANK_TRY(rank.upload(tight, true));
      tight.args().recvCapacity = e.reference->rowsNeeded(rank.rank()) - 1;
      RANK_OK(ncclMoeDispatch(&tight.args(), routing, rank.comm(), rank.stream()), rank.comm());
      RANK_TRY(asyncIs(rank, ncclInvalidUsage, "args.recvCapacity"));
      rank.forget();
      RANK_TRY(exchangeOnce(rank, routing, e)); // the first good one after a refused one
      DispatchCall dispatch(*e.reference, rank.rank(), DispatchStyle());
      CombineCall combine(*e.reference, e.combine, rank.rank(), false, 0);
      RANK_TRY(rank.upload(dispatch, true));
      RANK_TRY(rank.upload(combine, false));
      ncclMoeCombineArgs_t args = combine.args();
      args.x = nullptr;
      if (hostCounts != 0) {
        RANK_RESULT(ncclMoeCombine(&args, routing, rank.comm(), rank.stream()), ncclInvalidArgument, rank.comm(),
                    "args.x");
        args = combine.args();
        args.withGradWeights = 1;
        args.gradWeights = nullptr;
        args.gradTopkWeights = static_cast<float*>(args.out); // never written
        RANK_RESULT(ncclMoeCombine(&args, routing, rank.comm(), rank.stream()), ncclInvalidArgument, rank.comm(),
                    "args.gradWeights");
      }
      dispatch.args().nTokens = 0; // nobody has any, and no rank receives one
      RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
      RANK_TRY(asyncIs(rank, ncclSuccess));
      args = combine.args();
      args.x = nullptr;
      RANK_OK(ncclMoeCombine(&args, routing, rank.comm(), rank.stream()), rank.comm());
      RANK_TRY(asyncIs(rank, ncclSuccess));
      rank.forget();
      return exchangeOnce(rank, routing, e);
    });
    EXPECT_EQ(wrong, "") << "hostCounts " << hostCounts;
  }
}

TEST(GpuLatencyErrors, AbortEndsTheWait) {
  NEED_GPUS(1);
  DecodeShape shape;
  const DecodeCase e = lively(testSeed(), shape);
  const std::string wrong =
    runGpu(2, RanksAs::threads, 60000, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      for (const bool inPhases : {false, true}) {
        const World world = shape.world();
        ncclMoeConfig_t config = world.config();
        config.mode = ncclMoeModeLatency;
        config.numSms = 8;
        GpuRank rank(r, 2, r % gpuCount());
        RANK_TRY(rank.init(config, meeting, size_t{32} << 20));
        ncclMoeRouting_t routing = nullptr;
        RANK_TRY(makeRouting(rank, shape, &routing));
        RANK_TRY(exchangeOnce(rank, routing, e));
        if (r == 0) {
          DispatchStyle style;
          if (inPhases) style.flags = NCCL_MOE_SEND_ONLY;
          DispatchCall call(*e.reference, r, style);
          RANK_TRY(rank.upload(call, true));
          RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
          if (inPhases) RANK_OK(ncclMoeComplete(routing, rank.comm(), rank.stream()), rank.comm());
          const auto start = Clock::now();
          std::thread aborter([&] {
            sleepMs(200);
            ncclMoeCommAbort(rank.comm());
          });
          const cudaError_t ended = cudaStreamSynchronize(rank.stream());
          aborter.join();
          RANK_CUDA(ended);
          const long long took = millisecondsSince(start);
          RANK_CHECK(took >= 150 && took < 2000, "it took %lld ms", took);
          RANK_TRY(asyncIs(rank, ncclRemoteError, "aborted"));
          RANK_TRY(refusesCalls(rank, routing, e));
        }
        RANK_TRY(meetAll(rank, *meeting, 2));
        RANK_TRY(rank.destroy());
      }
      return "";
    });
  EXPECT_EQ(wrong, "");
}

TEST(GpuLatencyErrors, KilledRankIsNamed) {
  NEED_GPUS(1);
  DecodeShape shape;
  const DecodeCase e = lively(testSeed(), shape);
  DecodeRun run;
  run.as = RanksAs::processes;
  run.timeoutMs = 2000;
  const std::vector<std::string> said = runDecodeRanks(shape.world(), run, [&](GpuRank& rank, Meeting&) -> std::string {
    ncclMoeRouting_t routing = nullptr;
    RANK_TRY(makeRouting(rank, shape, &routing));
    RANK_TRY(exchangeOnce(rank, routing, e));
    if (rank.rank() == 1) raise(SIGKILL);
    const auto start = Clock::now();
    DispatchCall dispatch(*e.reference, rank.rank(), DispatchStyle());
    RANK_TRY(rank.upload(dispatch, true));
    RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
    RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 1"));
    const long long took = millisecondsSince(start);
    RANK_CHECK(took < 4000, "it took %lld ms", took);
    return refusesCalls(rank, routing, e);
  });
  EXPECT_EQ(said[0], "");
  EXPECT_NE(said[1], "");
}

// What rank 1 does otherwise.
struct Difference {
  const char* name;
  bool combine; // rank 0 combines
  std::function<std::string(GpuRank& rank, ncclMoeRouting_t routing, DispatchCall& dispatch, CombineCall& combine)>
    call;
};

TEST(GpuLatencyErrors, RanksThatDisagreeAreNamed) {
  NEED_GPUS(1);
  DecodeShape shape;
  const DecodeCase e = lively(testSeed(), shape);
  const auto dispatchWith = [](const std::function<void(ncclMoeDispatchArgs_t&)>& change) {
    return [change](GpuRank& rank, ncclMoeRouting_t routing, DispatchCall& dispatch, CombineCall&) -> std::string {
      ncclMoeDispatchArgs_t args = dispatch.args();
      change(args);
      RANK_OK(ncclMoeDispatch(&args, routing, rank.comm(), rank.stream()), rank.comm());
      return "";
    };
  };
  const auto combineWith = [](const std::function<void(ncclMoeCombineArgs_t&)>& change) {
    return [change](GpuRank& rank, ncclMoeRouting_t routing, DispatchCall&, CombineCall& combine) -> std::string {
      ncclMoeCombineArgs_t args = combine.args();
      change(args);
      RANK_OK(ncclMoeCombine(&args, routing, rank.comm(), rank.stream()), rank.comm());
      return "";
    };
  };
  const Difference differences[] = {
    {"hidden", false, dispatchWith([](ncclMoeDispatchArgs_t& a) { a.hidden = 256; })},
    {"type", false, dispatchWith([](ncclMoeDispatchArgs_t& a) { a.type = ncclMoeFloat8e4m3; })},
    {"keep", false, dispatchWith([](ncclMoeDispatchArgs_t& a) { a.flags |= NCCL_MOE_KEEP_ROUTING; })},
    {"combine for dispatch", false, combineWith([](ncclMoeCombineArgs_t&) {})},
    {"dispatch for combine", true, dispatchWith([](ncclMoeDispatchArgs_t&) {})},
    {"hidden of combine", true, combineWith([](ncclMoeCombineArgs_t& a) { a.hidden = 256; })},
    {"type of combine", true, combineWith([](ncclMoeCombineArgs_t& a) { a.type = ncclFloat16; })},
    {"quant of combine", true, combineWith([](ncclMoeCombineArgs_t& a) { a.quant = ncclMoeQuantFp8; })},
    {"exact", true, combineWith([](ncclMoeCombineArgs_t& a) { a.flags |= NCCL_MOE_EXACT; })},
  };
  const std::string wrong =
    runGpu(2, RanksAs::threads, 60000, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      for (const Difference& difference : differences) {
        const World world = shape.world();
        ncclMoeConfig_t config = world.config();
        config.mode = ncclMoeModeLatency;
        config.numSms = 8;
        config.timeoutMs = 3000;
        GpuRank rank(r, 2, r % gpuCount());
        RANK_TRY(rank.init(config, meeting, size_t{32} << 20));
        const std::string bad = [&]() -> std::string {
          ncclMoeRouting_t routing = nullptr;
          RANK_TRY(makeRouting(rank, shape, &routing));
          RANK_TRY(exchangeOnce(rank, routing, e));
          DispatchCall dispatch(*e.reference, r, DispatchStyle());
          CombineCall combine(*e.reference, e.combine, r, false, 0);
          RANK_TRY(rank.upload(dispatch, true));
          RANK_TRY(rank.upload(combine, false));
          if (r == 1) {
            RANK_TRY(difference.call(rank, routing, dispatch, combine));
          } else if (difference.combine) {
            RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
          } else {
            RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
          }
          RANK_TRY(asyncIs(rank, ncclInvalidUsage, r == 0 ? "rank 1" : "rank 0"));
          return refusesCalls(rank, routing, e);
        }();
        if (!bad.empty()) return std::string(difference.name) + ": " + bad;
        RANK_TRY(rank.destroy());
      }
      return "";
    });
  EXPECT_EQ(wrong, "");
}

TEST(GpuLatencyErrors, CallsOfDifferentRoutingsTimeOut) {
  NEED_GPUS(1);
  DecodeShape shape;
  const DecodeCase e = lively(testSeed(), shape);
  DecodeRun run;
  run.timeoutMs = 600;
  const std::string wrong = runDecode(shape.world(), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
    ncclMoeRouting_t routings[2] = {};
    for (ncclMoeRouting_t& routing : routings) RANK_TRY(makeRouting(rank, shape, &routing));
    DispatchCall dispatch(*e.reference, rank.rank(), DispatchStyle());
    RANK_TRY(rank.upload(dispatch, false));
    RANK_TRY(meetAll(rank, meeting, 2));
    RANK_OK(ncclMoeDispatch(&dispatch.args(), routings[rank.rank()], rank.comm(), rank.stream()), rank.comm());
    RANK_TRY(asyncIs(rank, ncclRemoteError, rank.rank() == 0 ? "from rank 1" : "from rank 0"));
    return refusesCalls(rank, routings[0], e);
  });
  EXPECT_EQ(wrong, "");
}

TEST(GpuLatencyErrors, BadIndexNamesTokenAndPosition) {
  NEED_GPUS(1);
  DecodeShape shape;
  const DecodeCase e = lively(testSeed(), shape);
  const std::string wrong = runDecode(shape.world(), DecodeRun(), [&](GpuRank& rank, Meeting&) -> std::string {
    ncclMoeRouting_t routing = nullptr;
    RANK_TRY(makeRouting(rank, shape, &routing));
    for (const bool inPhases : {false, true}) {
      for (const BadExpert bad : kBadExperts) {
        DispatchStyle style;
        if (inPhases) style.flags = NCCL_MOE_SEND_ONLY;
        DispatchCall call(*e.reference, rank.rank(), style);
        RANK_TRY(rank.upload(call, true));
        if (rank.rank() == 0) RANK_TRY(spoilIndex(call, shape.topK, 3, bad));
        RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
        if (inPhases) RANK_OK(ncclMoeComplete(routing, rank.comm(), rank.stream()), rank.comm());
        if (rank.rank() == 0) {
          RANK_TRY(asyncIs(rank, ncclInvalidArgument, "topkIdx,token 3,position 2"));
        } else {
          RANK_TRY(asyncIs(rank, ncclSuccess));
        }
        rank.forget();
        RANK_TRY(exchangeOnce(rank, routing, e)); // and all is well again
      }
    }
    return "";
  });
  EXPECT_EQ(wrong, "");
}

TEST(GpuLatencyErrors, CapacityExceededNamesRankAndSizeAndWritesNothing) {
  NEED_GPUS(1);
  constexpr int kRanks = 3;
  DecodeShape shapes[3];
  shapes[0].layout = ncclMoeLayoutRankMajor;
  shapes[1].layout = shapes[2].layout = ncclMoeLayoutExpertMajor;
  shapes[2].alignment = 8;
  shapes[1].quant = ncclMoeQuantFp8;
  for (DecodeShape& shape : shapes) shape.nRanks = kRanks;
  DecodeRun run;
  run.nRanks = kRanks;
  const std::string wrong = runDecode(shapes[0].world(), run, [&](GpuRank& rank, Meeting&) -> std::string {
    for (const DecodeShape& shape : shapes) {
      const DecodeCase e = lively(testSeed(), shape);
      const long long needed = e.reference->rowsNeeded(1);
      ncclMoeRouting_t routing = nullptr;
      RANK_TRY(makeRouting(rank, shape, &routing));
      for (const bool inPhases : {false, true}) {
        for (const long long capacity : {needed - 1, 1ll}) {
          DispatchStyle style;
          if (inPhases) style.flags = NCCL_MOE_SEND_ONLY;
          DispatchCall call(*e.reference, rank.rank(), style);
          RANK_TRY(rank.upload(call, true));
          if (rank.rank() == 1) call.args().recvCapacity = capacity;
          RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
          if (inPhases) RANK_OK(ncclMoeComplete(routing, rank.comm(), rank.stream()), rank.comm());
          const std::string mentions = format("rank 1,%lld,%lld", needed, capacity);
          RANK_TRY(asyncIs(rank, ncclInvalidUsage, mentions));
          int64_t nRows = -1;
          RANK_RESULT(ncclMoeRoutingGetCounts(routing, rank.comm(), &nRows, nullptr), ncclInvalidUsage, rank.comm(),
                      mentions);
          RANK_CHECK(nRows == e.reference->delivery(rank.rank()).nRows);
          RANK_TRY(rank.download());
          RANK_TRY(call.verifyRowsUntouched());
          rank.forget();
          RANK_TRY(exchangeOnce(rank, routing, e)); // and all is well again
        }
        // As many rows as there are, to the row.
        DispatchStyle tight;
        tight.slack = 0;
        DispatchCall call(*e.reference, rank.rank(), tight);
        RANK_TRY(rank.upload(call, true));
        RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
        RANK_TRY(asyncIs(rank, ncclSuccess));
        RANK_TRY(rank.download());
        RANK_TRY(call.verify());
        rank.forget();
      }
      RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
    }
    return "";
  });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << testSeed();
}

TEST(GpuLatencyErrors, WhatItCannotServeIsRefused) {
  NEED_GPUS(1);
  DecodeShape shape;
  const DecodeCase e = lively(testSeed(), shape);
  World world = shape.world();
  world.maxTokens = 1 << 16;
  world.maxRowBytes = 1024;
  const std::string wrong = runDecode(world, DecodeRun(), [&](GpuRank& rank, Meeting&) -> std::string {
    ncclMoeRouting_t routing = nullptr;
    RANK_TRY(makeRouting(rank, shape, &routing));
    ncclMoeRouting_t none = nullptr;
    ncclMoeRoutingConfig_t config = shape.routing();
    config.maxTokens = world.maxTokens;
    RANK_RESULT(ncclMoeRoutingCreate(&none, rank.comm(), &config), ncclInvalidUsage, rank.comm(),
                "ncclMoeModeLatency,65536,shared memory");
    RANK_CHECK(none == nullptr);
    RANK_TRY(exchangeOnce(rank, routing, e));
    DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
    RANK_TRY(rank.upload(call, true));
    ncclMoeDispatchArgs_t args = call.args();
    args.scales = args.recvScales = args.recvX; // never read
    args.scaleBytes = 1024;
    RANK_RESULT(ncclMoeDispatch(&args, routing, rank.comm(), rank.stream()), ncclInvalidUsage, rank.comm(),
                "scaleBytes");
    rank.forget();
    return exchangeOnce(rank, routing, e);
  });
  EXPECT_EQ(wrong, "");
  world = shape.world();
  world.nExperts = 4095;
  world.expertToRank = blockPlacement(world.nExperts, 2);
  for (const ncclMoeMode_t mode : {ncclMoeModeLatency, ncclMoeModeAuto}) {
    DecodeRun run;
    run.mode = mode;
    const std::string many = runDecode(world, run, [&](GpuRank& rank, Meeting&) -> std::string {
      ncclMoeRouting_t made = nullptr;
      const ncclMoeRoutingConfig_t config = shape.routing();
      if (mode == ncclMoeModeAuto) {
        RANK_OK(ncclMoeRoutingCreate(&made, rank.comm(), &config), rank.comm()); // the other kernels serve it
        return "";
      }
      RANK_RESULT(ncclMoeRoutingCreate(&made, rank.comm(), &config), ncclInvalidUsage, rank.comm(),
                  "config.nExperts 4095,4094");
      return "";
    });
    EXPECT_EQ(many, "") << "mode " << mode;
  }
}

// A routing may go while a half of a call is missing, and its memory serves the next.
TEST(GpuLatencyErrors, UncompletedCallsMayBeLeft) {
  NEED_GPUS(1);
  constexpr int kRounds = 6;
  const uint64_t seed = testSeed();
  DecodeShape most;
  most.nTokens = 64;
  most.topK = 8;
  const std::string wrong = runDecode(most.world(), DecodeRun(), [&](GpuRank& rank, Meeting&) -> std::string {
    for (int round = 0; round < kRounds; round++) {
      const DecodeShape shape = randomShape(seed + static_cast<uint64_t>(round), 2);
      const DecodeCase e = makeDecode(seed + static_cast<uint64_t>(round), shape);
      ncclMoeRouting_t routing = nullptr;
      RANK_TRY(makeRouting(rank, shape, &routing));
      RANK_TRY(exchangeOnce(rank, routing, e));
      DispatchStyle style;
      style.flags = round % 2 == 0 ? NCCL_MOE_SEND_ONLY : 0u;
      DispatchCall dispatch(*e.reference, rank.rank(), style);
      CombineCall combine(*e.reference, e.combine, rank.rank(), false, NCCL_MOE_SEND_ONLY);
      RANK_TRY(rank.upload(dispatch, true));
      RANK_TRY(rank.upload(combine, false));
      RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
      if (round % 2 == 1) RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
      if (round + 1 < kRounds) RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
      rank.forget();
    }
    return ""; // the communicator goes with the last
  });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

} // namespace
} // namespace moe::test
