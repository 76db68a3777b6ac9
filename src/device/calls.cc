// Dispatch, combine and complete: what the kernels are given, and the order of the calls.
#include <algorithm>

#include "base/types.h"
#include "device/device_backend.h"
#include "device/hash.h"
#include "device/nvtx.h"

namespace moe {
namespace {

// The fewest SMs that reach the best time but for a few per cent (docs/performance.md).
constexpr int kCopySms = 32;           // RANK_MAJOR dispatch without the cast, of larger rows: a plain copy
constexpr int kSmallRow = 8192;        // bytes: a row costs the same handling whatever its size
constexpr int kDefaultSms = 64;        // all else: local copies, the cast or sums beside the wire
constexpr int kLatencySms = INT32_MAX; // latency mode: all

ncclResult_t captureOf(cudaStream_t stream, unsigned long long* capture) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  CUDACHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  *capture = status == cudaStreamCaptureStatusActive ? id : 0;
  return ncclSuccess;
}

bool isCapturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

// After the work that leaves a dispatch's counts.
ncclResult_t noteCounts(DeviceRouting& state, cudaStream_t stream) {
  CUDACHECK(cudaEventRecord(state.counted.get(), stream));
  state.countedInCapture = isCapturing(stream);
  return ncclSuccess;
}

// Whether this rank received rows in the routing's last dispatch, as far as the host can know without waiting.  Latency
// mode tells it with hostCounts only.
bool hasRows(const DeviceRouting& state, cudaStream_t stream) {
  if (state.countedInCapture || isCapturing(stream)) return false;
  const bool clean = cudaPeekAtLastError() == cudaSuccess;
  const cudaError_t counted = cudaEventQuery(state.counted.get());
  if (counted == cudaErrorNotReady && clean) (void)cudaGetLastError(); // the caller shall not see it
  return counted == cudaSuccess && state.outcome->nRows > 0;
}

} // namespace

// The communicator's calls run one after the other, whatever their streams.  That holds among the calls of a graph
// capture and among those outside; a graph and what surrounds it are ordered by the streams that the caller uses.
ncclResult_t DeviceBackend::follow(cudaStream_t stream) {
  unsigned long long capture = 0, id = 0;
  MOECHECK(captureOf(stream, &capture));
  const LastCall& last = capture != 0 ? captured_ : eager_;
  if (!last.any || last.capture != capture) return ncclSuccess;
  if (capture == 0) CUDACHECK(cudaStreamGetId(stream, &id)); // not permitted while the stream is captured
  if (capture != 0 || last.stream != id) CUDACHECK(cudaStreamWaitEvent(stream, last.event.get(), 0));
  return ncclSuccess;
}

ncclResult_t DeviceBackend::followed(cudaStream_t stream) {
  unsigned long long capture = 0;
  MOECHECK(captureOf(stream, &capture));
  LastCall& last = capture != 0 ? captured_ : eager_;
  CUDACHECK(cudaEventRecord(last.event.get(), stream));
  if (capture == 0) CUDACHECK(cudaStreamGetId(stream, &last.stream));
  last.capture = capture;
  last.any = true;
  return ncclSuccess;
}

int DeviceBackend::sms(int wanted, int otherwise) const {
  const int n = wanted != 0 ? wanted : config_.numSms != 0 ? config_.numSms : otherwise;
  return std::min(n, smCount_);
}

ncclResult_t DeviceBackend::dispatch(const ncclMoeDispatchArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) {
  NvtxRange range("ncclMoeDispatch");
  DeviceScope scope(device_);
  MOECHECK(usable("ncclMoeDispatch"));
  DeviceRouting& state = stateOf(routing);
  MOE_TRACE("ncclMoeDispatch: rank %d, routing %d, %s mode, %d tokens of %d bytes, flags 0x%x", moe_.rank, state.id,
            state.mode(), args.nTokens, static_cast<int>(args.hidden * typeBytes(args.type)), args.flags);
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
  MOECHECK(follow(stream));
  launched_ = true;
  CUDACHECK(launchRoute(route, sms(args.numSms, smCount_), stream));
  // An event between the kernels keeps them apart, so it is only where a caller may wait for the counts that it stands
  // there.
  const bool countsFirst = routing.config.hostCounts != 0;
  if (countsFirst) MOECHECK(noteCounts(state, stream));
  CUDACHECK(launchPush(push, sms(args.numSms, plainCopy ? kCopySms : kDefaultSms), stream, overlaps_ && !countsFirst));
  if (!countsFirst) MOECHECK(noteCounts(state, stream));
  return followed(stream);
}

ncclResult_t DeviceBackend::combine(const ncclMoeCombineArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) {
  NvtxRange range("ncclMoeCombine");
  DeviceScope scope(device_);
  MOECHECK(usable("ncclMoeCombine"));
  DeviceRouting& state = stateOf(routing);
  if (args.x == nullptr && hasRows(state, stream)) return fail(ncclInvalidArgument, "ncclMoeCombine: args.x is NULL");
  if (args.withGradWeights != 0 && args.gradWeights == nullptr && hasRows(state, stream)) {
    return fail(ncclInvalidArgument, "ncclMoeCombine: args.gradWeights is NULL");
  }
  MOE_TRACE("ncclMoeCombine: rank %d, routing %d, %s mode, rows of %d bytes, flags 0x%x", moe_.rank, state.id,
            state.mode(), static_cast<int>(args.hidden * typeBytes(args.type)), args.flags);
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
ncclResult_t DeviceBackend::complete(ncclMoeRouting& routing, cudaStream_t stream) {
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

} // namespace moe
