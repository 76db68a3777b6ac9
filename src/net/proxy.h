// The proxy thread: takes descriptors out of rings that GPUs write (proxy_layout.h says how) and makes puts of them.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "nccl_moe.h"
#include "net/proxy_layout.h"

namespace moe {
namespace net {

// Who carries the puts out: connections (proxy_engine.h), or a test.  Only the proxy thread calls it.
class ProxySink {
 public:
  virtual ~ProxySink() = default;
  // What descriptors may name; constant while the proxy runs.  0 bytes: there is no such region.
  virtual uint32_t nPeers() const = 0;
  virtual uint64_t localBytes(uint32_t peer, uint32_t region) const = 0;
  virtual uint64_t remoteBytes(uint32_t peer, uint32_t region) const = 0;
  // op is a put or a putSignal within those bounds.  *request NULL: no room, to be tried again.
  virtual ncclResult_t post(const ProxyOp& op, void** request) = 0;
  // Requests of one peer complete in the order in which they were posted.
  virtual ncclResult_t test(const ProxyOp& op, void* request, bool* done) = 0;
  // Drives what comes in; called on every round.
  virtual ncclResult_t progress() = 0;
};

struct ProxyConfig {
  uint32_t maxInFlight = 256;              // puts of a ring that are posted and not complete
  uint64_t maxInFlightBytes = 64ull << 20; // likewise; one put may exceed it when it is alone
  int timeoutMs = 100000;                  // for the rest of a descriptor, and for the puts in flight at stop
  int spinUs = 200;                        // polls without a pause for so long after the last work, then sleeps between
  const cpu_set_t* cpus = nullptr;         // where the thread runs (Topology::cpusNear); NULL: anywhere
};

class Proxy {
 public:
  // Zeroes the rings' memory (base, capacity and nCounters set) and starts the thread.  Rings and sink must outlive it.
  static ncclResult_t start(const std::vector<ProxyRing>& rings, ProxySink* sink, const ProxyConfig& config,
                            std::unique_ptr<Proxy>* proxy);
  ~Proxy();

  // Takes no more descriptors, waits for the puts in flight, and ends the thread.  An error if descriptors that were
  // in the rings are dropped, puts did not complete, or the proxy had failed before.  Producers see an error after it.
  ncclResult_t stop();
  // Ends everything now; whoever waits on a ring stops waiting.
  void abort();
  // The first error, sticky; with a sentence in lastError() of the calling thread.
  ncclResult_t asyncError() const;

  struct Stats {
    uint64_t descriptors = 0, bytes = 0, retries = 0, rounds = 0, sleeps = 0;
  };
  Stats stats() const;

 private:
  struct Flight {
    ProxyOp op;
    void* request = nullptr;
    bool done = false;
  };
  // A ring's puts between posting and completion, oldest first, in a fixed array.
  struct RingState {
    ProxyRing ring;
    uint64_t head = 0;
    std::vector<Flight> flights;
    uint64_t oldest = 0, next = 0; // numbers of flights
    uint64_t bytes = 0;
    int64_t incompleteSince = 0; // ns; 0: the slot at head is empty or whole
  };
  enum class Slot { empty, incomplete, whole };

  Proxy(const std::vector<ProxyRing>& rings, ProxySink* sink, const ProxyConfig& config);
  void run();
  ncclResult_t round(bool* worked);
  ncclResult_t drain(size_t index, bool* worked);
  ncclResult_t complete(size_t index, bool* worked);
  ncclResult_t read(size_t index, Slot* slot, ProxyOp* op);
  ncclResult_t check(size_t index, const ProxyOp& op) const;
  ncclResult_t finish();
  void publish(ncclResult_t error);

  std::vector<RingState> rings_;
  ProxySink* sink_;
  ProxyConfig config_;
  bool pinned_;
  cpu_set_t cpus_{};
  std::vector<uint64_t> blockedRound_; // by ring and peer: the last round that found a put incomplete
  uint64_t round_ = 0;

  std::atomic<bool> stop_{false};
  std::atomic<int> error_{ncclSuccess};
  mutable std::mutex mutex_; // sentence_
  std::string sentence_;
  std::atomic<uint64_t> descriptors_{0}, bytes_{0}, retries_{0}, rounds_{0}, sleeps_{0};
  std::thread thread_;
};

} // namespace net
} // namespace moe
