#include "host/host_backend.h"

#include <poll.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "base/param.h"
#include "host/backend.h"
#include "host/row_math.h"

namespace moe {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr char kAborted[] = "the communicator was aborted";
constexpr auto kSpin = microseconds(100);     // then other threads get the core
constexpr auto kYield = milliseconds(1);      // then the loop sleeps
constexpr auto kLookAround = milliseconds(1); // how often a waiting rank looks whether its peers still live
constexpr auto kShortNaps = milliseconds(5);  // sleeps are short for so long
constexpr auto kMediumNaps = milliseconds(50);
constexpr size_t kAllRingBytes = size_t{1} << 24; // of a rank, unless rows need more

IntParam ringParam{"NCCL_MOE_HOST_RING_BYTES", 1 << 19, 1 << 12, 1 << 30,
                   "bytes of a ring between two ranks of the host backend (more where the rows of a token need more)"};
IntParam streamParam{"NCCL_MOE_HOST_STREAM_BYTES", 4 << 20, 0, int64_t{1} << 62,
                     "received bytes per call from which the host backend writes rows past the caches"};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int usableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
}

// A collective that only agrees on its arguments.
class AgreeOp final : public Op {
 public:
  AgreeOp(HostBackend& host, OpKind kind, const char* function, std::initializer_list<int64_t> values, bool able = true)
    : Op(host, kind, function) {
    std::copy(values.begin(), values.end(), value_);
    if (!able) mine_.kind = Verdict::noMemory;
  }
};

size_t widestRow(const CommConfig& config) {
  const auto k = static_cast<size_t>(config.maxTopK);
  return WireRow::make(config.maxRowBytes, WireRow::kMaxScaleBytes, k, k, k).stride;
}

} // namespace

size_t hostRingBytes(const CommConfig& config, int nRanks) {
  // An EXACT combine needs all rows of a token at once; and the writer fills some while the reader empties others.
  const size_t rows = static_cast<size_t>(config.maxTopK) + 2;
  const size_t share = kAllRingBytes / (2 * static_cast<size_t>(std::max(nRanks - 1, 1)));
  const size_t want = std::max(std::min(static_cast<size_t>(ringParam.get()), share), rows * widestRow(config));
  auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (bytes < want) bytes *= 2;
  return bytes;
}

size_t hostMemoryNeeded(const CommConfig& config, int nRanks) {
  return static_cast<size_t>(nRanks - 1) * 2 * hostRingBytes(config, nRanks) + config.maxRowBytes;
}

ncclResult_t hostBackendCreate(ncclMoeComm& comm, const char* rendezvous) {
  const size_t needed = hostMemoryNeeded(comm.config, comm.nRanks);
  if (comm.config.maxMemory != 0 && needed > comm.config.maxMemory) {
    return fail(ncclInvalidArgument, "ncclMoeCommInitHost: config.maxMemory %zu is less than the %zu bytes needed",
                comm.config.maxMemory, needed);
  }
  std::vector<BootstrapPeer> peers;
  MOECHECK(bootstrap(comm.config, comm.rank, comm.nRanks, rendezvous, &peers));
  auto backend = std::make_unique<HostBackend>(comm, hostRingBytes(comm.config, comm.nRanks));
  MOECHECK(backend->connect(std::move(peers)));
  comm.backend = std::move(backend);
  return ncclSuccess;
}

HostBackend::HostBackend(ncclMoeComm& comm, size_t ringBytes)
  : config_(comm.config), rank_(comm.rank), nRanks_(comm.nRanks), ringBytes_(ringBytes),
    streamBytes_(static_cast<size_t>(streamParam.get())), firstLocal_(comm.nRanks, 0), channels_(comm.nRanks),
    scratch_(comm.config.maxRowBytes) {
  for (int r = 1; r < nRanks_; r++) firstLocal_[r] = firstLocal_[r - 1] + config_.nLocal[r - 1];
}

HostBackend::~HostBackend() { shutdown(); }

