// What the kernels have counted.
#include <algorithm>

#include "device/device_backend.h"

namespace moe {

ncclResult_t DeviceBackend::stats(ncclMoeCommStats_t* stats) {
  DeviceScope scope(device_);
  const size_t nLocal = static_cast<size_t>(config_.nLocal[moe_.rank]);
  std::vector<unsigned long long> counted(sizeof(CommShared) / sizeof(unsigned long long) + nLocal);
  CUDACHECK(
    cudaMemcpyAsync(counted.data(), shared_, sizeof(counted[0]) * counted.size(), cudaMemcpyDeviceToHost, own_.get()));
  CUDACHECK(cudaStreamSynchronize(own_.get()));
  auto* shared = reinterpret_cast<CommShared*>(counted.data());
  if (stats->waitNs != nullptr) std::copy_n(shared->waitNs, moe_.nRanks, stats->waitNs);
  if (stats->expertTokens != nullptr) std::copy_n(shared->expertTokens(), nLocal, stats->expertTokens);
  stats->leftOut = shared->leftOut;
  return ncclSuccess;
}

} // namespace moe
