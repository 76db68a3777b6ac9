#include "pair.h"

#include <dlfcn.h>
#include <libgen.h>
#include <limits.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <deque>

namespace moe {
namespace net {

std::atomic<int> failovers{0};

namespace {

std::string fakeLibrary() {
  char path[PATH_MAX] = "";
  const ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
  path[n > 0 ? n : 0] = 0;
  return std::string(dirname(path)) + "/../fakeverbs/libibverbs.so.1";
}

struct Environment : testing::Environment {
  void SetUp() override {
    setenv("NCCL_DEBUG", "WARN", 1); // what the log says is looked at
    setenv("NCCL_MOE_NET_TRANSPORT", "verbs", 1);
    setenv("NCCL_MOE_NET_IBVERBS_LIB", fakeLibrary().c_str(), 1);
    setenv("NCCL_MOE_NET_IFNAME", "lo", 1);
    setenv("NCCL_MOE_NET_STRIPE_MIN", "8192", 1);
    setenv("NCCL_MOE_NET_TIMEOUT", "11", 1); // 8 ms
    setenv("NCCL_MOE_NET_RETRY_CNT", "1", 1);
    setenv("NCCL_MOE_NET_FAILOVER_TIMEOUT_MS", "3000", 1);
    const char* const traffic[][2] = {{"SL", "1"},          {"TC", "32"},           {"SL_LATENCY", "2"},
                                      {"TC_LATENCY", "64"}, {"SL_THROUGHPUT", "3"}, {"TC_THROUGHPUT", "96"}};
    for (const auto& one : traffic) setenv((std::string("NCCL_MOE_NET_") + one[0]).c_str(), one[1], 1);
    setenv("FAKEVERBS_DEVICES", "6", 1);
    setenv("FAKEVERBS_JOB", std::to_string(getpid()).c_str(), 1);
    // Completions come late, and queue pairs overtake one another.
    setenv("FAKEVERBS_DELAY_US", "60", 1);
    setenv("FAKEVERBS_REORDER", "1", 1);
  }
};
const auto* const environment = testing::AddGlobalTestEnvironment(new Environment);

void watchLog(LogLevel, const char*, int, const char* text) {
  if (strstr(text, "is given up") != nullptr) failovers++;
}

} // namespace

namespace {

template <class F> F* fakeFunction(const char* name) {
  void* library = dlopen(fakeLibrary().c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  dlclose(library); // the engine has it open
  return reinterpret_cast<F*>(dlsym(library, name));
}

} // namespace

void fakeFault(const std::string& script) {
  auto* inject = fakeFunction<int(const char*)>("fakeverbsInject");
  ASSERT_NE(inject, nullptr);
  ASSERT_EQ(inject(script.c_str()), 0) << script;
}

int fakeFired() {
  auto* fired = fakeFunction<int()>("fakeverbsFired");
  return fired != nullptr ? fired() : -1;
}

int queuesWith(int serviceLevel, int trafficClass) {
  auto* traffic = fakeFunction<int(int, int)>("fakeverbsTraffic");
  return traffic != nullptr ? traffic(serviceLevel, trafficClass) : -1;
}

Block::Block(Connection* connection, size_t bytes, bool strictOrder)
  : connection_(connection), bytes_(bytes + 2 * guard, '\x5a') {
  Memory memory;
  memory.data = data();
  memory.bytes = bytes;
  memory.strictOrder = strictOrder;
  EXPECT_EQ(connection->registerMemory(memory, &region_), ncclSuccess) << lastError();
}

Block::~Block() {
  EXPECT_EQ(connection_->deregisterMemory(region_), ncclSuccess) << lastError();
  EXPECT_TRUE(guardsIntact());
}

void Block::fill(uint64_t seed) {
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < size(); i += 8) {
    const uint64_t word = random();
    memcpy(data() + i, &word, std::min<size_t>(8, size() - i));
  }
}

void Block::poison() { memset(data(), 0x5a, size()); }

bool Block::guardsIntact() const {
  for (size_t i = 0; i < guard; i++) {
    if (bytes_[i] != 0x5a || bytes_[bytes_.size() - 1 - i] != 0x5a) return false;
  }
  return true;
}

RemoteRegion Block::remote() const {
  RemoteRegion remote;
  EXPECT_EQ(connection_->remoteRegion(region_, &remote), ncclSuccess);
  return remote;
}

void VerbsPair::SetUp() {
  const uint64_t seed = std::random_device{}();
  random.seed(seed);
  failovers = 0;
  setLogSink(watchLog);
  RecordProperty("seed", std::to_string(seed));
  ASSERT_EQ(Engine::create(&engine), ncclSuccess) << lastError();
  ASSERT_EQ(engine->nDevices(), 6);
}

void VerbsPair::TearDown() {
  sender.reset();
  receiver.reset();
  fakeFault("clear");
  for (int i = 0; i < 6; i++) fakeFault("now@fake" + std::to_string(i) + "=portup");
  engine.reset();
}

int VerbsPair::merged(const std::vector<int>& members) {
  int dev = -1;
  EXPECT_EQ(engine->merge(members, &dev), ncclSuccess) << lastError();
  return dev;
}

void VerbsPair::connect(int senderDev, int receiverDev) {
  sender.reset();
  receiver.reset();
  std::unique_ptr<Listener> listener;
  std::unique_ptr<Connector> connector;
  alignas(8) char handle[handleBytes];
  ASSERT_EQ(engine->listen(receiverDev, config, handle, &listener), ncclSuccess) << lastError();
  ASSERT_EQ(engine->connector(senderDev, config, handle, &connector), ncclSuccess) << lastError();
  ASSERT_TRUE(eventually([&] {
    if (sender == nullptr) {
      EXPECT_EQ(connector->connect(&sender), ncclSuccess) << lastError();
    }
    if (receiver == nullptr) {
      EXPECT_EQ(listener->accept(&receiver), ncclSuccess) << lastError();
    }
    return (sender != nullptr && receiver != nullptr) || HasFailure();
  }));
  ASSERT_NE(sender, nullptr);
  ASSERT_NE(receiver, nullptr);
}

bool VerbsPair::eventually(const std::function<bool()>& condition, double seconds) {
  const double end = nowSeconds() + seconds;
  while (nowSeconds() < end) {
    if (condition()) return true;
  }
  return false;
}

bool VerbsPair::finish(Connection* connection, Request* request, size_t* bytes) {
  Connection* other = connection == sender.get() ? receiver.get() : sender.get();
  bool done = false, failed = false;
  const bool ended = eventually([&] {
    (void)other->progress();
    failed = connection->test(request, &done, bytes) != ncclSuccess;
    return done || failed;
  });
  return ended && done;
}

VerbsPair::Outcome VerbsPair::stream(int count, size_t maxBytes, int maxMembers, int at,
                                     const std::function<void()>& then) {
  constexpr int ahead = 6;
  Outcome out;
  Block from(sender.get(), maxBytes + 4096);
  from.fill(random());
  // What is sent: message i begins at offset[i].
  std::vector<size_t> offset(static_cast<size_t>(count)), bytes(offset.size());
  for (size_t i = 0; i < offset.size(); i++) {
    const uint64_t kind = random() % 8;
    bytes[i] = kind == 0 ? 0
                         : random() % (kind < 4   ? 300
                                       : kind < 6 ? std::min<size_t>(maxBytes, 20000)
                                                  : maxBytes) +
                             1;
    offset[i] = random() % 4096;
  }
  struct Group {
    int first = 0, n = 0;
    std::unique_ptr<Block> into;
    Request* request = nullptr;
  };
  std::deque<Group> groups;
  std::deque<Request*> sends;
  int posted = 0, sent = 0, completed = 0;
  std::vector<int> order; // in which the messages of a group are sent
  std::vector<int> sendOrder;
  const auto note = [](ncclResult_t result, ncclResult_t* first, std::string* text) {
    if (result == ncclSuccess || *first != ncclSuccess) return;
    *first = result;
    *text = lastError();
  };
  out.hung = !eventually(
    [&] {
      if (posted < count && groups.size() < ahead && out.receiver == ncclSuccess) {
        Group group;
        group.first = posted;
        group.n = std::min(count - posted, 1 + static_cast<int>(random() % static_cast<uint64_t>(maxMembers)));
        group.into = std::make_unique<Block>(receiver.get(), static_cast<size_t>(group.n) * (maxBytes + 64));
        group.into->poison();
        void* data[maxGroup];
        size_t rooms[maxGroup];
        int tags[maxGroup];
        Region* regions[maxGroup];
        for (int i = 0; i < group.n; i++) {
          data[i] = group.into->data() + static_cast<size_t>(i) * (maxBytes + 64);
          rooms[i] = maxBytes;
          tags[i] = i;
          regions[i] = group.into->region();
        }
        note(receiver->irecv(group.n, data, rooms, tags, regions, &group.request), &out.receiver, &out.receiverText);
        if (group.request != nullptr) {
          posted += group.n;
          for (int i = 0; i < group.n; i++) sendOrder.push_back(group.first + i);
          std::shuffle(sendOrder.end() - group.n, sendOrder.end(), random);
          order.resize(static_cast<size_t>(posted), group.first);
          groups.push_back(std::move(group));
        }
      }
      if (sent < posted && out.sender == ncclSuccess) {
        if (sent == at && then != nullptr) {
          then();
          at = -1;
        }
        const auto i = static_cast<size_t>(sendOrder[static_cast<size_t>(sent)]);
        Request* request = nullptr;
        note(sender->isend(from.data() + offset[i], bytes[i], static_cast<int>(i) - order[i], from.region(), &request),
             &out.sender, &out.senderText);
        if (request != nullptr) {
          sends.push_back(request);
          sent++;
        }
      }
      if (!sends.empty() && out.sender == ncclSuccess) {
        bool done = false;
        note(sender->test(sends.front(), &done, nullptr), &out.sender, &out.senderText);
        if (done) {
          sends.pop_front();
          completed++;
        }
      } else {
        note(sender->progress(), &out.sender, &out.senderText);
      }
      if (!groups.empty() && out.receiver == ncclSuccess) {
        Group& group = groups.front();
        bool done = false;
        size_t got[maxGroup] = {};
        note(receiver->test(group.request, &done, got), &out.receiver, &out.receiverText);
        if (done) {
          for (int m = 0; m < group.n; m++) {
            const size_t i = static_cast<size_t>(group.first) + static_cast<size_t>(m);
            const char* data = group.into->data() + static_cast<size_t>(m) * (maxBytes + 64);
            EXPECT_EQ(got[m], bytes[i]) << "message " << i;
            EXPECT_EQ(memcmp(data, from.data() + offset[i], bytes[i]), 0) << "message " << i;
            for (size_t k = bytes[i]; k < maxBytes + 64; k++) {
              if (data[k] != 0x5a) {
                ADD_FAILURE() << "message " << i << " of " << bytes[i] << " bytes: byte " << k << " was written";
                break;
              }
            }
            out.received++;
          }
          groups.pop_front();
        }
      } else {
        note(receiver->progress(), &out.receiver, &out.receiverText);
      }
      if (HasFailure()) return true;
      if (out.sender != ncclSuccess && out.receiver != ncclSuccess) return true;
      return completed == count && out.received == count;
    },
    25);
  return out;
}

} // namespace net
} // namespace moe
