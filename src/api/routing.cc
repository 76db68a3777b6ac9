// Entry points of routings.
#include <algorithm>

#include "api/entry.h"
#include "comm/limits.h"

namespace moe {
namespace {

constexpr int kMaxAlignment = 65536;

ncclResult_t loadRoutingConfig(const ncclMoeComm& comm, const ncclMoeRoutingConfig_t* from, const char* function,
                               ncclMoeRoutingConfig_t* config) {
  MOECHECK(loadStruct(from, config, function, "config"));
  if (config->topK < 1 || config->topK > comm.config.maxTopK) {
    return fail(ncclInvalidArgument, "%s: config.topK %d is not in 1..%d (the communicator's maxTopK)", function,
                config->topK, comm.config.maxTopK);
  }
  if (config->maxTokens < 0 || config->maxTokens > comm.config.maxTokens) {
    return fail(ncclInvalidArgument, "%s: config.maxTokens %d is not in 0..%d (the communicator's)", function,
                config->maxTokens, comm.config.maxTokens);
  }
  const int layout = enumValue(config->layout);
  if (layout != ncclMoeLayoutRankMajor && layout != ncclMoeLayoutExpertMajor && layout != ncclMoeLayoutExpertPadded) {
    return fail(ncclInvalidArgument, "%s: config.layout %d is unknown", function, layout);
  }
  if (config->expertAlignment < 0 || config->expertAlignment > kMaxAlignment) {
    return fail(ncclInvalidArgument, "%s: config.expertAlignment %d is not in 0..%d", function, config->expertAlignment,
                kMaxAlignment);
  }
  if (config->expertAlignment > 1 && config->layout != ncclMoeLayoutExpertMajor) {
    return fail(ncclInvalidArgument, "%s: config.expertAlignment %d needs ncclMoeLayoutExpertMajor", function,
                config->expertAlignment);
  }
  if (config->hostCounts != 0 && config->hostCounts != 1) {
    return fail(ncclInvalidArgument, "%s: config.hostCounts %d is not 0 or 1", function, config->hostCounts);
  }
  if (config->maxTokens == 0) config->maxTokens = comm.config.maxTokens;
  if (config->expertAlignment == 0) config->expertAlignment = 1;
  return latencyRefusal(comm.config, comm.nRanks, config->maxTokens, function);
}

} // namespace

// Looks it up rather than into it: a destroyed routing's memory is not the library's to read.
ncclResult_t checkRouting(const ncclMoeRouting* routing, const ncclMoeComm* comm, const char* function) {
  if (routing == nullptr) return fail(ncclInvalidArgument, "%s: routing is NULL", function);
  for (const auto& own : comm->routings) {
    if (own.get() == routing) return ncclSuccess;
  }
  return fail(ncclInvalidArgument, "%s: routing is none of this communicator's; was it destroyed?", function);
}

} // namespace moe

using namespace moe;

MOE_API ncclResult_t ncclMoeRoutingMemoryNeeded(ncclMoeComm_t moe, const ncclMoeRoutingConfig_t* config,
                                                size_t* bytes) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    if (bytes == nullptr) return fail(ncclInvalidArgument, "%s: bytes is NULL", function);
    ncclMoeRoutingConfig_t loaded;
    MOECHECK(loadRoutingConfig(*moe, config, function, &loaded));
    return moe->backend->routingMemoryNeeded(loaded, bytes);
  });
}
MOE_API_ALIAS(ncclMoeRoutingMemoryNeeded);

MOE_API ncclResult_t ncclMoeRoutingCreate(ncclMoeRouting_t* routing, ncclMoeComm_t moe,
                                          const ncclMoeRoutingConfig_t* config) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    if (routing == nullptr) return fail(ncclInvalidArgument, "%s: routing is NULL", function);
    *routing = nullptr;
    auto made = std::make_unique<ncclMoeRouting>();
    MOECHECK(loadRoutingConfig(*moe, config, function, &made->config));
    made->comm = moe;
    moe->routings.reserve(moe->routings.size() + 1);
    MOECHECK(moe->backend->routingCreate(*made));
    moe->routings.push_back(std::move(made));
    *routing = moe->routings.back().get();
    return ncclSuccess;
  });
}
MOE_API_ALIAS(ncclMoeRoutingCreate);

MOE_API ncclResult_t ncclMoeRoutingDestroy(ncclMoeRouting_t routing, ncclMoeComm_t moe) {
  const char* function = __func__;
  if (routing == nullptr) return ncclSuccess;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    MOECHECK(checkRouting(routing, moe, function));
    const ncclResult_t result = moe->backend->routingDestroy(*routing);
    auto& all = moe->routings;
    all.erase(std::find_if(all.begin(), all.end(), [&](const auto& owned) { return owned.get() == routing; }));
    return result;
  });
}
MOE_API_ALIAS(ncclMoeRoutingDestroy);

MOE_API ncclResult_t ncclMoeRoutingGetCounts(ncclMoeRouting_t routing, ncclMoeComm_t moe, int64_t* nRows,
                                             int* expertCounts) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    MOECHECK(checkRouting(routing, moe, function));
    if (nRows == nullptr) return fail(ncclInvalidArgument, "%s: nRows is NULL", function);
    if (routing->config.hostCounts == 0) {
      return fail(ncclInvalidUsage, "%s: the routing was made without hostCounts", function);
    }
    // On host memory they could be had, but not where the same routing lies on a GPU.
    if (routing->phase == ncclMoeRouting::Phase::dispatchSent &&
        servedByLatency(moe->config, moe->nRanks, routing->config.maxTokens)) {
      return fail(ncclInvalidUsage, "%s: in latency mode the counts of a SEND_ONLY dispatch come with ncclMoeComplete",
                  function);
    }
    return moe->backend->routingGetCounts(*routing, nRows, expertCounts);
  });
}
MOE_API_ALIAS(ncclMoeRoutingGetCounts);
