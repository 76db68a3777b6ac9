// Entry points of dispatch, combine and complete: everything that one rank can check by itself is checked here.
#include "api/entry.h"
#include "base/types.h"
#include "comm/limits.h"
#include "routing/layout.h"

namespace moe {
namespace {

using Phase = ncclMoeRouting::Phase;

bool aligned(const void* ptr, size_t bytes) { return reinterpret_cast<uintptr_t>(ptr) % bytes == 0; }

#define CHECK_ARG(condition, ...)                                                                                      \
  do {                                                                                                                 \
    if (!(condition)) return fail(ncclInvalidArgument, __VA_ARGS__);                                                   \
  } while (0)

ncclResult_t checkFlags(unsigned int flags, const char* function) {
  CHECK_ARG((flags & ~(NCCL_MOE_SEND_ONLY | NCCL_MOE_KEEP_ROUTING | NCCL_MOE_EXACT)) == 0,
            "%s: args.flags 0x%x has unknown bits", function, flags);
  return ncclSuccess;
}

ncclResult_t checkNotPending(const ncclMoeRouting& routing, const char* function) {
  if (routing.phase == Phase::dispatchSent || routing.phase == Phase::combineSent) {
    return fail(ncclInvalidUsage, "%s: the routing's SEND_ONLY %s has not been completed (ncclMoeComplete)", function,
                routing.phase == Phase::dispatchSent ? "dispatch" : "combine");
  }
  return ncclSuccess;
}

ncclResult_t checkRow(const ncclMoeComm& comm, int hidden, int elemBytes, const char* function) {
  CHECK_ARG(hidden > 0, "%s: args.hidden %d is not positive", function, hidden);
  const size_t rowBytes = static_cast<size_t>(hidden) * elemBytes;
  CHECK_ARG(rowBytes % 16 == 0, "%s: args.hidden %d makes rows of %zu bytes, not a multiple of 16", function, hidden,
            rowBytes);
  CHECK_ARG(rowBytes <= comm.config.maxRowBytes,
            "%s: args.hidden %d makes rows of %zu bytes, more than maxRowBytes %zu", function, hidden, rowBytes,
            comm.config.maxRowBytes);
  return ncclSuccess;
}

// rows: how many the receive tensors have.
ncclResult_t checkScales(const ncclMoeDispatchArgs_t& a, const ncclMoeRouting& routing, int64_t rows,
                         const char* function) {
  int scaleBytes = a.scaleBytes;
  const int quant = enumValue(a.quant);
  const int scaleLayout = enumValue(a.scaleLayout);
  if (quant != ncclMoeQuantNone) {
    CHECK_ARG(quant == ncclMoeQuantFp8 || quant == ncclMoeQuantFp8Ue8m0, "%s: args.quant %d is unknown", function,
              quant);
    CHECK_ARG(a.type == ncclBfloat16, "%s: args.quant needs args.type ncclBfloat16", function);
    CHECK_ARG(a.hidden % 16 == 0, "%s: args.hidden %d is not a multiple of 16, which the FP8 cast needs", function,
              a.hidden);
    CHECK_ARG(a.scales == nullptr && a.scaleBytes == 0, "%s: args.scales and args.scaleBytes do not go with args.quant",
              function);
    scaleBytes = NCCL_MOE_QUANT_SCALE_BYTES(quant, a.hidden);
  }
  CHECK_ARG(scaleBytes >= 0 && scaleBytes <= WireRow::kMaxScaleBytes, "%s: args.scaleBytes %d is not in 0..%d",
            function, scaleBytes, WireRow::kMaxScaleBytes);
  CHECK_ARG(a.scales == nullptr || scaleBytes > 0, "%s: args.scales is given but args.scaleBytes is 0", function);
  CHECK_ARG(quant != ncclMoeQuantNone || a.scales != nullptr || scaleBytes == 0 || a.nTokens == 0,
            "%s: args.scaleBytes is %d but args.scales is NULL", function, scaleBytes);
  CHECK_ARG(scaleBytes == 0 || a.recvScales != nullptr || rows == 0, "%s: args.recvScales is NULL", function);
  CHECK_ARG(scaleBytes > 0 || a.recvScales == nullptr, "%s: args.recvScales is given but there are no scales",
            function);
  CHECK_ARG(scaleLayout == ncclMoeScaleRowMajor || scaleLayout == ncclMoeScaleColumnMajor,
            "%s: args.scaleLayout %d is unknown", function, scaleLayout);
  if (scaleLayout == ncclMoeScaleColumnMajor && scaleBytes > 0) {
    CHECK_ARG(scaleBytes % 4 == 0, "%s: args.scaleBytes %d is not a multiple of 4, which column-major scales need",
              function, scaleBytes);
    const bool padded = routing.config.layout == ncclMoeLayoutExpertPadded;
    CHECK_ARG(
      rows % 4 == 0 || !padded,
      "%s: args.scaleLayout is column-major, but %d ranks times the routing's config.maxTokens %d is %lld rows, "
      "not a multiple of 4",
      function, routing.comm->nRanks, routing.config.maxTokens, static_cast<long long>(rows));
    CHECK_ARG(rows % 4 == 0, "%s: args.scaleLayout is column-major, but args.recvCapacity %lld is not a multiple of 4",
              function, static_cast<long long>(rows));
    CHECK_ARG(aligned(a.recvScales, 4), "%s: args.recvScales is not aligned to 4 bytes", function);
  }
  return ncclSuccess;
}

ncclResult_t checkDispatch(const ncclMoeDispatchArgs_t& a, const ncclMoeRouting& routing, const char* function) {
  const ncclMoeComm& comm = *routing.comm;
  const ncclMoeLayout_t layout = routing.config.layout;
  const bool keep = (a.flags & NCCL_MOE_KEEP_ROUTING) != 0;
  CHECK_ARG((a.flags & NCCL_MOE_EXACT) == 0, "%s: args.flags has NCCL_MOE_EXACT, which is for ncclMoeCombine",
            function);
  MOECHECK(checkFlags(a.flags, function));
  MOECHECK(checkNotPending(routing, function));
  const int type = enumValue(a.type);
  const int elemBytes = typeBytes(type);
  CHECK_ARG(elemBytes != 0, "%s: args.type %d is not ncclBfloat16, ncclFloat16, ncclFloat32 or ncclMoeFloat8e4m3",
            function, type);
  MOECHECK(checkRow(comm, a.hidden, elemBytes, function));
  CHECK_ARG(a.nTokens >= 0 && a.nTokens <= routing.config.maxTokens, "%s: args.nTokens %d is not in 0..%d", function,
            a.nTokens, routing.config.maxTokens);
  const bool hasTokens = a.nTokens > 0;
  if (keep) {
    if (routing.phase == Phase::empty) {
      return fail(ncclInvalidUsage, "%s: NCCL_MOE_KEEP_ROUTING, but the routing has no dispatch that succeeded",
                  function);
    }
    CHECK_ARG(a.nTokens == routing.nTokens, "%s: args.nTokens %d differs from the kept routing's %d", function,
              a.nTokens, routing.nTokens);
  } else {
    CHECK_ARG(a.topkIdx != nullptr || !hasTokens, "%s: args.topkIdx is NULL", function);
    const int idxType = enumValue(a.topkIdxType);
    CHECK_ARG(idxType == ncclInt32 || idxType == ncclInt64, "%s: args.topkIdxType %d is not ncclInt32 or ncclInt64",
              function, idxType);
    CHECK_ARG(aligned(a.topkIdx, idxType == ncclInt64 ? 8 : 4), "%s: args.topkIdx is not aligned to its elements",
              function);
  }
  CHECK_ARG(a.x != nullptr || !hasTokens, "%s: args.x is NULL", function);
  CHECK_ARG(aligned(a.x, 16), "%s: args.x is not aligned to 16 bytes", function);
  CHECK_ARG(aligned(a.nTokensDev, 4), "%s: args.nTokensDev is not aligned to 4 bytes", function);
  CHECK_ARG(aligned(a.topkWeights, 4), "%s: args.topkWeights is not aligned to 4 bytes", function);
  const int nLocal = comm.config.nLocal[comm.rank];
  const bool padded = layout == ncclMoeLayoutExpertPadded;
  CHECK_ARG(padded || a.recvCapacity >= 0, "%s: args.recvCapacity %lld is negative", function,
            static_cast<long long>(a.recvCapacity));
  const int64_t planeRows = nLocal > 0 ? static_cast<int64_t>(comm.nRanks) * routing.config.maxTokens : 0;
  const int64_t rows = padded ? planeRows : a.recvCapacity;
  CHECK_ARG(a.recvX != nullptr || rows == 0, "%s: args.recvX is NULL", function);
  CHECK_ARG(aligned(a.recvX, 16), "%s: args.recvX is not aligned to 16 bytes", function);
  MOECHECK(checkScales(a, routing, rows, function));
  CHECK_ARG(a.recvTopkIdx == nullptr || layout == ncclMoeLayoutRankMajor,
            "%s: args.recvTopkIdx goes with ncclMoeLayoutRankMajor only", function);
  CHECK_ARG(a.recvWeights == nullptr || a.topkWeights != nullptr || !hasTokens,
            "%s: args.recvWeights is given but args.topkWeights is NULL", function);
  CHECK_ARG(a.expertOffsets == nullptr || layout == ncclMoeLayoutExpertMajor,
            "%s: args.expertOffsets goes with ncclMoeLayoutExpertMajor only", function);
  CHECK_ARG(aligned(a.recvTopkIdx, 4), "%s: args.recvTopkIdx is not aligned to 4 bytes", function);
  CHECK_ARG(aligned(a.recvWeights, 4), "%s: args.recvWeights is not aligned to 4 bytes", function);
  CHECK_ARG(aligned(a.recvCount, 4), "%s: args.recvCount is not aligned to 4 bytes", function);
  CHECK_ARG(aligned(a.expertCounts, 4), "%s: args.expertCounts is not aligned to 4 bytes", function);
  CHECK_ARG(aligned(a.expertOffsets, 4), "%s: args.expertOffsets is not aligned to 4 bytes", function);
  CHECK_ARG(a.numSms >= 0, "%s: args.numSms %d is negative", function, a.numSms);
  return ncclSuccess;
}

ncclResult_t checkCombine(const ncclMoeCombineArgs_t& a, const ncclMoeRouting& routing, const char* function) {
  const ncclMoeComm& comm = *routing.comm;
  const bool rankMajor = routing.config.layout == ncclMoeLayoutRankMajor;
  CHECK_ARG((a.flags & NCCL_MOE_KEEP_ROUTING) == 0,
            "%s: args.flags has NCCL_MOE_KEEP_ROUTING, which is for ncclMoeDispatch", function);
  MOECHECK(checkFlags(a.flags, function));
  MOECHECK(checkNotPending(routing, function));
  if (routing.phase == Phase::empty)
    return fail(ncclInvalidUsage, "%s: the routing has no dispatch that succeeded", function);
  const int quant = enumValue(a.quant);
  CHECK_ARG(quant == ncclMoeQuantNone || quant == ncclMoeQuantFp8,
            "%s: args.quant %d is not ncclMoeQuantNone or ncclMoeQuantFp8", function, quant);
  const int type = enumValue(a.type);
  CHECK_ARG(type == ncclBfloat16 || type == ncclFloat16 || type == ncclFloat32,
            "%s: args.type %d is not ncclBfloat16, ncclFloat16 or ncclFloat32", function, type);
  MOECHECK(checkRow(comm, a.hidden, typeBytes(type), function));
  CHECK_ARG(aligned(a.x, 16), "%s: args.x is not aligned to 16 bytes", function);
  CHECK_ARG(a.out != nullptr || routing.nTokens == 0, "%s: args.out is NULL", function);
  CHECK_ARG(aligned(a.out, 16), "%s: args.out is not aligned to 16 bytes", function);
  CHECK_ARG(a.weights == nullptr || !rankMajor,
            "%s: args.weights does not go with ncclMoeLayoutRankMajor, whose rows are sums over experts already",
            function);
  CHECK_ARG((a.flags & NCCL_MOE_EXACT) == 0 || !rankMajor, "%s: NCCL_MOE_EXACT does not go with ncclMoeLayoutRankMajor",
            function);
  if (quant != ncclMoeQuantNone) {
    CHECK_ARG(type == ncclBfloat16, "%s: args.quant needs args.type ncclBfloat16", function);
    CHECK_ARG(a.hidden % 16 == 0, "%s: args.hidden %d is not a multiple of 16, which the FP8 cast needs", function,
              a.hidden);
    CHECK_ARG((a.flags & NCCL_MOE_EXACT) == 0, "%s: args.quant does not go with NCCL_MOE_EXACT", function);
    if (!servedByLatency(comm.config, comm.nRanks, routing.config.maxTokens)) {
      return fail(ncclInvalidUsage, "%s: args.quant is for latency mode, which does not serve this routing", function);
    }
  }
  CHECK_ARG(a.withGradWeights == 0 || a.withGradWeights == 1, "%s: args.withGradWeights %d is not 0 or 1", function,
            a.withGradWeights);
  CHECK_ARG(a.withGradWeights == 1 || (a.gradWeights == nullptr && a.gradTopkWeights == nullptr),
            "%s: args.gradWeights and args.gradTopkWeights need args.withGradWeights", function);
  CHECK_ARG(a.withGradWeights == 0 || a.gradTopkWeights != nullptr || routing.nTokens == 0,
            "%s: args.gradTopkWeights is NULL", function);
  CHECK_ARG(aligned(a.weights, 4), "%s: args.weights is not aligned to 4 bytes", function);
  CHECK_ARG(aligned(a.gradWeights, 4), "%s: args.gradWeights is not aligned to 4 bytes", function);
  CHECK_ARG(aligned(a.gradTopkWeights, 4), "%s: args.gradTopkWeights is not aligned to 4 bytes", function);
  CHECK_ARG(a.numSms >= 0, "%s: args.numSms %d is negative", function, a.numSms);
  return ncclSuccess;
}

} // namespace
} // namespace moe

