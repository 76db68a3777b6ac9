// The route kernel: first half of a dispatch.  It counts this rank's rows per expert and per rank, tells every peer the
// counts and where rows shall go, and works out every slot.
//
// Protocol.  Each block counts some chunks of tokens.  The last block to finish makes prefix sums over the chunks, stores
// its Message and counts into mailbox[epoch parity][this rank] of every peer and then each Message's flag (release,
// system scope). It waits for the flags of all peers (acquire; bounded by the communicator's timeout and abort) and
// computes from their counts what the push kernel needs.  Only that one block waits, so a late peer costs one SM.
//   A peer's message of epoch n says that the peer has begun call n, so that all of its earlier calls have ended: rows
//   may
// now be written into its memory.  The other parity may not: a peer that has sent epoch n+1 may do so while this rank
// still reads epoch n.  Epoch n+2 cannot come before this rank has sent n+1, after it has read n.
#include <algorithm>

#include "device/primitives.cuh"

namespace moe {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxTogether = 4; // chunks that a block counts at a time
constexpr int kWords = kChunkTokens / 32;
constexpr size_t kPlainShared = 48 * 1024; // that a block has anywhere

__device__ __forceinline__ int bitsBelow(const uint32_t* words, int bit) {
  int n = 0;
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    if (w < bit / 32) n += __popc(words[w]);
    if (w == bit / 32) n += __popc(words[w] & ((1u << (bit % 32)) - 1));
  }
  return n;
}

// First bad index wins: reported once per call.
__device__ void reportIndex(const RouteArgs& a, int code, int token, int position, long long expert) {
  RoutingLayout::State* state = a.routing.state();
  if (atomicCAS(&state->badIndex, 0, 1) != 0) return;
  volatile RoutingOutcome* o = a.routing.outcome;
  o->token = token;
  o->position = position;
  o->expert = static_cast<int>(expert > INT32_MAX ? INT32_MAX : expert < INT32_MIN ? INT32_MIN : expert);
  __threadfence_system();
  o->code = code;
}

