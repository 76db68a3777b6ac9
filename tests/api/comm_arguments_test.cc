// The same as arguments_test.cc for communicators, routings and their memory, and where errors' sentences are found.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "api/one_rank.h"

namespace moe::test {
namespace {

struct BadInit {
  const char* what;
  std::function<void(ncclMoeConfig_t&)> spoil;
  const char* mentions;
};

TEST(Arguments, Init) {
  static const int badMap[kExperts] = {0, 0, 1, 0};
  static const int negativeMap[kExperts] = {0, -1, 0, 0};
  static const std::string longToken(256, 'a');
  static const std::vector<BadInit> table = {
    {"no magic", [](ncclMoeConfig_t& c) { c.magic = 1; }, "config"},
    {"size 4", [](ncclMoeConfig_t& c) { c.size = 4; }, "config"},
    {"nExperts 0", [](ncclMoeConfig_t& c) { c.nExperts = 0; }, "config.nExperts"},
    {"nExperts too large", [](ncclMoeConfig_t& c) { c.nExperts = (1 << 20) + 1; }, "config.nExperts"},
    {"maxTokens negative", [](ncclMoeConfig_t& c) { c.maxTokens = -1; }, "config.maxTokens"},
    {"maxTokens too large", [](ncclMoeConfig_t& c) { c.maxTokens = (1 << 24) + 1; }, "config.maxTokens"},
    {"maxTopK 0", [](ncclMoeConfig_t& c) { c.maxTopK = 0; }, "config.maxTopK"},
    {"maxTopK 33", [](ncclMoeConfig_t& c) { c.maxTopK = 33; }, "config.maxTopK"},
    {"maxRowBytes 0", [](ncclMoeConfig_t& c) { c.maxRowBytes = 0; }, "config.maxRowBytes"},
    {"maxRowBytes 24", [](ncclMoeConfig_t& c) { c.maxRowBytes = 24; }, "config.maxRowBytes"},
    {"maxRowBytes too large", [](ncclMoeConfig_t& c) { c.maxRowBytes = (1 << 24) + 16; }, "config.maxRowBytes"},
    {"mode unknown", [](ncclMoeConfig_t& c) { c.mode = static_cast<ncclMoeMode_t>(9); }, "config.mode"},
    {"numSms negative", [](ncclMoeConfig_t& c) { c.numSms = -1; }, "config.numSms"},
    {"timeoutMs negative", [](ncclMoeConfig_t& c) { c.timeoutMs = -1; }, "config.timeoutMs"},
    {"expert on a rank that is not", [](ncclMoeConfig_t& c) { c.expertToRank = badMap; }, "config.expertToRank[2]"},
    {"expert on rank -1", [](ncclMoeConfig_t& c) { c.expertToRank = negativeMap; }, "config.expertToRank[1]"},
    {"jobToken too long", [](ncclMoeConfig_t& c) { c.jobToken = longToken.c_str(); }, "config.jobToken"},
  };
  EXPECT_EQ(
    runOne([&](Rank& rank) -> std::string {
      const char* url = rank.rendezvous().c_str();
      ncclMoeConfig_t good = goodConfig();
      for (const BadInit& bad : table) {
        ncclMoeConfig_t config = goodConfig();
        bad.spoil(config);
        ncclMoeComm_t comm = reinterpret_cast<ncclMoeComm_t>(8);
        const std::string where = std::string("init with ") + bad.what;
        const ncclResult_t result = ncclMoeCommInitHost(&comm, 1, 0, url, &config);
        const std::string wrong = expectResult(where.c_str(), result, ncclInvalidArgument, nullptr, bad.mentions);
        if (!wrong.empty()) return wrong;
        RANK_CHECK(comm == nullptr, "%s left a communicator", where.c_str());
        size_t bytes = 77;
        RANK_TRY(expectResult(where.c_str(), ncclMoeCommMemoryNeeded(&config, 1, &bytes), ncclInvalidArgument, nullptr,
                              bad.mentions));
        RANK_CHECK(bytes == 77);
      }
      size_t bytes = 0;
      RANK_RESULT(ncclMoeCommMemoryNeeded(nullptr, 2, &bytes), ncclInvalidArgument, nullptr, "config");
      RANK_RESULT(ncclMoeCommMemoryNeeded(&good, 0, &bytes), ncclInvalidArgument, nullptr, "nRanks");
      RANK_RESULT(ncclMoeCommMemoryNeeded(&good, 2, nullptr), ncclInvalidArgument, nullptr, "bytes");
      RANK_RESULT(ncclMoeCommMemoryNeeded(&good, 65, &bytes), ncclInvalidUsage, nullptr, "65 ranks, 64 ");
      ncclMoeConfig_t many = goodConfig();
      many.nExperts = 8193;
      RANK_RESULT(ncclMoeCommMemoryNeeded(&many, 2, &bytes), ncclInvalidUsage, nullptr, "config.nExperts 8193, 8192 ");
#ifdef NCCL_MOE_NO_CUDA
      RANK_RESULT(ncclMoeCommMemoryNeeded(&good, 2, &bytes), ncclInvalidUsage, nullptr, "host memory only");
#else
      RANK_OK(ncclMoeCommMemoryNeeded(&good, 2, &bytes), nullptr);
      RANK_CHECK(bytes > 0);
#endif
      // Not in a process without NCCL, and not in a build without CUDA.
      ncclMoeComm_t onNccl = reinterpret_cast<ncclMoeComm_t>(8);
      const auto noNccl = reinterpret_cast<ncclComm_t>(&good);
      RANK_RESULT(ncclMoeCommInit(nullptr, noNccl, &good), ncclInvalidArgument, nullptr, "moe");
      RANK_RESULT(ncclMoeCommInit(&onNccl, nullptr, &good), ncclInvalidArgument, nullptr, "comm");
      RANK_CHECK(onNccl == nullptr);
      onNccl = reinterpret_cast<ncclMoeComm_t>(8);
      RANK_RESULT(ncclMoeCommInit(&onNccl, noNccl, &good), ncclInvalidUsage, nullptr, "ncclMoeCommInit");
      RANK_CHECK(onNccl == nullptr);
      ncclMoeComm_t comm = nullptr;
      RANK_RESULT(ncclMoeCommInitHost(nullptr, 1, 0, url, &good), ncclInvalidArgument, nullptr, "moe");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 1, 0, url, nullptr), ncclInvalidArgument, nullptr, "config");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 0, 0, url, &good), ncclInvalidArgument, nullptr, "nRanks");
      RANK_RESULT(ncclMoeCommInitHost(&comm, -1, 0, url, &good), ncclInvalidArgument, nullptr, "nRanks");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 1025, 0, url, &good), ncclInvalidArgument, nullptr, "nRanks");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 2, url, &good), ncclInvalidArgument, nullptr, "rank 2");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, -1, url, &good), ncclInvalidArgument, nullptr, "rank -1");
      for (const char* badUrl :
           {"", "file", "file:/", "file://", "file://relative/path", "tcp://", "tcp://localhost", "tcp://:1234",
            "tcp://localhost:", "tcp://localhost:0", "tcp://localhost:65536", "tcp://localhost:-1",
            "tcp://localhost:12x", "udp://localhost:1234", "/tmp/x", "TCP//localhost:1"}) {
        const std::string where = std::string("init with rendezvous \"") + badUrl + "\"";
        const ncclResult_t result = ncclMoeCommInitHost(&comm, 2, 0, badUrl, &good);
        const std::string wrong = expectResult(where.c_str(), result, ncclInvalidArgument, nullptr, "rendezvous");
        if (!wrong.empty()) return wrong;
      }
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 0, nullptr, &good), ncclInvalidArgument, nullptr, "rendezvous");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 0, "file:///nonexistent-folder/x", &good), ncclSystemError, nullptr,
                  "/nonexistent-folder/x");
      good.jobToken = nullptr;
      const std::string tcp = "tcp://127.0.0.1:" + std::to_string(freePort());
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 0, tcp.c_str(), &good), ncclInvalidArgument, nullptr, "jobToken");
      RANK_CHECK(comm == nullptr);
      // The environment may give it.
      good = goodConfig();
      RANK_OK(ncclMoeCommInitHost(&comm, 1, 0, url, &good), nullptr);
      RANK_OK(ncclMoeCommDestroy(comm), nullptr);
      return "";
    }),
    "");
}

