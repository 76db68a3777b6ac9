// Many communicators one after another and at once, many routings, memory of the communicator; nothing is left behind.
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <thread>

#include "host/job.h"

namespace moe::test {
namespace {

namespace fs = std::filesystem;

int countEntries(const char* folder) {
  int count = 0;
  std::error_code ignored;
  for (auto it = fs::directory_iterator(folder, ignored); it != fs::directory_iterator(); it.increment(ignored))
    count++;
  return count;
}

int countLines(const char* file) {
  std::ifstream in(file);
  int count = 0;
  for (std::string line; std::getline(in, line);) count++;
  return count;
}

long residentKb() {
  std::ifstream in("/proc/self/statm");
  long total = 0;
  long resident = 0;
  in >> total >> resident;
  return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

std::set<std::string> sharedMemoryFiles() {
  std::set<std::string> names;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator("/dev/shm", ignored)) {
    const std::string name = entry.path().filename();
    if (name.find("moe") != std::string::npos) names.insert(name);
  }
  return names;
}

// What one process holds.
struct Holdings {
  int files = countEntries("/proc/self/fd");
  int threads = countEntries("/proc/self/task");
  int mappings = countLines("/proc/self/maps");
  long resident = residentKb();

  // "" if now is no more than before.
  static std::string grown(const Holdings& before, const Holdings& now) {
    RANK_CHECK(now.files <= before.files, "%d open files, %d before", now.files, before.files);
    RANK_CHECK(now.threads <= before.threads, "%d threads, %d before", now.threads, before.threads);
    if (kSanitized) return ""; // whose own memory grows
    RANK_CHECK(now.mappings <= before.mappings + 8, "%d mappings, %d before", now.mappings, before.mappings);
    RANK_CHECK(now.resident <= before.resident + 8192, "%ld KB, %ld before", now.resident, before.resident);
    return "";
  }
};

World tinyWorld(int nRanks) {
  World world;
  world.nRanks = nRanks;
  world.nExperts = 4;
  world.maxTokens = 8;
  world.maxTopK = 2;
  world.maxRowBytes = 64;
  world.expertToRank = blockPlacement(4, nRanks);
  return world;
}

// Cycles of a job of two ranks; every process compares what it holds after the first few and after the last.
void cycles(int ranksPerProcess, int nHosts, int nCycles) {
  ClusterOptions options;
  options.nRanks = 2;
  options.ranksPerProcess = ranksPerProcess;
  options.nHosts = nHosts;
  options.timeLimitMs = 60000 * kSlow;
  const World world = tinyWorld(2);
  const std::set<std::string> filesBefore = sharedMemoryFiles();
  const ClusterResult result = runRanks(options, [&](Rank& first) -> std::string {
    // One thread of a process drives both of its ranks, so that the count of threads is its own.
    const int nThreads = ranksPerProcess == 0 ? 2 : 1;
    if (nThreads == 2 && first.rank() == 1) return "";
    std::unique_ptr<Holdings> before;
    for (int cycle = 0; cycle < nCycles; cycle++) {
      if (cycle == 20) before = std::make_unique<Holdings>();
      std::vector<std::string> wrong(2);
      const auto run = [&](int number) {
        const std::string url = first.rendezvous() + std::to_string(cycle);
        Rank rank(options, number, url);
        wrong[number] = [&]() -> std::string {
          RANK_OK(rank.init(world.config()), nullptr);
          if (cycle % 10 == 0) RANK_TRY(runSmoke(rank, rank.comm(), world.nExperts));
          void* memory = nullptr;
          if (cycle % 5 == 0) RANK_OK(ncclMoeMemAlloc(&memory, 100000, rank.comm()), rank.comm());
          RANK_OK(rank.destroy(), nullptr);
          return "";
        }();
      };
      if (nThreads == 2) {
        std::thread other(run, 1);
        run(0);
        other.join();
      } else {
        run(first.rank());
      }
      for (const std::string& sentence : wrong) RANK_CHECK(sentence.empty(), "cycle %d: %s", cycle, sentence.c_str());
    }
    const Holdings after;
    return Holdings::grown(*before, after);
  });
  EXPECT_EQ(result.failures(), "");
  for (const std::string& name : sharedMemoryFiles()) EXPECT_EQ(filesBefore.count(name), 1u) << "/dev/shm/" << name;
}

TEST(Cycles, ThousandCyclesOfThreads) { cycles(0, 0, kSanitized ? 100 : 1000); }
TEST(Cycles, CyclesOfProcesses) { cycles(1, 0, kSanitized ? 50 : 300); }
TEST(Cycles, CyclesOfHosts) { cycles(1, 2, kSanitized ? 50 : 300); }

TEST(Cycles, FailedInitsLeakNothing) {
  ClusterOptions options;
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    std::unique_ptr<Holdings> before;
    const ncclMoeConfig_t config = makeConfig(4, 8, 2, 64, 5);
    const int port = freePort();
    for (int i = 0; i < 60; i++) {
      if (i == 20) before = std::make_unique<Holdings>();
      ncclMoeComm_t comm = nullptr;
      const std::string url = i % 2 == 0 ? rank.rendezvous() : "tcp://127.0.0.1:" + std::to_string(port);
      RANK_RESULT(ncclMoeCommInitHost(&comm, 3, i % 4 < 2 ? 0 : 1, url.c_str(), &config), ncclRemoteError, nullptr,
                  "rank");
    }
    const Holdings after;
    return Holdings::grown(*before, after);
  });
  EXPECT_EQ(result.failures(), "");
}

