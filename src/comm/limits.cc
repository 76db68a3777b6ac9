#include "comm/limits.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "comm/comm.h"

namespace moe {
namespace {

// Why latency mode cannot serve such a routing, or "".
std::string obstacle(const CommConfig& config, int nRanks, int maxTokens) {
  if (nRanks > kMaxDeviceRanks) {
    return std::to_string(nRanks) + " ranks are more than the " + std::to_string(kMaxDeviceRanks);
  }
  if (config.nExperts > kMaxLatencyExperts) {
    return "the communicator's config.nExperts " + std::to_string(config.nExperts) + " is more than the " +
           std::to_string(kMaxLatencyExperts);
  }
  const size_t bytes = latencyListBytes(config, nRanks, maxTokens);
  if (bytes <= kMaxLatencyShared) return "";
  return "config.maxTokens " + std::to_string(maxTokens) + " needs " + std::to_string(bytes) +
         " bytes of shared memory, more than the " + std::to_string(kMaxLatencyShared);
}

} // namespace

ncclResult_t deviceRefusal(const CommConfig& config, int nRanks, const char* function) {
  if (nRanks > kMaxDeviceRanks) {
    return fail(ncclInvalidUsage, "%s: %d ranks, more than the %d that CUDA memory is served for", function, nRanks,
                kMaxDeviceRanks);
  }
  if (config.nExperts > kMaxDeviceExperts) {
    return fail(ncclInvalidUsage, "%s: config.nExperts %d is more than the %d that CUDA memory is served for", function,
                config.nExperts, kMaxDeviceExperts);
  }
  return ncclSuccess;
}

size_t latencyListBytes(int nRanks, int nExperts, int nLocal, int maxTokens) {
  const auto ranks = static_cast<size_t>(nRanks), words = (static_cast<size_t>(maxTokens) + 31) / 32;
  const auto local = static_cast<size_t>(nLocal);
  return sizeof(int) * ((local + 1) * (ranks * (words + 1) + 1) + static_cast<size_t>(nExperts) + 6 * ranks);
}
size_t latencyListBytes(const CommConfig& config, int nRanks, int maxTokens) {
  const int most = *std::max_element(config.nLocal.begin(), config.nLocal.end());
  return latencyListBytes(nRanks, config.nExperts, most, maxTokens);
}

bool servedByLatency(const CommConfig& config, int nRanks, int maxTokens) {
  if (config.mode == ncclMoeModeThroughput) return false;
  if (config.mode == ncclMoeModeAuto && maxTokens > kMaxLatencyTokens) return false;
  return obstacle(config, nRanks, maxTokens).empty();
}

ncclResult_t latencyRefusal(const CommConfig& config, int nRanks, int maxTokens, const char* function) {
  if (config.mode != ncclMoeModeLatency) return ncclSuccess;
  const std::string why = obstacle(config, nRanks, maxTokens);
  return why.empty() ? ncclSuccess : fail(ncclInvalidUsage, "%s: %s of ncclMoeModeLatency", function, why.c_str());
}

} // namespace moe