// Sets up all channels, then makes sure by a first call that every rank has done so.
ncclResult_t HostBackend::connect(std::vector<BootstrapPeer> peers) {
  const auto deadline = Clock::now() + milliseconds(config_.timeoutMs);
  int onThisHost = 1;
  for (int r = 0; r < nRanks_; r++) {
    if (r == rank_) continue;
    const bool sameHost = peers[r].hostId == peers[rank_].hostId;
    onThisHost += sameHost ? 1 : 0;
    channels_[r] = std::make_unique<Channel>(r, std::move(peers[r].socket), sameHost, ringBytes_);
  }
  spins_ = onThisHost <= usableCores();
  std::vector<int> waiting;
  for (int r = 0; r < nRanks_; r++) {
    if (r != rank_) waiting.push_back(r);
  }
  while (!waiting.empty()) {
    std::vector<pollfd> set;
    for (size_t i = 0; i < waiting.size();) {
      bool ready = false;
      const ncclResult_t result = channels_[waiting[i]]->setUp(rank_, &ready);
      if (result != ncclSuccess) return die(result, lastError(), ByeReason::failed);
      if (ready) {
        waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        set.push_back(pollfd{channels_[waiting[i++]]->setupFd(), POLLIN, 0});
      }
    }
    if (waiting.empty()) break;
    if (Clock::now() >= deadline) {
      return die(ncclRemoteError,
                 "ncclMoeCommInitHost: rank " + std::to_string(waiting[0]) + " did not set up its channel in time",
                 ByeReason::failed);
    }
    poll(set.data(), set.size(), millisUntil(deadline, 100));
  }
  return run(std::make_unique<AgreeOp>(*this, OpKind::init, "ncclMoeCommInitHost", std::initializer_list<int64_t>{}));
}

// ------------------------------------------------------------------------------------------------------ progress ----

ncclResult_t HostBackend::report(const Outcome& outcome) {
  return outcome.result == ncclSuccess ? ncclSuccess : fail(outcome.result, "%s", outcome.sentence.c_str());
}

ncclResult_t HostBackend::checkUsable() {
  const std::lock_guard<std::mutex> lock(errorMutex_);
  if (finalError_ == ncclSuccess) return ncclSuccess;
  // Others name the function that met them.
  if (finalSentence_ == kAborted) return fail(finalError_, "%s: %s", entered_, kAborted);
  return fail(finalError_, "%s", finalSentence_.c_str());
}

// The communicator ends: peers are told, calls in flight are dropped, later calls get the same error.
ncclResult_t HostBackend::die(ncclResult_t result, const std::string& sentence, ByeReason reason) {
  {
    const std::lock_guard<std::mutex> lock(errorMutex_);
    if (finalError_ == ncclSuccess) {
      finalError_ = result;
      finalSentence_ = sentence;
    }
  }
  for (const auto& channel : channels_) {
    if (channel) channel->leave(Bye{reason, sentence});
  }
  queue_.clear();
  return checkUsable();
}

ncclResult_t HostBackend::run(std::unique_ptr<Op> op) {
  entered_ = op->function();
  MOECHECK(checkUsable());
  Outcome outcome;
  const uint64_t sequence = op->sequence();
  op->reportTo(&outcome);
  queue_.push_back(std::move(op));
  MOECHECK(runUntil(sequence));
  return report(outcome);
}

// Puts a SEND_ONLY call in the queue and moves it as far as it goes without waiting.  One that this rank refuses has no
// second half in which peers could hear of it, so it is run like a whole one.
ncclResult_t HostBackend::launch(std::unique_ptr<Op> op, HostRouting& routing) {
  routing.pending = 0;
  if (op->refused()) return run(std::move(op));
  routing.pendingOutcome = Outcome{};
  routing.pending = op->sequence();
  op->reportTo(&routing.pendingOutcome);
  queue_.push_back(std::move(op));
  for (bool progress = true; progress && !queue_.empty();) {
    progress = false;
    if (aborted_.load(std::memory_order_acquire)) {
      return die(ncclRemoteError, kAborted, ByeReason::aborted);
    }
    MOECHECK(advance(&progress));
  }
  return ncclSuccess;
}

