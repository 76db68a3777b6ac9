// What surrounds the collectives on GPUs: graphs, streams, several communicators, errors, ranks that are lost.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "gpu/exchange_case.h"
#include "gpu/occupy.h"

namespace moe::test {
namespace {

constexpr size_t kArenaBytes = size_t{128} << 20;
constexpr int kTimeLimitMs = 60000;

// Makes a rank of the case and its routing, and runs the body.
using Body = std::function<std::string(GpuRank& rank, ncclMoeRouting_t routing)>;
GpuBody withRank(const ExchangeCase& e, const Body& body, int timeoutMs = 10000) {
  const int nDevices = gpuCount();
  return [&e, body, timeoutMs, nDevices](int r, std::shared_ptr<Meeting> meeting) -> std::string {
    GpuRank rank(r, e.world.nRanks, r % nDevices);
    const ncclMoeConfig_t config = configFor(e, timeoutMs);
    RANK_TRY(rank.init(config, meeting, kArenaBytes));
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &e.routing), rank.comm());
    RANK_TRY(body(rank, routing));
    return rank.destroy();
  };
}

TEST(GpuBehaviour, GraphReplaysWithChangingRoutings) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  const ExchangeCase first = makeExchange(seed, 3, 200, 256);
  const std::string wrong = runGpu(
    3, RanksAs::threads, kTimeLimitMs, withRank(first, [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
      constexpr size_t kPiece = size_t{8} << 20;
      DispatchStyle style;
      style.slack = 200 * 3 * 4 + 64 * 16; // any routing fits: the graph keeps the capacity
      ExchangeCase e = makeExchange(seed, 3, 200, 256);
      cudaGraphExec_t graph = nullptr;
      for (int replay = 0; replay < 40; replay++) {
        redraw(seed + 17 * static_cast<uint64_t>(replay), &e);
        rank.forget(kPiece);
        CallPair calls(rank, e, style);
        RANK_TRY(calls.upload(rank, false));
        if (graph == nullptr) RANK_TRY(capture(rank, &graph, [&] { return calls.enqueue(rank, routing); }));
        RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
        RANK_CUDA(cudaStreamSynchronize(rank.stream()));
        RANK_TRY(asyncIs(rank, ncclSuccess));
        RANK_TRY(rank.download());
        RANK_TRY(calls.verify());
      }
      RANK_CUDA(cudaGraphExecDestroy(graph));
      return "";
    }));
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

TEST(GpuBehaviour, TwoRoutingsOnTwoStreams) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  const ExchangeCase a = makeExchange(seed, 2, 300, 400), b = makeExchange(seed + 1, 2, 333, 400);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs, withRank(a, [&](GpuRank& rank, ncclMoeRouting_t routingA) -> std::string {
             ncclMoeRouting_t routingB = nullptr;
             RANK_OK(ncclMoeRoutingCreate(&routingB, rank.comm(), &b.routing), rank.comm());
             cudaStream_t other = nullptr;
             RANK_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
             for (int round = 0; round < 20; round++) {
               CallPair callsA(rank, a), callsB(rank, b);
               RANK_TRY(callsA.upload(rank, true));
               RANK_TRY(callsB.upload(rank, false));
               RANK_OK(ncclMoeDispatch(&callsA.dispatch.args(), routingA, rank.comm(), rank.stream()), rank.comm());
               RANK_OK(ncclMoeDispatch(&callsB.dispatch.args(), routingB, rank.comm(), other), rank.comm());
               RANK_OK(ncclMoeCombine(&callsA.combine.args(), routingA, rank.comm(), other), rank.comm());
               RANK_OK(ncclMoeCombine(&callsB.combine.args(), routingB, rank.comm(), rank.stream()), rank.comm());
               RANK_CUDA(cudaStreamSynchronize(other));
               RANK_TRY(asyncIs(rank, ncclSuccess));
               RANK_TRY(rank.download());
               RANK_TRY(callsA.verify());
               RANK_TRY(callsB.verify());
               rank.forget();
             }
             RANK_CUDA(cudaStreamDestroy(other));
             return "";
           }));
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

TEST(GpuBehaviour, CapacityExceededNamesRankAndSizeAndWritesNothing) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 3, 100, 128);
  const long long needed = e.reference->rowsNeeded(1);
  const std::string wrong =
    runGpu(3, RanksAs::threads, kTimeLimitMs, withRank(e, [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
             for (const bool reachable : {true, false}) {
               DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
               RANK_TRY(rank.upload(call, reachable));
               if (rank.rank() == 1) call.args().recvCapacity = needed - 1;
               RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_TRY(asyncIs(rank, ncclInvalidUsage, "rank 1," + std::to_string(needed)));
               RANK_TRY(rank.download());
               RANK_TRY(call.verifyRowsUntouched());
               rank.forget();
               RANK_TRY(exchangeOnce(rank, routing, e)); // and all is well again
             }
             return "";
           }));
  EXPECT_EQ(wrong, "");
}

