#include "net/proxy.h"

#include <pthread.h>
#include <time.h>

#include <cstring>
#include <system_error>

#include "base/error.h"

namespace moe {
namespace net {
namespace {

constexpr int drainBatch = 64; // descriptors of a ring per round
constexpr long sleepNs = 20000;

int64_t nowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

void pauseFor(long ns) {
  const timespec duration{0, ns};
  nanosleep(&duration, nullptr);
}

template <typename T> T acquire(const T* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
template <typename T> void release(T* p, T value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }

} // namespace

ncclResult_t Proxy::start(const std::vector<ProxyRing>& rings, ProxySink* sink, const ProxyConfig& config,
                          std::unique_ptr<Proxy>* proxy) {
  if (rings.empty() || sink == nullptr) return fail(ncclInvalidArgument, "proxy: it needs a ring and a sink");
  if (config.maxInFlight == 0 || config.timeoutMs <= 0)
    return fail(ncclInvalidArgument, "proxy: maxInFlight and timeoutMs must be positive");
  for (const ProxyRing& ring : rings) {
    if (ring.base == nullptr || reinterpret_cast<uintptr_t>(ring.base) % 64 != 0)
      return fail(ncclInvalidArgument, "proxy: the ring's memory must be a multiple of 64 bytes");
    if (ring.capacityBits > proxyMaxCapacityBits)
      return fail(ncclInvalidArgument, "proxy: a ring has at most 2^%u slots, not 2^%u", proxyMaxCapacityBits,
                  ring.capacityBits);
    if (ring.nCounters == 0 || ring.nCounters > proxyMaxCounters)
      return fail(ncclInvalidArgument, "proxy: a ring has 1 to %u counters, not %u", proxyMaxCounters, ring.nCounters);
    memset(ring.base, 0, proxyRingBytes(ring.capacityBits, ring.nCounters));
  }
  std::unique_ptr<Proxy> created(new Proxy(rings, sink, config));
  try {
    created->thread_ = std::thread(&Proxy::run, created.get());
  } catch (const std::system_error& error) {
    return fail(ncclSystemError, "proxy: no thread: %s", error.what());
  }
  *proxy = std::move(created);
  return ncclSuccess;
}

Proxy::Proxy(const std::vector<ProxyRing>& rings, ProxySink* sink, const ProxyConfig& config)
  : rings_(rings.size()), sink_(sink), config_(config), pinned_(config.cpus != nullptr),
    blockedRound_(rings.size() * sink->nPeers(), 0) {
  if (pinned_) cpus_ = *config.cpus;
  for (size_t i = 0; i < rings.size(); i++) {
    rings_[i].ring = rings[i];
    rings_[i].flights.resize(config.maxInFlight);
  }
}

Proxy::~Proxy() { stop(); }

ncclResult_t Proxy::stop() {
  stop_.store(true, std::memory_order_release);
  if (thread_.joinable()) thread_.join();
  return asyncError();
}

void Proxy::abort() {
  for (const RingState& state : rings_) release(&state.ring.header()->abort, 1u);
}

ncclResult_t Proxy::asyncError() const {
  const ncclResult_t error = ncclResult_t(error_.load(std::memory_order_acquire));
  if (error == ncclSuccess) return ncclSuccess;
  std::lock_guard<std::mutex> lock(mutex_);
  return fail(error, "%s", sentence_.c_str());
}

Proxy::Stats Proxy::stats() const {
  Stats stats;
  stats.descriptors = descriptors_.load(std::memory_order_relaxed);
  stats.bytes = bytes_.load(std::memory_order_relaxed);
  stats.retries = retries_.load(std::memory_order_relaxed);
  stats.rounds = rounds_.load(std::memory_order_relaxed);
  stats.sleeps = sleeps_.load(std::memory_order_relaxed);
  return stats;
}

// Before the waiters are told, so that the sentence is there when they ask.
void Proxy::publish(ncclResult_t error) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    sentence_ = lastError();
  }
  error_.store(error, std::memory_order_release);
}

void Proxy::run() {
  pthread_setname_np(pthread_self(), "moe-proxy");
  if (pinned_ && sched_setaffinity(0, sizeof(cpus_), &cpus_) != 0)
    MOE_WARN("proxy: the thread cannot be pinned next to its device: %s", strerror(errno));
  ncclResult_t result = ncclSuccess;
  int64_t idleSince = 0;
  while (result == ncclSuccess && !stop_.load(std::memory_order_acquire)) {
    bool worked = false;
    result = round(&worked);
    if (worked) {
      idleSince = 0;
      continue;
    }
    const int64_t now = nowNs();
    if (idleSince == 0) idleSince = now;
    if (now - idleSince < int64_t(config_.spinUs) * 1000) continue;
    sleeps_.fetch_add(1, std::memory_order_relaxed);
    pauseFor(sleepNs);
  }
  if (result == ncclSuccess) result = finish();
  if (result != ncclSuccess) publish(result);
  // After the last round nobody takes descriptors: a producer that waits must hear of it, whatever the reason.
  const uint32_t seen = uint32_t(result != ncclSuccess ? result : ncclInvalidUsage);
  for (const RingState& state : rings_) release(&state.ring.header()->error, seen);
}

ncclResult_t Proxy::round(bool* worked) {
  round_++;
  rounds_.store(round_, std::memory_order_relaxed);
  for (size_t i = 0; i < rings_.size(); i++) {
    if (acquire(&rings_[i].ring.header()->abort) != 0)
      return fail(ncclRemoteError, "proxy: ring %zu was aborted at descriptor %llu", i,
                  (unsigned long long)rings_[i].head);
    MOECHECK(drain(i, worked));
  }
  MOECHECK(sink_->progress());
  for (size_t i = 0; i < rings_.size(); i++) MOECHECK(complete(i, worked));
  return ncclSuccess;
}

// Posts what has arrived in the ring, as far as there is room.
ncclResult_t Proxy::drain(size_t index, bool* worked) {
  RingState& state = rings_[index];
  for (int i = 0; i < drainBatch && state.next - state.oldest < state.flights.size(); i++) {
    Slot slot = Slot::empty;
    ProxyOp op;
    MOECHECK(read(index, &slot, &op));
    if (slot != Slot::whole) break;
    MOECHECK(check(index, op));
    const bool alone = state.next == state.oldest;
    if ((op.flags & proxyFence) != 0 && !alone) break;
    if (!alone && state.bytes + op.bytes > config_.maxInFlightBytes) break;
    Flight& flight = state.flights[state.next % state.flights.size()];
    flight = Flight{op, nullptr, false};
    if (op.code != proxyQuiet) {
      MOECHECK(sink_->post(op, &flight.request));
      if (flight.request == nullptr) {
        retries_.fetch_add(1, std::memory_order_relaxed);
        break;
      }
    }
    state.bytes += op.bytes;
    state.next++;
    state.head++;
    release(&state.ring.header()->head, state.head);
    descriptors_.fetch_add(1, std::memory_order_relaxed);
    bytes_.fetch_add(op.bytes, std::memory_order_relaxed);
    *worked = true;
  }
  return ncclSuccess;
}

ncclResult_t Proxy::read(size_t index, Slot* slot, ProxyOp* op) {
  RingState& state = rings_[index];
  const uint64_t tag = proxyTag(state.head, state.ring.capacityBits);
  const uint64_t lastTag =
    state.head < state.ring.capacity() ? 0 : proxyTag(state.head - state.ring.capacity(), state.ring.capacityBits);
  const ProxySlot* source = state.ring.slot(state.head);
  uint64_t words[proxyWords];
  int arrived = 0;
  for (int i = 0; i < proxyWords; i++) {
    words[i] = acquire(&source->words[i]);
    if (words[i] >> 56 == tag) {
      arrived++;
    } else if (words[i] >> 56 != lastTag) {
      return fail(ncclInternalError, "proxy: word %d of descriptor %llu in ring %zu is corrupt: tag %u, not %u", i,
                  (unsigned long long)state.head, index, unsigned(words[i] >> 56), unsigned(tag));
    }
    if (arrived == 0) break; // nothing yet: the usual poll reads one word
  }
  *slot = arrived == 0 ? Slot::empty : arrived < proxyWords ? Slot::incomplete : Slot::whole;
  if (*slot != Slot::incomplete) state.incompleteSince = 0;
  if (*slot == Slot::whole && !proxyDecode(words, state.head, op))
    return fail(ncclInternalError, "proxy: descriptor %llu in ring %zu is corrupt", (unsigned long long)state.head,
                index);
  if (*slot == Slot::incomplete) {
    const int64_t now = nowNs();
    if (state.incompleteSince == 0) state.incompleteSince = now;
    if (now - state.incompleteSince > int64_t(config_.timeoutMs) * 1000000)
      return fail(ncclRemoteError, "proxy: only %d of %d words of descriptor %llu in ring %zu came in %d ms", arrived,
                  proxyWords, (unsigned long long)state.head, index, config_.timeoutMs);
  }
  return ncclSuccess;
}

// Nothing that a kernel wrote is trusted: a put out of bounds would be the NIC's to refuse, or nobody's.
ncclResult_t Proxy::check(size_t index, const ProxyOp& op) const {
  const RingState& state = rings_[index];
  const unsigned long long position = state.head;
  const auto within = [](uint64_t offset, uint64_t bytes, uint64_t size) {
    return offset <= size && bytes <= size - offset;
  };
  if (op.code < proxyPut || op.code > proxyQuiet || (op.flags & ~uint32_t(proxyFence)) != 0)
    return fail(ncclInvalidArgument, "proxy: descriptor %llu in ring %zu has operation %u, flags %u", position, index,
                op.code, op.flags);
  if (op.counter >= state.ring.nCounters)
    return fail(ncclInvalidArgument, "proxy: descriptor %llu in ring %zu names counter %u of %u", position, index,
                op.counter, state.ring.nCounters);
  if (op.code == proxyQuiet) return ncclSuccess;
  if (op.peer >= sink_->nPeers())
    return fail(ncclInvalidArgument, "proxy: descriptor %llu in ring %zu names peer %u of %u", position, index, op.peer,
                sink_->nPeers());
  if (op.bytes != 0 && !within(op.localOffset, op.bytes, sink_->localBytes(op.peer, op.localRegion)))
    return fail(ncclInvalidArgument,
                "proxy: descriptor %llu in ring %zu leaves local region %u: %llu bytes at %llu of %llu", position,
                index, op.localRegion, (unsigned long long)op.bytes, (unsigned long long)op.localOffset,
                (unsigned long long)sink_->localBytes(op.peer, op.localRegion));
  if (op.bytes != 0 && !within(op.remoteOffset, op.bytes, sink_->remoteBytes(op.peer, op.remoteRegion)))
    return fail(ncclInvalidArgument,
                "proxy: descriptor %llu in ring %zu leaves region %u of peer %u: %llu bytes at %llu of %llu", position,
                index, op.remoteRegion, op.peer, (unsigned long long)op.bytes, (unsigned long long)op.remoteOffset,
                (unsigned long long)sink_->remoteBytes(op.peer, op.remoteRegion));
  if (op.code == proxyPutSignal &&
      (op.signalOffset % 8 != 0 || !within(op.signalOffset, 8, sink_->remoteBytes(op.peer, op.signalRegion))))
    return fail(ncclInvalidArgument,
                "proxy: descriptor %llu in ring %zu: no signal at %llu in region %u of peer %u, which has %llu bytes",
                position, index, (unsigned long long)op.signalOffset, op.signalRegion, op.peer,
                (unsigned long long)sink_->remoteBytes(op.peer, op.signalRegion));
  return ncclSuccess;
}

// Counts what is complete.  Of each peer only the oldest put is tested, and the next ones once that is done.
ncclResult_t Proxy::complete(size_t index, bool* worked) {
  RingState& state = rings_[index];
  bool allBefore = true;
  for (uint64_t number = state.oldest; number < state.next; number++) {
    Flight& flight = state.flights[number % state.flights.size()];
    if (!flight.done) {
      if (flight.op.code == proxyQuiet) {
        flight.done = allBefore;
      } else {
        uint64_t& blocked = blockedRound_[index * sink_->nPeers() + flight.op.peer];
        if (blocked != round_) MOECHECK(sink_->test(flight.op, flight.request, &flight.done));
        if (!flight.done) blocked = round_;
      }
      if (flight.done) {
        uint64_t* counter = state.ring.counter(flight.op.counter);
        release(counter, *counter + 1);
        *worked = true;
      }
    }
    allBefore = allBefore && flight.done;
    if (allBefore) {
      state.bytes -= flight.op.bytes;
      state.oldest++;
    }
  }
  return ncclSuccess;
}

// The memory of puts in flight is in use until they complete.
ncclResult_t Proxy::finish() {
  const int64_t deadline = nowNs() + int64_t(config_.timeoutMs) * 1000000;
  for (;;) {
    size_t inFlight = 0;
    round_++;
    MOECHECK(sink_->progress());
    for (size_t i = 0; i < rings_.size(); i++) {
      bool worked = false;
      MOECHECK(complete(i, &worked));
      inFlight += size_t(rings_[i].next - rings_[i].oldest);
      if (acquire(&rings_[i].ring.header()->abort) != 0) return fail(ncclRemoteError, "proxy: ring %zu was aborted", i);
    }
    if (inFlight == 0) break;
    if (nowNs() > deadline)
      return fail(ncclRemoteError, "proxy: %zu puts did not complete in %d ms", inFlight, config_.timeoutMs);
    pauseFor(sleepNs);
  }
  for (size_t i = 0; i < rings_.size(); i++) {
    Slot slot = Slot::empty;
    ProxyOp op;
    MOECHECK(read(i, &slot, &op));
    if (slot != Slot::empty)
      return fail(ncclInvalidUsage, "proxy: stopped with descriptor %llu and maybe more queued in ring %zu",
                  (unsigned long long)rings_[i].head, i);
  }
  return ncclSuccess;
}

} // namespace net
} // namespace moe
