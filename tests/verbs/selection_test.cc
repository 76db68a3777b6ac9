// Which ports are used (one that cannot work is left out when devices are looked for, and the reason is said), and with
// which service level and traffic class.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "pair.h"

namespace moe {
namespace net {
namespace {

std::mutex mutex;
std::vector<std::string> warnings;

void keepWarnings(LogLevel level, const char*, int, const char* text) {
  std::lock_guard<std::mutex> lock(mutex);
  if (level == LogLevel::warn) warnings.push_back(text);
}

class Selection : public VerbsPair {
 protected:
  void SetUp() override {
    VerbsPair::SetUp(); // loads the library
    engine.reset();
    setLogSink(keepWarnings);
    warnings.clear();
  }
  std::vector<std::string> devices() {
    std::vector<std::string> names;
    for (int i = 0; engine != nullptr && i < engine->nDevices(); i++) names.push_back(engine->device(i).name);
    return names;
  }
  static int warned(const std::string& text) {
    return static_cast<int>(std::count_if(warnings.begin(), warnings.end(), [&](const std::string& warning) {
      return warning.find(text) != std::string::npos;
    }));
  }
};

TEST_F(Selection, aPortWithoutAGidIsLeftOut) {
  fakeFault("query_gid@fake1#1+=EIO");
  ASSERT_EQ(Engine::create(&engine), ncclSuccess) << lastError();
  EXPECT_EQ(devices(), (std::vector<std::string>{"fake0:1", "fake2:1", "fake3:1", "fake4:1", "fake5:1"}));
  EXPECT_EQ(warned("fake1:1 is not used: the port has no usable GID"), 1);
  EXPECT_EQ(warnings.size(), 1u);
  connect(0, 1); // the others work
}

TEST_F(Selection, noPortWithAGidIsAnErrorWhereVerbsWasAskedFor) {
  fakeFault("query_gid#1+=EIO");
  EXPECT_EQ(Engine::create(&engine), ncclSystemError);
  EXPECT_NE(strstr(lastError(), "NCCL_MOE_NET_TRANSPORT=verbs, but fake0:1: the port has no usable GID"), nullptr)
    << lastError();
}

TEST_F(Selection, tooLittleLockedMemoryIsSaid) {
  rlimit before = {}, low = {};
  ASSERT_EQ(getrlimit(RLIMIT_MEMLOCK, &before), 0);
  low = before;
  low.rlim_cur = 65536;
  ASSERT_EQ(setrlimit(RLIMIT_MEMLOCK, &low), 0);
  fakeFault("reg_mr@fake2#1+=ENOMEM"); // what a kernel does then
  EXPECT_EQ(Engine::create(&engine), ncclSuccess) << lastError();
  EXPECT_EQ(devices().size(), 5u);
  EXPECT_EQ(
    warned("fake2:1 is not used: registering 16 MiB: Cannot allocate memory (the limit of locked memory, ulimit "
           "-l, is too low)"),
    1);
  engine.reset();
  fakeFault("clear;reg_mr#1+=ENOMEM");
  EXPECT_EQ(Engine::create(&engine), ncclSystemError);
  EXPECT_NE(strstr(lastError(), "ulimit -l"), nullptr) << lastError();
  EXPECT_EQ(setrlimit(RLIMIT_MEMLOCK, &before), 0);
}

using Traffic = VerbsPair;

TEST_F(Traffic, eachKindHasItsLevelAndClass) {
  const struct {
    TrafficKind kind;
    int trafficClass, level, expected;
  } cases[] = {{TrafficKind::other, -1, 1, 32},
               {TrafficKind::latency, -1, 2, 64},
               {TrafficKind::throughput, -1, 3, 96},
               {TrafficKind::latency, 7, 2, 7}}; // the communicator's class goes first
  for (const auto& c : cases) {
    config.traffic = c.kind;
    config.trafficClass = c.trafficClass;
    connect(0, 3);
    EXPECT_EQ(queuesWith(c.level, c.expected), 4); // two on each side
    EXPECT_TRUE(stream(10, 60000, 2).good(10));
  }
}

} // namespace
} // namespace net
} // namespace moe