// One round of everything that can be done without waiting.
ncclResult_t HostBackend::advance(bool* progress) {
  for (const auto& channel : channels_) {
    if (channel && !channel->shared()) channel->pump(progress);
  }
  if (queue_.empty()) return ncclSuccess;
  Op& op = *queue_.front();
  const ncclResult_t result = op.step(progress);
  if (result != ncclSuccess) return die(result, lastError(), ByeReason::failed);
  if (!op.done()) return ncclSuccess;
  if (op.report() != nullptr) *op.report() = op.outcome();
  finished_ = op.sequence();
  queue_.pop_front();
  *progress = true;
  return ncclSuccess;
}

ncclResult_t HostBackend::runUntil(uint64_t sequence, const bool* early) {
  auto lastProgress = Clock::now();
  auto lastLook = lastProgress;
  bool idle = false; // the clock is not read while there is progress
  while (finished_ < sequence && (early == nullptr || !*early)) {
    bool progress = false;
    MOECHECK(advance(&progress));
    if (aborted_.load(std::memory_order_acquire)) {
      return die(ncclRemoteError, kAborted, ByeReason::aborted);
    }
    if (progress) {
      idle = false;
      continue;
    }
    const auto now = Clock::now();
    if (!idle) lastProgress = now;
    idle = true;
    const auto waited = now - lastProgress;
    if (waited > milliseconds(config_.timeoutMs)) return timedOut();
    if (now - lastLook > kLookAround) {
      lastLook = now;
      for (const auto& channel : channels_) {
        if (channel && channel->shared()) channel->pump(&progress);
      }
      MOECHECK(checkPeers());
    }
    if (spins_ && waited < kSpin) {
      relax();
    } else if (waited < kYield) {
      sched_yield();
    } else {
      sleep(microseconds(waited < kShortNaps ? 50 : waited < kMediumNaps ? 200 : 1000));
    }
  }
  return ncclSuccess;
}

// Sleeps so long, or until a socket has something to say.
void HostBackend::sleep(microseconds time) {
  std::vector<pollfd> set;
  for (const auto& channel : channels_) {
    if (!channel || channel->gone()) continue;
    set.push_back(pollfd{channel->fd(), channel->wants(), 0});
  }
  const timespec timeout{0, time.count() * 1000};
  ppoll(set.data(), set.size(), &timeout, nullptr);
}

// Ends the communicator if the call that is waited for needs a peer that has gone.  What such a peer has left in the
// rings is still good: a rank may finish its part and leave while others are not so far.
ncclResult_t HostBackend::checkPeers() {
  if (queue_.empty()) return ncclSuccess;
  const Op& op = *queue_.front();
  int lost = -1;
  for (int r = 0; r < nRanks_; r++) {
    if (r == rank_ || !channels_[r]->gone()) continue;
    if (!op.needsTo(r) && channels_[r]->in().fill() >= op.needsFrom(r)) continue;
    // Of several, the one that others did not only fail because of.
    if (lost < 0 || (channels_[r]->goneByItself() && !channels_[lost]->goneByItself())) lost = r;
  }
  if (lost < 0) return ncclSuccess;
  return die(ncclRemoteError, whereIn(op) + "rank " + std::to_string(lost) + " " + channels_[lost]->epitaph(),
             ByeReason::failed);
}

// What the user called, and the call that it waits for.
std::string HostBackend::whereIn(const Op& op) const {
  char text[160];
  const bool other = strcmp(entered_, op.function()) != 0;
  snprintf(text, sizeof(text), "%s%s%s (call %" PRIu64 ", %s): ", other ? entered_ : "", other ? ": " : "",
           op.function(), op.sequence(), op.phaseName());
  return text;
}

ncclResult_t HostBackend::timedOut() {
  const Op& op = *queue_.front();
  std::string ranks;
  int named = 0;
  for (int r = 0; r < nRanks_; r++) {
    if (r == rank_ || !op.waitsFor(r)) continue;
    if (++named <= 8) ranks += (named > 1 ? ", " : "") + std::to_string(r);
  }
  if (named > 8) ranks += " and " + std::to_string(named - 8) + " others";
  return die(ncclRemoteError,
             whereIn(op) + "timed out after " + std::to_string(config_.timeoutMs) + " ms, waiting for rank" +
               (named == 1 ? " " : "s ") + ranks,
             ByeReason::failed);
}