TEST(GpuBehaviour, BadIndexNamesTokenAndPosition) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs, withRank(e, [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
             for (const BadExpert bad : kBadExperts) {
               DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
               RANK_TRY(rank.upload(call, true));
               if (rank.rank() == 0) RANK_TRY(spoilIndex(call, e.routing.topK, 33, bad));
               RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
               if (rank.rank() == 0) {
                 RANK_TRY(asyncIs(rank, ncclInvalidArgument, "topkIdx,token 33"));
               } else {
                 RANK_TRY(asyncIs(rank, ncclSuccess));
               }
               RANK_CUDA(cudaDeviceSynchronize());
               rank.forget();
               RANK_TRY(exchangeOnce(rank, routing, e));
             }
             return "";
           }));
  EXPECT_EQ(wrong, "");
}

// What the host knows to be missing is refused before anything is enqueued.
TEST(GpuBehaviour, MissingRowsOfACombineAreRefused) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs, withRank(e, [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
             RANK_TRY(exchangeOnce(rank, routing, e));
             CombineCall call(*e.reference, e.combine, rank.rank(), false, 0);
             RANK_TRY(rank.upload(call, false));
             ncclMoeCombineArgs_t args = call.args();
             args.x = nullptr;
             RANK_RESULT(ncclMoeCombine(&args, routing, rank.comm(), rank.stream()), ncclInvalidArgument, rank.comm(),
                         "args.x");
             std::vector<float> zeros(50 * 4);
             args = call.args();
             args.withGradWeights = 1;
             args.gradWeights = nullptr;
             args.gradTopkWeights = zeros.data(); // never written
             RANK_RESULT(ncclMoeCombine(&args, routing, rank.comm(), rank.stream()), ncclInvalidArgument, rank.comm(),
                         "args.gradWeights");
             rank.forget();
             return exchangeOnce(rank, routing, e);
           }));
  EXPECT_EQ(wrong, "");
}

TEST(GpuBehaviour, RankThatNeverCallsIsNamed) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 3, 50, 64);
  const std::string wrong =
    runGpu(3, RanksAs::threads, kTimeLimitMs,
           withRank(
             e,
             [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
               RANK_TRY(exchangeOnce(rank, routing, e));
               DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
               RANK_TRY(rank.upload(call, true));
               if (rank.rank() == 1) {
                 std::this_thread::sleep_for(std::chrono::milliseconds(1500));
                 return "";
               }
               const auto start = std::chrono::steady_clock::now();
               RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_CUDA(cudaStreamSynchronize(rank.stream()));
               const auto took = std::chrono::steady_clock::now() - start;
               RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 1"));
               RANK_CHECK(took < std::chrono::milliseconds(2000), "it took %lld ms",
                          static_cast<long long>(std::chrono::duration_cast<std::chrono::milliseconds>(took).count()));
               return refusesCalls(rank, routing, e);
             },
             600));
  EXPECT_EQ(wrong, "");
}

TEST(GpuBehaviour, RankThatNeverCombinesIsNamed) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs,
           withRank(
             e,
             [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
               RANK_TRY(exchangeOnce(rank, routing, e));
               if (rank.rank() == 1) {
                 std::this_thread::sleep_for(std::chrono::milliseconds(1500));
                 return "";
               }
               CombineCall call(*e.reference, e.combine, rank.rank(), false, 0);
               RANK_TRY(rank.upload(call, true));
               RANK_OK(ncclMoeCombine(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 1"));
               return refusesCalls(rank, routing, e);
             },
             600));
  EXPECT_EQ(wrong, "");
}

TEST(GpuBehaviour, AbortEndsTheWait) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs, withRank(e, [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
             if (rank.rank() == 1) return "";
             DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
             RANK_TRY(rank.upload(call, true));
             const auto start = std::chrono::steady_clock::now();
             std::thread aborter([&] {
               std::this_thread::sleep_for(std::chrono::milliseconds(200));
               ncclMoeCommAbort(rank.comm());
             });
             const ncclResult_t result = ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream());
             const cudaError_t ended = cudaStreamSynchronize(rank.stream());
             aborter.join();
             RANK_CHECK(result == ncclSuccess && ended == cudaSuccess);
             RANK_CHECK(std::chrono::steady_clock::now() - start < std::chrono::milliseconds(5000));
             RANK_TRY(asyncIs(rank, ncclRemoteError, "aborted"));
             return refusesCalls(rank, routing, e);
           }));
  EXPECT_EQ(wrong, "");
}

