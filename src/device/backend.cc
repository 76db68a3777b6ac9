#include "device/backend.h"

#include <nvtx3/nvToolsExt.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#include "base/types.h"
#include "device/bootstrap.h"
#include "device/cuda_handle.h"
#include "device/kernels.h"
#include "device/latency_routing.h"
#include "device/window.h"

namespace moe {
namespace {

// The fewest SMs that reach the best time but for a few per cent (docs/performance.md).
constexpr int kCopySms = 32;           // RANK_MAJOR dispatch without the cast, of larger rows: a plain copy
constexpr int kSmallRow = 8192;        // bytes: a row costs the same handling whatever its size
constexpr int kDefaultSms = 64;        // all else: local copies, the cast or sums beside the wire
constexpr int kLatencySms = INT32_MAX; // latency mode: all

class NvtxRange {
 public:
  explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
  ~NvtxRange() { nvtxRangePop(); }
};

uint32_t hash(std::initializer_list<long long> values) {
  uint64_t h = 1469598103934665603ull;
  for (long long value : values) {
    for (int shift = 0; shift < 64; shift += 8) h = (h ^ ((value >> shift) & 0xff)) * 1099511628211ull;
  }
  return static_cast<uint32_t>(h ^ h >> 32);
}

// Ranks with the same identity may reach each other's memory.  NCCL_HOSTID stands in for it, as in NCCL.
uint64_t hostIdentity() {
  std::string identity;
  if (const char* id = getenv("NCCL_HOSTID")) {
    identity = id;
  } else {
    char name[256] = "";
    gethostname(name, sizeof(name) - 1);
    std::string boot;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
    identity = name + boot;
  }
  uint64_t h = 1469598103934665603ull;
  for (char c : identity) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return h;
}

// Tables of the placement and of the windows, and what latency mode's routings share, beside the communicator window.
size_t windowTableBytes(int nRanks) { return align128(sizeof(char*) * kMaxWindows * nRanks); }
size_t expertTableBytes(int nExperts) { return align128(sizeof(int) * nExperts); }
size_t latencySharedBytes(int nExperts) {
  return align128(sizeof(LatencyShared) + sizeof(unsigned long long) * nExperts);
}
size_t tableBytes(const CommConfig& config, int nRanks) {
  return windowTableBytes(nRanks) + 2 * expertTableBytes(config.nExperts) + align128(sizeof(int) * (nRanks + 1)) +
         latencySharedBytes(config.nExperts);
}

// Room for rows is only taken where a routing may be served by the throughput kernels.
CommLayout commLayout(const CommConfig& config, int nRanks) {
  const bool latencyOnly = servedByLatency(config, nRanks, config.maxTokens, config.maxTopK);
  return CommLayout(nRanks, config.nExperts, latencyOnly ? 0 : config.maxTokens, config.maxTopK, config.maxRowBytes);
}

struct DeviceRouting : RoutingState {
  int id = 0;
  int window = -1;
  RoutingLayout layout;
  std::unique_ptr<LatencyRouting> latency; // where latency mode serves it; layout is then unused
  HostMapped<RoutingOutcome> outcome;
  UniqueEvent counted; // after the route kernel of the last dispatch
  bool countedInCapture = false;
  size_t bytes = 0;
};

class DeviceBackend : public Backend {
 public:
  DeviceBackend(ncclMoeComm& moe, std::unique_ptr<DeviceBootstrap> bootstrap)
    : moe_(moe), config_(moe.config), bootstrap_(std::move(bootstrap)) {}