// A child of fork has the memory and the sockets of its parent's rank: what it sends would be taken for the rank's.
TEST(Arguments, ChildOfForkIsRefused) {
  ASSERT_EQ(runOne([](Rank& rank) -> std::string {
              const ncclMoeConfig_t config = goodConfig();
              ncclMoeComm_t comm = nullptr;
              ncclMoeRouting_t routing = nullptr;
              const ncclMoeRoutingConfig_t routingConfig = goodRouting(kRankMajor);
              RANK_OK(ncclMoeCommInitHost(&comm, 1, 0, rank.rendezvous().c_str(), &config), nullptr);
              RANK_OK(ncclMoeRoutingCreate(&routing, comm, &routingConfig), comm);
              const pid_t child = fork();
              if (child == 0) {
                Tensors t;
                ncclMoeDispatchArgs_t dispatch = t.dispatch();
                const bool refused = ncclMoeDispatch(&dispatch, routing, comm, nullptr) == ncclInvalidUsage &&
                                     strstr(ncclMoeGetLastError(comm), "child") != nullptr &&
                                     ncclMoeCommAbort(comm) == ncclInvalidUsage &&
                                     ncclMoeCommDestroy(comm) == ncclInvalidUsage;
                _exit(refused ? 0 : 1);
              }
              int status = -1;
              RANK_CHECK(waitpid(child, &status, 0) == child && status == 0, "the child's status is %d", status);
              RANK_TRY(exchange(comm, routing, kRankMajor));
              RANK_OK(ncclMoeCommDestroy(comm), nullptr);
              return "";
            }),
            "");
}

