// The proxy thread with host threads in the GPU's place and a sink in memory.
#include "net/proxy.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <deque>
#include <functional>
#include <random>

#include "base/error.h"
#include "base/handle.h"
#include "proxy_producer.h"

namespace moe {
namespace net {
namespace {

constexpr uint32_t testPeers = 3;
constexpr uint32_t testRegions = 2;
constexpr uint64_t testBytes = 4096;

// Two regions here and two at each of three peers.  A put's bytes move when it completes, as with a real network.
class MemorySink : public ProxySink {
 public:
  MemorySink() {
    for (auto& region : local) region.assign(testBytes, 0xEE);
    for (auto& peer : remote) {
      for (auto& region : peer) region.assign(testBytes, 0xEE);
    }
  }
  uint32_t nPeers() const override { return testPeers; }
  uint64_t localBytes(uint32_t, uint32_t region) const override { return region < testRegions ? testBytes : 0; }
  uint64_t remoteBytes(uint32_t, uint32_t region) const override { return region < testRegions ? testBytes : 0; }

  ncclResult_t post(const ProxyOp& op, void** request) override {
    if (postError != ncclSuccess) return fail(postError, "the sink's post fails");
    *request = nullptr;
    if (full.load() || (refuse && refuse(op))) return ncclSuccess;
    posted.push_back(op);
    *request = &posted.back();
    nPosted.store(posted.size());
    flying.fetch_add(1);
    maxFlying = std::max(maxFlying, flying.load());
    return ncclSuccess;
  }
  ncclResult_t test(const ProxyOp& op, void* request, bool* done) override {
    if (testError != ncclSuccess) return fail(testError, "the sink's test fails");
    EXPECT_EQ(static_cast<ProxyOp*>(request)->localOffset, op.localOffset);
    *done = !hold.load() && !(keep && keep(op));
    if (!*done) return ncclSuccess;
    if (op.bytes != 0) {
      memcpy(&remote[op.peer][op.remoteRegion][op.remoteOffset], &local[op.localRegion][op.localOffset], op.bytes);
    }
    if (op.code == proxyPutSignal)
      memcpy(&remote[op.peer][op.signalRegion][op.signalOffset], &op.signalValue, sizeof(op.signalValue));
    completed.push_back(op);
    flying.fetch_sub(1);
    return ncclSuccess;
  }
  ncclResult_t progress() override {
    return progressError.load() ? fail(ncclRemoteError, "the sink's progress fails") : ncclSuccess;
  }

  std::vector<uint8_t> local[testRegions];
  std::vector<uint8_t> remote[testPeers][testRegions];
  // Set before the proxy starts.
  std::function<bool(const ProxyOp&)> refuse, keep;
  ncclResult_t postError = ncclSuccess, testError = ncclSuccess;
  // May change while it runs.
  std::atomic<bool> full{false}, hold{false}, progressError{false};
  std::atomic<size_t> nPosted{0};
  // To be read after stop.
  std::deque<ProxyOp> posted, completed;
  std::atomic<int> flying{0};
  int maxFlying = 0;
};

// The memory and counters of a ring whose producers are this process's threads.
struct HostRing {
  explicit HostRing(uint32_t capacityBits, uint32_t nCounters = 4, int timeoutMs = 20000)
    : memory(mmap(nullptr, proxyRingBytes(capacityBits, nCounters), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                  -1, 0),
             proxyRingBytes(capacityBits, nCounters)) {
    memset(memory.get(), 0xEE, proxyRingBytes(capacityBits, nCounters));
    ring.base = static_cast<char*>(memory.get());
    ring.tail = &tail;
    ring.headCopy = &headCopy;
    ring.timeoutNs = uint64_t(timeoutMs) * 1000000;
    ring.capacityBits = capacityBits;
    ring.nCounters = nCounters;
  }
  UniqueMap memory;
  uint64_t tail = 0, headCopy = 0;
  ProxyRing ring;
};

ProxyConfig quick(int timeoutMs = 20000) {
  ProxyConfig config;
  config.spinUs = 0;
  config.timeoutMs = timeoutMs;
  return config;
}

ProxyOp putOp(uint32_t peer = 0, uint64_t offset = 0, uint64_t bytes = 8) {
  ProxyOp op;
  op.peer = peer;
  op.localOffset = offset;
  op.remoteOffset = offset;
  op.bytes = bytes;
  return op;
}

ProxyOp quietOp(uint32_t counter) {
  ProxyOp op;
  op.code = proxyQuiet;
  op.counter = counter;
  return op;
}

class ProxyTest : public testing::Test {
 protected:
  void start(const ProxyConfig& config = quick()) {
    ASSERT_EQ(Proxy::start({host.ring}, &sink, config, &proxy), ncclSuccess) << lastError();
  }
  uint64_t counter(uint32_t i) const { return __atomic_load_n(host.ring.counter(i), __ATOMIC_ACQUIRE); }
  bool eventually(const std::function<bool()>& condition) const {
    for (int i = 0; i < 20000; i++) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }
  void expectStop(ncclResult_t result, const std::string& words) {
    EXPECT_EQ(proxy->stop(), result) << lastError();
    if (!words.empty()) {
      EXPECT_NE(std::string(lastError()).find(words), std::string::npos) << lastError();
    }
    EXPECT_TRUE(proxyDead(host.ring)) << "producers must hear of it";
    EXPECT_FALSE(proxyAwaitCounter(host.ring, 0, ~0ull));
  }