  ncclResult_t init() {
    NvtxRange range("ncclMoeCommInit");
    CUDACHECK(cudaGetDevice(&device_));
    CUDACHECK(cudaDeviceGetAttribute(&smCount_, cudaDevAttrMultiProcessorCount, device_));
    int major = 0;
    CUDACHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    overlaps_ = major >= 9;
    CUDACHECK(cudaDeviceGetAttribute(&sharedBytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    MOECHECK(agree());
    layout_ = commLayout(config_, moe_.nRanks);
    const size_t needed = layout_.bytes + tableBytes(config_, moe_.nRanks);
    if (config_.maxMemory != 0 && needed > config_.maxMemory) {
      return fail(ncclInvalidArgument, "ncclMoeCommInit: needs %zu bytes, more than config.maxMemory %zu", needed,
                  config_.maxMemory);
    }
    CUDACHECK(prepareRoute(sharedBytes_));
    CUDACHECK(preparePush());
    CUDACHECK(prepareCombine(sharedBytes_, &combineShapes_));
    CUDACHECK(prepareLatencyDispatch());
    CUDACHECK(prepareLatencyCombine());
    CUDACHECK(prepareMeet());
    MOECHECK(streamCreate(&own_));
    MOECHECK(hostMappedAlloc(&failure_, sizeof(Failure)));
    MOECHECK(hostMappedAlloc(&abortFlag_, sizeof(int)));
    MOECHECK(eventCreate(&eager_.event));
    MOECHECK(eventCreate(&captured_.event));
    MOECHECK(makeTables());
    int window = -1;
    MOECHECK(addWindow(layout_.bytes, true, &window));
    MOE_INFO("MoE communicator: rank %d of %d, %d experts, %zu MiB on device %d", moe_.rank, moe_.nRanks,
             config_.nExperts, layout_.bytes >> 20, device_);
    return ncclSuccess;
  }

  // init, which frees nothing after an error where that would wait for ever.
  ncclResult_t start() {
    const ncclResult_t result = init();
    if (result != ncclSuccess && bootstrap_->stuck()) abandon();
    return result;
  }

  ncclResult_t routingMemoryNeeded(const ncclMoeRoutingConfig_t& config, size_t* bytes) override {
    *bytes = servedByLatency(config_, moe_.nRanks, config.maxTokens, config.topK)
               ? latencyLayout(config_, moe_.nRanks, config.maxTokens, config.topK).bytes
               : RoutingLayout(moe_.nRanks, config_.nExperts, config.maxTokens, config.topK).bytes;
    return ncclSuccess;
  }

  ncclResult_t routingCreate(ncclMoeRouting& routing) override {
    NvtxRange range("ncclMoeRoutingCreate");
    DeviceScope scope(device_);
    MOECHECK(usable("ncclMoeRoutingCreate"));
    MOECHECK(nobodyMasked("ncclMoeRoutingCreate"));
    auto state = std::make_unique<DeviceRouting>();
    const ncclResult_t result = routingMake(routing.config, *state);
    if (result != ncclSuccess) {
      if (bootstrap_->stuck()) (void)state->outcome.release(); // freeing would wait for the device
      return result;
    }
    MOE_INFO("MoE routing %d: rank %d, top-k %d, at most %d tokens, layout %d, %zu KiB", state->id, moe_.rank,
             routing.config.topK, routing.config.maxTokens, routing.config.layout, state->bytes >> 10);
    std::lock_guard<std::mutex> lock(liveMutex_);
    live_.push_back(state.get());
    routing.state = std::move(state);
    return ncclSuccess;
  }

  ncclResult_t routingDestroy(ncclMoeRouting& routing) override {
    DeviceScope scope(device_);
    const ncclResult_t result = drain();
    DeviceRouting& state = stateOf(routing);
    {
      std::lock_guard<std::mutex> lock(liveMutex_);
      live_.erase(std::find(live_.begin(), live_.end(), &state));
    }
    releaseWindow(state.window);
    if (bootstrap_->stuck()) (void)state.outcome.release();
    routing.state.reset();
    return result;
  }

  ncclResult_t routingGetCounts(ncclMoeRouting& routing, int64_t* nRows, int* expertCounts) override {
    DeviceScope scope(device_);
    DeviceRouting& state = stateOf(routing);
    if (routing.phase == ncclMoeRouting::Phase::empty) {
      return fail(ncclInvalidUsage, "ncclMoeRoutingGetCounts: the routing has had no dispatch");
    }
    if (state.latency != nullptr && routing.phase == ncclMoeRouting::Phase::dispatchSent) {
      return fail(ncclInvalidUsage,
                  "ncclMoeRoutingGetCounts: the counts of a SEND_ONLY dispatch come with ncclMoeComplete");
    }
    if (state.countedInCapture) {
      return fail(ncclInvalidUsage,
                  "ncclMoeRoutingGetCounts: the routing's last dispatch was captured in a graph; read the "
                  "counts that it left in device memory");
    }
    CUDACHECK(cudaEventSynchronize(state.counted.get()));
    MOECHECK(usable("ncclMoeRoutingGetCounts"));
    const int nLocal = config_.nLocal[moe_.rank];
    *nRows = state.outcome->nRows;
    if (expertCounts != nullptr) memcpy(expertCounts, state.outcome.get() + 1, sizeof(int) * nLocal);
    std::string sentence;
    const ncclResult_t result = outcomeOf(state, &sentence);
    return result == ncclSuccess ? result : fail(result, "%s", sentence.c_str());
  }

  ncclResult_t dispatch(const ncclMoeDispatchArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) override {
    NvtxRange range("ncclMoeDispatch");
    DeviceScope scope(device_);
    MOECHECK(usable("ncclMoeDispatch"));
    DeviceRouting& state = stateOf(routing);
    if (state.latency != nullptr) {
      MOECHECK(follow(stream));
      launched_ = true;
      MOECHECK(state.latency->dispatch(args, routing, sms(args.numSms, kLatencySms), stream));
      if ((args.flags & NCCL_MOE_SEND_ONLY) == 0) MOECHECK(noteCounts(state, stream));
      return followed(stream);
    }
    MOECHECK(nobodyMasked("ncclMoeDispatch"));
    const bool keep = (args.flags & NCCL_MOE_KEEP_ROUTING) != 0;
    PushArgs push{};
    push.comm = view();
    push.routing = view(routing);
    push.x = static_cast<const char*>(args.x);
    push.hidden = args.hidden;
    push.quant = args.quant;
    push.rowBytes = static_cast<int>(args.hidden * typeBytes(args.type));
    push.wireBytes = args.quant != ncclMoeQuantNone ? args.hidden : push.rowBytes;
    push.topkWeights = args.topkWeights;
    push.scales = static_cast<const char*>(args.scales);
    push.scaleBytes =
      args.quant != ncclMoeQuantNone ? NCCL_MOE_QUANT_SCALE_BYTES(args.quant, args.hidden) : args.scaleBytes;
    if (push.scaleBytes > static_cast<int>(layout_.scaleStride)) {
      return fail(ncclInvalidUsage,
                  "ncclMoeDispatch: args.scaleBytes %d is more than the %zu that the communicator's "
                  "maxRowBytes leaves room for",
                  push.scaleBytes, layout_.scaleStride);
    }
    push.columnMajor = args.scaleLayout == ncclMoeScaleColumnMajor;
    const long long plane = static_cast<long long>(moe_.nRanks) * routing.config.maxTokens;
    const bool padded = routing.config.layout == ncclMoeLayoutExpertPadded;
    push.rows = padded ? plane : args.recvCapacity;
    push.recvX = static_cast<char*>(args.recvX);
    push.recvScales = static_cast<char*>(args.recvScales);
    push.recvTopkIdx = args.recvTopkIdx;
    push.recvWeights = args.recvWeights;

    RouteArgs route{};
    route.comm = push.comm;
    route.routing = push.routing;
    route.topkIdx = args.topkIdx;
    route.idx64 = args.topkIdxType == ncclInt64;
    route.keep = keep;
    route.nTokens = args.nTokens;
    route.nTokensDev = args.nTokensDev;
    route.capacity = args.recvCapacity;
    route.recvCount = args.recvCount;
    route.expertCounts = args.expertCounts;
    route.expertOffsets = args.expertOffsets;
    const long long rows = padded ? plane * config_.nLocal[moe_.rank] : args.recvCapacity;
    MOECHECK(findWindow(args.recvX, rows, push.wireBytes, &route.recvWindow, &route.recvOffset));
    push.recvDirect = route.recvWindow >= 0;
    route.signature = hash({1, state.id, push.wireBytes, push.scaleBytes, args.quant, keep ? 1 : 0});

    const bool plainCopy =
      routing.config.layout == ncclMoeLayoutRankMajor && args.quant == ncclMoeQuantNone && push.wireBytes > kSmallRow;
    MOE_TRACE("ncclMoeDispatch: rank %d, routing %d, %d tokens of %d bytes, flags 0x%x", moe_.rank, state.id,
              args.nTokens, push.rowBytes, args.flags);
    MOECHECK(follow(stream));
    launched_ = true;
    CUDACHECK(launchRoute(route, sms(args.numSms, smCount_), stream));
    // An event between the kernels keeps them apart, so it is only where a caller may wait for the counts that it stands there.
    const bool countsFirst = routing.config.hostCounts != 0;
    if (countsFirst) MOECHECK(noteCounts(state, stream));
    CUDACHECK(launchPush(push, sms(args.numSms, plainCopy ? kCopySms : kDefaultSms), stream, overlaps_ && !countsFirst));
    if (!countsFirst) MOECHECK(noteCounts(state, stream));
    return followed(stream);
  }

  ncclResult_t combine(const ncclMoeCombineArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) override {
    NvtxRange range("ncclMoeCombine");
    DeviceScope scope(device_);
    MOECHECK(usable("ncclMoeCombine"));
    DeviceRouting& state = stateOf(routing);
    if (args.x == nullptr && hasRows(state, stream)) return fail(ncclInvalidArgument, "ncclMoeCombine: args.x is NULL");
    if (args.withGradWeights != 0 && args.gradWeights == nullptr && hasRows(state, stream)) {
      return fail(ncclInvalidArgument, "ncclMoeCombine: args.gradWeights is NULL");
    }
    if (state.latency != nullptr) {
      if ((args.flags & NCCL_MOE_EXACT) != 0) {
        MOECHECK(nobodyMasked("ncclMoeCombine: NCCL_MOE_EXACT"));
        exactUsed_ = true;
      }
      MOECHECK(follow(stream));
      launched_ = true;
      MOECHECK(state.latency->combine(args, routing, sms(args.numSms, kLatencySms), stream));
      return followed(stream);
    }
    MOECHECK(nobodyMasked("ncclMoeCombine"));
    if (args.quant != ncclMoeQuantNone) {
      return fail(ncclInvalidUsage,
                  "ncclMoeCombine: args.quant is for latency mode, which does not serve this routing");
    }
    CombineArgs combine{};
    combine.comm = view();
    combine.routing = view(routing);
    combine.x = static_cast<const char*>(args.x);
    combine.rowBytes = static_cast<int>(args.hidden * typeBytes(args.type));
    combine.type = args.type;
    combine.weights = args.weights;
    combine.gradWeights = args.gradWeights;
    combine.withGrads = args.withGradWeights != 0;
    combine.exact = (args.flags & NCCL_MOE_EXACT) != 0;
    combine.out = static_cast<char*>(args.out);
    combine.gradTopkWeights = args.gradTopkWeights;
    combine.signature = hash({2, state.id, combine.rowBytes, args.type, args.withGradWeights, combine.exact ? 1 : 0});
    MOE_TRACE("ncclMoeCombine: rank %d, routing %d, rows of %d bytes, flags 0x%x", moe_.rank, state.id,
              combine.rowBytes, args.flags);
    const int maxTokens = routing.config.maxTokens;
    combine.nTokens = combine.exact ? layout_.exactTokens(routing.config.topK) : maxTokens;
    MOECHECK(follow(stream));
    launched_ = true;
    do {
      CUDACHECK(launchCombine(combine, combineShapes_, sms(args.numSms, kDefaultSms), stream));
      combine.firstToken += combine.nTokens;
    } while (combine.firstToken < maxTokens);
    return followed(stream);
  }

  // The throughput kernels do the whole transfer in the first half.
  ncclResult_t complete(ncclMoeRouting& routing, cudaStream_t stream) override {
    NvtxRange range("ncclMoeComplete");
    DeviceScope scope(device_);
    MOECHECK(usable("ncclMoeComplete"));
    DeviceRouting& state = stateOf(routing);
    MOECHECK(follow(stream));
    if (state.latency == nullptr) return ncclSuccess;
    MOECHECK(state.latency->complete(routing, stream));
    if (routing.phase == ncclMoeRouting::Phase::dispatchSent) MOECHECK(noteCounts(state, stream));
    return followed(stream);
  }

  ncclResult_t memAlloc(void** ptr, size_t bytes) override {
    DeviceScope scope(device_);
    MOECHECK(usable("ncclMoeMemAlloc"));
    MOECHECK(nobodyMasked("ncclMoeMemAlloc"));
    int window = -1;
    MOECHECK(addWindow(bytes, false, &window));
    *ptr = windows_[window]->self();
    userWindows_.push_back(window);
    return ncclSuccess;
  }

  ncclResult_t memFree(void* ptr) override {
    DeviceScope scope(device_);
    const auto found = std::find_if(userWindows_.begin(), userWindows_.end(),
                                    [&](int window) { return windows_[window]->self() == ptr; });
    if (found == userWindows_.end()) {
      return fail(ncclInvalidArgument, "ncclMoeMemFree: ptr is not ncclMoeMemAlloc memory of this communicator");
    }
    const ncclResult_t result = drain();
    releaseWindow(*found);
    userWindows_.erase(found);
    return result;
  }

  // What was under way when a rank went missing is given up: between two meetings, when nobody's kernels run, everybody
  // empties what peers write into and starts counting calls anew.
  ncclResult_t maskRanks(const int* masked, uint64_t generation) override {
    DeviceScope scope(device_);
    const char* function = "ncclMoeCommMaskRanks";
    if (generation <= generation_ || generation >> 62 != 0) {
      return fail(ncclInvalidArgument, "%s: generation %llu is not in %llu..2^62-1", function,
                  static_cast<unsigned long long>(generation), static_cast<unsigned long long>(generation_) + 1);
    }
    // What a masked rank still sends lies where nobody looks, but for rows that go by selection.
    if (exactUsed_) {
      return fail(ncclInvalidUsage, "%s: the communicator has combined with NCCL_MOE_EXACT in latency mode", function);
    }
    if (failure_->code != kFailTimeout) MOECHECK(usable(function));
    MOECHECK(drain());
    generation_ = generation;
    *failure_ = Failure{};
    CUDACHECK(cudaMemsetAsync(windows_[0]->self() + offsetof(Control, failed), 0, sizeof(Control::failed), own_.get()));
    MeetArgs meet{view(), 0, 2 * generation};
    for (int r = 0; r < moe_.nRanks; r++) meet.masked |= static_cast<unsigned long long>(masked[r]) << r;
    MOECHECK(meetRanks(meet, function));
    masked_ = meet.masked;
    CUDACHECK(cudaMemcpyAsync(&shared_->masked, &masked_, sizeof(masked_), cudaMemcpyHostToDevice, own_.get()));
    char* window = windows_[0]->self();
    CUDACHECK(cudaMemsetAsync(window, 0, layout_.meeting, own_.get()));
    CUDACHECK(cudaMemsetAsync(window + layout_.rowFlags, 0, layout_.scales - layout_.rowFlags, own_.get()));
    CUDACHECK(cudaStreamSynchronize(own_.get()));
    for (const auto& routing : moe_.routings) {
      if (stateOf(*routing).latency != nullptr) MOECHECK(stateOf(*routing).latency->empty(own_.get()));
    }
    meet.value++;
    return meetRanks(meet, function);
  }

  ncclResult_t stats(ncclMoeCommStats_t* stats) override {
    DeviceScope scope(device_);
    const size_t nLocal = static_cast<size_t>(config_.nLocal[moe_.rank]);
    std::vector<unsigned long long> counted(sizeof(LatencyShared) / sizeof(unsigned long long) + nLocal);
    CUDACHECK(cudaMemcpyAsync(counted.data(), shared_, sizeof(counted[0]) * counted.size(), cudaMemcpyDeviceToHost,
                              own_.get()));
    CUDACHECK(cudaStreamSynchronize(own_.get()));
    const auto* shared = reinterpret_cast<const LatencyShared*>(counted.data());
    const auto* expertTokens = reinterpret_cast<const unsigned long long*>(shared + 1);
    if (stats->waitNs != nullptr) std::copy(shared->waitNs, shared->waitNs + moe_.nRanks, stats->waitNs);
    if (stats->expertTokens != nullptr) std::copy(expertTokens, expertTokens + nLocal, stats->expertTokens);
    stats->leftOut = shared->leftOut;
    return ncclSuccess;
  }

  size_t memoryBytes() override {
    size_t bytes = layout_.bytes + tableBytes(config_, moe_.nRanks);
    for (const auto& routing : moe_.routings) bytes += stateOf(*routing).bytes;
    return bytes;
  }
  int nScaleUpRanks() override { return moe_.nRanks; }
  bool onHost() override { return false; }
  void abort() override { *reinterpret_cast<volatile int*>(abortFlag_.get()) = 1; }

  ncclResult_t asyncError(std::string* sentence) override {
    const ncclResult_t result = failureOf(sentence);
    if (result != ncclSuccess) return result;
    std::lock_guard<std::mutex> lock(liveMutex_);
    for (const DeviceRouting* routing : live_) {
      const ncclResult_t outcome = outcomeOf(*routing, sentence);
      if (outcome != ncclSuccess) return outcome;
    }
    return ncclSuccess;
  }

  ncclResult_t shutdown() override {
    DeviceScope scope(device_);
    const ncclResult_t result = drain();
    if (bootstrap_->stuck()) abandon();
    for (auto& window : windows_) window.reset();
    return result;
  }

 private:
  static DeviceRouting& stateOf(ncclMoeRouting& routing) { return static_cast<DeviceRouting&>(*routing.state); }

  // All ranks must have the same shape and reach each other.
  ncclResult_t agree() {
    struct Shape {
      uint64_t host;
      long long values[5];
      uint32_t placement;
    };
    static const char* const names[] = {"nExperts", "maxTokens", "maxTopK", "maxRowBytes", "mode"};
    Shape mine{
      hostIdentity(),
      {config_.nExperts, config_.maxTokens, config_.maxTopK, static_cast<long long>(config_.maxRowBytes), config_.mode},
      0};
    for (const ExpertHome& home : config_.home)
      mine.placement = mine.placement * 16777619u ^ static_cast<uint32_t>(home.rank);
    std::vector<Shape> all(moe_.nRanks);
    if (moe_.nRanks > kMaxDeviceRanks) {
      return fail(ncclInvalidUsage, "ncclMoeCommInit: %d ranks, more than the %d that CUDA memory is served for",
                  moe_.nRanks, kMaxDeviceRanks);
    }
    MOECHECK(bootstrap_->allGather(&mine, sizeof(mine), all.data()));
    for (int r = 0; r < moe_.nRanks; r++) {
      for (int f = 0; f < 5; f++) {
        if (all[r].values[f] != mine.values[f]) {
          return fail(ncclInvalidArgument, "ncclMoeCommInit: config.%s is %lld on rank %d but %lld on rank %d",
                      names[f], mine.values[f], moe_.rank, all[r].values[f], r);
        }
      }
      if (all[r].placement != mine.placement) {
        return fail(ncclInvalidArgument, "ncclMoeCommInit: config.expertToRank differs between rank %d and rank %d",
                    moe_.rank, r);
      }
      if (all[r].host != mine.host) {
        return fail(ncclInvalidUsage,
                    "ncclMoeCommInit: rank %d is on another host than rank %d; communicators of CUDA memory "
                    "that span hosts are not there yet",
                    r, moe_.rank);
      }
    }
    if (config_.nExperts > kMaxDeviceExperts) {
      return fail(ncclInvalidUsage,
                  "ncclMoeCommInit: config.nExperts %d is more than the %d that CUDA memory is served for",
                  config_.nExperts, kMaxDeviceExperts);
    }
    const size_t shared = routeSharedNeeded(moe_.nRanks, config_.nExperts);
    if (shared > static_cast<size_t>(sharedBytes_)) {
      return fail(ncclInvalidUsage,
                  "ncclMoeCommInit: config.nExperts %d needs %zu bytes of shared memory in a block, device %d has %d",
                  config_.nExperts, shared, device_, sharedBytes_);
    }
    return ncclSuccess;
  }

  ncclResult_t makeTables() {
    std::vector<int> rankStart(moe_.nRanks + 1, 0), rankOf(config_.nExperts);
    std::vector<uint32_t> homes(config_.nExperts);
    for (int r = 0; r < moe_.nRanks; r++) rankStart[r + 1] = rankStart[r] + config_.nLocal[r];
    for (int e = 0; e < config_.nExperts; e++) {
      const ExpertHome& home = config_.home[e];
      const int position = rankStart[home.rank] + home.local;
      rankOf[position] = home.rank;
      homes[e] = static_cast<uint32_t>(position) | static_cast<uint32_t>(home.rank) << 16;
    }
    const size_t windowBytes = windowTableBytes(moe_.nRanks);
    const size_t expertBytes = expertTableBytes(config_.nExperts);
    MOECHECK(tables_.alloc(tableBytes(config_, moe_.nRanks)));
    char* at = tables_.get();
    dWindows_ = reinterpret_cast<char**>(at);
    dRankOf_ = reinterpret_cast<int*>(at + windowBytes);
    dHomes_ = reinterpret_cast<uint32_t*>(at + windowBytes + expertBytes);
    shared_ = reinterpret_cast<LatencyShared*>(at + windowBytes + 2 * expertBytes);
    dRankStart_ = reinterpret_cast<int*>(at + windowBytes + 2 * expertBytes + latencySharedBytes(config_.nExperts));
    CUDACHECK(cudaMemcpy(dHomes_, homes.data(), sizeof(uint32_t) * homes.size(), cudaMemcpyHostToDevice));
    CUDACHECK(cudaMemset(shared_, 0, latencySharedBytes(config_.nExperts)));
    CUDACHECK(cudaMemcpy(dRankOf_, rankOf.data(), sizeof(int) * rankOf.size(), cudaMemcpyHostToDevice));
    CUDACHECK(cudaMemcpy(dRankStart_, rankStart.data(), sizeof(int) * rankStart.size(), cudaMemcpyHostToDevice));
    return ncclSuccess;
  }

  ncclResult_t routingMake(const ncclMoeRoutingConfig_t& c, DeviceRouting& state) {
    const int nLocal = config_.nLocal[moe_.rank];
    const bool latency = servedByLatency(config_, moe_.nRanks, c.maxTokens, c.topK);
    if (!latency) state.layout = RoutingLayout(moe_.nRanks, config_.nExperts, c.maxTokens, c.topK);
    const long long perExpert = static_cast<long long>(moe_.nRanks) * c.maxTokens + c.expertAlignment - 1;
    ncclResult_t result = latencyRefusal(config_, moe_.nRanks, c.maxTokens, c.topK);
    if (c.layout != ncclMoeLayoutRankMajor && perExpert * nLocal > INT32_MAX) {
      result =
        fail(ncclInvalidArgument, "ncclMoeRoutingCreate: config.maxTokens %d makes more than 2^31 rows", c.maxTokens);
    }
    if (result == ncclSuccess) result = hostMappedAlloc(&state.outcome, sizeof(RoutingOutcome) + sizeof(int) * nLocal);
    if (result == ncclSuccess) result = eventCreate(&state.counted);
    state.id = nextRouting_++;
    MOECHECK(routingMemoryNeeded(c, &state.bytes));
    const std::array<int, 4> mine{result == ncclSuccess ? 1 : 0, c.topK, c.maxTokens,
                                  static_cast<int>(hash({c.layout, c.expertAlignment}))};
    std::vector<std::array<int, 4>> all(moe_.nRanks);
    MOECHECK(bootstrap_->allGather(&mine, sizeof(mine), all.data()));
    MOECHECK(result);
    for (int r = 0; r < moe_.nRanks; r++) {
      static const char* const names[] = {"success", "config.topK", "config.maxTokens",
                                          "config.layout or expertAlignment"};
      for (int f = 0; f < 4; f++) {
        if (all[r][f] != mine[f]) {
          return fail(ncclInvalidArgument, "ncclMoeRoutingCreate: %s differs between rank %d and rank %d", names[f],
                      moe_.rank, r);
        }
      }
    }
    MOECHECK(addWindow(state.bytes, true, &state.window));
    if (!latency) return ncclSuccess;
    state.latency = std::make_unique<LatencyRouting>(config_, view(), *windows_[state.window], c, state.outcome.get(),
                                                     shared_);
    const ncclResult_t emptied = state.latency->empty(own_.get());
    MOECHECK(bootstrap_->allGather(&mine, sizeof(mine), all.data())); // nobody sends before everybody's are empty
    return emptied;
  }

  // After the work that leaves a dispatch's counts.
  ncclResult_t noteCounts(DeviceRouting& state, cudaStream_t stream) {
    CUDACHECK(cudaEventRecord(state.counted.get(), stream));
    state.countedInCapture = isCapturing(stream);
    return ncclSuccess;
  }

  // Collective; the same number on every rank.  Takes a released window where all ranks have released one that fits:
  // the one of the lowest number, for ranks may release in different orders.
  ncclResult_t addWindow(size_t bytes, bool zeroed, int* number) {
    struct State {
      std::bitset<kMaxWindows> taken, spare;
    } mine{};
    static_assert(std::is_trivially_copyable<State>::value, "it travels as bytes");
    for (int w = 0; w < kMaxWindows; w++) {
      mine.taken[w] = windows_[w] != nullptr;
      mine.spare[w] = released_[w] && windows_[w]->bytes() >= bytes;
    }
    std::vector<State> all(moe_.nRanks);
    MOECHECK(bootstrap_->allGather(&mine, sizeof(mine), all.data()));
    std::bitset<kMaxWindows> taken, spare = mine.spare;
    for (const State& theirs : all) {
      taken |= theirs.taken;
      spare &= theirs.spare;
    }
    int reuse = 0, next = 0;
    while (reuse < kMaxWindows && !spare[reuse]) reuse++;
    while (next < kMaxWindows && taken[next]) next++;
    if (reuse < kMaxWindows) {
      *number = reuse;
      released_[reuse] = false;
      if (zeroed) CUDACHECK(cudaMemset(windows_[reuse]->self(), 0, bytes));
      CUDACHECK(cudaDeviceSynchronize());
      return bootstrap_->allGather(&mine, sizeof(mine), all.data()); // nobody writes into it before it is zeroed
    }
    if (next == kMaxWindows) {
      return fail(ncclInvalidUsage, "more than %d routings and allocations at a time", kMaxWindows - 1);
    }
    auto window = std::make_unique<Window>();
    const ncclResult_t created = window->create(*bootstrap_, moe_.rank, moe_.nRanks, bytes, zeroed);
    if (created != ncclSuccess) {
      if (bootstrap_->stuck()) (void)window.release(); // freeing would wait for the device
      return created;
    }
    CUDACHECK(cudaMemcpy(dWindows_ + next * moe_.nRanks, window->bases().data(), sizeof(char*) * moe_.nRanks,
                         cudaMemcpyHostToDevice));
    CUDACHECK(cudaStreamSynchronize(nullptr)); // a copy from pageable memory may return before it is done
    windows_[next] = std::move(window);
    *number = next;
    return ncclSuccess;
  }

  // CUDA frees memory only when every GPU of the process that reaches it is idle; one of them may be running a kernel of NCCL
  // that waits for this rank's next call.  So where ranks share a process, memory is kept and used again.
  void releaseWindow(int number) {
    if (bootstrap_->stuck()) {
      (void)windows_[number].release();
    } else if (windows_[0]->ranksShareProcess()) {
      released_[number] = true;
    } else {
      windows_[number].reset();
    }
  }

  ncclResult_t findWindow(const void* ptr, long long rows, long long rowBytes, int* window, long long* offset) const {
    *window = -1;
    *offset = 0;
    for (int w : userWindows_) {
      if (!windows_[w]->contains(ptr)) continue;
      *offset = static_cast<const char*>(ptr) - windows_[w]->self();
      if (rows > (static_cast<long long>(windows_[w]->bytes()) - *offset) / rowBytes) {
        return fail(ncclInvalidArgument,
                    "ncclMoeDispatch: args.recvX with %lld rows of %lld bytes ends beyond its ncclMoeMemAlloc memory",
                    rows, rowBytes);
      }
      *window = w;
    }
    return ncclSuccess;
  }

  CommView view() const {
    CommView v{};
    v.rank = moe_.rank;
    v.nRanks = moe_.nRanks;
    v.nExperts = config_.nExperts;
    v.layout = layout_;
    v.self = windows_[0]->self();
    v.windows = dWindows_;
    v.homes = dHomes_;
    v.positionRank = dRankOf_;
    v.rankStart = dRankStart_;
    v.failure = failure_.get();
    v.abortFlag = abortFlag_.get();
    v.timeoutNs = static_cast<uint64_t>(config_.timeoutMs) * 1000000;
    return v;
  }

  RoutingView view(ncclMoeRouting& routing) const {
    DeviceRouting& state = stateOf(routing);
    RoutingView v{};
    v.layout = state.layout;
    v.self = windows_[state.window]->self();
    v.window = state.window;
    v.kind = routing.config.layout;
    v.alignment = routing.config.expertAlignment;
    v.outcome = state.outcome.get();
    return v;
  }

  // Whether this rank received rows in the routing's last dispatch, as far as the host can know without waiting.
  static bool hasRows(const DeviceRouting& state, cudaStream_t stream) {
    if (state.countedInCapture || isCapturing(stream)) return false;
    const bool clean = cudaPeekAtLastError() == cudaSuccess;
    const cudaError_t counted = cudaEventQuery(state.counted.get());
    if (counted == cudaErrorNotReady && clean) (void)cudaGetLastError(); // the caller shall not see it
    return counted == cudaSuccess && state.outcome->nRows > 0;
  }

  int sms(int wanted, int otherwise) const {
    const int n = wanted != 0 ? wanted : config_.numSms != 0 ? config_.numSms : otherwise;
    return std::min(n, smCount_);
  }

  // The last call that was enqueued: of those of a capture, or of those outside captures.
  struct LastCall {
    UniqueEvent event;
    unsigned long long capture = 0; // 0: outside
    unsigned long long stream = 0;  // outside captures, its id: a handle may come to stand for another stream
    bool any = false;
  };

  // The communicator's calls run one after the other, whatever their streams.  That holds among the calls of a graph
  // capture and among those outside; a graph and what surrounds it are ordered by the streams that the caller uses.
  ncclResult_t follow(cudaStream_t stream) {
    unsigned long long capture = 0, id = 0;
    MOECHECK(captureOf(stream, &capture));
    const LastCall& last = capture != 0 ? captured_ : eager_;
    if (!last.any || last.capture != capture) return ncclSuccess;
    if (capture == 0) CUDACHECK(cudaStreamGetId(stream, &id)); // not permitted while the stream is captured
    if (capture != 0 || last.stream != id) CUDACHECK(cudaStreamWaitEvent(stream, last.event.get(), 0));
    return ncclSuccess;
  }
  ncclResult_t followed(cudaStream_t stream) {
    unsigned long long capture = 0;
    MOECHECK(captureOf(stream, &capture));
    LastCall& last = capture != 0 ? captured_ : eager_;
    CUDACHECK(cudaEventRecord(last.event.get(), stream));
    if (capture == 0) CUDACHECK(cudaStreamGetId(stream, &last.stream));
    last.capture = capture;
    last.any = true;
    return ncclSuccess;
  }
  static ncclResult_t captureOf(cudaStream_t stream, unsigned long long* capture) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    CUDACHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
    *capture = status == cudaStreamCaptureStatusActive ? id : 0;
    return ncclSuccess;
  }
  static bool isCapturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
  }

