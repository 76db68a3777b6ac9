#include "perf/moe/buffers.h"

#include "perf/moe/numeric.h"
#include "perf/moe/perf_error.h"

namespace moe::perf {

size_t bufferBytes(const Shape& s, int64_t maxSlots) {
  const auto tokens = static_cast<size_t>(s.nTokens);
  const auto slots = static_cast<size_t>(maxSlots);
  const auto perSlot = s.recvRowBytes() + s.combineRowBytes() + s.scaleBytes + static_cast<size_t>(s.topK) * 8;
  const auto perToken = s.sendRowBytes() + s.combineRowBytes() + s.scaleBytes + static_cast<size_t>(s.topK) * 12;
  return tokens * perToken + slots * perSlot + 16 * guardBytes + static_cast<size_t>(s.nExperts) * 8;
}

ncclResult_t BufferSet::takeRows(void** ptr, size_t bytes) {
  if (!libraryMemory_) return takeOther(ptr, bytes);
  const ncclResult_t result = ncclMoeMemAlloc(ptr, bytes + guardBytes, comm_);
  if (result != ncclSuccess) return perfFail(result, "%s", ncclMoeGetLastError(nullptr));
  rows_.push_back(*ptr);
  return ncclSuccess;
}

ncclResult_t BufferSet::takeOther(void** ptr, size_t bytes) {
  PERFCHECK(device_.alloc(ptr, bytes + guardBytes));
  others_.push_back(*ptr);
  return ncclSuccess;
}

ncclResult_t BufferSet::take(const Shape& s, int rank, int64_t maxSlots) {
  const auto tokens = static_cast<size_t>(s.nTokens);
  const auto slots = static_cast<size_t>(maxSlots);
  const auto topK = static_cast<size_t>(s.topK);
  const bool rankMajor = s.layout == ncclMoeLayoutRankMajor;
  b_.maxSlots = maxSlots;
  PERFCHECK(takeRows(&b_.x, tokens * s.sendRowBytes()));
  PERFCHECK(takeRows(&b_.recvX, slots * s.recvRowBytes()));
  PERFCHECK(takeRows(&b_.expertX, slots * s.combineRowBytes()));
  PERFCHECK(takeOther(&b_.topkIdx, tokens * topK * 8));
  PERFCHECK(takeOther(&b_.topkWeights, tokens * topK * 4));
  if (s.type == ncclMoeFloat8e4m3) PERFCHECK(takeOther(&b_.scales, tokens * s.scaleBytes));
  if (s.scaleBytes > 0) PERFCHECK(takeOther(&b_.recvScales, slots * s.scaleBytes));
  if (rankMajor) PERFCHECK(takeOther(&b_.recvTopkIdx, slots * topK * 4));
  PERFCHECK(takeOther(&b_.recvWeights, slots * 4 * (rankMajor ? topK : 1)));
  PERFCHECK(takeOther(&b_.recvCount, 4));
  const auto nLocal = static_cast<size_t>(nLocalExperts(s, rank));
  PERFCHECK(takeOther(&b_.expertCounts, nLocal * 4));
  if (s.layout == ncclMoeLayoutExpertMajor) PERFCHECK(takeOther(&b_.expertOffsets, (nLocal + 1) * 4));
  return takeOther(&b_.out, tokens * s.combineRowBytes());
}

ncclResult_t BufferSet::release() {
  for (void* p : others_) device_.free(p);
  others_.clear();
  for (void* p : rows_) {
    const ncclResult_t result = ncclMoeMemFree(p, comm_);
    if (result != ncclSuccess) return perfFail(result, "%s", ncclMoeGetLastError(nullptr));
  }
  rows_.clear();
  return ncclSuccess;
}

} // namespace moe::perf