TEST(GpuBehaviour, KilledRankIsNamed) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::vector<std::string> said =
    runGpuRanks(2, RanksAs::processes, kTimeLimitMs,
                withRank(
                  e,
                  [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
                    RANK_TRY(exchangeOnce(rank, routing, e));
                    if (rank.rank() == 1) raise(SIGKILL);
                    for (int call = 0; call < 3; call++) {
                      DispatchCall dispatch(*e.reference, rank.rank(), DispatchStyle());
                      rank.forget();
                      RANK_TRY(rank.upload(dispatch, true));
                      const ncclResult_t result =
                        ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream());
                      RANK_CHECK(call > 0 || result == ncclSuccess);
                      RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 1"));
                    }
                    return refusesCalls(rank, routing, e);
                  },
                  2000));
  EXPECT_EQ(said[0], "");
  EXPECT_NE(said[1], "");
}

// The same calls of two routings, in another order.
TEST(GpuBehaviour, AnotherOrderOfRoutingsIsAnError) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::string wrong = runGpu(
    2, RanksAs::threads, kTimeLimitMs,
    withRank(
      e,
      [&](GpuRank& rank, ncclMoeRouting_t first) -> std::string {
        ncclMoeRouting_t second = nullptr;
        RANK_OK(ncclMoeRoutingCreate(&second, rank.comm(), &e.routing), rank.comm());
        DispatchCall a(*e.reference, rank.rank(), DispatchStyle()), b(*e.reference, rank.rank(), DispatchStyle());
        RANK_TRY(rank.upload(a, true));
        RANK_TRY(rank.upload(b, true));
        ncclMoeRouting_t order[] = {first, second};
        if (rank.rank() == 1) std::swap(order[0], order[1]);
        RANK_OK(ncclMoeDispatch(&a.args(), order[0], rank.comm(), rank.stream()), rank.comm());
        (void)ncclMoeDispatch(&b.args(), order[1], rank.comm(), rank.stream()); // the first may have failed by now
        RANK_TRY(asyncIs(rank, ncclInvalidUsage, rank.rank() == 0 ? "rank 1" : "rank 0"));
        return refusesCalls(rank, first, e);
      },
      2000));
  EXPECT_EQ(wrong, "");
}

TEST(GpuBehaviour, DisagreementIsAnError) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs,
           withRank(
             e,
             [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
               DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
               RANK_TRY(rank.upload(call, true));
               if (rank.rank() == 1) call.args().hidden = 256;
               RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_TRY(asyncIs(rank, ncclInvalidUsage, rank.rank() == 0 ? "rank 1" : "rank 0"));
               return refusesCalls(rank, routing, e);
             },
             2000));
  EXPECT_EQ(wrong, "");
}