TEST(Cycles, RoutingsComeAndGo) {
  const World world = tinyWorld(2);
  ClusterOptions options;
  options.nRanks = 2;
  options.ranksPerProcess = 1;
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(world.config()), nullptr);
    ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
    size_t memory = 0;
    std::unique_ptr<Holdings> before;
    for (int i = 0; i < 400 / kFewer; i++) {
      if (i == 20) {
        before = std::make_unique<Holdings>();
        RANK_OK(ncclMoeCommGetInfo(rank.comm(), &info), rank.comm());
        memory = info.memoryBytes;
      }
      RANK_TRY(runSmoke(rank, rank.comm(), world.nExperts));
    }
    RANK_OK(ncclMoeCommGetInfo(rank.comm(), &info), rank.comm());
    RANK_CHECK(info.memoryBytes == memory, "%zu bytes, %zu before", info.memoryBytes, memory);
    const Holdings after;
    return Holdings::grown(*before, after);
  });
  EXPECT_EQ(result.failures(), "");
}

const Place kPlaces[] = {{"threads", 0, 0}, {"processes", 1, 0}, {"hosts", 1, 2}, {"mixed", 2, 2}};

class Lifecycle : public testing::TestWithParam<Place> {
 protected:
  ClusterOptions options(int nRanks) const {
    ClusterOptions options;
    options.nRanks = nRanks;
    options.ranksPerProcess = GetParam().ranksPerProcess;
    options.nHosts = GetParam().nHosts;
    return options;
  }
};
INSTANTIATE_TEST_SUITE_P(Places, Lifecycle, testing::ValuesIn(kPlaces), testing::PrintToStringParamName());