  HostRing host{4};
  MemorySink sink;
  std::unique_ptr<Proxy> proxy;
};

TEST(ProxyLayout, carriesEveryField) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int i = 0; i < 20000; i++) {
    ProxyOp op;
    op.code = random() % 16;
    op.flags = random() % 16;
    op.peer = random() % proxyMaxPeers;
    op.counter = random() % proxyMaxCounters;
    op.localRegion = random() % proxyMaxRegions;
    op.remoteRegion = random() % proxyMaxRegions;
    op.signalRegion = random() % proxyMaxRegions;
    op.localOffset = random() & proxyMaxOffset;
    op.remoteOffset = random() & proxyMaxOffset;
    op.signalOffset = random() & proxyMaxOffset;
    op.signalValue = random();
    op.bytes = random() & proxyMaxBytes;
    ASSERT_TRUE(proxyFits(op));
    const uint32_t bits = random() % 12;
    const uint64_t position = random() >> 8 >> random() % 56;
    uint64_t words[proxyWords];
    proxyEncode(op, position, bits, words);
    for (uint64_t word : words) {
      ASSERT_EQ(word >> 56, proxyTag(position, bits));
      ASSERT_NE(word >> 56, 0u);
    }
    ASSERT_NE(proxyTag(position, bits), proxyTag(position + (1ull << bits), bits));
    ProxyOp back;
    ASSERT_TRUE(proxyDecode(words, position, &back));
    EXPECT_EQ(back.code, op.code);
    EXPECT_EQ(back.flags, op.flags);
    EXPECT_EQ(back.peer, op.peer);
    EXPECT_EQ(back.counter, op.counter);
    EXPECT_EQ(back.localRegion, op.localRegion);
    EXPECT_EQ(back.remoteRegion, op.remoteRegion);
    EXPECT_EQ(back.signalRegion, op.signalRegion);
    EXPECT_EQ(back.localOffset, op.localOffset);
    EXPECT_EQ(back.remoteOffset, op.remoteOffset);
    EXPECT_EQ(back.signalOffset, op.signalOffset);
    EXPECT_EQ(back.signalValue, op.signalValue);
    EXPECT_EQ(back.bytes, op.bytes);
    EXPECT_FALSE(proxyDecode(words, position + (128ull << bits), &back)) << "same tag, other position";
    for (int bit = 0; bit < 56; bit++) {
      words[i % proxyWords] ^= 1ull << bit;
      EXPECT_FALSE(proxyDecode(words, position, &back)) << "bit " << bit;
      words[i % proxyWords] ^= 1ull << bit;
    }
  }
  ProxyOp tooBig;
  tooBig.bytes = proxyMaxBytes + 1;
  EXPECT_FALSE(proxyFits(tooBig));
}

TEST(ProxyLayout, keepsItsPartsApart) {
  for (uint32_t bits : {0u, 1u, 6u}) {
    for (uint32_t nCounters : {1u, 7u, 8u, 9u, 100u}) {
      HostRing host(bits, nCounters);
      const uint32_t capacity = host.ring.capacity();
      const char* counters = reinterpret_cast<const char*>(host.ring.counter(0));
      const char* slots = reinterpret_cast<const char*>(host.ring.slot(0));
      EXPECT_EQ(counters - host.ring.base, int64_t(sizeof(ProxyHeader)));
      EXPECT_GE(slots, counters + 8 * nCounters);
      EXPECT_EQ((slots - host.ring.base) % 64, 0);
      EXPECT_EQ(reinterpret_cast<const char*>(host.ring.slot(capacity - 1)) + 64 - host.ring.base,
                int64_t(proxyRingBytes(bits, nCounters)));
      EXPECT_EQ(host.ring.slot(capacity), host.ring.slot(0));
    }
  }
}

TEST_F(ProxyTest, putsSignalsAndCounts) {
  for (size_t i = 0; i < testBytes; i++) sink.local[1][i] = uint8_t(i * 7 + 1);
  start();
  ProxyOp op = putOp(2, 100, 200);
  op.code = proxyPutSignal;
  op.localRegion = 1;
  op.remoteOffset = 300;
  op.signalRegion = 1;
  op.signalOffset = 64;
  op.signalValue = 0x123456789abcdef0;
  op.counter = 3;
  ASSERT_TRUE(proxyPush(host.ring, op));
  ASSERT_TRUE(proxyAwaitCounter(host.ring, 3, 1));
  EXPECT_EQ(memcmp(&sink.remote[2][0][300], &sink.local[1][100], 200), 0);
  EXPECT_EQ(sink.remote[2][0][299], 0xEE);
  EXPECT_EQ(sink.remote[2][0][500], 0xEE);
  uint64_t signal;
  memcpy(&signal, &sink.remote[2][1][64], 8);
  EXPECT_EQ(signal, op.signalValue);
  EXPECT_EQ(counter(0) + counter(1) + counter(2), 0u);
  EXPECT_EQ(proxy->stats().descriptors, 1u);
  EXPECT_EQ(proxy->stats().bytes, 200u);
  EXPECT_EQ(proxy->asyncError(), ncclSuccess);
  expectStop(ncclSuccess, "");
  EXPECT_FALSE(proxyPush(host.ring, op) && proxyAwaitCounter(host.ring, 3, 2));
}

// Several producers on several rings, laps beyond the tags' period, refusals and delays: everything arrives once, and
// in order per producer.
TEST(Proxy, deliversEverythingOnceAndInOrder) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  constexpr int producers = 4, each = 3000;
  for (uint32_t bits : {0u, 2u, 8u}) {
    MemorySink sink;
    std::mt19937 random(seed);
    sink.refuse = [&](const ProxyOp&) { return random() % 8 == 0; };
    sink.keep = [&](const ProxyOp&) { return random() % 4 == 0; };
    HostRing hosts[2] = {HostRing(bits), HostRing(bits)};
    std::unique_ptr<Proxy> proxy;
    ProxyConfig config = quick();
    config.spinUs = 50;
    config.maxInFlight = 32;
    ASSERT_EQ(Proxy::start({hosts[0].ring, hosts[1].ring}, &sink, config, &proxy), ncclSuccess) << lastError();
    std::vector<std::thread> threads;
    threads.reserve(producers);
    for (int p = 0; p < producers; p++) {
      threads.emplace_back([&, p] {
        const ProxyRing& ring = hosts[p % 2].ring;
        for (int i = 0; i < each; i++) {
          ProxyOp op = putOp(uint32_t(i * 5 + p) % testPeers, uint64_t(p) * 8, 8);
          op.code = proxyPutSignal;
          op.signalOffset = uint64_t(p) * 8;
          op.signalRegion = 1;
          op.signalValue = uint64_t(p) << 32 | uint64_t(i);
          op.counter = uint32_t(p);
          ASSERT_TRUE(proxyPush(ring, op)) << "producer " << p << " descriptor " << i;
        }
        EXPECT_TRUE(proxyAwaitCounter(ring, uint32_t(p), each)) << "producer " << p;
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(proxy->stop(), ncclSuccess) << lastError();
    EXPECT_EQ(sink.posted.size(), size_t(producers * each));
    EXPECT_EQ(sink.completed.size(), size_t(producers * each));
    uint64_t next[producers] = {};
    for (const ProxyOp& op : sink.posted) {
      const uint64_t p = op.signalValue >> 32;
      ASSERT_LT(p, uint64_t(producers));
      EXPECT_EQ(op.signalValue & 0xffffffff, next[p]++);
    }
    uint64_t last[producers][testPeers] = {};
    for (const ProxyOp& op : sink.completed) {
      uint64_t& before = last[op.signalValue >> 32][op.peer];
      EXPECT_GE(op.signalValue & 0xffffffff, before);
      before = op.signalValue & 0xffffffff;
    }
    for (int p = 0; p < producers; p++) EXPECT_EQ(*hosts[p % 2].ring.counter(uint32_t(p)), uint64_t(each));
    EXPECT_GT(proxy->stats().retries, 0u);
  }
}

TEST_F(ProxyTest, givesNoMoreCreditsThanSlots) {
  sink.full = true;
  start();
  for (uint32_t i = 0; i < host.ring.capacity(); i++) ASSERT_TRUE(proxyPush(host.ring, putOp()));
  std::atomic<bool> pushed{false};
  std::thread extra([&] {
    EXPECT_TRUE(proxyPush(host.ring, putOp()));
    pushed = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(pushed);
  EXPECT_EQ(__atomic_load_n(&host.ring.header()->head, __ATOMIC_ACQUIRE), 0u);
  sink.full = false;
  extra.join();
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 0, host.ring.capacity() + 1));
  expectStop(ncclSuccess, "");
  EXPECT_EQ(sink.posted.size(), host.ring.capacity() + 1);
}

TEST_F(ProxyTest, endsForAllWhenAProducerGivesUp) {
  sink.full = true;
  start();
  for (uint32_t i = 0; i < host.ring.capacity(); i++) ASSERT_TRUE(proxyPush(host.ring, putOp()));
  std::thread waiter([&] { EXPECT_FALSE(proxyAwaitCounter(host.ring, 0, 1)); });
  ProxyRing impatient = host.ring;
  impatient.timeoutNs = 30000000;
  EXPECT_FALSE(proxyPush(impatient, putOp()));
  waiter.join();
  EXPECT_TRUE(eventually([&] { return proxy->asyncError() != ncclSuccess; }));
  expectStop(ncclRemoteError, "aborted");
  EXPECT_TRUE(sink.posted.empty());
}

TEST_F(ProxyTest, waitsForTheWholeDescriptor) {
  start();
  for (int missing = 0; missing < proxyWords; missing++) {
    uint64_t words[proxyWords];
    const uint64_t position = __atomic_fetch_add(host.ring.tail, 1, __ATOMIC_RELAXED);
    proxyEncode(putOp(), position, host.ring.capacityBits, words);
    proxyStore(host.ring, position, words, 0, missing);
    proxyStore(host.ring, position, words, missing + 1);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_EQ(sink.nPosted.load(), size_t(missing));
    EXPECT_EQ(proxy->asyncError(), ncclSuccess) << lastError();
    proxyStore(host.ring, position, words, missing, missing + 1);
    EXPECT_TRUE(proxyAwaitCounter(host.ring, 0, uint64_t(missing) + 1));
  }
  expectStop(ncclSuccess, "");
}

TEST_F(ProxyTest, givesUpOnAnIncompleteDescriptor) {
  start(quick(40));
  uint64_t words[proxyWords];
  proxyEncode(putOp(), 0, host.ring.capacityBits, words);
  proxyStore(host.ring, 0, words, 0, 5);
  EXPECT_TRUE(eventually([&] { return proxy->asyncError() != ncclSuccess; }));
  expectStop(ncclRemoteError, "only 5 of 8 words of descriptor 0");
  EXPECT_TRUE(sink.posted.empty());
}

TEST_F(ProxyTest, refusesCorruptWords) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (int round = 0; round < 60; round++) {
    HostRing host(4);
    MemorySink sink;
    std::unique_ptr<Proxy> proxy;
    ASSERT_EQ(Proxy::start({host.ring}, &sink, quick(), &proxy), ncclSuccess);
    uint64_t words[proxyWords];
    proxyEncode(putOp(), 0, host.ring.capacityBits, words);
    // A payload bit, or a tag that is neither of this lap (0x80) nor of the one before (0).
    uint64_t& word = words[random() % proxyWords];
    word = round % 2 == 0 ? word ^ 1ull << random() % 56 : (word & proxyPayload) | uint64_t(1 + random() % 127) << 56;
    // All at once, for otherwise the corrupt word may come first and the error before the rest is there.
    proxyStore(host.ring, 0, words);
    for (int i = 0; i < 20000 && proxy->asyncError() == ncclSuccess; i++)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_EQ(proxy->stop(), ncclInternalError) << "round " << round;
    EXPECT_NE(std::string(lastError()).find("corrupt"), std::string::npos) << lastError();
    EXPECT_TRUE(sink.posted.empty());
  }
}

TEST(Proxy, refusesOperandsOutOfRange) {
  struct Case {
    const char* words;
    std::function<void(ProxyOp*)> spoil;
  };
  const uint64_t last = testBytes;
  const std::vector<Case> cases = {
    {"operation 0", [](ProxyOp* op) { op->code = 0; }},
    {"operation 4", [](ProxyOp* op) { op->code = 4; }},
    {"flags 2", [](ProxyOp* op) { op->flags = 2; }},
    {"peer 3 of 3", [](ProxyOp* op) { op->peer = 3; }},
    {"peer 65535 of 3", [](ProxyOp* op) { op->peer = 65535; }},
    {"counter 4 of 4", [](ProxyOp* op) { op->counter = 4; }},
    {"leaves local region 2", [](ProxyOp* op) { op->localRegion = 2; }},
    {"leaves local region 0", [&](ProxyOp* op) { op->localOffset = last - 7; }},
    {"leaves local region 0", [](ProxyOp* op) { op->localOffset = proxyMaxOffset; }},
    {"leaves local region 0", [](ProxyOp* op) { op->bytes = proxyMaxBytes; }},
    {"leaves region 2 of peer 0", [](ProxyOp* op) { op->remoteRegion = 2; }},
    {"leaves region 0 of peer 0", [&](ProxyOp* op) { op->remoteOffset = last - 7; }},
    {"no signal at 4 ", [](ProxyOp* op) { op->signalOffset = 4; }},
    {"no signal at 4096", [&](ProxyOp* op) { op->signalOffset = last; }},
    {"in region 2 of peer 0", [](ProxyOp* op) { op->signalRegion = 2; }},
  };
  for (const Case& c : cases) {
    HostRing host(4);
    MemorySink sink;
    std::unique_ptr<Proxy> proxy;
    ASSERT_EQ(Proxy::start({host.ring}, &sink, quick(), &proxy), ncclSuccess);
    // The furthest that is allowed goes through; the spoilt one does not, and nothing after it.
    ProxyOp op = putOp(0, last - 8, 8);
    op.code = proxyPutSignal;
    op.signalOffset = last - 8;
    op.counter = 3;
    EXPECT_TRUE(proxyPush(host.ring, op));
    op.localOffset = op.remoteOffset = op.signalOffset = 0;
    ProxyOp spoilt = op;
    c.spoil(&spoilt);
    EXPECT_TRUE(proxyPush(host.ring, spoilt));
    proxyPush(host.ring, op);
    for (int i = 0; i < 20000 && proxy->asyncError() == ncclSuccess; i++)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_EQ(proxy->stop(), ncclInvalidArgument);
    EXPECT_NE(std::string(lastError()).find(c.words), std::string::npos) << c.words << ": " << lastError();
    EXPECT_NE(std::string(lastError()).find("descriptor 1 in ring 0"), std::string::npos) << lastError();
    EXPECT_EQ(sink.posted.size(), 1u) << c.words;
    EXPECT_FALSE(proxyAwaitCounter(host.ring, 3, 3));
  }
}

TEST_F(ProxyTest, ignoresRegionsOfEmptyPuts) {
  start();
  ProxyOp op = putOp(1, 0, 0);
  op.code = proxyPutSignal;
  op.localRegion = 9;
  op.remoteRegion = 9;
  op.signalValue = 5;
  EXPECT_TRUE(proxyPush(host.ring, op));
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 0, 1));
  EXPECT_EQ(sink.remote[1][0][0], 5);
}