// Rank 0 has one SM: its blocks run one after the other, and the first does all the work.  The last ones start when
// rank 1 is in its next call.
TEST(GpuBehaviour, BlocksThatStartLateFinish) {
  NEED_GPUS(2);
  constexpr int kOccupiedMs = 800;
  const ExchangeCase e = makeExchange(testSeed(), 2, 100, 128);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs,
           withRank(
             e,
             [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
               RANK_TRY(exchangeOnce(rank, routing, e));
               DispatchCall dispatch(*e.reference, rank.rank(), DispatchStyle());
               CombineCall first(*e.reference, e.combine, rank.rank(), false, 0),
                 second(*e.reference, e.combine, rank.rank(), false, 0);
               RANK_TRY(rank.upload(dispatch, false));
               RANK_TRY(rank.upload(first, false));
               RANK_TRY(rank.upload(second, false));
               cudaStream_t other = nullptr;
               RANK_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
               if (rank.rank() == 0) {
                 int nSms = 0;
                 RANK_CUDA(cudaDeviceGetAttribute(&nSms, cudaDevAttrMultiProcessorCount, 0));
                 RANK_CUDA(occupySms(0, 0, other));
                 RANK_CUDA(occupySms(nSms - 1, kOccupiedMs, other));
                 std::this_thread::sleep_for(std::chrono::milliseconds(50)); // they are there
               }
               RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_OK(ncclMoeCombine(&first.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_OK(ncclMoeCombine(&second.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_TRY(asyncIs(rank, ncclSuccess));
               if (rank.rank() == 0) {
                 RANK_CHECK(cudaStreamQuery(other) == cudaErrorNotReady, "it took until the SMs were free, after %d ms",
                            kOccupiedMs);
                 (void)cudaGetLastError();
               }
               RANK_TRY(rank.download());
               RANK_TRY(dispatch.verify());
               RANK_TRY(first.verify());
               RANK_TRY(second.verify());
               RANK_CUDA(cudaStreamSynchronize(other));
               RANK_CUDA(cudaStreamDestroy(other));
               return "";
             },
             3000));
  EXPECT_EQ(wrong, "");
}

TEST(GpuBehaviour, CallsAroundACaptureStayOrdered) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 300, 400);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs, withRank(e, [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
             cudaStream_t other = nullptr, capturing = nullptr;
             RANK_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
             RANK_CUDA(cudaStreamCreateWithFlags(&capturing, cudaStreamNonBlocking));
             for (int round = 0; round < 20; round++) {
               DispatchCall dispatch(*e.reference, rank.rank(), DispatchStyle());
               CombineCall captured(*e.reference, e.combine, rank.rank(), false, 0),
                 combine(*e.reference, e.combine, rank.rank(), false, 0);
               RANK_TRY(rank.upload(dispatch, true));
               RANK_TRY(rank.upload(captured, false));
               RANK_TRY(rank.upload(combine, false));
               RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
               cudaGraph_t graph = nullptr;
               RANK_CUDA(cudaStreamBeginCapture(capturing, cudaStreamCaptureModeThreadLocal));
               RANK_OK(ncclMoeCombine(&captured.args(), routing, rank.comm(), capturing), rank.comm());
               RANK_CUDA(cudaStreamEndCapture(capturing, &graph));
               RANK_CUDA(cudaGraphDestroy(graph)); // never launched
               RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), other), rank.comm());
               RANK_CUDA(cudaStreamSynchronize(other));
               RANK_TRY(asyncIs(rank, ncclSuccess));
               RANK_TRY(rank.download());
               RANK_TRY(dispatch.verify());
               RANK_TRY(combine.verify());
               rank.forget();
             }
             RANK_CUDA(cudaStreamDestroy(other));
             RANK_CUDA(cudaStreamDestroy(capturing));
             return "";
           }));
  EXPECT_EQ(wrong, "");
}

// A call's result says nothing of what went wrong in the caller's own calls before.
TEST(GpuBehaviour, AnErrorOfTheCallersIsNotTheCalls) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs, withRank(e, [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
             CallPair calls(rank, e);
             RANK_TRY(calls.upload(rank, true));
             RANK_CHECK(cudaSetDevice(100000) != cudaSuccess);
             RANK_CHECK(cudaPeekAtLastError() != cudaSuccess);
             RANK_TRY(calls.enqueue(rank, routing));
             RANK_TRY(asyncIs(rank, ncclSuccess));
             (void)cudaGetLastError();
             RANK_TRY(rank.download());
             return calls.verify();
           }));
  EXPECT_EQ(wrong, "");
}

// More of them than there are windows, freed in another order on each rank, while another thread watches.
void routingsComeAndGo(RanksAs as) {
  const ExchangeCase e = makeExchange(testSeed(), 3, 60, 64);
  const std::string wrong =
    runGpu(3, as, kTimeLimitMs, withRank(e, [&](GpuRank& rank, ncclMoeRouting_t first) -> std::string {
             std::atomic<bool> done{false}, well{true};
             std::thread watcher([&] {
               while (!done.load()) {
                 ncclResult_t async = ncclSuccess;
                 if (ncclMoeCommGetAsyncError(rank.comm(), &async) != ncclSuccess || async != ncclSuccess) well = false;
                 std::this_thread::sleep_for(std::chrono::microseconds(100));
               }
             });
             const std::string failure = [&]() -> std::string {
               for (int round = 0; round < 60; round++) {
                 ncclMoeRouting_t routings[3] = {};
                 for (int i = 0; i < 3; i++) {
                   ncclMoeRoutingConfig_t config = e.routing;
                   config.maxTokens = i == 1 ? 0 : 60; // windows of two sizes
                   RANK_OK(ncclMoeRoutingCreate(&routings[i], rank.comm(), &config), rank.comm());
                 }
                 void* memory = nullptr;
                 RANK_OK(ncclMoeMemAlloc(&memory, size_t{3} << 20, rank.comm()), rank.comm());
                 if (round % 10 == 0) {
                   for (ncclMoeRouting_t routing : routings) RANK_TRY(exchangeOnce(rank, routing, e));
                   RANK_TRY(exchangeOnce(rank, first, e));
                 }
                 const int turn = round % 2 == 0 ? rank.rank() : 0; // in the other rounds all free in the same order
                 for (int i = 0; i < 3; i++) {
                   RANK_OK(ncclMoeRoutingDestroy(routings[(i + turn) % 3], rank.comm()), rank.comm());
                   if (i == turn) RANK_OK(ncclMoeMemFree(memory, rank.comm()), rank.comm());
                 }
               }
               return "";
             }();
             done = true;
             watcher.join();
             RANK_CHECK(failure.empty(), "%s", failure.c_str());
             RANK_CHECK(well.load(), "an async error while routings came and went");
             return "";
           }));
  EXPECT_EQ(wrong, "");
}