TEST_P(Lifecycle, Info) {
  const int nRanks = 4;
  World world = tinyWorld(nRanks);
  world.nExperts = 6;
  world.expertToRank = {0, 3, 3, 1, 0, 3};
  world.explicitMap = true;
  const ClusterResult result = runRanks(options(nRanks), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(world.config()), nullptr);
    ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
    RANK_OK(ncclMoeCommGetInfo(rank.comm(), &info), rank.comm());
    const int nLocal[] = {2, 1, 0, 3};
    RANK_CHECK(info.rank == rank.rank() && info.nRanks == nRanks && info.onHost == 1);
    RANK_CHECK(info.nLocalExperts == nLocal[rank.rank()], "%d", info.nLocalExperts);
    const int reach = GetParam().nHosts == 0 ? 4 : 2;
    RANK_CHECK(info.nScaleUpRanks == reach, "%d ranks are reached by loads and stores", info.nScaleUpRanks);
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

// Two communicators of the same ranks, used in turns.
TEST_P(Lifecycle, TwoCommunicatorsInTurns) {
  WorldLimits limits;
  limits.minRanks = 4;
  limits.maxRanks = 4;
  const Job jobA = randomJob(testSeed() + 10, 2, 2, limits);
  const Job jobB = randomJob(testSeed() + 11, 2, 2, limits);
  const ClusterResult result = runRanks(options(4), [&](Rank& rank) -> std::string {
    Rank second(options(4), rank.rank(), rank.rendezvous() + "-second");
    RANK_OK(rank.init(jobA.config()), nullptr);
    RANK_OK(second.init(jobB.config()), nullptr);
    for (size_t i = 0; i < 2; i++) {
      RANK_TRY(runRouting(rank, jobA.routings[i], jobA.latency));
      RANK_TRY(runRouting(second, jobB.routings[i], jobB.latency));
    }
    RANK_OK(rank.destroy(), nullptr);
    RANK_TRY(runRouting(second, jobB.routings[0], jobB.latency)); // is not disturbed by the other's end
    RANK_OK(second.destroy(), nullptr);
    return "";
  });
  EXPECT_EQ(result.failures(), "") << "MOE_TEST_SEED=" << testSeed();
}

// Three communicators of the same ranks, each used by a thread of its own at the same time.
TEST_P(Lifecycle, CommunicatorsOfSeveralThreads) {
  WorldLimits limits;
  limits.minRanks = 4;
  limits.maxRanks = 4;
  std::vector<Job> jobs;
  for (uint64_t i = 0; i < 3; i++) jobs.push_back(randomJob(testSeed() + 20 + i, 1, 2, limits));
  const ClusterResult result = runRanks(options(4), [&](Rank& rank) -> std::string {
    std::vector<std::string> wrong(3);
    const auto run = [&](int i) {
      Rank own(options(4), rank.rank(), rank.rendezvous() + "-" + std::to_string(i));
      wrong[i] = runJob(own, jobs[i]);
    };
    std::thread second(run, 1);
    std::thread third(run, 2);
    run(0);
    second.join();
    third.join();
    return wrong[0] + wrong[1] + wrong[2];
  });
  EXPECT_EQ(result.failures(), "") << "MOE_TEST_SEED=" << testSeed();
}

// Several routings in flight: halves in one order, completions in another.
TEST_P(Lifecycle, RoutingsInFlight) {
  const int nRanks = 4;
  const int nRoutings = 3;
  WorldLimits limits;
  limits.minRanks = limits.maxRanks = nRanks;
  for (uint64_t trial = 0; trial < (kSanitized ? 1 : 3); trial++) {
    Random random(testSeed() + 30 + trial);
    const World world = randomWorld(random, limits);
    std::vector<std::unique_ptr<Reference>> references;
    std::vector<CombineProblem> combines;
    for (int i = 0; i < nRoutings; i++) {
      references.push_back(std::make_unique<Reference>(randomDispatch(random, world)));
      combines.push_back(randomCombine(random, world, *references.back()));
    }
    const int orders[2][nRoutings] = {{1, 2, 0}, {2, 0, 1}};
    const ClusterResult result = runRanks(options(nRanks), [&](Rank& rank) -> std::string {
      const ncclMoeComm_t comm = (rank.init(world.config()), rank.comm());
      RANK_CHECK(comm != nullptr, "%s", ncclMoeGetLastError(nullptr));
      std::vector<ncclMoeRouting_t> routings(nRoutings);
      std::vector<DispatchCall> dispatches;
      std::vector<CombineCall> combineCalls;
      dispatches.reserve(nRoutings);
      combineCalls.reserve(nRoutings);
      for (int i = 0; i < nRoutings; i++) {
        const ncclMoeRoutingConfig_t config = routingConfig(world, references[i]->problem(), false);
        RANK_OK(ncclMoeRoutingCreate(&routings[i], comm, &config), comm);
        DispatchStyle style;
        style.flags = NCCL_MOE_SEND_ONLY;
        dispatches.emplace_back(*references[i], rank.rank(), style);
        combineCalls.emplace_back(*references[i], combines[i], rank.rank(), false, NCCL_MOE_SEND_ONLY);
      }
      for (int repeat = 0; repeat < 2; repeat++) {
        for (int i = 0; i < nRoutings; i++) {
          dispatches[i].poison();
          combineCalls[i].poison();
          rank.jitter();
          RANK_OK(ncclMoeDispatch(&dispatches[i].args(), routings[i], comm, nullptr), comm);
        }
        for (const int i : orders[0]) {
          RANK_OK(ncclMoeComplete(routings[i], comm, nullptr), comm);
          RANK_TRY(dispatches[i].verify());
        }
        // A combine of one overlaps with the dispatch of another.
        RANK_OK(ncclMoeCombine(&combineCalls[0].args(), routings[0], comm, nullptr), comm);
        dispatches[1].poison();
        RANK_OK(ncclMoeDispatch(&dispatches[1].args(), routings[1], comm, nullptr), comm);
        RANK_OK(ncclMoeCombine(&combineCalls[2].args(), routings[2], comm, nullptr), comm);
        for (const int i : orders[1]) RANK_OK(ncclMoeComplete(routings[i], comm, nullptr), comm);
        RANK_TRY(combineCalls[0].verify());
        RANK_TRY(dispatches[1].verify());
        RANK_TRY(combineCalls[2].verify());
      }
      return "";
    });
    ASSERT_EQ(result.failures(), "") << "MOE_TEST_SEED=" << testSeed() << " trial " << trial << " " << world.describe();
  }
}

// A handle that was destroyed, or is another communicator's, is refused without being looked into.
TEST(Handles, OfDestroyedAndForeignRoutings) {
  ClusterOptions options;
  const ClusterResult result = runRanks(options, [](Rank& rank) -> std::string {
    const ncclMoeConfig_t config = makeConfig(1, 1, 1, 16);
    RANK_OK(rank.init(config), nullptr);
    ncclMoeComm_t other = nullptr;
    TempDir folder;
    const std::string rendezvous = "file://" + folder.path() + "/other";
    RANK_OK(ncclMoeCommInitHost(&other, 1, 0, rendezvous.c_str(), &config), nullptr);
    ncclMoeRoutingConfig_t layer = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
    layer.topK = 1;
    ncclMoeRouting_t gone = nullptr, foreign = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&gone, rank.comm(), &layer), rank.comm());
    RANK_OK(ncclMoeRoutingCreate(&foreign, other, &layer), other);
    RANK_OK(ncclMoeRoutingDestroy(gone, rank.comm()), rank.comm());
    for (ncclMoeRouting_t routing : {gone, foreign}) {
      RANK_RESULT(ncclMoeComplete(routing, rank.comm(), nullptr), ncclInvalidArgument, rank.comm(), "routing");
      RANK_RESULT(ncclMoeRoutingDestroy(routing, rank.comm()), ncclInvalidArgument, rank.comm(), "routing");
    }
    RANK_OK(ncclMoeRoutingDestroy(foreign, other), other);
    RANK_OK(ncclMoeCommDestroy(other), nullptr);
    return runSmoke(rank, rank.comm(), 1);
  });
  EXPECT_EQ(result.failures(), "");
}

