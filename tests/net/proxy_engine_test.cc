// The proxy on real connections: two processes' halves in this one, each with its own proxy thread.  It is part of the
// verbs tests too, so over TCP and over (fake) verbs.
#include "net/proxy_engine.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <random>

#include "base/error.h"
#include "base/handle.h"
#include "proxy_producer.h"

namespace moe {
namespace net {
namespace {

constexpr size_t blockBytes = 1000; // of one put
constexpr int blocks = 200;
constexpr size_t dataBytes = blockBytes * blocks;

// Memory [data to send | data received | signals], one connection to the other side and one from it, and a ring.
struct Side {
  Side() : memory(2 * dataBytes + 8 * blocks, char(0xEE)) {
    ring.capacityBits = 4;
    ring.nCounters = 2;
    ring.timeoutNs = 20000000000;
    ring.tail = &tail;
    ring.headCopy = &headCopy;
    const size_t bytes = proxyRingBytes(ring.capacityBits, ring.nCounters);
    ringMemory = UniqueMap(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), bytes);
    ring.base = static_cast<char*>(ringMemory.get());
  }
  Memory sendMemory() { return Memory{memory.data(), dataBytes}; }
  Memory receiveMemory() {
    Memory all{memory.data() + dataBytes, dataBytes + 8 * blocks};
    all.strictOrder = true; // signals are stored there too
    return all;
  }
  uint64_t signal(int i) const {
    return __atomic_load_n(reinterpret_cast<const uint64_t*>(memory.data() + 2 * dataBytes) + i, __ATOMIC_ACQUIRE);
  }

