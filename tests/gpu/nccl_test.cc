// On communicators of NCCL's own: threads, processes, split and non-blocking ones, and NCCL's collectives beside ours.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <type_traits>

#include "gpu/exchange_case.h"

namespace moe::test {
namespace {

constexpr size_t kArenaBytes = size_t{128} << 20;
constexpr int kTimeLimitMs = 60000;

// NCCL, opened as a program that links it would have it.
struct Nccl {
  decltype(&ncclGetUniqueId) getUniqueId = nullptr;
  decltype(&ncclCommInitRank) commInitRank = nullptr;
  decltype(&ncclCommInitRankConfig) commInitRankConfig = nullptr;
  decltype(&ncclCommGetAsyncError) commGetAsyncError = nullptr;
  decltype(&ncclCommDestroy) commDestroy = nullptr;
  decltype(&ncclCommAbort) commAbort = nullptr;
  decltype(&ncclCommSplit) commSplit = nullptr;
  decltype(&ncclAllReduce) allReduce = nullptr;
  bool open() {
    void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
    const auto find = [library](const char* name, auto* function) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
      return *function != nullptr;
    };
    return library != nullptr && find("ncclGetUniqueId", &getUniqueId) && find("ncclCommInitRank", &commInitRank) &&
           find("ncclCommInitRankConfig", &commInitRankConfig) && find("ncclCommGetAsyncError", &commGetAsyncError) &&
           find("ncclCommDestroy", &commDestroy) && find("ncclCommAbort", &commAbort) &&
           find("ncclCommSplit", &commSplit) && find("ncclAllReduce", &allReduce);
  }
};

// NCCL, on the rank's own device, and an id of rank 0's for a communicator.
std::string prepare(Nccl* nccl, Meeting& meeting, int rank, int nRanks, ncclUniqueId* id) {
  RANK_CHECK(nccl->open(), "no libnccl.so.2");
  RANK_CUDA(cudaSetDevice(rank));
  ncclUniqueId mine{};
  if (rank == 0) RANK_CHECK(nccl->getUniqueId(&mine) == ncclSuccess);
  std::vector<ncclUniqueId> ids(static_cast<size_t>(nRanks));
  RANK_CHECK(meet(meeting, rank, &mine, sizeof(mine), ids.data()));
  *id = ids[0];
  return "";
}
// And a communicator of all ranks.
std::string connect(Nccl* nccl, Meeting& meeting, int rank, int nRanks, ncclComm_t* comm) {
  ncclUniqueId id{};
  RANK_TRY(prepare(nccl, meeting, rank, nRanks, &id));
  RANK_CHECK(nccl->commInitRank(comm, nRanks, id, rank) == ncclSuccess);
  return "";
}

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
      ncclComm_t comm = nullptr;
      RANK_TRY(connect(&nccl, *meeting, r, nRanks, &comm));
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

// Sub-communicators: each rank by itself, and all of them in the reverse order.
TEST(GpuNccl, SplitCommunicators) {
  NEED_GPUS(2);
  const int nRanks = std::min(gpuCount(), 4);
  const uint64_t seed = testSeed();
  const ExchangeCase alone = makeExchange(seed, 1, 200, 256), together = makeExchange(seed + 1, nRanks, 200, 256);
  const std::string wrong =
    runGpu(nRanks, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      Nccl nccl;
      ncclComm_t comm = nullptr, single = nullptr, reversed = nullptr;
      RANK_TRY(connect(&nccl, *meeting, r, nRanks, &comm));
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

// NCCL's own collectives run beside ours on another stream, enqueued before ours on some ranks and behind them on
// others; and they go on after a timeout of ours.
TEST(GpuNccl, BesideItsOwnCollectives) {
  NEED_GPUS(2);
  constexpr int kRounds = 10, kTimeoutMs = 2000;
  constexpr size_t kCount = size_t{8} << 20;
  const int nRanks = std::min(gpuCount(), 4);
  const uint64_t seed = testSeed();
  const ExchangeCase e = makeExchange(seed, nRanks, 300, 300);
  const std::string wrong =
    runGpu(nRanks, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      Nccl nccl;
      ncclComm_t comm = nullptr;
      RANK_TRY(connect(&nccl, *meeting, r, nRanks, &comm));
      {
        const ncclMoeConfig_t config = configFor(e, kTimeoutMs);
        GpuRank rank(r, nRanks, r);
        RANK_TRY(rank.init([&](ncclMoeComm_t* moe) { return ncclMoeCommInit(moe, comm, &config); }, kArenaBytes));
        ncclMoeRouting_t routing = nullptr;
        RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &e.routing), rank.comm());
        cudaStream_t other = nullptr;
        float* x = nullptr;
        RANK_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
        RANK_CUDA(cudaMalloc(&x, kCount * sizeof(float)));
        std::vector<float> values(kCount);
        const auto reduce = [&](int round) -> std::string {
          std::fill(values.begin(), values.end(), static_cast<float>(r + round));
          RANK_CUDA(cudaMemcpyAsync(x, values.data(), kCount * sizeof(float), cudaMemcpyHostToDevice, other));
          RANK_CHECK(nccl.allReduce(x, x, kCount, ncclFloat32, ncclSum, comm, other) == ncclSuccess);
          return "";
        };
        const auto checkSum = [&](int round) -> std::string {
          RANK_CUDA(cudaMemcpyAsync(values.data(), x, kCount * sizeof(float), cudaMemcpyDeviceToHost, other));
          RANK_CUDA(cudaStreamSynchronize(other));
          int sum = 0;
          for (int peer = 0; peer < nRanks; peer++) sum += peer + round;
          const auto want = static_cast<float>(sum);
          for (const float got : values) RANK_CHECK(got == want, "a sum is %g instead of %g", got, want);
          return "";
        };
        RANK_TRY(reduce(-1)); // NCCL connects the ranks, and waits for them on the host there
        RANK_TRY(checkSum(-1));
        for (int round = 0; round < kRounds; round++) {
          CallPair calls(rank, e);
          RANK_TRY(calls.upload(rank, round % 2 == 0));
          const bool ncclFirst = (r + round) % 2 == 0;
          if (ncclFirst) RANK_TRY(reduce(round));
          RANK_TRY(calls.enqueue(rank, routing));
          if (!ncclFirst) RANK_TRY(reduce(round));
          RANK_TRY(asyncIs(rank, ncclSuccess));
          RANK_TRY(checkSum(round));
          RANK_TRY(rank.download());
          RANK_TRY(calls.verify());
          rank.forget();
        }
        if (r != 1) {
          DispatchCall alone(*e.reference, r, DispatchStyle());
          RANK_TRY(rank.upload(alone, true));
          RANK_OK(ncclMoeDispatch(&alone.args(), routing, rank.comm(), rank.stream()), rank.comm());
          RANK_TRY(asyncIs(rank, ncclRemoteError, "rank 1"));
        }
        RANK_TRY(reduce(kRounds));
        RANK_TRY(checkSum(kRounds));
        RANK_CUDA(cudaFree(x));
        RANK_CUDA(cudaStreamDestroy(other));
        RANK_TRY(rank.destroy());
      }
      RANK_CHECK(nccl.commDestroy(comm) == ncclSuccess);
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
      ncclUniqueId id{};
      RANK_TRY(prepare(&nccl, *meeting, r, nRanks, &id));
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
      const ncclMoeConfig_t config = configFor(e, 1000);
      int one = 1, all[2] = {};
      for (const bool initComes : {false, true}) {
        ncclComm_t comm = nullptr;
        RANK_TRY(connect(&nccl, *meeting, r, 2, &comm));
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