// Too little names what is needed; exactly that is enough, and no more is taken.
TEST(Arguments, MaxMemory) {
  ClusterOptions options;
  options.nRanks = 2;
  const ClusterResult result = runRanks(options, [](Rank& rank) -> std::string {
    ncclMoeConfig_t config = goodConfig();
    config.maxMemory = 1;
    ncclMoeComm_t comm = reinterpret_cast<ncclMoeComm_t>(8);
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2, rank.rank(), rank.rendezvous().c_str(), &config), ncclInvalidArgument,
                nullptr, "config.maxMemory 1 ");
    RANK_CHECK(comm == nullptr);
    const std::string sentence = ncclMoeGetLastError(nullptr);
    size_t needed = 0;
    RANK_CHECK(sscanf(sentence.c_str(), "%*[^:]: config.maxMemory 1 is less than the %zu bytes", &needed) == 1, "%s",
               sentence.c_str());
    config.maxMemory = needed - 1;
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2, rank.rank(), rank.rendezvous().c_str(), &config), ncclInvalidArgument,
                nullptr, "maxMemory," + std::to_string(needed));
    config.maxMemory = needed;
    RANK_OK(rank.init(config), nullptr);
    ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
    RANK_OK(ncclMoeCommGetInfo(rank.comm(), &info), rank.comm());
    RANK_CHECK(info.memoryBytes <= needed, "%zu bytes needed, but %zu are taken", needed, info.memoryBytes);
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

struct BadRouting {
  const char* what;
  std::function<void(ncclMoeRoutingConfig_t&)> spoil;
  const char* mentions;
};