// Routings that are destroyed between the halves of a call take nothing with them.
TEST_P(Lifecycle, RoutingDestroyedInFlight) {
  const int nRanks = 4;
  WorldLimits limits;
  limits.minRanks = limits.maxRanks = nRanks;
  Random random(testSeed() + 50);
  const World world = randomWorld(random, limits);
  const Reference reference(randomDispatch(random, world));
  const CombineProblem problem = randomCombine(random, world, reference);
  const ClusterResult result = runRanks(options(nRanks), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(world.config()), nullptr);
    const ncclMoeComm_t comm = rank.comm();
    ncclMoeCommInfo_t before = NCCL_MOE_COMM_INFO_INITIALIZER;
    ncclMoeCommInfo_t now = NCCL_MOE_COMM_INFO_INITIALIZER;
    RANK_OK(ncclMoeCommGetInfo(comm, &before), comm);
    const ncclMoeRoutingConfig_t config = routingConfig(world, reference.problem(), false);
    size_t bytes = 0;
    RANK_OK(ncclMoeRoutingMemoryNeeded(comm, &config, &bytes), comm);
    for (const bool inCombine : {false, true}) {
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
      RANK_OK(ncclMoeCommGetInfo(comm, &now), comm);
      RANK_CHECK(now.memoryBytes == before.memoryBytes + bytes, "%zu bytes, expected %zu + %zu", now.memoryBytes,
                 before.memoryBytes, bytes);
      DispatchStyle style;
      style.flags = inCombine ? 0u : NCCL_MOE_SEND_ONLY;
      const DispatchCall dispatch(reference, rank.rank(), style);
      const CombineCall combine(reference, problem, rank.rank(), false, NCCL_MOE_SEND_ONLY);
      RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, comm, nullptr), comm);
      if (inCombine) RANK_OK(ncclMoeCombine(&combine.args(), routing, comm, nullptr), comm);
      RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
    }
    RANK_OK(ncclMoeCommGetInfo(comm, &now), comm);
    RANK_CHECK(now.memoryBytes == before.memoryBytes);
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
    const DispatchCall dispatch(reference, rank.rank(), DispatchStyle());
    RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, comm, nullptr), comm);
    return dispatch.verify();
  });
  EXPECT_EQ(result.failures(), "") << "MOE_TEST_SEED=" << testSeed();
}

