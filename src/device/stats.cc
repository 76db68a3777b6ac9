// What the kernels have counted.
#include <algorithm>

#include "device/device_backend.h"

namespace moe {

ncclResult_t DeviceBackend::stats(ncclMoeCommStats_t* stats) {
  DeviceScope scope(device_);
  const size_t nLocal = static_cast<size_t>(config_.nLocal[moe_.rank]);
  std::vector<unsigned long long> counted(sizeof(LatencyShared) / sizeof(unsigned long long) + nLocal);
  CUDACHECK(
    cudaMemcpyAsync(counted.data(), shared_, sizeof(counted[0]) * counted.size(), cudaMemcpyDeviceToHost, own_.get()));
  CUDACHECK(cudaStreamSynchronize(own_.get()));
  const auto* shared = reinterpret_cast<const LatencyShared*>(counted.data());
  const auto* expertTokens = reinterpret_cast<const unsigned long long*>(shared + 1);
  if (stats->waitNs != nullptr) std::copy(shared->waitNs, shared->waitNs + moe_.nRanks, stats->waitNs);
  if (stats->expertTokens != nullptr) std::copy(expertTokens, expertTokens + nLocal, stats->expertTokens);
  stats->leftOut = shared->leftOut;
  return ncclSuccess;
}

} // namespace moe