TEST(GpuBehaviour, RoutingsComeAndGoInThreads) {
  NEED_GPUS(1);
  routingsComeAndGo(RanksAs::threads);
}
TEST(GpuBehaviour, RoutingsComeAndGoInProcesses) {
  NEED_GPUS(1);
  routingsComeAndGo(RanksAs::processes);
}

TEST(GpuBehaviour, MemoryIsAsStatedAndComesBack) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 2, 50, 64);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      ncclMoeConfig_t config = configFor(e);
      size_t needed = 0;
      RANK_OK(ncclMoeCommMemoryNeeded(&config, 2, &needed), nullptr);
      size_t before = 0, after = 0, total = 0;
      for (int cycle = 0; cycle < 30; cycle++) {
        GpuRank rank(r, 2, r % gpuCount());
        RANK_TRY(rank.init(config, meeting, 0));
        ncclMoeRouting_t routing = nullptr;
        size_t routingBytes = 0;
        RANK_OK(ncclMoeRoutingMemoryNeeded(rank.comm(), &e.routing, &routingBytes), rank.comm());
        RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &e.routing), rank.comm());
        ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
        RANK_OK(ncclMoeCommGetInfo(rank.comm(), &info), rank.comm());
        RANK_CHECK(info.memoryBytes == needed + routingBytes, "%zu bytes, stated %zu + %zu", info.memoryBytes, needed,
                   routingBytes);
        RANK_CHECK(info.nRanks == 2 && info.rank == r && info.onHost == 0 && info.nScaleUpRanks == 2 &&
                   info.nLocalExperts == 8);
        RANK_TRY(rank.destroy());
        GpuRank barrier(r, 2, r % gpuCount()); // both have destroyed
        RANK_TRY(barrier.init(config, meeting, 0));
        RANK_TRY(barrier.destroy());
        RANK_CUDA(cudaMemGetInfo(cycle == 2 ? &before : &after, &total));
      }
      // The other rank may hold a communicator at either moment.
      RANK_CHECK(after + 2 * (needed + (size_t{4} << 20)) >= before, "%zu bytes were free, now %zu", before, after);
      config.maxMemory = needed - 1;
      GpuRank rank(r, 2, r % gpuCount());
      const std::string refused = rank.init(config, meeting, 0);
      RANK_CHECK(refused.find(std::to_string(needed)) != std::string::npos, "%s", refused.c_str());
      return "";
    });
  EXPECT_EQ(wrong, "");
}

// What the library says is what the device has less.  One rank, whose first communicator loads the kernels.
TEST(GpuBehaviour, MemoryIsWhatTheDeviceHasLess) {
  NEED_GPUS(1);
  const ExchangeCase e = makeExchange(testSeed(), 1, 3000, 3000);
  const std::string wrong =
    runGpu(1, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      constexpr size_t kPage = size_t{2} << 20; // small allocations share one
      const ncclMoeConfig_t config = configFor(e);
      for (int cycle = 0; cycle < 3; cycle++) {
        size_t before = 0, after = 0, total = 0;
        RANK_CUDA(cudaSetDevice(0));
        RANK_CUDA(cudaMemGetInfo(&before, &total));
        GpuRank rank(r, 1, 0);
        RANK_TRY(rank.init(config, meeting, 0));
        for (int n = 0; n < 3; n++) {
          ncclMoeRouting_t routing = nullptr;
          RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &e.routing), rank.comm());
        }
        RANK_CUDA(cudaMemGetInfo(&after, &total));
        ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
        RANK_OK(ncclMoeCommGetInfo(rank.comm(), &info), rank.comm());
        const size_t taken = before - after;
        RANK_CHECK(cycle == 0 || (taken + kPage >= info.memoryBytes && taken <= info.memoryBytes + kPage),
                   "%zu bytes, the device says %zu", info.memoryBytes, taken);
        RANK_TRY(rank.destroy());
      }
      return "";
    });
  EXPECT_EQ(wrong, "");
}

} // namespace
} // namespace moe::test
