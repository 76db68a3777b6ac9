// What surrounds the collectives on GPUs: graphs, streams, several communicators, errors, ranks that are lost.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <thread>

#include "gpu/exchange_case.h"

namespace moe::test {
namespace {

constexpr size_t kArenaBytes = size_t{128} << 20;
constexpr int kTimeLimitMs = 60000;

ncclMoeConfig_t configFor(const ExchangeCase& e, int timeoutMs = 10000) {
  ncclMoeConfig_t config = e.world.config();
  config.numSms = 8;
  config.timeoutMs = timeoutMs;
  return config;
}

// Waits for the rank's stream, not for the device, where another rank's kernel may wait for this rank's next.
std::string asyncIs(GpuRank& rank, ncclResult_t want, const std::string& mentions = "") {
  RANK_CUDA(cudaStreamSynchronize(rank.stream()));
  ncclResult_t async = ncclSuccess;
  RANK_OK(ncclMoeCommGetAsyncError(rank.comm(), &async), rank.comm());
  return expectResult("async error", async, want, rank.comm(), mentions);
}

// A dispatch and a combine of the case, checked.
std::string exchangeOnce(GpuRank& rank, ncclMoeRouting_t routing, const ExchangeCase& e) {
  DispatchCall dispatch(*e.reference, rank.rank(), DispatchStyle());
  CombineCall combine(*e.reference, e.combine, rank.rank(), false, 0);
  RANK_TRY(rank.upload(dispatch, true));
  RANK_TRY(rank.upload(combine, false));
  RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
  RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
  RANK_CUDA(cudaStreamSynchronize(rank.stream()));
  RANK_TRY(asyncIs(rank, ncclSuccess));
  RANK_TRY(rank.download());
  RANK_TRY(dispatch.verify());
  RANK_TRY(combine.verify());
  rank.forget();
  return "";
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
        DispatchCall dispatch(*e.reference, rank.rank(), style);
        CombineCall combine(*e.reference, e.combine, rank.rank(), false, 0);
        RANK_TRY(rank.upload(dispatch, false));
        RANK_TRY(rank.upload(combine, false));
        if (graph == nullptr) {
          cudaGraph_t captured = nullptr;
          RANK_CUDA(cudaStreamBeginCapture(rank.stream(), cudaStreamCaptureModeThreadLocal));
          RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
          RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
          RANK_CUDA(cudaStreamEndCapture(rank.stream(), &captured));
          RANK_CUDA(cudaGraphInstantiate(&graph, captured, 0));
          RANK_CUDA(cudaGraphDestroy(captured));
        }
        RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
        RANK_CUDA(cudaStreamSynchronize(rank.stream()));
        RANK_TRY(asyncIs(rank, ncclSuccess));
        RANK_TRY(rank.download());
        RANK_TRY(dispatch.verify());
        RANK_TRY(combine.verify());
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
               DispatchCall dispatchA(*a.reference, rank.rank(), DispatchStyle()),
                 dispatchB(*b.reference, rank.rank(), DispatchStyle());
               CombineCall combineA(*a.reference, a.combine, rank.rank(), false, 0),
                 combineB(*b.reference, b.combine, rank.rank(), false, 0);
               RANK_TRY(rank.upload(dispatchA, true));
               RANK_TRY(rank.upload(dispatchB, false));
               RANK_TRY(rank.upload(combineA, false));
               RANK_TRY(rank.upload(combineB, false));
               RANK_OK(ncclMoeDispatch(&dispatchA.args(), routingA, rank.comm(), rank.stream()), rank.comm());
               RANK_OK(ncclMoeDispatch(&dispatchB.args(), routingB, rank.comm(), other), rank.comm());
               RANK_OK(ncclMoeCombine(&combineA.args(), routingA, rank.comm(), other), rank.comm());
               RANK_OK(ncclMoeCombine(&combineB.args(), routingB, rank.comm(), rank.stream()), rank.comm());
               RANK_CUDA(cudaStreamSynchronize(other));
               RANK_TRY(asyncIs(rank, ncclSuccess));
               RANK_TRY(rank.download());
               RANK_TRY(dispatchA.verify());
               RANK_TRY(dispatchB.verify());
               RANK_TRY(combineA.verify());
               RANK_TRY(combineB.verify());
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
             for (const int64_t bad : {int64_t{16}, int64_t{-2}, int64_t{1} << 40, int64_t{-1000}}) {
               DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
               RANK_TRY(rank.upload(call, true));
               if (rank.rank() == 0) {
                 int64_t* idx = static_cast<int64_t*>(const_cast<void*>(call.args().topkIdx));
                 int64_t value = bad;
                 if (bad == -1000)
                   RANK_CUDA(cudaMemcpy(&value, idx + 33 * 4 + 1, 8, cudaMemcpyDeviceToHost)); // repeated
                 RANK_CUDA(cudaMemcpy(idx + 33 * 4 + 2, &value, 8, cudaMemcpyHostToDevice));
               }
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

// After a communicator has failed: the context lives, calls are refused, destroy works.
std::string aftermath(GpuRank& rank, ncclMoeRouting_t routing, const ExchangeCase& e) {
  DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
  rank.forget();
  RANK_TRY(rank.upload(call, true));
  RANK_CHECK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()) != ncclSuccess);
  RANK_CUDA(cudaStreamSynchronize(rank.stream()));
  RANK_CUDA(cudaGetLastError());
  return "";
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
               return aftermath(rank, routing, e);
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
               return aftermath(rank, routing, e);
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
             return aftermath(rank, routing, e);
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
                    return aftermath(rank, routing, e);
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
               return aftermath(rank, routing, e);
             },
             2000));
  EXPECT_EQ(wrong, "");
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
  decltype(&ncclCommDestroy) commDestroy = nullptr;
  bool open() {
    void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) return false;
    getUniqueId = reinterpret_cast<decltype(getUniqueId)>(dlsym(library, "ncclGetUniqueId"));
    commInitRank = reinterpret_cast<decltype(commInitRank)>(dlsym(library, "ncclCommInitRank"));
    commDestroy = reinterpret_cast<decltype(commDestroy)>(dlsym(library, "ncclCommDestroy"));
    return getUniqueId != nullptr && commInitRank != nullptr && commDestroy != nullptr;
  }
};

void onNccl(RanksAs as) {
  const int nRanks = std::min(gpuCount(), 4);
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

} // namespace
} // namespace moe::test
