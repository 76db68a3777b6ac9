// Routings: made together, freed by each rank alone.
#include <algorithm>
#include <cstring>

#include "device/device_backend.h"
#include "device/hash.h"
#include "device/nvtx.h"

namespace moe {

size_t DeviceBackend::windowBytes(const ncclMoeRoutingConfig_t& config) const {
  if (servedByLatency(config_, moe_.nRanks, config.maxTokens)) {
    return latencyLayout(config_, moe_.nRanks, config.maxTokens, config.topK).bytes;
  }
  return RoutingLayout(moe_.nRanks, config_.nExperts, config.maxTokens, config.topK).bytes;
}

ncclResult_t DeviceBackend::routingMemoryNeeded(const ncclMoeRoutingConfig_t& config, size_t* bytes) {
  MOECHECK(rowsRefusal(config, "ncclMoeRoutingMemoryNeeded"));
  *bytes = Window::memoryOf(windowBytes(config));
  return ncclSuccess;
}

ncclResult_t DeviceBackend::rowsRefusal(const ncclMoeRoutingConfig_t& c, const char* function) const {
  const long long perExpert = static_cast<long long>(moe_.nRanks) * c.maxTokens + c.expertAlignment - 1;
  if (c.layout == ncclMoeLayoutRankMajor || perExpert * config_.nLocal[moe_.rank] <= INT32_MAX) return ncclSuccess;
  return fail(ncclInvalidArgument, "%s: config.maxTokens %d makes more than 2^31 rows", function, c.maxTokens);
}

ncclResult_t DeviceBackend::routingMake(const ncclMoeRoutingConfig_t& c, DeviceRouting& state) {
  const bool latency = servedByLatency(config_, moe_.nRanks, c.maxTokens);
  if (!latency) state.layout = RoutingLayout(moe_.nRanks, config_.nExperts, c.maxTokens, c.topK);
  ncclResult_t result = rowsRefusal(c, "ncclMoeRoutingCreate");
  if (result == ncclSuccess) result = eventCreate(&state.counted);
  state.id = nextRouting_++;
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
  MOECHECK(addWindow(windowBytes(c), true, &state.window));
  state.outcome = clearedOutcome(state.window);
  if (!latency) return ncclSuccess;
  state.latency =
    std::make_unique<LatencyRouting>(config_, view(), *windows_[state.window], c, state.outcome, overlaps_);
  const ncclResult_t emptied = state.latency->empty(own_.get());
  MOECHECK(bootstrap_->allGather(&mine, sizeof(mine), all.data())); // nobody sends before everybody's are empty
  return emptied;
}

ncclResult_t DeviceBackend::routingCreate(ncclMoeRouting& routing) {
  NvtxRange range("ncclMoeRoutingCreate");
  DeviceScope scope(device_);
  MOECHECK(usable("ncclMoeRoutingCreate"));
  MOECHECK(nobodyMasked("ncclMoeRoutingCreate"));
  auto state = std::make_unique<DeviceRouting>();
  MOECHECK(routingMake(routing.config, *state));
  MOE_INFO("MoE routing %d: rank %d, %s mode, top-k %d, at most %d tokens, layout %d, %zu KiB", state->id, moe_.rank,
           state->mode(), routing.config.topK, routing.config.maxTokens, routing.config.layout,
           windowBytes(routing.config) >> 10);
  std::lock_guard<std::mutex> lock(liveMutex_);
  live_.push_back(state.get());
  routing.state = std::move(state);
  return ncclSuccess;
}

ncclResult_t DeviceBackend::routingDestroy(ncclMoeRouting& routing) {
  DeviceScope scope(device_);
  const ncclResult_t result = drain();
  DeviceRouting& state = stateOf(routing);
  {
    std::lock_guard<std::mutex> lock(liveMutex_);
    live_.erase(std::find(live_.begin(), live_.end(), &state));
  }
  releaseWindow(state.window);
  routing.state.reset();
  return result;
}

ncclResult_t DeviceBackend::routingGetCounts(ncclMoeRouting& routing, int64_t* nRows, int* expertCounts) {
  DeviceScope scope(device_);
  DeviceRouting& state = stateOf(routing);
  if (routing.phase == ncclMoeRouting::Phase::empty) {
    return fail(ncclInvalidUsage, "ncclMoeRoutingGetCounts: the routing has had no dispatch");
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
  if (expertCounts != nullptr) memcpy(expertCounts, state.outcome + 1, sizeof(int) * nLocal);
  std::string sentence;
  const ncclResult_t result = outcomeOf(state, &sentence);
  return result == ncclSuccess ? result : fail(result, "%s", sentence.c_str());
}

} // namespace moe