using namespace moe;

MOE_API ncclResult_t ncclMoeDispatch(const ncclMoeDispatchArgs_t* args, ncclMoeRouting_t routing, ncclMoeComm_t moe,
                                     cudaStream_t stream) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    MOECHECK(checkRouting(routing, moe, function));
    ncclMoeDispatchArgs_t loaded;
    MOECHECK(loadStruct(args, &loaded, function, "args"));
    MOECHECK(checkDispatch(loaded, *routing, function));
    routing->keeps = (loaded.flags & NCCL_MOE_KEEP_ROUTING) != 0;
    if (!routing->keeps) routing->phase = Phase::empty; // a failure leaves no routing behind
    MOECHECK(moe->backend->dispatch(loaded, *routing, stream));
    routing->nTokens = loaded.nTokens;
    routing->phase = (loaded.flags & NCCL_MOE_SEND_ONLY) != 0 ? Phase::dispatchSent : Phase::dispatched;
    return ncclSuccess;
  });
}
MOE_API_ALIAS(ncclMoeDispatch);

MOE_API ncclResult_t ncclMoeCombine(const ncclMoeCombineArgs_t* args, ncclMoeRouting_t routing, ncclMoeComm_t moe,
                                    cudaStream_t stream) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    MOECHECK(checkRouting(routing, moe, function));
    ncclMoeCombineArgs_t loaded;
    MOECHECK(loadStruct(args, &loaded, function, "args"));
    MOECHECK(checkCombine(loaded, *routing, function));
    MOECHECK(moe->backend->combine(loaded, *routing, stream));
    if ((loaded.flags & NCCL_MOE_SEND_ONLY) != 0) routing->phase = Phase::combineSent;
    return ncclSuccess;
  });
}
MOE_API_ALIAS(ncclMoeCombine);

MOE_API ncclResult_t ncclMoeComplete(ncclMoeRouting_t routing, ncclMoeComm_t moe, cudaStream_t stream) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    MOECHECK(checkRouting(routing, moe, function));
    if (routing->phase != Phase::dispatchSent && routing->phase != Phase::combineSent) {
      return fail(ncclInvalidUsage, "%s: the routing has no SEND_ONLY dispatch or combine to complete", function);
    }
    const bool wasDispatch = routing->phase == Phase::dispatchSent;
    const ncclResult_t result = moe->backend->complete(*routing, stream);
    const bool lost = wasDispatch && !routing->keeps && result != ncclSuccess;
    routing->phase = lost ? Phase::empty : Phase::dispatched;
    return result;
  });
}
MOE_API_ALIAS(ncclMoeComplete);