TEST(Arguments, Routing) {
  static const std::vector<BadRouting> table = {
    {"no magic", [](ncclMoeRoutingConfig_t& c) { c.magic = 0; }, "config"},
    {"size 15", [](ncclMoeRoutingConfig_t& c) { c.size = 15; }, "config"},
    {"topK 0", [](ncclMoeRoutingConfig_t& c) { c.topK = 0; }, "config.topK"},
    {"topK beyond maxTopK", [](ncclMoeRoutingConfig_t& c) { c.topK = kTopK + 1; }, "config.topK"},
    {"maxTokens negative", [](ncclMoeRoutingConfig_t& c) { c.maxTokens = -1; }, "config.maxTokens"},
    {"maxTokens too large", [](ncclMoeRoutingConfig_t& c) { c.maxTokens = kMaxTokens + 1; }, "config.maxTokens"},
    {"layout unknown", [](ncclMoeRoutingConfig_t& c) { c.layout = static_cast<ncclMoeLayout_t>(3); }, "config.layout"},
    {"alignment negative", [](ncclMoeRoutingConfig_t& c) { c.expertAlignment = -1; }, "config.expertAlignment"},
    {"alignment too large", [](ncclMoeRoutingConfig_t& c) { c.expertAlignment = 65537; }, "config.expertAlignment"},
    {"alignment of RANK_MAJOR",
     [](ncclMoeRoutingConfig_t& c) {
       c.layout = kRankMajor;
       c.expertAlignment = 2;
     },
     "config.expertAlignment"},
    {"hostCounts 2", [](ncclMoeRoutingConfig_t& c) { c.hostCounts = 2; }, "config.hostCounts"},
  };
  EXPECT_EQ(
    runOne([&](Rank& rank) -> std::string {
      RANK_OK(rank.init(goodConfig()), nullptr);
      const ncclMoeComm_t comm = rank.comm();
      size_t bytes = 0;
      for (const BadRouting& bad : table) {
        ncclMoeRoutingConfig_t config = goodRouting(kExpertMajor);
        bad.spoil(config);
        const std::string where = std::string("routing with ") + bad.what;
        ncclMoeRouting_t routing = reinterpret_cast<ncclMoeRouting_t>(8);
        std::string wrong = expectResult(where.c_str(), ncclMoeRoutingCreate(&routing, comm, &config),
                                         ncclInvalidArgument, comm, bad.mentions);
        if (!wrong.empty()) return wrong;
        RANK_CHECK(routing == nullptr, "%s left a routing", where.c_str());
        wrong = expectResult(where.c_str(), ncclMoeRoutingMemoryNeeded(comm, &config, &bytes), ncclInvalidArgument,
                             comm, bad.mentions);
        if (!wrong.empty()) return wrong;
      }
      ncclMoeRoutingConfig_t config = goodRouting(kExpertMajor);
      ncclMoeRouting_t routing = nullptr;
      RANK_RESULT(ncclMoeRoutingCreate(nullptr, comm, &config), ncclInvalidArgument, comm, "routing");
      RANK_RESULT(ncclMoeRoutingCreate(&routing, nullptr, &config), ncclInvalidArgument, nullptr, "moe");
      RANK_RESULT(ncclMoeRoutingCreate(&routing, comm, nullptr), ncclInvalidArgument, comm, "config");
      RANK_RESULT(ncclMoeRoutingMemoryNeeded(comm, &config, nullptr), ncclInvalidArgument, comm, "bytes");
      RANK_OK(ncclMoeRoutingMemoryNeeded(comm, &config, &bytes), comm);
      int64_t nRows = 0;
      RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
      RANK_RESULT(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), ncclInvalidUsage, comm, "hostCounts");
      RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
      config.hostCounts = 1;
      RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
      RANK_RESULT(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), ncclInvalidUsage, comm, "dispatch");
      RANK_RESULT(ncclMoeRoutingGetCounts(routing, comm, nullptr, nullptr), ncclInvalidArgument, comm, "nRows");
      RANK_RESULT(ncclMoeRoutingGetCounts(nullptr, comm, &nRows, nullptr), ncclInvalidArgument, comm, "routing");
      RANK_RESULT(ncclMoeRoutingGetCounts(routing, nullptr, &nRows, nullptr), ncclInvalidArgument, nullptr, "moe");
      RANK_TRY(exchange(comm, routing, kExpertMajor));
      RANK_OK(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), comm);
      RANK_CHECK(nRows == kRows);
      RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
      RANK_OK(ncclMoeRoutingDestroy(nullptr, comm), comm);
      return "";
    }),
    "");
}