// Counts chunks [chunk, chunk + nChunks) and notes each selection's place within its chunk.
__device__ void countChunks(const RouteArgs& a, int chunk, int nChunks, int nTokens, uint32_t* bits) {
  constexpr int kBatch = 4; // loads of a thread in flight
  const CommView& c = a.comm;
  const RoutingLayout& layout = a.routing.layout;
  const int k = layout.topK;
  const int first = chunk * kChunkTokens;
  const int n = min(kChunkTokens * nChunks, nTokens - first);
  const int chunkWords = layout.nColumns * kWords;
  for (int w = threadIdx.x; w < nChunks * chunkWords; w += kThreads) bits[w] = 0;
  __syncthreads();
  Selection* selections =
    reinterpret_cast<Selection*>(a.routing.self + layout.selections) + static_cast<size_t>(first) * k;
  for (int s0 = threadIdx.x; s0 < n * k; s0 += kBatch * kThreads) {
    long long experts[kBatch];
    int positions[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int s = s0 + b * kThreads;
      const size_t at = static_cast<size_t>(first) * k + s;
      experts[b] = -1;
      if (s < n * k) {
        experts[b] = a.idx64 ? static_cast<const long long*>(a.topkIdx)[at] : static_cast<const int*>(a.topkIdx)[at];
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      positions[b] = experts[b] >= 0 && experts[b] < c.nExperts ? c.expertPosition[experts[b]] : -1;
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int s = s0 + b * kThreads;
      if (s >= n * k) break;
      const int token = s / k;
      int position = positions[b], rank = -1;
      if (position >= 0) {
        uint32_t* ofChunk = bits + token / kChunkTokens * chunkWords + token % kChunkTokens / 32;
        const uint32_t bit = 1u << (token % 32);
        if ((atomicOr(&ofChunk[position * kWords], bit) & bit) != 0) {
          reportIndex(a, kOutcomeIndexRepeated, first + token, s % k, experts[b]);
          position = -1;
        } else {
          rank = c.positionRank[position];
          atomicOr(&ofChunk[(c.nExperts + rank) * kWords], bit);
        }
      } else if (experts[b] != -1) {
        reportIndex(a, kOutcomeIndexRange, first + token, s % k, experts[b]);
      }
      selections[s].position = static_cast<int16_t>(position);
      selections[s].rank = static_cast<int16_t>(rank);
    }
  }
  __syncthreads();
  for (int s = threadIdx.x; s < n * k; s += kThreads) {
    const int position = selections[s].position; // this thread wrote it
    if (position < 0) continue;
    const int token = s / k;
    const uint32_t* ofChunk = bits + token / kChunkTokens * chunkWords;
    const int inChunk = token % kChunkTokens;
    selections[s].inExpert = static_cast<uint16_t>(bitsBelow(&ofChunk[position * kWords], inChunk));
    selections[s].inRank =
      static_cast<uint16_t>(bitsBelow(&ofChunk[(c.nExperts + selections[s].rank) * kWords], inChunk));
  }
  int* counts = a.routing.ints(layout.chunkBase) + static_cast<size_t>(chunk) * layout.nColumns;
  for (int col = threadIdx.x; col < nChunks * layout.nColumns; col += kThreads) {
    counts[col] = bitsBelow(&bits[col * kWords], kChunkTokens - 1) + (bits[col * kWords + kWords - 1] >> 31);
  }
}

// Turns the chunks' counts into exclusive prefix sums; the totals become row nChunks.  Threads share a column's chunks in equal
// segments: each adds up its own first and then starts from what came before.
__device__ void scanChunks(const RouteArgs& a, int nChunks, int* sums) {
  constexpr int kBatch = 16; // loads of a thread in flight
  const int nColumns = a.routing.layout.nColumns;
  int* counts = a.routing.ints(a.routing.layout.chunkBase);
  int* totals = counts + static_cast<size_t>(a.routing.layout.nChunks) * nColumns;
  const int nSegments = max(1, min(kThreads / nColumns, kWords));
  const int perSegment = (nChunks + nSegments - 1) / nSegments;
  for (int pass = nSegments == 1 ? 1 : 0; pass < 2; pass++) {
    for (int item = threadIdx.x; item < nColumns * nSegments; item += kThreads) {
      const int col = item % nColumns, segment = item / nColumns;
      const int begin = segment * perSegment, end = min(nChunks, begin + perSegment);
      int sum = 0;
      if (pass == 1) {
        for (int before = 0; before < segment; before++) sum += sums[before * nColumns + col];
      }
      for (int chunk = begin; chunk < end; chunk += kBatch) {
        int batch[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
          batch[b] = chunk + b < end ? __ldcg(&counts[static_cast<size_t>(chunk + b) * nColumns + col]) : 0;
        }
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
          if (pass == 1 && chunk + b < end) counts[static_cast<size_t>(chunk + b) * nColumns + col] = sum;
          sum += batch[b];
        }
      }
      if (pass == 0) sums[segment * nColumns + col] = sum;
      if (pass == 1 && segment == nSegments - 1) totals[col] = sum;
    }
    __syncthreads();
  }
}

__device__ bool exchange(const RouteArgs& a, uint32_t epoch) {
  const CommView& c = a.comm;
  const int nColumns = a.routing.layout.nColumns;
  const int* totals =
    a.routing.ints(a.routing.layout.chunkBase) + static_cast<size_t>(a.routing.layout.nChunks) * nColumns;
  const size_t mine = c.layout.mailboxOf(epoch & 1, c.rank);
  for (int r = 0; r < c.nRanks; r++) {
    char* box = c.peer(r) + mine;
    int* counts = reinterpret_cast<int*>(box + sizeof(Message));
    if (!a.keep) {
      for (int col = threadIdx.x; col < nColumns; col += kThreads) counts[col] = totals[col];
    }
    if (threadIdx.x == 0) {
      Message* m = reinterpret_cast<Message*>(box);
      m->capacity = a.capacity;
      m->recvWindow = a.recvWindow;
      m->recvOffset = a.recvOffset;
    }
  }
  __syncthreads(); // cumulative: the flags below release all threads' stores
  bool ok = true;
  if (threadIdx.x < c.nRanks) {
    const int r = threadIdx.x;
    const unsigned long long flag = static_cast<unsigned long long>(epoch) << 32 | a.signature;
    storeRelease(&reinterpret_cast<Message*>(c.peer(r) + mine)->flag, flag);
    const Message* theirs = reinterpret_cast<const Message*>(c.self + c.layout.mailboxOf(epoch & 1, r));
    unsigned long long seen = 0;
    ok = waitUntil(c, kPhaseExchange, r, epoch, [&] {
      seen = loadAcquire(&theirs->flag);
      return seen >> 32 == epoch;
    });
    if (ok && seen != flag) {
      recordFailure(c, kFailMismatch, kPhaseExchange, r, epoch, static_cast<uint32_t>(seen));
      ok = false;
    }
  }
  return __syncthreads_and(ok) != 0;
}

