/* The public structs and values as they were released.  A line here is never changed, and a struct only grows at its
 * end: then its SIZE changes, its new fields get lines, and old callers go on working because they pass their own size.
 */
#include <nccl_moe.h>

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "size of " #type)
#define FIELD(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)
#define VALUE(name, value) _Static_assert((int)(name) == (value), #name)

SIZE(ncclMoeConfig_t, 80);
FIELD(ncclMoeConfig_t, size, 0);
FIELD(ncclMoeConfig_t, magic, 8);
FIELD(ncclMoeConfig_t, version, 12);
FIELD(ncclMoeConfig_t, nExperts, 16);
FIELD(ncclMoeConfig_t, maxTokens, 20);
FIELD(ncclMoeConfig_t, maxTopK, 24);
FIELD(ncclMoeConfig_t, expertToRank, 32);
FIELD(ncclMoeConfig_t, maxRowBytes, 40);
FIELD(ncclMoeConfig_t, mode, 48);
FIELD(ncclMoeConfig_t, numSms, 52);
FIELD(ncclMoeConfig_t, timeoutMs, 56);
FIELD(ncclMoeConfig_t, maxMemory, 64);
FIELD(ncclMoeConfig_t, jobToken, 72);

SIZE(ncclMoeCommInfo_t, 48);
FIELD(ncclMoeCommInfo_t, size, 0);
FIELD(ncclMoeCommInfo_t, magic, 8);
FIELD(ncclMoeCommInfo_t, version, 12);
FIELD(ncclMoeCommInfo_t, rank, 16);
FIELD(ncclMoeCommInfo_t, nRanks, 20);
FIELD(ncclMoeCommInfo_t, nLocalExperts, 24);
FIELD(ncclMoeCommInfo_t, onHost, 28);
FIELD(ncclMoeCommInfo_t, memoryBytes, 32);
FIELD(ncclMoeCommInfo_t, nScaleUpRanks, 40);

SIZE(ncclMoeCommStats_t, 40);
FIELD(ncclMoeCommStats_t, size, 0);
FIELD(ncclMoeCommStats_t, magic, 8);
FIELD(ncclMoeCommStats_t, version, 12);
FIELD(ncclMoeCommStats_t, waitNs, 16);
FIELD(ncclMoeCommStats_t, expertTokens, 24);
FIELD(ncclMoeCommStats_t, leftOut, 32);

SIZE(ncclMoeRoutingConfig_t, 40);
FIELD(ncclMoeRoutingConfig_t, size, 0);
FIELD(ncclMoeRoutingConfig_t, magic, 8);
FIELD(ncclMoeRoutingConfig_t, version, 12);
FIELD(ncclMoeRoutingConfig_t, topK, 16);
FIELD(ncclMoeRoutingConfig_t, maxTokens, 20);
FIELD(ncclMoeRoutingConfig_t, layout, 24);
FIELD(ncclMoeRoutingConfig_t, expertAlignment, 28);
FIELD(ncclMoeRoutingConfig_t, hostCounts, 32);