// The host backend has the bounds of latency mode on GPUs, in the same words, and in no other mode.
TEST(Arguments, ShapesThatLatencyModeCannotServe) {
  // (L+1) * (R * (ceil(maxTokens/32) + 1) + 1) + E + 6R ints, at most 24576: with one rank and 4 experts 5 * 4913 + 10.
  constexpr int kMostTokens = 4911 * 32;
  struct Bad {
    int nExperts, maxTokens;
    const char* mentions;
  };
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              for (const Bad& bad : {Bad{4095, 32, "config.nExperts 4095 , 4094 ,ncclMoeModeLatency"},
                                     Bad{kExperts, kMostTokens + 1, "config.maxTokens 157153, 98320 bytes, 98304 "}}) {
                for (const ncclMoeMode_t mode : {ncclMoeModeLatency, ncclMoeModeAuto, ncclMoeModeThroughput}) {
                  const ncclMoeConfig_t config = [&] {
                    ncclMoeConfig_t c = makeConfig(bad.nExperts, bad.maxTokens, kTopK, 64, 5000 * kSlow);
                    c.mode = mode;
                    return c;
                  }();
                  const std::string url = rank.rendezvous() + std::to_string(bad.nExperts) + std::to_string(mode);
                  ncclMoeComm_t comm = nullptr;
                  ncclMoeRouting_t routing = nullptr;
                  size_t bytes = 0;
                  RANK_OK(ncclMoeCommInitHost(&comm, 1, 0, url.c_str(), &config), nullptr);
                  ncclMoeRoutingConfig_t bound = goodRouting(kExpertMajor);
                  if (mode == ncclMoeModeLatency) {
                    RANK_RESULT(ncclMoeRoutingMemoryNeeded(comm, &bound, &bytes), ncclInvalidUsage, comm, bad.mentions);
                    RANK_RESULT(ncclMoeRoutingCreate(&routing, comm, &bound), ncclInvalidUsage, comm, bad.mentions);
                    RANK_CHECK(bytes == 0 && routing == nullptr);
                    if (bad.nExperts == kExperts) bound.maxTokens = kMostTokens;
                  }
                  if (mode != ncclMoeModeLatency || bad.nExperts == kExperts) {
                    RANK_OK(ncclMoeRoutingMemoryNeeded(comm, &bound, &bytes), comm);
                    RANK_OK(ncclMoeRoutingCreate(&routing, comm, &bound), comm);
                  }
                  RANK_OK(ncclMoeCommDestroy(comm), nullptr);
                }
              }
              return "";
            }),
            "");
}