// ------------------------------------------------------------------------------------------------------- routings ----

ncclResult_t HostBackend::routingMemoryNeeded(const ncclMoeRoutingConfig_t& config, size_t* bytes) {
  *bytes = SendPlan::bytesNeeded(nRanks_, config_.nExperts, config.maxTokens, config.topK) +
           RecvPlan::bytesNeeded(config.layout, nRanks_, nLocal(), config.maxTokens, config.topK);
  return ncclSuccess;
}

ncclResult_t HostBackend::routingCreate(ncclMoeRouting& routing) {
  const ncclMoeRoutingConfig_t& c = routing.config;
  auto state = std::make_unique<HostRouting>();
  state->topK = c.topK;
  state->maxTokens = c.maxTokens;
  state->layout = c.layout;
  state->id = routingsMade_;
  const ncclResult_t made = [&]() -> ncclResult_t {
    MOECHECK(state->send.allocate(nRanks_, config_.nExperts, c.maxTokens, c.topK));
    return state->recv.allocate(c.layout, nRanks_, nLocal(), c.maxTokens, c.topK, c.expertAlignment);
  }();
  MOECHECK(routingMemoryNeeded(c, &state->bytes));
  MOECHECK(run(std::make_unique<AgreeOp>(
    *this, OpKind::routingCreate, "ncclMoeRoutingCreate",
    std::initializer_list<int64_t>{c.topK, c.maxTokens, c.layout, c.expertAlignment, c.hostCounts},
    made == ncclSuccess)));
  routingsMade_++;
  routingBytes_ += state->bytes;
  routing.state = std::move(state);
  return ncclSuccess;
}

ncclResult_t HostBackend::routingDestroy(ncclMoeRouting& routing) {
  entered_ = "ncclMoeRoutingDestroy";
  auto* state = static_cast<HostRouting*>(routing.state.get());
  ncclResult_t result = ncclSuccess;
  // A call in flight uses its tables, and peers wait for the call.
  if (state->lastCall > finished_ && checkUsable() == ncclSuccess) result = runUntil(state->lastCall);
  routingBytes_ -= state->bytes;
  routing.state.reset();
  return result;
}

ncclResult_t HostBackend::routingGetCounts(ncclMoeRouting& routing, int64_t* nRows, int* expertCounts) {
  entered_ = "ncclMoeRoutingGetCounts";
  auto* state = static_cast<HostRouting*>(routing.state.get());
  if (!state->hasDispatch) return fail(ncclInvalidUsage, "ncclMoeRoutingGetCounts: the routing has had no dispatch");
  if (state->pendingDispatch) {
    MOECHECK(checkUsable());
    MOECHECK(runUntil(state->pending, &state->counted));
  }
  if (state->counted) { // also when there was too little room for them
    *nRows = state->recv.nRows();
    if (expertCounts != nullptr) std::copy_n(state->recv.expertCounts(), nLocal(), expertCounts);
  }
  return report(state->pendingDispatch ? state->pendingOutcome : state->dispatched);
}

// ---------------------------------------------------------------------------------------------------- collectives ----

ncclResult_t HostBackend::dispatch(const ncclMoeDispatchArgs_t& args, ncclMoeRouting& routing, cudaStream_t) {
  entered_ = "ncclMoeDispatch";
  auto* state = static_cast<HostRouting*>(routing.state.get());
  MOECHECK(checkUsable());
  std::unique_ptr<Op> op = makeDispatch(*this, args, *state);
  state->lastCall = op->sequence();
  state->hasDispatch = true;
  state->counted = false;
  const bool sendOnly = (args.flags & NCCL_MOE_SEND_ONLY) != 0;
  const ncclResult_t result = sendOnly ? launch(std::move(op), *state) : run(std::move(op));
  state->pendingDispatch = sendOnly && result == ncclSuccess;
  state->dispatched = Outcome{result, result == ncclSuccess ? "" : lastError()};
  return result;
}

