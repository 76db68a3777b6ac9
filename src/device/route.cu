// The route kernel: first half of a dispatch.  It counts this rank's rows per expert and per rank, tells every peer the
// counts and where rows shall go, and works out every slot.
//
// Protocol.  Each block counts some chunks of tokens.  The last block to finish adds the chunks up and stores, into
// mailbox[epoch parity][this rank] of every peer, packets that carry the epoch: where its rows shall go, and its
// counts.  While they travel it makes prefix sums over the chunks.  Then it polls the packets of all peers themselves,
// with neither flags nor fences (bounded by the communicator's timeout and abort), and computes from the counts what
// the push kernel needs.  Only that one block waits, so a late peer costs one SM.
//   A peer's packets of epoch n say that the peer has begun call n, so that all of its earlier calls have ended: rows
// may now be written into its memory.  (Their loads are relaxed: this rests on the kernels' boundaries, at which a
// kernel's accesses to its own memory have been performed, and on the boundary behind this kernel.)  The other parity
// may not: a peer that has sent epoch n+1 may do so while this rank still reads epoch n.  Epoch n+2 cannot come before
// this rank has sent n+1, after it has read n.
#include <algorithm>

#include "device/primitives.cuh"

namespace moe {
namespace {

constexpr int kThreads = 1024;
constexpr int kMaxTogether = 4; // chunks that a block counts at a time
constexpr int kWords = kChunkTokens / 32;
constexpr size_t kStaticShared = 4096;                     // the kernel's own and the runtime's
constexpr size_t kPlainShared = 48 * 1024 - kStaticShared; // that a block has anywhere for the rest

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
  storeIndexOutcome(a.routing.outcome, code, token, position, expert);
}

// Counts chunks [chunk, chunk + nChunks) and notes each selection's place within its chunk.
__device__ void countChunks(const RouteArgs& a, int chunk, int nChunks, int nTokens, uint32_t* bits) {
  constexpr int kBatch = 2; // loads of a thread in flight
  constexpr uint32_t kNoHome = ~0u;
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
    uint32_t homes[kBatch];
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
      homes[b] = experts[b] >= 0 && experts[b] < c.nExperts ? c.homes[experts[b]] : kNoHome;
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int s = s0 + b * kThreads;
      if (s >= n * k) break;
      const int token = s / k;
      int position = -1, rank = -1;
      if (homes[b] != kNoHome) {
        position = static_cast<int>(homes[b] & 0xffff);
        uint32_t* ofChunk = bits + token / kChunkTokens * chunkWords + token % kChunkTokens / 32;
        const uint32_t bit = 1u << (token % 32);
        if ((atomicOr(&ofChunk[position * kWords], bit) & bit) != 0) {
          reportIndex(a, kOutcomeIndexRepeated, first + token, s % k, experts[b]);
          position = -1;
        } else {
          rank = static_cast<int>(homes[b] >> 16);
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

// What the last block keeps in shared memory.
struct Scratch {
  int nSegments;  // threads share a column's chunks in so many segments
  int perSegment; // chunks
  int* sums;      // [nSegments][nColumns], later [nExperts]: rows of each expert
  int* totals;    // [nColumns] of this rank
  int* toRank;    // [R][R]: rows from one rank to another

  __device__ __forceinline__ Scratch(uint32_t* shared, int nColumns, int nChunks)
    : nSegments(max(1, min(kThreads / nColumns, kWords - 1))), perSegment((nChunks + nSegments - 1) / nSegments),
      sums(reinterpret_cast<int*>(shared)), totals(sums + (kWords - 1) * nColumns), toRank(totals + nColumns) {}
};
constexpr int kChunksAtATime = 16; // loads of a thread in flight

// Adds up the chunks' counts.
__device__ void addChunks(const RouteArgs& a, int nChunks, const Scratch& s) {
  const int nColumns = a.routing.layout.nColumns;
  const int* counts = a.routing.ints(a.routing.layout.chunkBase);
  for (int item = threadIdx.x; item < nColumns * s.nSegments; item += kThreads) {
    const int col = item % nColumns, begin = item / nColumns * s.perSegment, end = min(nChunks, begin + s.perSegment);
    int sum = 0;
    for (int chunk = begin; chunk < end; chunk += kChunksAtATime) {
#pragma unroll
      for (int b = 0; b < kChunksAtATime; b++) {
        sum += chunk + b < end ? __ldcg(&counts[static_cast<size_t>(chunk + b) * nColumns + col]) : 0;
      }
    }
    s.sums[item] = sum;
  }
  __syncthreads();
  for (int col = threadIdx.x; col < nColumns; col += kThreads) {
    int total = 0;
    for (int segment = 0; segment < s.nSegments; segment++) total += s.sums[segment * nColumns + col];
    s.totals[col] = total;
  }
  __syncthreads();
}

// Turns the chunks' counts into exclusive prefix sums.
__device__ void scanChunks(const RouteArgs& a, int nChunks, const Scratch& s) {
  const int nColumns = a.routing.layout.nColumns;
  int* counts = a.routing.ints(a.routing.layout.chunkBase);
  for (int item = threadIdx.x; item < nColumns * s.nSegments; item += kThreads) {
    const int col = item % nColumns, begin = item / nColumns * s.perSegment, end = min(nChunks, begin + s.perSegment);
    int sum = 0;
    for (int before = col; before < item; before += nColumns) sum += s.sums[before];
    for (int chunk = begin; chunk < end; chunk += kChunksAtATime) {
      int batch[kChunksAtATime];
#pragma unroll
      for (int b = 0; b < kChunksAtATime; b++) {
        batch[b] = chunk + b < end ? __ldcg(&counts[static_cast<size_t>(chunk + b) * nColumns + col]) : 0;
      }
#pragma unroll
      for (int b = 0; b < kChunksAtATime; b++) {
        if (chunk + b < end) counts[static_cast<size_t>(chunk + b) * nColumns + col] = sum;
        sum += batch[b];
      }
    }
  }
}

__device__ __forceinline__ uint4* packetOf(char* window, const RouteArgs& a, uint32_t epoch, int source, int i) {
  return reinterpret_cast<uint4*>(window + a.comm.layout.mailboxOf(epoch & 1, source)) + i;
}

// Tells every rank where its rows shall go here, and how many come from here.
__device__ void sendMessage(const RouteArgs& a, uint32_t epoch, char* const* peers, const Scratch& s) {
  const CommView& c = a.comm;
  const int nColumns = a.routing.layout.nColumns;
  const int nPackets = kMessageHeaders + (a.keep ? 0 : countPackets(nColumns));
  for (int i = threadIdx.x; i < nPackets; i += kThreads) {
    uint4 packet;
    if (i < kMessageHeaders) {
      const unsigned long long value = static_cast<unsigned long long>(i == 0 ? a.capacity : a.recvOffset);
      packet = make_uint4(static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32),
                          i == 0 ? a.signature : static_cast<uint32_t>(a.recvWindow), epoch);
    } else {
      const int col = (i - kMessageHeaders) * kCountsPerPacket;
      const auto count = [&](int n) { return n < nColumns ? static_cast<uint32_t>(s.totals[n]) : 0u; };
      packet = make_uint4(count(col), count(col + 1), count(col + 2), epoch);
    }
    for (int r = 0; r < c.nRanks; r++) storePacket(packetOf(peers[r], a, epoch, c.rank, i), packet);
  }
}

// A packet of source's message.  False: a wait has failed.
__device__ __forceinline__ bool awaitPacket(const RouteArgs& a, uint32_t epoch, int source, int i, uint4* packet) {
  const uint4* at = packetOf(a.comm.self, a, epoch, source, i);
  return waitUntil(a.comm, kPhaseExchange, source, epoch, [&] {
    *packet = loadPacket(at);
    return packet->w == epoch;
  });
}

// The ranks' receive buffers, and how long this rank waited for each.  By threads from the last one down, for the first
// ones wait for counts meanwhile.
__device__ bool receiveHeaders(const RouteArgs& a, uint32_t epoch, long long* capacity) {
  const CommView& c = a.comm;
  RoutingLayout::PerRank* perRank = a.routing.perRank();
  const int i = kThreads - 1 - static_cast<int>(threadIdx.x), r = i / kMessageHeaders;
  if (r >= c.nRanks) return true;
  uint4 packet;
  const uint64_t start = globalTimerNs();
  const bool there = awaitPacket(a, epoch, r, i % kMessageHeaders, &packet);
  if (i % kMessageHeaders == 0) countWait(c, r, start);
  if (!there) return false;
  const long long value = static_cast<long long>(static_cast<unsigned long long>(packet.y) << 32 | packet.x);
  if (i % kMessageHeaders == 0) {
    capacity[r] = value;
    if (packet.z == a.signature) return true;
    recordFailure(c, kFailMismatch, kPhaseExchange, r, epoch, packet.z);
    return false;
  }
  const int window = static_cast<int>(packet.z);
  perRank[r].recvX = window < 0 ? nullptr : c.windows[window * c.nRanks + r] + value;
  return true;
}

// Everybody's counts: what comes before this rank's rows of each expert, and the sums.
__device__ bool receiveCounts(const RouteArgs& a, uint32_t epoch, const Scratch& s) {
  constexpr int kAtATime = 4; // packets of a thread in flight
  const CommView& c = a.comm;
  const int nColumns = a.routing.layout.nColumns;
  int* expertBase = a.routing.ints(a.routing.layout.expertBase);
  for (int i = threadIdx.x; i < countPackets(nColumns); i += kThreads) {
    int before[kCountsPerPacket] = {}, total[kCountsPerPacket] = {};
    for (int s0 = 0; s0 < c.nRanks; s0 += kAtATime) {
      uint4 packets[kAtATime] = {};
#pragma unroll
      for (int n = 0; n < kAtATime; n++) {
        if (s0 + n < c.nRanks) packets[n] = loadPacket(packetOf(c.self, a, epoch, s0 + n, kMessageHeaders + i));
      }
#pragma unroll
      for (int n = 0; n < kAtATime; n++) {
        const int source = s0 + n;
        if (source >= c.nRanks) continue;
        if (packets[n].w != epoch && !awaitPacket(a, epoch, source, kMessageHeaders + i, &packets[n])) return false;
#pragma unroll
        for (int j = 0; j < kCountsPerPacket; j++) {
          const int count = static_cast<int>(word(packets[n], j)), rank = i * kCountsPerPacket + j - c.nExperts;
          before[j] += source < c.rank ? count : 0;
          total[j] += count;
          if (rank >= 0 && rank < c.nRanks) s.toRank[source * c.nRanks + rank] = count;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kCountsPerPacket; j++) {
      const int p = i * kCountsPerPacket + j;
      if (p >= c.nExperts) continue;
      expertBase[p] = before[j];
      s.sums[p] = total[j];
    }
  }
  return true;
}

// From everybody's counts: slots, receive counts, group offsets.
__device__ void solve(const RouteArgs& a, const Scratch& s) {
  const CommView& c = a.comm;
  const RoutingView& routing = a.routing;
  const int lane = threadIdx.x % 32;
  int* expertBase = routing.ints(routing.layout.expertBase);
  int* expertTotal = routing.ints(routing.layout.expertTotal);
  int* expertOffset = routing.ints(routing.layout.expertOffset);
  RoutingLayout::PerRank* perRank = routing.perRank();
  if (threadIdx.x < c.nRanks) {
    const int r = threadIdx.x;
    int sendBase = 0, recvBase = 0, needed = 0;
    for (int source = 0; source < c.nRanks; source++) {
      const int toR = s.toRank[source * c.nRanks + r];
      sendBase += source < c.rank ? toR : 0;
      needed += toR;
      recvBase += source < r ? s.toRank[source * c.nRanks + c.rank] : 0;
    }
    perRank[r].sendRows = s.toRank[c.rank * c.nRanks + r];
    perRank[r].recvRows = s.toRank[r * c.nRanks + c.rank];
    perRank[r].sendBase = sendBase;
    perRank[r].recvBase = recvBase;
    if (routing.kind == ncclMoeLayoutRankMajor) perRank[r].needed = needed;
  }
  const int firstOwn = c.rankStart[c.rank], endOwn = c.rankStart[c.rank + 1];
  if (routing.kind == ncclMoeLayoutRankMajor) {
    for (int p = firstOwn + static_cast<int>(threadIdx.x); p < endOwn; p += kThreads)
      expertTotal[p - firstOwn] = s.sums[p];
    return;
  }
  // One warp a rank: groups start one after the other, rounded up to the alignment, or each at its plane.
  const long long plane = static_cast<long long>(c.nRanks) * routing.layout.maxTokens;
  for (int r = threadIdx.x / 32; r < c.nRanks; r += kThreads / 32) {
    const int begin = c.rankStart[r], end = c.rankStart[r + 1];
    long long start = 0;
    for (int p0 = begin; p0 < end; p0 += 32) {
      const int p = p0 + lane;
      const int total = p < end ? s.sums[p] : 0;
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
__device__ void conclude(const RouteArgs& a, const long long* capacity) {
  const CommView& c = a.comm;
  const RoutingView& routing = a.routing;
  const RoutingLayout::PerRank* perRank = routing.perRank();
  const int r = threadIdx.x;
  const bool fits = r >= c.nRanks || routing.kind == ncclMoeLayoutExpertPadded || perRank[r].needed <= capacity[r];
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
  if (go) {
    unsigned long long* expertTokens = c.shared->expertTokens();
    for (int l = threadIdx.x; l < nLocal; l += kThreads) {
      atomicAdd(&expertTokens[l], static_cast<unsigned long long>(expertTotal[l])); // nobody waits for it
    }
  }
  if (threadIdx.x != 0) return;
  const long long nRows = perRank[c.rank].needed;
  if (a.recvCount != nullptr) *a.recvCount = static_cast<int>(nRows);
  routing.state()->go = go ? 1 : 0;
  volatile RoutingOutcome* o = routing.outcome;
  o->nRows = nRows;
  if (go) {
    if (routing.state()->badIndex == 0) o->code = kOutcomeOk;
    return;
  }
  int full = 0;
  while (perRank[full].needed <= capacity[full]) full++;
  o->rank = full;
  o->needed = perRank[full].needed;
  o->capacity = capacity[full];
  __threadfence_system();
  o->code = kOutcomeCapacity;
}

__global__ void __launch_bounds__(kThreads) routeKernel(const __grid_constant__ RouteArgs a) {
  extern __shared__ uint32_t bits[];
  __shared__ char* peers[kMaxDeviceRanks];
  __shared__ long long capacity[kMaxDeviceRanks];
  const CommView& c = a.comm;
  Control* ctl = control(c);
  RoutingLayout::State* state = a.routing.state();
  if (threadIdx.x < c.nRanks) peers[threadIdx.x] = c.peer(threadIdx.x);
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
  const Scratch scratch(bits, a.routing.layout.nColumns, nChunks);
  bool ok = ctl->failed == 0; // a rank that has failed says nothing more
  if (!a.keep) addChunks(a, nChunks, scratch);
  if (ok) sendMessage(a, epoch, peers, scratch);
  if (!a.keep) {
    scanChunks(a, nChunks, scratch);
    if (threadIdx.x == 0) state->nTokens = nTokens;
    __syncthreads(); // the sums are read
  }
  // The headers come first: with thousands of experts their threads wait for counts too, and that wait is not timed.
  ok = ok && receiveHeaders(a, epoch, capacity);
  ok = ok && (a.keep || receiveCounts(a, epoch, scratch));
  ok = __syncthreads_and(ok) != 0;
  admitKernelBehind(); // not before: its blocks would wait on their SMs for a late peer
  if (ok) {
    if (!a.keep) {
      solve(a, scratch);
      __syncthreads();
    }
    conclude(a, capacity);
  } else if (threadIdx.x == 0) {
    state->go = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ctl->epoch = epoch;
    if (!a.keep) state->badIndex = 0;
  }
}

size_t bitsOfChunk(const RoutingLayout& layout) { return sizeof(uint32_t) * kWords * layout.nColumns; }
// What the last block needs fits where there are the bits of a chunk, but for the rows between ranks.
size_t routeShared(const RoutingLayout& layout, int nTogether) {
  return std::max(nTogether * bitsOfChunk(layout), bitsOfChunk(layout) + sizeof(int) * layout.nRanks * layout.nRanks);
}

} // namespace

size_t routeSharedNeeded(int nRanks, int nExperts) {
  return routeShared(RoutingLayout(nRanks, nExperts, 0, 1), 1) + kStaticShared;
}

cudaError_t prepareRoute(size_t sharedBytes) {
  const size_t most = std::min(routeSharedNeeded(kMaxDeviceRanks, kMaxDeviceExperts), sharedBytes) - kStaticShared;
  return cudaFuncSetAttribute(routeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
}

cudaError_t launchRoute(RouteArgs args, int numSms, cudaStream_t stream) {
  const size_t perChunk = bitsOfChunk(args.routing.layout);
  const int nChunks = args.keep ? 0 : (args.nTokens + kChunkTokens - 1) / kChunkTokens;
  const int each = (nChunks + numSms - 1) / numSms;
  args.nTogether = std::max(1, std::min({each, kMaxTogether, static_cast<int>(kPlainShared / perChunk)}));
  const int nBlocks = std::max(1, std::min(numSms, (nChunks + args.nTogether - 1) / args.nTogether));
  return launchKernel<RouteArgs>(routeKernel, nBlocks, kThreads, routeShared(args.routing.layout, args.nTogether),
                                 stream, args);
}

} // namespace moe