// As on a GPU: counts between the halves of a dispatch are throughput mode's alone, sums as FP8 are latency mode's.
TEST(Arguments, WhatDependsOnTheMode) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              for (const ncclMoeMode_t mode : {ncclMoeModeLatency, ncclMoeModeAuto, ncclMoeModeThroughput}) {
                for (const int maxTokens : {512, 513}) {
                  ncclMoeConfig_t config = makeConfig(kExperts, maxTokens, kTopK, 64, 5000 * kSlow);
                  config.mode = mode;
                  const std::string url = rank.rendezvous() + std::to_string(maxTokens) + std::to_string(mode);
                  ncclMoeComm_t comm = nullptr;
                  ncclMoeRouting_t routing = nullptr;
                  RANK_OK(ncclMoeCommInitHost(&comm, 1, 0, url.c_str(), &config), nullptr);
                  ncclMoeRoutingConfig_t routingConfig = goodRouting(kExpertMajor);
                  routingConfig.hostCounts = 1;
                  RANK_OK(ncclMoeRoutingCreate(&routing, comm, &routingConfig), comm);
                  const Tensors t;
                  ncclMoeDispatchArgs_t args = t.dispatch();
                  args.flags = NCCL_MOE_SEND_ONLY;
                  RANK_OK(ncclMoeDispatch(&args, routing, comm, nullptr), comm);
                  int64_t nRows = -1;
                  const bool throughput =
                    mode == ncclMoeModeThroughput || (mode == ncclMoeModeAuto && maxTokens == 513);
                  if (throughput) {
                    RANK_OK(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), comm);
                    RANK_CHECK(nRows == kRows);
                  } else {
                    RANK_RESULT(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), ncclInvalidUsage, comm,
                                "SEND_ONLY,ncclMoeComplete");
                    RANK_CHECK(nRows == -1);
                  }
                  RANK_OK(ncclMoeComplete(routing, comm, nullptr), comm);
                  RANK_OK(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), comm);
                  RANK_CHECK(nRows == kRows);
                  ncclMoeCombineArgs_t sums = t.combine();
                  sums.quant = ncclMoeQuantFp8;
                  if (throughput) {
                    RANK_RESULT(ncclMoeCombine(&sums, routing, comm, nullptr), ncclInvalidUsage, comm,
                                "args.quant,latency mode");
                    RANK_CHECK(t.out.untouched());
                  } else {
                    RANK_OK(ncclMoeCombine(&sums, routing, comm, nullptr), comm);
                    for (int i = 0; i < kTokens * kHidden; i++) RANK_CHECK(t.out.as<uint16_t>()[i] == 0x4000); // 2
                  }
                  RANK_OK(ncclMoeCommDestroy(comm), nullptr);
                }
              }
              return "";
            }),
            "");
}

TEST(Arguments, CommunicatorAndMemory) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              int version = 0;
              RANK_RESULT(ncclMoeGetVersion(nullptr), ncclInvalidArgument, nullptr, "version");
              RANK_OK(ncclMoeGetVersion(&version), nullptr);
              RANK_CHECK(version == NCCL_MOE_VERSION_CODE, "%d", version);
              version = 0;
              RANK_OK(pncclMoeGetVersion(&version), nullptr);
              RANK_CHECK(version == NCCL_MOE_VERSION_CODE, "%d", version);
              RANK_OK(ncclMoeCommDestroy(nullptr), nullptr);
              RANK_RESULT(ncclMoeCommAbort(nullptr), ncclInvalidArgument, nullptr, "moe");

              RANK_OK(rank.init(goodConfig()), nullptr);
              const ncclMoeComm_t comm = rank.comm();
              ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
              RANK_RESULT(ncclMoeCommGetInfo(comm, nullptr), ncclInvalidArgument, nullptr, "info");
              RANK_RESULT(ncclMoeCommGetInfo(nullptr, &info), ncclInvalidArgument, nullptr, "moe");
              info.magic = 3;
              RANK_RESULT(ncclMoeCommGetInfo(comm, &info), ncclInvalidArgument, nullptr, "info");
              info.magic = NCCL_MOE_MAGIC;
              RANK_OK(ncclMoeCommGetInfo(comm, &info), comm);
              ncclMoeCommStats_t stats = NCCL_MOE_COMM_STATS_INITIALIZER;
              RANK_RESULT(ncclMoeCommGetStats(comm, nullptr), ncclInvalidArgument, comm, "stats");
              RANK_RESULT(ncclMoeCommGetStats(nullptr, &stats), ncclInvalidArgument, nullptr, "moe");
              RANK_RESULT(ncclMoeCommGetStats(comm, &stats), ncclInvalidUsage, comm, "host backend");
              const int nobody = 0, oneself = 1;
              RANK_RESULT(ncclMoeCommMaskRanks(nullptr, &nobody, 1), ncclInvalidArgument, nullptr, "moe");
              RANK_RESULT(ncclMoeCommMaskRanks(comm, nullptr, 1), ncclInvalidArgument, comm, "masked");
              RANK_RESULT(ncclMoeCommMaskRanks(comm, &oneself, 1), ncclInvalidArgument, comm, "masked[0]");
              RANK_RESULT(ncclMoeCommMaskRanks(comm, &nobody, 1), ncclInvalidUsage, comm, "host backend");
              RANK_CHECK(info.rank == 0 && info.nRanks == 1 && info.nLocalExperts == kExperts && info.onHost == 1 &&
                         info.nScaleUpRanks == 1);
              ncclResult_t async = ncclInternalError;
              RANK_RESULT(ncclMoeCommGetAsyncError(comm, nullptr), ncclInvalidArgument, nullptr, "asyncError");
              RANK_RESULT(ncclMoeCommGetAsyncError(nullptr, &async), ncclInvalidArgument, nullptr, "moe");
              RANK_OK(ncclMoeCommGetAsyncError(comm, &async), comm);
              RANK_CHECK(async == ncclSuccess, "%s", resultName(async));
              void* memory = nullptr;
              RANK_RESULT(ncclMoeMemAlloc(nullptr, 64, comm), ncclInvalidArgument, comm, "ptr");
              RANK_RESULT(ncclMoeMemAlloc(&memory, 0, comm), ncclInvalidArgument, comm, "bytes");
              RANK_RESULT(ncclMoeMemAlloc(&memory, 64, nullptr), ncclInvalidArgument, nullptr, "moe");
              int local = 0;
              RANK_RESULT(ncclMoeMemFree(&local, comm), ncclInvalidArgument, comm, "ptr");
              RANK_OK(ncclMoeMemAlloc(&memory, 1, comm), comm);
              RANK_CHECK(memory != nullptr && reinterpret_cast<uintptr_t>(memory) % 128 == 0);
              RANK_RESULT(ncclMoeMemFree(memory, nullptr), ncclInvalidArgument, nullptr, "moe");
              RANK_RESULT(ncclMoeMemFree(static_cast<char*>(memory) + 16, comm), ncclInvalidArgument, comm, "ptr");
              RANK_OK(ncclMoeMemFree(memory, comm), comm);
              RANK_RESULT(ncclMoeMemFree(memory, comm), ncclInvalidArgument, comm, "ptr");
              return "";
            }),
            "");
}

