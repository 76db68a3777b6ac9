// What surrounds the collectives on GPUs: graphs, streams, several communicators, errors, ranks that are lost.
#include <dlfcn.h>
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

ncclMoeConfig_t configFor(const ExchangeCase& e, int timeoutMs = 10000) {
  ncclMoeConfig_t config = e.world.config();
  config.mode = ncclMoeModeThroughput;
  config.numSms = 8;
  config.timeoutMs = timeoutMs;
  return config;
}

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

// Rank 0 has one SM: its blocks run one after the other, and the first does all the work.  The last ones start when rank 1 is in
// its next combine.
TEST(GpuBehaviour, BlocksThatStartLateFinish) {
  NEED_GPUS(2);
  const ExchangeCase e = makeExchange(testSeed(), 2, 100, 128);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs,
           withRank(
             e,
             [&](GpuRank& rank, ncclMoeRouting_t routing) -> std::string {
               RANK_TRY(exchangeOnce(rank, routing, e));
               CombineCall first(*e.reference, e.combine, rank.rank(), false, 0),
                 second(*e.reference, e.combine, rank.rank(), false, 0);
               RANK_TRY(rank.upload(first, false));
               RANK_TRY(rank.upload(second, false));
               cudaStream_t other = nullptr;
               RANK_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
               if (rank.rank() == 0) {
                 int nSms = 0;
                 RANK_CUDA(cudaDeviceGetAttribute(&nSms, cudaDevAttrMultiProcessorCount, 0));
                 RANK_CUDA(occupySms(0, 0, other));
                 RANK_CUDA(occupySms(nSms - 1, 500, other));
                 std::this_thread::sleep_for(std::chrono::milliseconds(50)); // they are there
               }
               RANK_OK(ncclMoeCombine(&first.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_OK(ncclMoeCombine(&second.args(), routing, rank.comm(), rank.stream()), rank.comm());
               RANK_TRY(asyncIs(rank, ncclSuccess));
               RANK_TRY(rank.download());
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

// NCCL, opened as a program that links it would have it.
struct Nccl {
  decltype(&ncclGetUniqueId) getUniqueId = nullptr;
  decltype(&ncclCommInitRank) commInitRank = nullptr;
  decltype(&ncclCommInitRankConfig) commInitRankConfig = nullptr;
  decltype(&ncclCommGetAsyncError) commGetAsyncError = nullptr;
  decltype(&ncclCommDestroy) commDestroy = nullptr;
  decltype(&ncclCommAbort) commAbort = nullptr;
  decltype(&ncclCommSplit) commSplit = nullptr;
  bool open() {
    void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) return false;
    getUniqueId = reinterpret_cast<decltype(getUniqueId)>(dlsym(library, "ncclGetUniqueId"));
    commInitRank = reinterpret_cast<decltype(commInitRank)>(dlsym(library, "ncclCommInitRank"));
    commInitRankConfig = reinterpret_cast<decltype(commInitRankConfig)>(dlsym(library, "ncclCommInitRankConfig"));
    commGetAsyncError = reinterpret_cast<decltype(commGetAsyncError)>(dlsym(library, "ncclCommGetAsyncError"));
    commDestroy = reinterpret_cast<decltype(commDestroy)>(dlsym(library, "ncclCommDestroy"));
    commAbort = reinterpret_cast<decltype(commAbort)>(dlsym(library, "ncclCommAbort"));
    commSplit = reinterpret_cast<decltype(commSplit)>(dlsym(library, "ncclCommSplit"));
    return getUniqueId != nullptr && commInitRank != nullptr && commInitRankConfig != nullptr &&
           commGetAsyncError != nullptr && commDestroy != nullptr && commAbort != nullptr && commSplit != nullptr;
  }
};

void onNccl(RanksAs as) {
  const int nRanks = gpuCount();
  const uint64_t seed = testSeed();
  const ExchangeCase e = makeExchange(seed, nRanks, 300, 400);
  const std::string wrong =
    runGpu(nRanks, as, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      const ncclMoeConfig_t config = configFor(e);
      ncclMoeComm_t none = nullptr;
      RANK_RESULT(ncclMoeCommInit(&none, nullptr, &config), ncclInvalidArgument, nullptr, "comm");
      Nccl nccl;
      RANK_CHECK(nccl.open(), "no libnccl.so.2");
      RANK_CUDA(cudaSetDevice(r));
      ncclUniqueId mine{};
      if (r == 0) RANK_CHECK(nccl.getUniqueId(&mine) == ncclSuccess);
      std::vector<ncclUniqueId> ids(static_cast<size_t>(nRanks));
      RANK_CHECK(meet(*meeting, r, &mine, sizeof(mine), ids.data()));
      ncclComm_t comm = nullptr;
      RANK_CHECK(nccl.commInitRank(&comm, nRanks, ids[0], r) == ncclSuccess);
      {
        // Two MoE communicators on one NCCL communicator.
        GpuRank a(r, nRanks, r), b(r, nRanks, r);
        const auto make = [&](ncclMoeComm_t* moe) { return ncclMoeCommInit(moe, comm, &config); };
        RANK_TRY(a.init(make, kArenaBytes));
        RANK_TRY(b.init(make, kArenaBytes));
        for (GpuRank* rank : {&a, &b, &a}) {
          ncclMoeRouting_t routing = nullptr;
          RANK_OK(ncclMoeRoutingCreate(&routing, rank->comm(), &e.routing), rank->comm());
          for (int n = 0; n < 5; n++) RANK_TRY(exchangeOnce(*rank, routing, e));
          RANK_OK(ncclMoeRoutingDestroy(routing, rank->comm()), rank->comm());
        }
        RANK_TRY(a.destroy());
        RANK_TRY(b.destroy());
      }
      RANK_CHECK(nccl.commDestroy(comm) == ncclSuccess);
      return "";
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

TEST(GpuNccl, ThreadsOnAnNcclCommunicator) {
  NEED_GPUS(1);
  onNccl(RanksAs::threads);
}
TEST(GpuNccl, ProcessesOnAnNcclCommunicator) {
  NEED_GPUS(1);
  onNccl(RanksAs::processes);
}

// An id of rank 0's, on every rank.
std::string sharedId(const Nccl& nccl, Meeting& meeting, int rank, int nRanks, ncclUniqueId* id) {
  ncclUniqueId mine{};
  if (rank == 0) RANK_CHECK(nccl.getUniqueId(&mine) == ncclSuccess);
  std::vector<ncclUniqueId> ids(static_cast<size_t>(nRanks));
  RANK_CHECK(meet(meeting, rank, &mine, sizeof(mine), ids.data()));
  *id = ids[0];
  return "";
}

// Sub-communicators: each rank by itself, and all of them in the reverse order.
TEST(GpuNccl, SplitCommunicators) {
  NEED_GPUS(2);
  const int nRanks = std::min(gpuCount(), 4);
  const uint64_t seed = testSeed();
  const ExchangeCase alone = makeExchange(seed, 1, 200, 256), together = makeExchange(seed + 1, nRanks, 200, 256);
  const std::string wrong =
    runGpu(nRanks, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      Nccl nccl;
      RANK_CHECK(nccl.open(), "no libnccl.so.2");
      RANK_CUDA(cudaSetDevice(r));
      ncclUniqueId id{};
      RANK_TRY(sharedId(nccl, *meeting, r, nRanks, &id));
      ncclComm_t comm = nullptr, single = nullptr, reversed = nullptr;
      RANK_CHECK(nccl.commInitRank(&comm, nRanks, id, r) == ncclSuccess);
      RANK_CHECK(nccl.commSplit(comm, r, 0, &single, nullptr) == ncclSuccess);
      RANK_CHECK(nccl.commSplit(comm, 0, nRanks - r, &reversed, nullptr) == ncclSuccess);
      {
        const ncclMoeConfig_t configAlone = configFor(alone), configTogether = configFor(together);
        GpuRank a(0, 1, r), b(nRanks - 1 - r, nRanks, r);
        RANK_TRY(a.init([&](ncclMoeComm_t* moe) { return ncclMoeCommInit(moe, single, &configAlone); }, kArenaBytes));
        RANK_TRY(
          b.init([&](ncclMoeComm_t* moe) { return ncclMoeCommInit(moe, reversed, &configTogether); }, kArenaBytes));
        ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
        RANK_OK(ncclMoeCommGetInfo(b.comm(), &info), b.comm());
        RANK_CHECK(info.rank == nRanks - 1 - r && info.nRanks == nRanks);
        ncclMoeRouting_t routingA = nullptr, routingB = nullptr;
        RANK_OK(ncclMoeRoutingCreate(&routingA, a.comm(), &alone.routing), a.comm());
        RANK_OK(ncclMoeRoutingCreate(&routingB, b.comm(), &together.routing), b.comm());
        for (int n = 0; n < 3; n++) {
          RANK_TRY(exchangeOnce(a, routingA, alone));
          RANK_TRY(exchangeOnce(b, routingB, together));
        }
        RANK_TRY(a.destroy());
        RANK_TRY(b.destroy());
      }
      for (ncclComm_t each : {single, reversed, comm}) RANK_CHECK(nccl.commDestroy(each) == ncclSuccess);
      return "";
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

TEST(GpuNccl, NonBlockingCommunicator) {
  NEED_GPUS(1);
  const int nRanks = gpuCount();
  const ExchangeCase e = makeExchange(testSeed(), nRanks, 100, 128);
  const std::string wrong =
    runGpu(nRanks, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      Nccl nccl;
      RANK_CHECK(nccl.open(), "no libnccl.so.2");
      RANK_CUDA(cudaSetDevice(r));
      ncclUniqueId id{};
      RANK_TRY(sharedId(nccl, *meeting, r, nRanks, &id));
      ncclConfig_t ncclConfig = NCCL_CONFIG_INITIALIZER;
      ncclConfig.blocking = 0;
      ncclComm_t comm = nullptr;
      ncclResult_t state = nccl.commInitRankConfig(&comm, nRanks, id, r, &ncclConfig);
      RANK_CHECK(state == ncclSuccess || state == ncclInProgress);
      while (state == ncclInProgress) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        RANK_CHECK(nccl.commGetAsyncError(comm, &state) == ncclSuccess);
      }
      RANK_CHECK(state == ncclSuccess);
      {
        const ncclMoeConfig_t config = configFor(e);
        GpuRank rank(r, nRanks, r);
        RANK_TRY(rank.init([&](ncclMoeComm_t* moe) { return ncclMoeCommInit(moe, comm, &config); }, kArenaBytes));
        ncclMoeRouting_t routing = nullptr;
        RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &e.routing), rank.comm());
        RANK_TRY(exchangeOnce(rank, routing, e));
        RANK_TRY(rank.destroy());
      }
      int one = 1;
      std::vector<int> all(static_cast<size_t>(nRanks));
      RANK_CHECK(meet(*meeting, r, &one, sizeof(one), all.data()));
      state = nccl.commAbort(comm);
      RANK_CHECK(state == ncclSuccess || state == ncclInProgress);
      return "";
    });
  EXPECT_EQ(wrong, "");
}

// Init, routing and destroy end in time though NCCL's own kernel, which waits for the other rank, does not.
TEST(GpuNccl, RankThatDoesNotComeToASetup) {
  NEED_GPUS(2);
  const ExchangeCase e = makeExchange(testSeed(), 2, 100, 128);
  const std::string wrong =
    runGpu(2, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      Nccl nccl;
      RANK_CHECK(nccl.open(), "no libnccl.so.2");
      RANK_CUDA(cudaSetDevice(r));
      const ncclMoeConfig_t config = configFor(e, 1000);
      int one = 1, all[2] = {};
      for (const bool initComes : {false, true}) {
        ncclUniqueId id{};
        RANK_TRY(sharedId(nccl, *meeting, r, 2, &id));
        ncclComm_t comm = nullptr;
        RANK_CHECK(nccl.commInitRank(&comm, 2, id, r) == ncclSuccess);
        ncclMoeComm_t connected = nullptr; // NCCL connects at its first collective, and waits on the host there
        RANK_OK(ncclMoeCommInit(&connected, comm, &config), nullptr);
        RANK_CHECK(meet(*meeting, r, &one, sizeof(one), all));
        if (r == 0) {
          const auto start = std::chrono::steady_clock::now();
          if (initComes) {
            ncclMoeRouting_t routing = nullptr;
            RANK_RESULT(ncclMoeRoutingCreate(&routing, connected, &e.routing), ncclRemoteError, connected, "1000 ms");
          } else {
            ncclMoeComm_t moe = nullptr;
            RANK_RESULT(ncclMoeCommInit(&moe, comm, &config), ncclRemoteError, nullptr, "1000 ms");
            RANK_CHECK(moe == nullptr);
          }
          if (initComes) RANK_RESULT(ncclMoeCommDestroy(connected), ncclRemoteError, nullptr, "occupies the device");
          RANK_CHECK(std::chrono::steady_clock::now() - start < std::chrono::milliseconds(4000));
        }
        RANK_CHECK(meet(*meeting, r, &one, sizeof(one), all));
        RANK_CHECK(nccl.commAbort(comm) == ncclSuccess);
        RANK_CHECK(meet(*meeting, r, &one, sizeof(one), all));
        if (r == 1 || !initComes) RANK_OK(ncclMoeCommDestroy(connected), nullptr);
        RANK_CUDA(cudaDeviceSynchronize());
      }
      return "";
    });
  EXPECT_EQ(wrong, "");
}

} // namespace
} // namespace moe::test