// Rows in memory that the communicator gave.
TEST_P(Lifecycle, CommunicatorMemory) {
  const int nRanks = 4;
  const World world = tinyWorld(nRanks);
  const ClusterResult result = runRanks(options(nRanks), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(world.config()), nullptr);
    const ncclMoeComm_t comm = rank.comm();
    ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
    config.topK = 2;
    config.layout = ncclMoeLayoutExpertMajor;
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
    const int nTokens = 8;
    const int64_t capacity = nRanks * nTokens * 2;
    void* memory[2] = {};
    const size_t bytes = static_cast<size_t>(capacity) * 64;
    for (void*& m : memory) {
      RANK_OK(ncclMoeMemAlloc(&m, bytes, comm), comm);
      RANK_CHECK(m != nullptr && reinterpret_cast<uintptr_t>(m) % 128 == 0);
      memset(m, 0xee, bytes); // all of it can be written
    }
    RANK_CHECK(memory[0] != memory[1]);
    float* x = static_cast<float*>(memory[0]);
    float* recv = static_cast<float*>(memory[1]);
    std::vector<int64_t> idx;
    for (int t = 0; t < nTokens; t++) {
      idx.push_back((t + rank.rank()) % 4);
      idx.push_back((t + rank.rank() + 1) % 4);
    }
    for (int i = 0; i < nTokens * 16; i++) x[i] = static_cast<float>(rank.rank() * 1000 + i);
    int count = 0;
    ncclMoeDispatchArgs_t dispatch = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
    dispatch.x = x;
    dispatch.type = ncclFloat32;
    dispatch.hidden = 16;
    dispatch.nTokens = nTokens;
    dispatch.topkIdx = idx.data();
    dispatch.recvX = recv;
    dispatch.recvCapacity = capacity;
    dispatch.recvCount = &count;
    RANK_OK(ncclMoeDispatch(&dispatch, routing, comm, nullptr), comm);
    RANK_CHECK(count == nRanks * nTokens * 2 / 4, "%d rows", count);
    std::vector<float> out(nTokens * 16 + 4);
    float* aligned = out.data();
    while (reinterpret_cast<uintptr_t>(aligned) % 16 != 0) aligned++;
    ncclMoeCombineArgs_t combine = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
    combine.x = recv;
    combine.type = ncclFloat32;
    combine.hidden = 16;
    combine.out = aligned;
    RANK_OK(ncclMoeCombine(&combine, routing, comm, nullptr), comm);
    for (int i = 0; i < nTokens * 16; i++) RANK_CHECK(aligned[i] == 2 * x[i], "element %d: %g", i, aligned[i]);
    RANK_OK(ncclMoeMemFree(memory[0], comm), comm);
    void* again = nullptr;
    RANK_OK(ncclMoeMemAlloc(&again, 4096, comm), comm);
    // memory[1] and again go with the communicator.
    RANK_OK(rank.destroy(), nullptr);
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

} // namespace
} // namespace moe::test