TEST(Arguments, LastErrorIsPerThreadAndPerCommunicator) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              RANK_CHECK(std::string(ncclMoeGetLastError(nullptr)).empty(), "%s", ncclMoeGetLastError(nullptr));
              RANK_OK(rank.init(goodConfig()), nullptr);
              const ncclMoeComm_t comm = rank.comm();
              RANK_CHECK(std::string(ncclMoeGetLastError(comm)).empty());
              RANK_RESULT(ncclMoeMemAlloc(nullptr, 64, comm), ncclInvalidArgument, comm, "ptr");
              std::string ofThread = "not run";
              std::string ofComm;
              std::thread other([&] {
                ofThread = ncclMoeGetLastError(nullptr);
                ofComm = ncclMoeGetLastError(comm);
              });
              other.join();
              RANK_CHECK(ofThread.empty(), "%s", ofThread.c_str());
              RANK_CHECK(ofComm.find("ptr") != std::string::npos, "%s", ofComm.c_str());
              // One communicator's sentence outlives calls on another.
              ncclMoeComm_t second = nullptr;
              const ncclMoeConfig_t config = goodConfig();
              RANK_OK(ncclMoeCommInitHost(&second, 1, 0, (rank.rendezvous() + "2").c_str(), &config), nullptr);
              const char* sentence = ncclMoeGetLastError(comm);
              RANK_RESULT(ncclMoeMemAlloc(nullptr, 64, second), ncclInvalidArgument, second, "ptr");
              RANK_RESULT(ncclMoeComplete(nullptr, second, nullptr), ncclInvalidArgument, second, "routing");
              RANK_CHECK(std::string(sentence).find("ptr") != std::string::npos, "%s", sentence);
              RANK_OK(ncclMoeCommDestroy(second), nullptr);
              return "";
            }),
            "");
}

} // namespace
} // namespace moe::test