  ncclResult_t meetRanks(const MeetArgs& meet, const char* function) {
    CUDACHECK(launchMeet(meet, own_.get()));
    CUDACHECK(cudaStreamSynchronize(own_.get()));
    return usable(function);
  }

  // What all ranks must take part in, and throughput mode, need everybody.
  ncclResult_t nobodyMasked(const char* function) const {
    if (masked_ == 0) return ncclSuccess;
    return fail(ncclInvalidUsage,
                "%s: ranks are masked (ncclMoeCommMaskRanks); only latency mode's calls go on without them", function);
  }

  // Waits for this rank's kernels, which end within the communicator's timeout.
  ncclResult_t drain() {
    if (bootstrap_->stuck()) {
      return fail(ncclRemoteError, "an exchange of the ranks that timed out still occupies the device; "
                                   "memory is not freed, for that would wait");
    }
    if (!launched_) return ncclSuccess;
    // Graphs may have been launched on any stream.
    CUDACHECK(cudaDeviceSynchronize());
    return ncclSuccess;
  }

  ncclResult_t failureOf(std::string* sentence) const {
    const volatile Failure* f = failure_.get();
    static const char* const phases[] = {"",
                                         "the counts of dispatch",
                                         "the start of combine",
                                         "a row of dispatch",
                                         "a row of combine",
                                         "the start of a call",
                                         "a row of dispatch",
                                         "a row of combine",
                                         "ncclMoeCommMaskRanks"};
    const char* const whose = f->phase >= kPhaseHeader && f->phase != kPhaseMeeting ? "routing" : "communicator";
    char text[256];
    switch (f->code) {
    case kFailNone:
      return ncclSuccess;
    case kFailTimeout:
      snprintf(text, sizeof(text), "rank %d waited %d ms for %s from rank %d, call %u of the %s", moe_.rank,
               config_.timeoutMs, phases[f->phase], f->peer, f->epoch, whose);
      break;
    case kFailAborted:
      snprintf(text, sizeof(text), "rank %d was aborted while it waited for %s from rank %d, call %u of the %s",
               moe_.rank, phases[f->phase], f->peer, f->epoch, whose);
      break;
    default:
      snprintf(text, sizeof(text),
               "rank %d and rank %d disagree about call %u of the %s: not the same collective, "
               "routing, hidden, type, quant or scaleBytes",
               moe_.rank, f->peer, f->epoch, whose);
    }
    *sentence = text;
    return f->code == kFailMismatch ? ncclInvalidUsage : ncclRemoteError;
  }