ncclResult_t HostBackend::combine(const ncclMoeCombineArgs_t& args, ncclMoeRouting& routing, cudaStream_t) {
  entered_ = "ncclMoeCombine";
  auto* state = static_cast<HostRouting*>(routing.state.get());
  MOECHECK(checkUsable());
  std::unique_ptr<Op> op = makeCombine(*this, args, *state);
  state->lastCall = op->sequence();
  if ((args.flags & NCCL_MOE_SEND_ONLY) != 0) return launch(std::move(op), *state);
  return run(std::move(op));
}

ncclResult_t HostBackend::complete(ncclMoeRouting& routing, cudaStream_t) {
  entered_ = "ncclMoeComplete";
  auto* state = static_cast<HostRouting*>(routing.state.get());
  MOECHECK(checkUsable());
  const ncclResult_t result = runUntil(state->pending);
  if (result != ncclSuccess) state->pendingOutcome = Outcome{result, lastError()};
  state->pending = 0;
  if (state->pendingDispatch) state->dispatched = state->pendingOutcome;
  state->pendingDispatch = false;
  return report(state->pendingOutcome);
}

ncclResult_t HostBackend::memAlloc(void** ptr, size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  UniqueMap map;
  if (base != MAP_FAILED) map = UniqueMap(base, bytes);
  MOECHECK(run(std::make_unique<AgreeOp>(*this, OpKind::memAlloc, "ncclMoeMemAlloc",
                                         std::initializer_list<int64_t>{static_cast<int64_t>(bytes)},
                                         static_cast<bool>(map))));
  allocations_[base] = {allocationsMade_++, std::move(map)};
  *ptr = base;
  return ncclSuccess;
}

ncclResult_t HostBackend::memFree(void* ptr) {
  const auto found = allocations_.find(ptr);
  if (found == allocations_.end()) {
    return fail(ncclInvalidArgument, "ncclMoeMemFree: ptr is not from ncclMoeMemAlloc of this communicator");
  }
  MOECHECK(run(std::make_unique<AgreeOp>(*this, OpKind::memFree, "ncclMoeMemFree",
                                         std::initializer_list<int64_t>{found->second.first})));
  allocations_.erase(found);
  return ncclSuccess;
}

ncclResult_t HostBackend::maskRanks(const int*, uint64_t) {
  return fail(ncclInvalidUsage, "ncclMoeCommMaskRanks: the host backend cannot leave ranks out");
}

ncclResult_t HostBackend::stats(ncclMoeCommStats_t*) {
  return fail(ncclInvalidUsage, "ncclMoeCommGetStats: the host backend keeps no statistics");
}

size_t HostBackend::memoryBytes() {
  size_t bytes = scratch_.size() + routingBytes_;
  for (const auto& channel : channels_) bytes += channel ? channel->memoryBytes() : 0;
  return bytes;
}

int HostBackend::nScaleUpRanks() {
  return 1 + static_cast<int>(std::count_if(channels_.begin(), channels_.end(),
                                            [](const auto& channel) { return channel && channel->shared(); }));
}

void HostBackend::abort() {
  aborted_.store(true, std::memory_order_release);
  {
    const std::lock_guard<std::mutex> lock(errorMutex_);
    if (finalError_ == ncclSuccess) {
      finalError_ = ncclRemoteError;
      finalSentence_ = kAborted;
    }
  }
  for (const auto& channel : channels_) {
    if (channel) channel->leave(Bye{ByeReason::aborted, ""});
  }
}

ncclResult_t HostBackend::asyncError(std::string* sentence) {
  const std::lock_guard<std::mutex> lock(errorMutex_);
  *sentence = finalSentence_;
  return finalError_;
}

ncclResult_t HostBackend::shutdown() {
  queue_.clear();
  for (const auto& channel : channels_) {
    if (channel) channel->leave(Bye{ByeReason::left, ""});
  }
  channels_.clear();
  allocations_.clear();
  return ncclSuccess;
}

} // namespace moe