TEST_F(ProxyTest, isQuietOnlyWhenAllBeforeIsComplete) {
  std::atomic<bool> holdPeer1{true};
  sink.keep = [&](const ProxyOp& op) { return op.peer == 1 && holdPeer1.load(); };
  start();
  EXPECT_TRUE(proxyPush(host.ring, putOp(1)));
  EXPECT_TRUE(proxyPush(host.ring, putOp(0)));
  EXPECT_TRUE(proxyPush(host.ring, quietOp(1)));
  ProxyOp after = putOp(2);
  after.counter = 2;
  EXPECT_TRUE(proxyPush(host.ring, after));
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 0, 1)) << "peer 0 is not held up by peer 1";
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 2, 1)) << "nor is what comes after the quiet";
  EXPECT_EQ(counter(1), 0u);
  holdPeer1 = false;
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 1, 1));
  EXPECT_EQ(counter(0), 2u);
  EXPECT_TRUE(proxyPush(host.ring, quietOp(1)));
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 1, 2)) << "with nothing before it";
  expectStop(ncclSuccess, "");
}

TEST_F(ProxyTest, startsFencedPutsAfterAllBefore) {
  sink.hold = true;
  start();
  EXPECT_TRUE(proxyPush(host.ring, putOp(0)));
  ProxyOp fenced = putOp(1);
  fenced.flags = proxyFence;
  EXPECT_TRUE(proxyPush(host.ring, fenced));
  EXPECT_TRUE(proxyPush(host.ring, putOp(2)));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(sink.nPosted.load(), 1u);
  sink.hold = false;
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 0, 3));
  expectStop(ncclSuccess, "");
}

