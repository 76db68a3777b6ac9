#include "device/latency_routing.h"

#include "base/error.h"
#include "base/types.h"
#include "device/hash.h"

namespace moe {

LatencyLayout latencyLayout(const CommConfig& config, int nRanks, int maxTokens, int topK) {
  return LatencyLayout(nRanks, maxTokens, topK, config.maxRowBytes, scaleRoom(config.maxRowBytes));
}

LatencyRouting::LatencyRouting(const CommConfig& config, const CommView& comm, const Window& window,
                               const ncclMoeRoutingConfig_t& routing, RoutingOutcome* outcome, bool overlaps)
  : maxScaleBytes_(scaleRoom(config.maxRowBytes)), overlaps_(overlaps) {
  view_.comm = comm;
  view_.layout = latencyLayout(config, comm.nRanks, routing.maxTokens, routing.topK);
  for (int r = 0; r < comm.nRanks; r++) view_.peers[r] = window.bases()[r];
  view_.nLocal = config.nLocal[comm.rank];
  for (int r = 0; r < comm.rank; r++) view_.firstPosition += config.nLocal[r];
  view_.kind = routing.layout;
  view_.alignment = routing.expertAlignment;
  view_.hostCounts = routing.hostCounts != 0;
  view_.outcome = outcome;
}

ncclResult_t LatencyRouting::empty(cudaStream_t stream) {
  char* own = view_.peers[view_.comm.rank];
  const LatencyLayout& layout = view_.layout;
  CUDACHECK(cudaMemsetAsync(own, 0, layout.records, stream));
  CUDACHECK(cudaMemsetAsync(own + layout.records, kEmptyByte, layout.map - layout.records, stream));
  CUDACHECK(cudaMemsetAsync(own + layout.map, 0, layout.bytes - layout.map, stream));
  CUDACHECK(cudaStreamSynchronize(stream));
  *view_.outcome = RoutingOutcome{};
  return ncclSuccess;
}

ncclResult_t LatencyRouting::dispatch(const ncclMoeDispatchArgs_t& args, const ncclMoeRouting& routing, int maxSms,
                                      cudaStream_t stream) {
  LatencyDispatchArgs a{};
  const bool cast = args.quant != ncclMoeQuantNone;
  a.view = view_;
  a.halves = {true, (args.flags & NCCL_MOE_SEND_ONLY) == 0};
  a.x = static_cast<const char*>(args.x);
  a.rowBytes = args.hidden * typeBytes(args.type);
  a.wireBytes = cast ? args.hidden : a.rowBytes;
  a.quant = args.quant;
  a.topkIdx = args.topkIdx;
  a.idx64 = args.topkIdxType == ncclInt64;
  a.keep = (args.flags & NCCL_MOE_KEEP_ROUTING) != 0;
  a.topkWeights = args.topkWeights;
  a.scales = static_cast<const char*>(args.scales);
  a.scaleBytes = cast ? NCCL_MOE_QUANT_SCALE_BYTES(args.quant, args.hidden) : args.scaleBytes;
  if (static_cast<size_t>(a.scaleBytes) > maxScaleBytes_) {
    return fail(ncclInvalidUsage,
                "ncclMoeDispatch: args.scaleBytes %d is more than the %zu that the communicator's maxRowBytes leaves "
                "room for",
                a.scaleBytes, maxScaleBytes_);
  }
  a.columnMajor = args.scaleLayout == ncclMoeScaleColumnMajor;
  a.rows = routing.config.layout == ncclMoeLayoutExpertPadded
             ? static_cast<long long>(view_.comm.nRanks) * routing.config.maxTokens
             : args.recvCapacity;
  a.recvX = static_cast<char*>(args.recvX);
  a.recvScales = static_cast<char*>(args.recvScales);
  a.recvTopkIdx = args.recvTopkIdx;
  a.recvWeights = args.recvWeights;
  a.recvCount = args.recvCount;
  a.expertCounts = args.expertCounts;
  a.expertOffsets = args.expertOffsets;
  a.nTokens = args.nTokens;
  a.nTokensDev = args.nTokensDev;
  a.capacity = args.recvCapacity;
  a.signature = hash({1, a.wireBytes, a.scaleBytes, args.quant, a.keep ? 1 : 0});
  dispatch_ = a;
  maxSms_ = maxSms;
  CUDACHECK(launchLatencyDispatch(a, maxSms, stream, overlaps_));
  return ncclSuccess;
}

ncclResult_t LatencyRouting::combine(const ncclMoeCombineArgs_t& args, const ncclMoeRouting& routing, int maxSms,
                                     cudaStream_t stream) {
  LatencyCombineArgs a{};
  a.view = view_;
  a.halves = {true, (args.flags & NCCL_MOE_SEND_ONLY) == 0};
  a.x = static_cast<const char*>(args.x);
  a.rowBytes = args.hidden * typeBytes(args.type);
  a.type = args.type;
  a.exact = (args.flags & NCCL_MOE_EXACT) != 0;
  a.cast = args.quant != ncclMoeQuantNone;
  a.wireBytes = a.cast ? args.hidden : a.rowBytes;
  a.weights = args.weights;
  a.gradWeights = args.gradWeights;
  a.withGrads = args.withGradWeights != 0;
  a.out = static_cast<char*>(args.out);
  a.gradTopkWeights = args.gradTopkWeights;
  a.nTokens = routing.nTokens;
  a.signature = hash({2, a.rowBytes, args.type, a.withGrads ? 1 : 0, a.exact ? 1 : 0, a.cast ? 1 : 0});
  combine_ = a;
  maxSms_ = maxSms;
  CUDACHECK(launchLatencyCombine(a, maxSms, stream, overlaps_));
  return ncclSuccess;
}

ncclResult_t LatencyRouting::complete(const ncclMoeRouting& routing, cudaStream_t stream) {
  if (routing.phase == ncclMoeRouting::Phase::dispatchSent) {
    dispatch_.halves = {false, true};
    CUDACHECK(launchLatencyDispatch(dispatch_, maxSms_, stream, overlaps_));
  } else {
    combine_.halves = {false, true};
    CUDACHECK(launchLatencyCombine(combine_, maxSms_, stream, overlaps_));
  }
  return ncclSuccess;
}

} // namespace moe