// From everybody's counts: slots, receive counts, group offsets.
__device__ void solve(const RouteArgs& a, uint32_t epoch, int* scratch) {
  const CommView& c = a.comm;
  const RoutingView& routing = a.routing;
  const int lane = threadIdx.x % 32;
  const auto countsOf = [&](int source) {
    return reinterpret_cast<const int*>(c.self + c.layout.mailboxOf(epoch & 1, source) + sizeof(Message));
  };
  int* expertBase = routing.ints(routing.layout.expertBase);
  int* expertTotal = routing.ints(routing.layout.expertTotal);
  int* expertOffset = routing.ints(routing.layout.expertOffset);
  for (int p = threadIdx.x; p < c.nExperts; p += kThreads) {
    int before = 0, total = 0;
#pragma unroll 4
    for (int s = 0; s < c.nRanks; s++) {
      const int n = __ldcg(&countsOf(s)[p]);
      before += s < c.rank ? n : 0;
      total += n;
    }
    expertBase[p] = before;
    scratch[p] = total;
  }
  RoutingLayout::PerRank* perRank = routing.perRank();
  if (threadIdx.x < c.nRanks) {
    const int r = threadIdx.x;
    int sendBase = 0, recvBase = 0, needed = 0;
#pragma unroll 4
    for (int s = 0; s < c.nRanks; s++) {
      const int toR = __ldcg(&countsOf(s)[c.nExperts + r]);
      sendBase += s < c.rank ? toR : 0;
      needed += toR;
      recvBase += s < r ? __ldcg(&countsOf(s)[c.nExperts + c.rank]) : 0;
    }
    perRank[r].sendRows = __ldcg(&countsOf(c.rank)[c.nExperts + r]);
    perRank[r].recvRows = __ldcg(&countsOf(r)[c.nExperts + c.rank]);
    perRank[r].sendBase = sendBase;
    perRank[r].recvBase = recvBase;
    if (routing.kind == ncclMoeLayoutRankMajor) perRank[r].needed = needed;
  }
  __syncthreads();
  if (routing.kind == ncclMoeLayoutRankMajor) {
    for (int p = c.rankStart[c.rank] + threadIdx.x; p < c.rankStart[c.rank + 1]; p += kThreads) {
      expertTotal[p - c.rankStart[c.rank]] = scratch[p];
    }
    return;
  }
  // One warp a rank: groups start one after the other, rounded up to the alignment, or each at its plane.
  const long long plane = static_cast<long long>(c.nRanks) * routing.layout.maxTokens;
  for (int r = threadIdx.x / 32; r < c.nRanks; r += kThreads / 32) {
    const int begin = c.rankStart[r], end = c.rankStart[r + 1];
    long long start = 0;
    for (int p0 = begin; p0 < end; p0 += 32) {
      const int p = p0 + lane;
      const int total = p < end ? scratch[p] : 0;
      int size = (total + routing.alignment - 1) / routing.alignment * routing.alignment;
      int sum = size;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
      }
      if (p < end) {
        const long long group = routing.kind == ncclMoeLayoutExpertPadded ? (p - begin) * plane : start + sum - size;
        expertBase[p] += static_cast<int>(group);
        if (r == c.rank) {
          expertTotal[p - begin] = total;
          expertOffset[p - begin] = static_cast<int>(group);
        }
      }
      start += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) {
      perRank[r].needed = start;
      if (r == c.rank) expertOffset[end - begin] = static_cast<int>(start);
    }
  }
}