  static ncclResult_t outcomeOf(const DeviceRouting& state, std::string* sentence) {
    const volatile RoutingOutcome* o = state.outcome.get();
    char text[256];
    switch (o->code) {
    case kOutcomeOk:
      return ncclSuccess;
    case kOutcomeCapacity:
      snprintf(text, sizeof(text), "ncclMoeDispatch: rank %d receives %lld rows, more than its args.recvCapacity %lld",
               o->rank, o->needed, o->capacity);
      *sentence = text;
      return ncclInvalidUsage;
    default:
      snprintf(text, sizeof(text), "ncclMoeDispatch: args.topkIdx of token %d, position %d, is %d, %s", o->token,
               o->position, o->expert, o->code == kOutcomeIndexRange ? "out of range" : "named twice by that token");
      *sentence = text;
      return ncclInvalidArgument;
    }
  }

  ncclResult_t usable(const char* function) const {
    std::string sentence;
    const ncclResult_t result = failureOf(&sentence);
    if (result != ncclSuccess) return fail(result, "%s: the communicator has failed: %s", function, sentence.c_str());
    if (*abortFlag_ != 0) return fail(ncclRemoteError, "%s: the communicator was aborted", function);
    return ncclSuccess;
  }

  // Lets go of all memory without freeing it.
  void abandon() {
    for (auto& window : windows_) (void)window.release();
    for (auto& routing : moe_.routings) (void)stateOf(*routing).outcome.release();
    (void)failure_.release();
    (void)abortFlag_.release();
    tables_.abandon();
  }