TEST_F(ProxyTest, boundsWhatIsInFlight) {
  sink.hold = true;
  ProxyConfig config = quick();
  config.maxInFlight = 5;
  config.maxInFlightBytes = 1000;
  start(config);
  for (int i = 0; i < 8; i++) EXPECT_TRUE(proxyPush(host.ring, putOp(0, 0, 8)));
  EXPECT_TRUE(eventually([&] { return sink.nPosted.load() == 5; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(sink.nPosted.load(), 5u);
  sink.hold = false;
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 0, 8));
  sink.hold = true;
  EXPECT_TRUE(proxyPush(host.ring, putOp(0, 0, 600)));
  EXPECT_TRUE(proxyPush(host.ring, putOp(0, 0, 600)));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(sink.nPosted.load(), 9u);
  sink.hold = false;
  EXPECT_TRUE(proxyPush(host.ring, putOp(0, 0, 2000))); // more than the bound, but alone
  EXPECT_TRUE(proxyAwaitCounter(host.ring, 0, 11));
  expectStop(ncclSuccess, "");
  EXPECT_EQ(sink.maxFlying, 5);
}

TEST_F(ProxyTest, keepsTheErrorOfPost) {
  sink.postError = ncclRemoteError;
  start();
  EXPECT_TRUE(proxyPush(host.ring, putOp()));
  EXPECT_FALSE(proxyAwaitCounter(host.ring, 0, 1));
  EXPECT_EQ(proxy->asyncError(), ncclRemoteError);
  EXPECT_EQ(proxy->asyncError(), ncclRemoteError);
  expectStop(ncclRemoteError, "the sink's post fails");
}

TEST_F(ProxyTest, keepsTheErrorOfTest) {
  sink.testError = ncclSystemError;
  start();
  EXPECT_TRUE(proxyPush(host.ring, putOp()));
  EXPECT_FALSE(proxyAwaitCounter(host.ring, 0, 1));
  expectStop(ncclSystemError, "the sink's test fails");
}

TEST_F(ProxyTest, keepsTheErrorOfProgress) {
  start();
  sink.progressError = true;
  EXPECT_FALSE(proxyAwaitCounter(host.ring, 0, 1));
  expectStop(ncclRemoteError, "the sink's progress fails");
}

TEST_F(ProxyTest, stopsWithDescriptorsQueued) {
  sink.full = true;
  start();
  for (int i = 0; i < 5; i++) EXPECT_TRUE(proxyPush(host.ring, putOp()));
  std::thread waiter([&] { EXPECT_FALSE(proxyAwaitCounter(host.ring, 0, 5)); });
  expectStop(ncclInvalidUsage, "stopped with descriptor 0");
  waiter.join();
  EXPECT_TRUE(sink.posted.empty());
}

TEST_F(ProxyTest, waitsForPutsInFlightAtStop) {
  sink.hold = true;
  start();
  EXPECT_TRUE(proxyPush(host.ring, putOp()));
  EXPECT_TRUE(eventually([&] { return sink.nPosted.load() == 1; }));
  std::thread releaser([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    sink.hold = false;
  });
  EXPECT_EQ(proxy->stop(), ncclSuccess) << lastError();
  releaser.join();
  EXPECT_EQ(sink.completed.size(), 1u);
  EXPECT_EQ(counter(0), 1u);
}

TEST_F(ProxyTest, boundsTheWaitForPutsInFlightAtStop) {
  sink.hold = true;
  start(quick(50));
  EXPECT_TRUE(proxyPush(host.ring, putOp()));
  EXPECT_TRUE(eventually([&] { return sink.nPosted.load() == 1; }));
  expectStop(ncclRemoteError, "1 puts did not complete in 50 ms");
}

TEST_F(ProxyTest, abortsAtOnce) {
  sink.hold = true;
  start();
  EXPECT_TRUE(proxyPush(host.ring, putOp()));
  std::thread waiter([&] { EXPECT_FALSE(proxyAwaitCounter(host.ring, 0, 1)); });
  proxy->abort();
  waiter.join();
  expectStop(ncclRemoteError, "aborted");
}

TEST_F(ProxyTest, sleepsWhenThereIsNothingToDo) {
  start();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_GT(proxy->stats().sleeps, 10u);
  expectStop(ncclSuccess, "");
}

TEST_F(ProxyTest, runsWhereItIsPinned) {
  struct PinnedSink : MemorySink {
    ncclResult_t progress() override {
      if (CPU_COUNT(&seen) == 0) sched_getaffinity(0, sizeof(seen), &seen);
      return ncclSuccess;
    }
    cpu_set_t seen{};
  } pinned;
  cpu_set_t mine, cpus;
  ASSERT_EQ(sched_getaffinity(0, sizeof(mine), &mine), 0);
  CPU_ZERO(&cpus);
  for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&cpus) == 0; i++) {
    if (CPU_ISSET(i, &mine)) CPU_SET(i, &cpus);
  }
  ProxyConfig config = quick();
  config.cpus = &cpus;
  ASSERT_EQ(Proxy::start({host.ring}, &pinned, config, &proxy), ncclSuccess);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(proxy->stop(), ncclSuccess);
  EXPECT_TRUE(CPU_EQUAL(&pinned.seen, &cpus));
}

TEST(Proxy, refusesBadRings) {
  MemorySink sink;
  std::unique_ptr<Proxy> proxy;
  HostRing host(4);
  const auto startWith = [&](const std::function<void(ProxyRing*)>& spoil) {
    ProxyRing ring = host.ring;
    spoil(&ring);
    return Proxy::start({ring}, &sink, quick(), &proxy);
  };
  EXPECT_EQ(startWith([](ProxyRing* ring) { ring->capacityBits = 21; }), ncclInvalidArgument);
  EXPECT_EQ(startWith([](ProxyRing* ring) { ring->nCounters = 0; }), ncclInvalidArgument);
  EXPECT_EQ(startWith([](ProxyRing* ring) { ring->base = nullptr; }), ncclInvalidArgument);
  EXPECT_EQ(startWith([](ProxyRing* ring) { ring->base += 8; }), ncclInvalidArgument);
  EXPECT_EQ(Proxy::start({}, &sink, quick(), &proxy), ncclInvalidArgument);
  EXPECT_EQ(Proxy::start({host.ring}, nullptr, quick(), &proxy), ncclInvalidArgument);
  EXPECT_EQ(proxy, nullptr);
}

} // namespace
} // namespace net
} // namespace moe