// Decides whether everybody's buffers hold, and tells the caller the counts.
__device__ void conclude(const RouteArgs& a, uint32_t epoch) {
  const CommView& c = a.comm;
  const RoutingView& routing = a.routing;
  RoutingLayout::PerRank* perRank = routing.perRank();
  __syncthreads();
  bool fits = true;
  if (threadIdx.x < c.nRanks) {
    const int r = threadIdx.x;
    const Message* m = reinterpret_cast<const Message*>(c.self + c.layout.mailboxOf(epoch & 1, r));
    const volatile Message* vm = m;
    const int window = vm->recvWindow;
    perRank[r].recvX = window < 0 ? nullptr : c.windows[window * c.nRanks + r] + vm->recvOffset;
    fits = routing.kind == ncclMoeLayoutExpertPadded || perRank[r].needed <= vm->capacity;
  }
  const int nLocal = c.rankStart[c.rank + 1] - c.rankStart[c.rank];
  const int* expertTotal = routing.ints(routing.layout.expertTotal);
  const int* expertOffset = routing.ints(routing.layout.expertOffset);
  int* hostCounts = reinterpret_cast<int*>(routing.outcome + 1);
  for (int l = threadIdx.x; l < nLocal; l += kThreads) {
    if (a.expertCounts != nullptr) a.expertCounts[l] = expertTotal[l];
    hostCounts[l] = expertTotal[l];
  }
  if (a.expertOffsets != nullptr) {
    for (int l = threadIdx.x; l <= nLocal; l += kThreads) a.expertOffsets[l] = expertOffset[l];
  }
  const bool go = __syncthreads_and(fits) != 0;
  if (threadIdx.x != 0) return;
  long long nRows = perRank[c.rank].needed;
  if (a.recvCount != nullptr) *a.recvCount = static_cast<int>(nRows);
  routing.state()->go = go ? 1 : 0;
  volatile RoutingOutcome* o = routing.outcome;
  o->nRows = nRows;
  if (go) {
    if (routing.state()->badIndex == 0) o->code = kOutcomeOk;
    return;
  }
  for (int r = 0; r < c.nRanks; r++) {
    const volatile Message* m = reinterpret_cast<const volatile Message*>(c.self + c.layout.mailboxOf(epoch & 1, r));
    if (perRank[r].needed <= m->capacity) continue;
    o->rank = r;
    o->needed = perRank[r].needed;
    o->capacity = m->capacity;
    break;
  }
  __threadfence_system();
  o->code = kOutcomeCapacity;
}

__global__ void __launch_bounds__(kThreads) routeKernel(const __grid_constant__ RouteArgs a) {
  extern __shared__ uint32_t bits[];
  Control* ctl = control(a.comm);
  RoutingLayout::State* state = a.routing.state();
  int nTokens = a.nTokens;
  if (a.nTokensDev != nullptr) nTokens = max(0, min(nTokens, *a.nTokensDev));
  const int nChunks = (nTokens + kChunkTokens - 1) / kChunkTokens;
  if (!a.keep) {
    for (int chunk = blockIdx.x * a.nTogether; chunk < nChunks; chunk += gridDim.x * a.nTogether) {
      __syncthreads();
      countChunks(a, chunk, min(a.nTogether, nChunks - chunk), nTokens, bits);
    }
  }
  if (!lastBlock(ctl)) return;
  const uint32_t epoch = nextEpoch(ctl->epoch);
  if (!a.keep) {
    scanChunks(a, nChunks, reinterpret_cast<int*>(bits));
    if (threadIdx.x == 0) state->nTokens = nTokens;
  }
  const bool ok = ctl->failed == 0 && exchange(a, epoch);
  if (ok) {
    if (!a.keep) solve(a, epoch, reinterpret_cast<int*>(bits));
    conclude(a, epoch);
  } else if (threadIdx.x == 0) {
    state->go = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ctl->epoch = epoch;
    if (!a.keep) state->badIndex = 0;
  }
}

} // namespace

namespace {
size_t bitsOfChunk(const RoutingLayout& layout) { return sizeof(uint32_t) * kWords * layout.nColumns; }
} // namespace

size_t routeSharedNeeded(int nRanks, int nExperts) {
  return bitsOfChunk(RoutingLayout(nRanks, nExperts, 0, 1)) + 1024; // the runtime's own
}

cudaError_t prepareRoute(size_t sharedBytes) {
  const size_t most = std::min(routeSharedNeeded(kMaxDeviceRanks, kMaxDeviceExperts), sharedBytes) - 1024;
  return cudaFuncSetAttribute(routeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
}

cudaError_t launchRoute(RouteArgs args, int numSms, cudaStream_t stream) {
  const size_t perChunk = bitsOfChunk(args.routing.layout);
  const int nChunks = args.keep ? 0 : (args.nTokens + kChunkTokens - 1) / kChunkTokens;
  const int each = (nChunks + numSms - 1) / numSms;
  args.nTogether = std::max(1, std::min({each, kMaxTogether, static_cast<int>(kPlainShared / perChunk)}));
  const int nBlocks = std::max(1, std::min(numSms, (nChunks + args.nTogether - 1) / args.nTogether));
  return launchKernel<RouteArgs>(routeKernel, nBlocks, kThreads, args.nTogether * perChunk, stream, args);
}

} // namespace moe