SIZE(ncclMoeDispatchArgs_t, 168);
FIELD(ncclMoeDispatchArgs_t, size, 0);
FIELD(ncclMoeDispatchArgs_t, magic, 8);
FIELD(ncclMoeDispatchArgs_t, version, 12);
FIELD(ncclMoeDispatchArgs_t, x, 16);
FIELD(ncclMoeDispatchArgs_t, type, 24);
FIELD(ncclMoeDispatchArgs_t, hidden, 28);
FIELD(ncclMoeDispatchArgs_t, nTokens, 32);
FIELD(ncclMoeDispatchArgs_t, nTokensDev, 40);
FIELD(ncclMoeDispatchArgs_t, topkIdx, 48);
FIELD(ncclMoeDispatchArgs_t, topkIdxType, 56);
FIELD(ncclMoeDispatchArgs_t, topkWeights, 64);
FIELD(ncclMoeDispatchArgs_t, scales, 72);
FIELD(ncclMoeDispatchArgs_t, scaleBytes, 80);
FIELD(ncclMoeDispatchArgs_t, quant, 84);
FIELD(ncclMoeDispatchArgs_t, scaleLayout, 88);
FIELD(ncclMoeDispatchArgs_t, recvX, 96);
FIELD(ncclMoeDispatchArgs_t, recvCapacity, 104);
FIELD(ncclMoeDispatchArgs_t, recvScales, 112);
FIELD(ncclMoeDispatchArgs_t, recvTopkIdx, 120);
FIELD(ncclMoeDispatchArgs_t, recvWeights, 128);
FIELD(ncclMoeDispatchArgs_t, recvCount, 136);
FIELD(ncclMoeDispatchArgs_t, expertCounts, 144);
FIELD(ncclMoeDispatchArgs_t, expertOffsets, 152);
FIELD(ncclMoeDispatchArgs_t, flags, 160);
FIELD(ncclMoeDispatchArgs_t, numSms, 164);

SIZE(ncclMoeCombineArgs_t, 80);
FIELD(ncclMoeCombineArgs_t, size, 0);
FIELD(ncclMoeCombineArgs_t, magic, 8);
FIELD(ncclMoeCombineArgs_t, version, 12);
FIELD(ncclMoeCombineArgs_t, x, 16);
FIELD(ncclMoeCombineArgs_t, type, 24);
FIELD(ncclMoeCombineArgs_t, hidden, 28);
FIELD(ncclMoeCombineArgs_t, weights, 32);
FIELD(ncclMoeCombineArgs_t, gradWeights, 40);
FIELD(ncclMoeCombineArgs_t, out, 48);
FIELD(ncclMoeCombineArgs_t, gradTopkWeights, 56);
FIELD(ncclMoeCombineArgs_t, flags, 64);
FIELD(ncclMoeCombineArgs_t, numSms, 68);
FIELD(ncclMoeCombineArgs_t, withGradWeights, 72);
FIELD(ncclMoeCombineArgs_t, quant, 76);
VALUE(ncclSuccess, 0);
VALUE(ncclUnhandledCudaError, 1);
VALUE(ncclSystemError, 2);
VALUE(ncclInternalError, 3);
VALUE(ncclInvalidArgument, 4);
VALUE(ncclInvalidUsage, 5);
VALUE(ncclRemoteError, 6);
VALUE(ncclInProgress, 7);
VALUE(ncclNumResults, 8);
VALUE(ncclInt32, 2);
VALUE(ncclInt64, 4);
VALUE(ncclFloat16, 6);
VALUE(ncclFloat32, 7);
VALUE(ncclBfloat16, 9);
VALUE(ncclMoeModeAuto, 0);
VALUE(ncclMoeModeThroughput, 1);
VALUE(ncclMoeModeLatency, 2);
VALUE(ncclMoeLayoutRankMajor, 0);
VALUE(ncclMoeLayoutExpertMajor, 1);
VALUE(ncclMoeLayoutExpertPadded, 2);
VALUE(ncclMoeQuantNone, 0);
VALUE(ncclMoeQuantFp8, 1);
VALUE(ncclMoeQuantFp8Ue8m0, 2);
VALUE(ncclMoeScaleRowMajor, 0);
VALUE(ncclMoeScaleColumnMajor, 1);
VALUE(NCCL_MOE_MAGIC, 1836016897);
VALUE(NCCL_MOE_MAX_TOPK, 32);
VALUE(NCCL_MOE_MAX_RANKS, 1024);
VALUE(NCCL_MOE_SCALE_BLOCK, 128);
VALUE(NCCL_MOE_SEND_ONLY, 1);
VALUE(NCCL_MOE_KEEP_ROUTING, 2);
VALUE(NCCL_MOE_EXACT, 4);
