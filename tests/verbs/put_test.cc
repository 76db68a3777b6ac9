// Puts and signals over verbs: the value of a signal is there only after the data of all puts before it, whatever order
// completions take.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "pair.h"

namespace moe {
namespace net {
namespace {

class Puts : public VerbsPair {
 protected:
  Request* mustPut(const char* data, size_t bytes, const Block& from, const RemoteRegion& to, uint64_t offset) {
    Request* request = nullptr;
    EXPECT_TRUE(eventually([&] {
      EXPECT_EQ(sender->put(data, bytes, from.region(), to, offset, &request), ncclSuccess) << lastError();
      return request != nullptr || HasFailure();
    }));
    return request;
  }
  Request* mustSignal(const char* data, size_t bytes, const Block& from, const RemoteRegion& to, uint64_t offset,
                      const RemoteRegion& signal, uint64_t at, uint64_t value) {
    Request* request = nullptr;
    EXPECT_TRUE(eventually([&] {
      EXPECT_EQ(sender->putSignal(data, bytes, from.region(), to, offset, signal, at, value, &request), ncclSuccess)
        << lastError();
      return request != nullptr || HasFailure();
    }));
    return request;
  }
  static uint64_t load(Block& flags, size_t index) {
    return __atomic_load_n(reinterpret_cast<uint64_t*>(flags.data()) + index, __ATOMIC_ACQUIRE);
  }
};

TEST_F(Puts, aSignalIsVisibleOnlyAfterTheDataOfAllPutsBefore) {
  const int pairs[][2] = {{0, 3}, {merged({0, 1}), merged({3, 4})}};
  for (const auto& pair : pairs) {
    SCOPED_TRACE(engine->device(pair[0]).name);
    connect(pair[0], pair[1]);
    ASSERT_FALSE(HasFatalFailure());
    constexpr size_t room = 256 << 10;
    constexpr uint64_t rounds = 120;
    Block from(sender.get(), room), into(receiver.get(), room), flags(receiver.get(), 64, true);
    memset(flags.data(), 0, 64);
    const RemoteRegion to = into.remote(), signal = flags.remote();
    // Each round overwrites the region with its own data; a watcher looks at them as soon as the value is there, and
    // lets the next round begin.
    std::atomic<uint64_t> filled{0}, seen{0}, wrong{0};
    std::vector<char> expected(room);
    std::thread watcher([&] {
      for (uint64_t round = 1; round <= rounds; round++) {
        while (load(flags, 3) < round && wrong == 0) std::this_thread::yield();
        if (filled != round) wrong = round; // and what this thread knows of expected, devices being no thread
        if (memcmp(into.data(), expected.data(), room) != 0) wrong = round;
        if (load(flags, 2) != 0 || load(flags, 4) != 0) wrong = round;
        seen = round;
      }
    });
    std::vector<Request*> requests;
    for (uint64_t round = 1; round <= rounds && !HasFailure(); round++) {
      from.fill(random());
      memcpy(expected.data(), from.data(), room);
      filled = round;
      // Pieces of any size, in any order; the signal goes with the last one, or alone.
      std::vector<size_t> cuts = {0, room};
      for (int i = 0; i < 6; i++) cuts.push_back(random() % room);
      std::sort(cuts.begin(), cuts.end());
      std::vector<size_t> order(cuts.size() - 1);
      for (size_t i = 0; i < order.size(); i++) order[i] = i;
      std::shuffle(order.begin(), order.end(), random);
      for (size_t i = 0; i < order.size(); i++) {
        const size_t begin = cuts[order[i]], bytes = cuts[order[i] + 1] - begin;
        const bool last = i + 1 == order.size() && round % 2 == 0;
        requests.push_back(last ? mustSignal(from.data() + begin, bytes, from, to, begin, signal, 24, round)
                                : mustPut(from.data() + begin, bytes, from, to, begin));
      }
      if (round % 2 == 1) requests.push_back(mustSignal(nullptr, 0, from, to, 0, signal, 24, round));
      for (Request* request : requests) EXPECT_TRUE(finish(sender.get(), request)) << lastError();
      requests.clear();
      EXPECT_TRUE(eventually([&] { return seen == round || wrong != 0; }));
    }
    if (HasFailure()) wrong = UINT64_MAX;
    watcher.join();
    EXPECT_EQ(wrong, 0u) << "in this round";
  }
}

TEST_F(Puts, manySignalsUnderWayArriveInOrder) {
  connect(0, 3);
  Block from(sender.get(), 4096), into(receiver.get(), 4096), flags(receiver.get(), 8, true);
  memset(flags.data(), 0, 8);
  const RemoteRegion to = into.remote(), signal = flags.remote();
  constexpr uint64_t total = 3000;
  std::vector<Request*> requests;
  uint64_t posted = 0, last = 0;
  bool backwards = false;
  EXPECT_TRUE(eventually([&] {
    Request* request = nullptr;
    if (posted < total) {
      EXPECT_EQ(sender->putSignal(from.data(), posted % 100, from.region(), to, 0, signal, 0, posted + 1, &request),
                ncclSuccess);
    }
    if (request != nullptr) {
      requests.push_back(request);
      posted++;
    }
    if (!requests.empty()) { // any order of testing
      const size_t i = random() % requests.size();
      bool done = false;
      EXPECT_EQ(sender->test(requests[i], &done, nullptr), ncclSuccess) << lastError();
      if (done) requests.erase(requests.begin() + static_cast<ptrdiff_t>(i));
    }
    const uint64_t value = load(flags, 0);
    backwards = backwards || value < last;
    last = value;
    return (posted == total && requests.empty()) || backwards || HasFailure();
  }));
  EXPECT_FALSE(backwards);
  EXPECT_EQ(load(flags, 0), total);
}

// Both of the above where later writes may be in memory before earlier ones.  The fake and the parameter are set up
// once a process, hence another one.
TEST(PutsAdaptive, signalsComeAfterDataUnderAdaptiveRouting) {
  char self[4096] = "";
  ASSERT_GT(readlink("/proc/self/exe", self, sizeof(self) - 1), 0);
  const pid_t child = fork();
  if (child == 0) {
    setenv("FAKEVERBS_ADAPTIVE", "1", 1);
    setenv("NCCL_MOE_NET_ADAPTIVE_ROUTING", "1", 1);
    execl(self, self, "--gtest_filter=Puts.aSignal*:Puts.manySignals*", "--gtest_output=", nullptr);
    _exit(127);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status << ", see above";
}

TEST_F(Puts, refusesWhatIsOutsideOfTheRegions) {
  connect(0, 3);
  Block from(sender.get(), 4096), into(receiver.get(), 4096), flags(receiver.get(), 64, true);
  const RemoteRegion to = into.remote(), signal = flags.remote();
  Request* request = nullptr;
  EXPECT_EQ(sender->put(from.data(), 64, from.region(), to, 4096 - 63, &request), ncclInvalidArgument);
  EXPECT_NE(strstr(lastError(), "outside the remote region"), nullptr) << lastError();
  EXPECT_EQ(sender->put(from.data(), 64, from.region(), to, UINT64_MAX - 8, &request), ncclInvalidArgument);
  EXPECT_EQ(sender->put(nullptr, 64, from.region(), to, 0, &request), ncclInvalidArgument);
  EXPECT_EQ(sender->put(from.data(), 64, nullptr, to, 0, &request), ncclInvalidArgument);
  EXPECT_EQ(sender->put(from.data(), 64, from.region(), RemoteRegion(), 0, &request), ncclInvalidArgument);
  for (uint64_t at : {uint64_t{12}, uint64_t{64}, UINT64_MAX - 7}) {
    EXPECT_EQ(sender->putSignal(nullptr, 0, nullptr, to, 0, signal, at, 1, &request), ncclInvalidArgument) << at;
    EXPECT_NE(strstr(lastError(), "signalOffset"), nullptr) << lastError();
  }
  EXPECT_EQ(receiver->put(from.data(), 64, from.region(), to, 0, &request), ncclInvalidUsage);
  EXPECT_EQ(request, nullptr);
  for (size_t i = 0; i < into.size(); i++) ASSERT_EQ(into.data()[i], 0x5a);
}

TEST_F(Puts, memoryThatIsNotRegisteredAnyMoreIsAnErrorThatSaysSo) {
  connect(0, 3);
  Block from(sender.get(), 4096);
  RemoteRegion gone;
  {
    Block into(receiver.get(), 4096);
    gone = into.remote();
  }
  Request* request = mustPut(from.data(), 64, from, gone, 0);
  EXPECT_FALSE(finish(sender.get(), request));
  const std::string text = lastError();
  for (const char* part : {"fake0:1", "127.0.0.1", "RDMA write failed", "remote access error", "not registered"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in " << text;
  }
  // It stays failed, and says the same.
  EXPECT_EQ(sender->put(from.data(), 64, from.region(), gone, 0, &request), ncclRemoteError);
  EXPECT_EQ(lastError(), text);
}

TEST_F(Puts, goOnOverAnotherPortIfNoneWasUnderWay) {
  connect(merged({0, 1}), merged({3, 4}));
  Block from(sender.get(), 100000), into(receiver.get(), 100000), flags(receiver.get(), 8, true);
  from.fill(7);
  memset(flags.data(), 0, 8);
  const RemoteRegion to = into.remote(), signal = flags.remote();
  EXPECT_TRUE(finish(sender.get(), mustSignal(from.data(), 50000, from, to, 0, signal, 0, 1)));
  // A message finds out that the first port is down.
  fakeFault("now@fake0=portdown");
  EXPECT_TRUE(stream(10, 60000, 1).good(10));
  EXPECT_GE(failovers, 2);
  EXPECT_TRUE(finish(sender.get(), mustSignal(from.data() + 50000, 50000, from, to, 50000, signal, 0, 2)));
  EXPECT_EQ(load(flags, 0), 2u);
  EXPECT_EQ(memcmp(into.data(), from.data(), 100000), 0);
}

TEST_F(Puts, underWayOverAPortThatFailsAreAnError) {
  connect(merged({0, 1}), merged({3, 4}));
  Block from(sender.get(), 4096), into(receiver.get(), 4096);
  fakeFault("wc.send@fake0#1=status:RETRY_EXC_ERR");
  Request* request = mustPut(from.data(), 64, from, into.remote(), 0);
  EXPECT_FALSE(finish(sender.get(), request));
  EXPECT_NE(strstr(lastError(), "cannot be sent again"), nullptr) << lastError();
  // The other side hears of it.
  EXPECT_TRUE(eventually([&] { return receiver->progress() != ncclSuccess; }));
}

// Every status that a completion may have, and every verb that may refuse a put: an error on both sides, in words.
TEST_F(Puts, failuresSayWhatFailed) {
  const std::pair<const char*, const char*> cases[] = {{"wc.send@fake0#2=status:RETRY_EXC_ERR", "NCCL_MOE_NET_TIMEOUT"},
                                                       {"wc.send@fake0#2=status:REM_ACCESS_ERR", "not registered"},
                                                       {"wc.send@fake0#2=status:LOC_PROT_ERR", "not registered"},
                                                       {"wc.send@fake0#2=status:REM_OP_ERR", "remote operation error"},
                                                       {"wc.send@fake0#2=status:GENERAL_ERR", "other error"},
                                                       {"post_send@fake0#2=ENOMEM", "ibv_post_send"},
                                                       {"poll_cq@fake0#2=EIO", "ibv_poll_cq"}};
  for (const auto& c : cases) {
    SCOPED_TRACE(c.first);
    connect(0, 3);
    ASSERT_FALSE(HasFatalFailure());
    Block from(sender.get(), 4096), into(receiver.get(), 4096), flags(receiver.get(), 8, true);
    memset(flags.data(), 0, 8);
    fakeFault(std::string("clear;") + c.first);
    ncclResult_t result = ncclSuccess;
    for (uint64_t i = 1; i <= 10 && result == ncclSuccess; i++) {
      Request* request = nullptr;
      bool done = false;
      EXPECT_TRUE(eventually([&] {
        if (request == nullptr) {
          result = sender->putSignal(from.data(), 64, from.region(), into.remote(), 0, flags.remote(), 0, i, &request);
        } else {
          result = sender->test(request, &done, nullptr);
        }
        return done || result != ncclSuccess;
      }));
    }
    fakeFault("clear");
    ASSERT_NE(result, ncclSuccess);
    const std::string text = lastError();
    EXPECT_NE(text.find(c.second), std::string::npos) << text;
    EXPECT_NE(text.find("fake0:1"), std::string::npos) << text;
    EXPECT_NE(text.find("127.0.0.1"), std::string::npos) << text;
    EXPECT_TRUE(eventually([&] { return receiver->progress() != ncclSuccess; }));
    EXPECT_NE(strstr(lastError(), "closed the connection or is gone"), nullptr) << lastError();
  }
}

} // namespace
} // namespace net
} // namespace moe
