// The backend over host memory: one progress loop per communicator, run by whichever call waits.
//
// Calls form a queue, in which only the first makes progress: all ranks make the same calls in the same order, so
// nothing is lost by that and nothing can overtake.  A SEND_ONLY call is put in the queue and moved as far as it goes
// without waiting; ncclMoeComplete, or any later call that waits, brings it to its end.  Only one that this rank
// refuses waits, as a whole call does.
//
// Waiting: spin, then yield, then sleep on the sockets.  It ends with progress, after timeoutMs without any, on abort,
// or when a peer that is still needed has gone.  The last three are final: the peers are told, and every later call
// returns the same error.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/bootstrap.h"
#include "comm/comm.h"
#include "host/channel.h"
#include "host/op.h"
#include "routing/plan.h"

namespace moe {

// What the host backend keeps for a routing.
struct HostRouting : RoutingState {
  int64_t id = 0; // which of the communicator's routings, counted alike on every rank
  int topK = 0;
  int maxTokens = 0;
  ncclMoeLayout_t layout = ncclMoeLayoutRankMajor;
  SendPlan send;
  RecvPlan recv;
  size_t bytes = 0;
  bool counted = false;     // recv holds the counts of the last dispatch
  bool hasDispatch = false; // one has begun
  Outcome dispatched;       // how the last one ended
  uint64_t lastCall = 0;    // sequence of the last call that uses this object
  uint64_t pending = 0;     // sequence of the SEND_ONLY call in flight; 0: none
  bool pendingDispatch = false;
  Outcome pendingOutcome;
};

class HostBackend final : public Backend {
 public:
  HostBackend(ncclMoeComm& comm, size_t ringBytes);
  ~HostBackend() override;
  ncclResult_t connect(std::vector<BootstrapPeer> peers);

  ncclResult_t routingMemoryNeeded(const ncclMoeRoutingConfig_t& config, size_t* bytes) override;
  ncclResult_t routingCreate(ncclMoeRouting& routing) override;
  ncclResult_t routingDestroy(ncclMoeRouting& routing) override;
  ncclResult_t routingGetCounts(ncclMoeRouting& routing, int64_t* nRows, int* expertCounts) override;
  ncclResult_t dispatch(const ncclMoeDispatchArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) override;
  ncclResult_t combine(const ncclMoeCombineArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) override;
  ncclResult_t complete(ncclMoeRouting& routing, cudaStream_t stream) override;
  ncclResult_t memAlloc(void** ptr, size_t bytes) override;
  ncclResult_t memFree(void* ptr) override;
  size_t memoryBytes() override;
  ncclResult_t maskRanks(const int* masked, uint64_t generation) override;
  ncclResult_t stats(ncclMoeCommStats_t* stats) override;
  int nScaleUpRanks() override;
  bool onHost() override { return true; }
  void abort() override;
  ncclResult_t asyncError(std::string* sentence) override;
  ncclResult_t shutdown() override;

  // For calls.
  int rank() const { return rank_; }
  int nRanks() const { return nRanks_; }
  int nLocal(int rank) const { return config_.nLocal[rank]; }
  int nLocal() const { return config_.nLocal[rank_]; }
  int firstLocal(int rank) const { return firstLocal_[rank]; }
  const int* firstLocals() const { return firstLocal_.data(); }
  Placement placement() const { return Placement{config_.nExperts, nRanks_, config_.home.data()}; }
  Channel& channel(int rank) { return *channels_[rank]; }
  uint64_t nextSequence() { return ++issued_; }
  uint8_t* scratchRow() { return scratch_.data(); } // maxRowBytes; what is cast takes less, scales included
  // Rows of at least so many bytes in one call go past the caches.
  bool streams(size_t bytes) const { return bytes >= streamBytes_; }

 private:
  // Runs a call to its end, or a SEND_ONLY one that is not refused as far as it goes without waiting.
  ncclResult_t run(std::unique_ptr<Op> op);
  ncclResult_t launch(std::unique_ptr<Op> op, HostRouting& routing);
  // Until the call has ended, or *early is true.
  ncclResult_t runUntil(uint64_t sequence, const bool* early = nullptr);
  ncclResult_t advance(bool* progress);
  ncclResult_t checkPeers();
  ncclResult_t timedOut();
  std::string whereIn(const Op& op) const;
  void sleep(std::chrono::microseconds time);
  // An error where the communicator has ended.
  ncclResult_t checkUsable();
  ncclResult_t die(ncclResult_t result, const std::string& sentence, ByeReason reason);
  static ncclResult_t report(const Outcome& outcome);

  const CommConfig& config_;
  const int rank_;
  const int nRanks_;
  const size_t ringBytes_;
  size_t streamBytes_;
  bool spins_ = false;                             // every rank of this host has a core
  std::vector<int> firstLocal_;                    // [R] experts of lower ranks
  std::vector<std::unique_ptr<Channel>> channels_; // [R]; none to itself
  std::vector<uint8_t> scratch_;
  std::deque<std::unique_ptr<Op>> queue_;
  uint64_t issued_ = 0;   // calls begun
  uint64_t finished_ = 0; // calls that have ended
  const char* entered_ =
    "ncclMoeCommInitHost"; // the function that the user called last; an earlier call may have to end first
  int64_t routingsMade_ = 0;
  int64_t allocationsMade_ = 0;
  size_t routingBytes_ = 0;
  std::map<void*, std::pair<int64_t, UniqueMap>> allocations_; // with their number, the same on every rank
  std::atomic<bool> aborted_{false};
  std::mutex errorMutex_; // guards what follows
  ncclResult_t finalError_ = ncclSuccess;
  std::string finalSentence_;
};

// Ring size and memory of a communicator on one rank.
size_t hostRingBytes(const CommConfig& config, int nRanks);
size_t hostMemoryNeeded(const CommConfig& config, int nRanks);

std::unique_ptr<Op> makeDispatch(HostBackend& host, const ncclMoeDispatchArgs_t& args, HostRouting& routing);
std::unique_ptr<Op> makeCombine(HostBackend& host, const ncclMoeCombineArgs_t& args, HostRouting& routing);

} // namespace moe
