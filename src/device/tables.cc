// What the kernels of a communicator look up: where windows and experts are.
#include <cstring>

#include "device/device_backend.h"

namespace moe {
namespace {

size_t windowTableBytes(int nRanks) { return align128(sizeof(char*) * kMaxWindows * nRanks); }
size_t expertTableBytes(int nExperts) { return align128(sizeof(int) * nExperts); }
size_t outcomeBytes(int nLocal) { return align128(sizeof(RoutingOutcome) + sizeof(int) * nLocal); }
size_t commSharedBytes(int nExperts) { return align128(sizeof(CommShared) + sizeof(unsigned long long) * nExperts); }

} // namespace

size_t tableBytes(const CommConfig& config, int nRanks) {
  return windowTableBytes(nRanks) + 2 * expertTableBytes(config.nExperts) + align128(sizeof(int) * (nRanks + 1)) +
         commSharedBytes(config.nExperts);
}

// Room for rows is only taken where a routing may be served by the throughput kernels.
CommLayout commLayout(const CommConfig& config, int nRanks) {
  const bool latencyOnly = servedByLatency(config, nRanks, config.maxTokens);
  return CommLayout(nRanks, config.nExperts, latencyOnly ? 0 : config.maxTokens, config.maxTopK, config.maxRowBytes);
}

ncclResult_t DeviceBackend::makeTables() {
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
  MOECHECK(
    hostMappedAlloc(&host_, align128(sizeof(HostState)) + kMaxWindows * outcomeBytes(config_.nLocal[moe_.rank])));
  MOECHECK(tables_.alloc(tableBytes(config_, moe_.nRanks)));
  char* at = tables_.get();
  dWindows_ = reinterpret_cast<char**>(at);
  dRankOf_ = reinterpret_cast<int*>(at + windowBytes);
  dHomes_ = reinterpret_cast<uint32_t*>(at + windowBytes + expertBytes);
  shared_ = reinterpret_cast<CommShared*>(at + windowBytes + 2 * expertBytes);
  dRankStart_ = reinterpret_cast<int*>(at + windowBytes + 2 * expertBytes + commSharedBytes(config_.nExperts));
  CUDACHECK(cudaMemcpy(dHomes_, homes.data(), sizeof(uint32_t) * homes.size(), cudaMemcpyHostToDevice));
  CUDACHECK(cudaMemset(shared_, 0, commSharedBytes(config_.nExperts)));
  CUDACHECK(cudaMemcpy(dRankOf_, rankOf.data(), sizeof(int) * rankOf.size(), cudaMemcpyHostToDevice));
  CUDACHECK(cudaMemcpy(dRankStart_, rankStart.data(), sizeof(int) * rankStart.size(), cudaMemcpyHostToDevice));
  return ncclSuccess;
}

RoutingOutcome* DeviceBackend::clearedOutcome(int window) {
  const size_t bytes = outcomeBytes(config_.nLocal[moe_.rank]);
  void* outcome = reinterpret_cast<char*>(host_.get()) + align128(sizeof(HostState)) + window * bytes;
  return static_cast<RoutingOutcome*>(memset(outcome, 0, bytes));
}

CommView DeviceBackend::view() const {
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
  v.shared = shared_;
  v.failure = &host_->failure;
  v.abortFlag = &host_->abortFlag;
  v.timeoutNs = static_cast<uint64_t>(config_.timeoutMs) * 1000000;
  return v;
}

RoutingView DeviceBackend::view(ncclMoeRouting& routing) const {
  DeviceRouting& state = stateOf(routing);
  RoutingView v{};
  v.layout = state.layout;
  v.self = windows_[state.window]->self();
  v.window = state.window;
  v.kind = routing.config.layout;
  v.alignment = routing.config.expertAlignment;
  v.outcome = state.outcome;
  return v;
}

} // namespace moe