  std::vector<char> memory;
  UniqueMap ringMemory;
  uint64_t tail = 0, headCopy = 0;
  ProxyRing ring;
  std::unique_ptr<Connection> out, in;
  Region *sendRegion = nullptr, *receiveRegion = nullptr;
  RemoteRegion exported;
  std::unique_ptr<ConnectionSink> sink;
  std::unique_ptr<Proxy> proxy;
};

class ProxyEngine : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(Engine::create(&engine), ncclSuccess) << lastError();
    ASSERT_GT(engine->nDevices(), 0);
    for (int i = 0; i < 2; i++) connect(&sides[i].out, &sides[1 - i].in);
    for (Side& side : sides) {
      ASSERT_EQ(side.out->registerMemory(side.sendMemory(), &side.sendRegion), ncclSuccess) << lastError();
      ASSERT_EQ(side.in->registerMemory(side.receiveMemory(), &side.receiveRegion), ncclSuccess) << lastError();
      ASSERT_EQ(side.in->remoteRegion(side.receiveRegion, &side.exported), ncclSuccess) << lastError();
    }
    ProxyConfig config;
    config.spinUs = 0;
    config.timeoutMs = 20000;
    for (int i = 0; i < 2; i++) {
      Side& side = sides[i];
      const ProxyPeer peer{side.out.get(), {side.sendRegion}, {sides[1 - i].exported}};
      side.sink = std::make_unique<ConnectionSink>(std::vector<Memory>{side.sendMemory()}, std::vector<ProxyPeer>{peer},
                                                   std::vector<Connection*>{side.in.get()});
      ASSERT_EQ(Proxy::start({side.ring}, side.sink.get(), config, &side.proxy), ncclSuccess) << lastError();
    }
  }
  void TearDown() override {
    for (Side& side : sides) side.proxy.reset();
    for (Side& side : sides) {
      if (side.sendRegion != nullptr) side.out->deregisterMemory(side.sendRegion);
      if (side.receiveRegion != nullptr) side.in->deregisterMemory(side.receiveRegion);
      side.out.reset();
      side.in.reset();
    }
  }
  void connect(std::unique_ptr<Connection>* out, std::unique_ptr<Connection>* in) {
    std::unique_ptr<Listener> listener;
    std::unique_ptr<Connector> connector;
    char handle[handleBytes];
    CommConfig config;
    config.traffic = TrafficKind::latency;
    ASSERT_EQ(engine->listen(0, config, handle, &listener), ncclSuccess) << lastError();
    ASSERT_EQ(engine->connector(0, config, handle, &connector), ncclSuccess) << lastError();
    for (int i = 0; i < 10000 && (*out == nullptr || *in == nullptr); i++) {
      if (*out == nullptr) {
        ASSERT_EQ(connector->connect(out), ncclSuccess) << lastError();
      }
      if (*in == nullptr) {
        ASSERT_EQ(listener->accept(in), ncclSuccess) << lastError();
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_TRUE(*out != nullptr && *in != nullptr);
  }
  std::unique_ptr<Engine> engine;
  Side sides[2];
};

TEST_F(ProxyEngine, putsBothWaysWithSignalsAfterTheirData) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::thread producers[2];
  for (int s = 0; s < 2; s++) {
    producers[s] = std::thread([this, s, seed] {
      Side& mine = sides[s];
      std::mt19937_64 random(seed + unsigned(s));
      for (int i = 0; i < blocks; i++) {
        for (size_t k = 0; k < blockBytes; k++) mine.memory[size_t(i) * blockBytes + k] = char(random());
        ProxyOp op;
        op.code = proxyPutSignal;
        op.localOffset = op.remoteOffset = size_t(i) * blockBytes;
        op.bytes = blockBytes;
        op.signalOffset = dataBytes + 8 * size_t(i);
        op.signalValue = 1000 + uint64_t(i);
        ASSERT_TRUE(proxyPush(mine.ring, op)) << lastError();
      }
      // The moment that a signal of the other side is here, its data are.
      std::mt19937_64 others(seed + unsigned(1 - s));
      for (int i = 0; i < blocks; i++) {
        const uint64_t deadline = proxyNowNs() + 20000000000;
        while (mine.signal(i) != 1000 + uint64_t(i) && proxyNowNs() < deadline) std::this_thread::yield();
        ASSERT_EQ(mine.signal(i), 1000 + uint64_t(i));
        for (size_t k = 0; k < blockBytes; k++) {
          ASSERT_EQ(mine.memory[dataBytes + size_t(i) * blockBytes + k], char(others())) << "block " << i;
        }
      }
      EXPECT_TRUE(proxyAwaitCounter(mine.ring, 0, blocks));
      ProxyOp quiet;
      quiet.code = proxyQuiet;
      quiet.counter = 1;
      EXPECT_TRUE(proxyPush(mine.ring, quiet));
      EXPECT_TRUE(proxyAwaitCounter(mine.ring, 1, 1));
    });
  }
  for (std::thread& producer : producers) producer.join();
  for (Side& side : sides) EXPECT_EQ(side.proxy->stop(), ncclSuccess) << lastError();
}

TEST_F(ProxyEngine, sendsSignalsAlone) {
  ProxyOp op;
  op.code = proxyPutSignal;
  op.remoteRegion = 77; // an empty put needs none
  op.signalOffset = dataBytes;
  op.signalValue = 42;
  ASSERT_TRUE(proxyPush(sides[0].ring, op));
  EXPECT_TRUE(proxyAwaitCounter(sides[0].ring, 0, 1));
  for (int i = 0; i < 20000 && sides[1].signal(0) != 42; i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(sides[1].signal(0), 42u);
  EXPECT_EQ(sides[1].memory[dataBytes], char(0xEE));
}

TEST_F(ProxyEngine, refusesWhatThePeerDidNotExport) {
  ProxyOp op;
  op.bytes = 8;
  op.remoteOffset = dataBytes + 8 * blocks - 7;
  ASSERT_TRUE(proxyPush(sides[0].ring, op));
  EXPECT_FALSE(proxyAwaitCounter(sides[0].ring, 0, 1));
  EXPECT_EQ(sides[0].proxy->stop(), ncclInvalidArgument);
  EXPECT_NE(std::string(lastError()).find("leaves region 0 of peer 0"), std::string::npos) << lastError();
}

TEST_F(ProxyEngine, endsWhenThePeerIsGone) {
  EXPECT_EQ(sides[1].proxy->stop(), ncclSuccess) << lastError();
  sides[1].proxy.reset();
  EXPECT_EQ(sides[1].in->deregisterMemory(sides[1].receiveRegion), ncclSuccess);
  sides[1].receiveRegion = nullptr;
  sides[1].in.reset();
  ProxyOp op;
  op.bytes = blockBytes;
  bool ended = false;
  for (int i = 0; i < 20000 && !ended; i++) {
    ended = !proxyPush(sides[0].ring, op) || sides[0].proxy->asyncError() != ncclSuccess;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(ended);
  EXPECT_EQ(sides[0].proxy->stop(), ncclRemoteError);
}

} // namespace
} // namespace net
} // namespace moe