  ncclMoeComm& moe_;
  const CommConfig& config_;
  std::unique_ptr<DeviceBootstrap> bootstrap_;
  int device_ = 0, smCount_ = 0, sharedBytes_ = 0;
  bool overlaps_ = false; // the device can begin a kernel before the one that it follows has ended
  CommLayout layout_;
  CombineShapes combineShapes_;
  HostMapped<Failure> failure_;
  HostMapped<int> abortFlag_;
  DeviceMemory tables_;
  char** dWindows_ = nullptr;
  int *dRankOf_ = nullptr, *dRankStart_ = nullptr;
  uint32_t* dHomes_ = nullptr;
  LatencyShared* shared_ = nullptr;
  UniqueStream own_; // for copies and meetings, beside the caller's streams
  unsigned long long masked_ = 0;
  uint64_t generation_ = 0; // of the last ncclMoeCommMaskRanks
  bool exactUsed_ = false;  // in latency mode
  std::array<std::unique_ptr<Window>, kMaxWindows> windows_;
  std::vector<int> userWindows_;
  std::bitset<kMaxWindows> released_; // of windows_: no longer in use, but kept
  int nextRouting_ = 0;
  LastCall eager_, captured_;
  bool launched_ = false;                  // kernels of this communicator may run
  std::mutex liveMutex_;                   // guards live_
  std::vector<const DeviceRouting*> live_; // routings that asyncError looks at, which any thread may call
};

} // namespace

ncclResult_t deviceMemoryNeeded(const CommConfig& config, int nRanks, size_t* bytes) {
  *bytes = commLayout(config, nRanks).bytes + tableBytes(config, nRanks);
  return ncclSuccess;
}

ncclResult_t deviceBackendCreate(ncclMoeComm& moe, std::unique_ptr<DeviceBootstrap> bootstrap) {
  auto backend = std::make_unique<DeviceBackend>(moe, std::move(bootstrap));
  MOECHECK(backend->start());
  moe.backend = std::move(backend);
  return ncclSuccess;
}

} // namespace moe
