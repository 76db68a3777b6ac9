// A routing that latency mode serves: its window, and its calls.
#pragma once

#include "comm/comm.h"
#include "device/latency.h"
#include "device/window.h"

namespace moe {

LatencyLayout latencyLayout(const CommConfig& config, int nRanks, int maxTokens, int topK);

class LatencyRouting {
 public:
  LatencyRouting(const CommConfig& config, const CommView& comm, const Window& window,
                 const ncclMoeRoutingConfig_t& routing, RoutingOutcome* outcome, bool overlaps);
  // Makes all records empty.  No peer may write meanwhile.  Waits for the stream.
  ncclResult_t empty(cudaStream_t stream);

  ncclResult_t dispatch(const ncclMoeDispatchArgs_t& args, const ncclMoeRouting& routing, int maxSms,
                        cudaStream_t stream);
  ncclResult_t combine(const ncclMoeCombineArgs_t& args, const ncclMoeRouting& routing, int maxSms,
                       cudaStream_t stream);
  // The second half of the call that routing.phase names.
  ncclResult_t complete(const ncclMoeRouting& routing, cudaStream_t stream);

 private:
  LatencyView view_{};
  size_t maxScaleBytes_;
  bool overlaps_;                  // kernels may begin before the ones that they follow have ended
  LatencyDispatchArgs dispatch_{}; // of the last call, for its second half
  LatencyCombineArgs combine_{};
  int maxSms_ = 0;
};

} // namespace moe
