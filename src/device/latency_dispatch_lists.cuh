// What a block of latency mode's dispatch learns of the arriving rows: who sends what, whether it fits, where it goes.
#pragma once

#include "device/latency_dispatch_send.cuh"

namespace moe {

constexpr int kDispatchThreads = 512; // what leaves the registers that each needs
static_assert(kDispatchThreads / 32 <= kMaxLatencyWarps, "claims");

// What a block knows of the arriving rows, in shared memory.
struct Lists {
  uint32_t* bits;     // [nLocal + 1][words]: tokens (source * maxTokens + t) of each local expert, then of any
  int* totals;        // [nLocal] rows of each expert
  int* offsets;       // [nLocal + 1] first row of each group
  int* nTokens;       // [R]
  int* weighted;      // [R] the source sends weights
  uint32_t* capacity; // [R]
  int* needed;        // [R] rows that it receives; known only where a buffer might be too small
  int* counts;        // [nExperts + R] likewise
  int words;

  __device__ __forceinline__ Lists(const LatencyView& v, uint32_t* at) : words(v.layout.words()) {
    const int r = v.comm.nRanks;
    bits = at, at += (v.nLocal + 1) * words;
    totals = reinterpret_cast<int*>(at), at += v.nLocal;
    offsets = reinterpret_cast<int*>(at), at += v.nLocal + 1;
    nTokens = reinterpret_cast<int*>(at), at += r;
    weighted = reinterpret_cast<int*>(at), at += r;
    capacity = at, at += r;
    needed = reinterpret_cast<int*>(at), at += r;
    counts = reinterpret_cast<int*>(at);
  }
  __device__ __forceinline__ uint32_t* any(const LatencyView& v) const { return bits + v.nLocal * words; }
  // How many tokens before this one have plane l's bit; by a whole warp.
  __device__ __forceinline__ int before(int l, int token) const {
    int n = 0;
#pragma unroll 1
    for (int w = threadIdx.x & 31; w <= token / 32; w += 32) {
      const uint32_t word = bits[l * words + w];
      n += __popc(w == token / 32 ? word & ((1u << (token % 32)) - 1) : word);
    }
    return __reduce_add_sync(~0u, n);
  }
  __device__ __forceinline__ int all(int l) const {
    int n = 0;
#pragma unroll 1
    for (int w = threadIdx.x & 31; w < words; w += 32) n += __popc(bits[l * words + w]);
    return __reduce_add_sync(~0u, n);
  }
};

// Marks one token's picks.
__device__ __forceinline__ void mark(const LatencyView& v, const Lists& lists, const uint4& packet, int row,
                                     int first) {
  const uint32_t bit = 1u << (row % 32);
  bool here = false;
#pragma unroll
  for (int i = 0; i < kPicksPerPacket; i++) {
    const int local = pickOf(packet, i) - first;
    if (local >= 0 && local < v.nLocal) {
      atomicOr(&lists.bits[local * lists.words + row / 32], bit);
      here = true;
    }
  }
  if (here) atomicOr(&lists.any(v)[row / 32], bit);
}

// Headers and picks of all ranks, as far as this thread looks at them.
__device__ __forceinline__ Progress gather(const LatencyDispatchArgs& a, const Call& call, unsigned long long masked,
                                           unsigned buffer, const Lists& lists, bool mayStall) {
  const LatencyView& v = a.view;
  const LatencyState* state = stateOf(v);
  const int nRanks = v.comm.nRanks, perToken = v.layout.pickPackets, perRank = v.layout.maxTokens * perToken;
  const int first = v.firstPosition;
  if (threadIdx.x < nRanks) {
    const int r = threadIdx.x;
    uint4 header = make_uint4(0, 0, ~0u, 0); // of a masked rank
    if ((masked >> r & 1) == 0) {
      const Progress progress = blockIdx.x == 0 ? awaitAndCount(v, call, r, a.signature, mayStall, &header)
                                                : awaitHeader(v, call, r, a.signature, mayStall, &header);
      if (progress != Progress::done) return progress;
    }
    lists.nTokens[r] = a.keep ? state->nTokens[r] : static_cast<int>(header.x & ~kWeightedBit);
    lists.weighted[r] = (header.x & kWeightedBit) != 0 ? 1 : 0;
    lists.capacity[r] = header.z;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < nRanks * perRank; i += kDispatchThreads) {
    const int source = i / perRank, t = i % perRank / perToken;
    if ((masked >> source & 1) != 0) continue;
    const uint4* at = packets(own(v), v.layout.pick(buffer, source, t)) + i % perToken;
    uint4 packet;
    bool exists = true;
    if (a.keep) {
      exists = t < state->nTokens[source];
      if (exists) packet = loadPacket(at);
    } else {
      const uint4* head = packets(own(v), v.layout.header(call.parity, source));
      const Progress progress = await(v.comm, kPhaseHeader, source, call.tag, mayStall, [&] {
        packet = loadPacket(at);
        if (packet.w == call.tag) return true;
        const uint4 header = loadPacket(head);
        exists = header.w != call.tag || t < static_cast<int>(header.x & ~kWeightedBit);
        return !exists;
      });
      if (progress != Progress::done) return progress;
    }
    if (exists) mark(v, lists, packet, source * v.layout.maxTokens + t, first);
  }
  return Progress::done;
}

// Whether every rank's buffer holds what it receives.  By a whole block, the same answer in all threads.
__device__ __forceinline__ bool fits(const LatencyDispatchArgs& a, unsigned buffer, const Lists& lists) {
  const LatencyView& v = a.view;
  if (v.kind == ncclMoeLayoutExpertPadded) return true;
  const bool rankMajor = v.kind == ncclMoeLayoutRankMajor;
  const int nRanks = v.comm.nRanks, k = v.layout.topK;
  bool enough = true;
  if (threadIdx.x < nRanks) {
    long long most = 0;
#pragma unroll 1
    for (int s = 0; s < nRanks; s++) most += lists.nTokens[s];
    if (!rankMajor) {
      const int experts = v.comm.rankStart[threadIdx.x + 1] - v.comm.rankStart[threadIdx.x];
      most = most * min(k, experts) + static_cast<long long>(experts) * (v.alignment - 1);
    }
    enough = most <= lists.capacity[threadIdx.x];
  }
  if (__builtin_expect(__syncthreads_and(enough) != 0, 1)) return true;
    // It might be too small: everything is counted.
#pragma unroll 1
  for (int i = threadIdx.x; i < v.comm.nExperts + nRanks; i += kDispatchThreads) lists.counts[i] = 0;
  __syncthreads();
  const int perToken = v.layout.pickPackets;
#pragma unroll 1
  for (int i = threadIdx.x; i < nRanks * v.layout.maxTokens; i += kDispatchThreads) {
    const int source = i / v.layout.maxTokens, t = i % v.layout.maxTokens;
    if (t >= lists.nTokens[source]) continue;
    unsigned long long ranks = 0;
#pragma unroll 1
    for (int p = 0; p < perToken; p++) {
      const uint4 packet = loadPacket(packets(own(v), v.layout.pick(buffer, source, t)) + p);
#pragma unroll
      for (int n = 0; n < kPicksPerPacket; n++) {
        const int pick = pickOf(packet, n);
        if (pick == kNoPick) continue;
        if (rankMajor) {
          ranks |= 1ull << v.comm.positionRank[pick];
        } else {
          atomicAdd(&lists.counts[pick], 1);
        }
      }
    }
#pragma unroll 1
    for (; ranks != 0; ranks &= ranks - 1) {
      atomicAdd(&lists.counts[v.comm.nExperts + __ffsll(static_cast<long long>(ranks)) - 1], 1);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < nRanks; r += kDispatchThreads / 32) {
    int needed = lists.counts[v.comm.nExperts + r];
    if (!rankMajor) {
      needed = 0;
#pragma unroll 1
      for (int p = v.comm.rankStart[r] + (threadIdx.x & 31); p < v.comm.rankStart[r + 1]; p += 32) {
        needed += (lists.counts[p] + v.alignment - 1) / v.alignment * v.alignment;
      }
      needed = __reduce_add_sync(~0u, needed);
    }
    if ((threadIdx.x & 31) == 0) lists.needed[r] = needed;
  }
  __syncthreads();
  enough = threadIdx.x >= nRanks || static_cast<uint32_t>(lists.needed[threadIdx.x]) <= lists.capacity[threadIdx.x];
  return __syncthreads_and(enough) != 0;
}

// Rows of every expert and, from them, where the groups start.  By a whole block; ends in a barrier.
__device__ __forceinline__ void measure(const LatencyView& v, const Lists& lists) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int l = warp; l < v.nLocal; l += kDispatchThreads / 32) {
    const int n = lists.all(l);
    if (lane == 0) lists.totals[l] = n;
  }
  __syncthreads();
  if (v.kind == ncclMoeLayoutExpertMajor && warp == 0) {
    int start = 0;
#pragma unroll 1
    for (int l0 = 0; l0 < v.nLocal; l0 += 32) {
      const int n = l0 + lane < v.nLocal ? (lists.totals[l0 + lane] + v.alignment - 1) / v.alignment * v.alignment : 0;
      int upTo = n;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, upTo, d);
        if (lane >= d) upTo += other;
      }
      if (l0 + lane < v.nLocal) lists.offsets[l0 + lane] = start + upTo - n;
      start += __shfl_sync(~0u, upTo, 31);
    }
    if (lane == 0) lists.offsets[v.nLocal] = start;
  }
  __syncthreads();
}

// Tells the caller the counts, and later calls of the routing what they need.  By one block.
__device__ __forceinline__ void publish(const LatencyDispatchArgs& a, const Call& call, const Lists& lists, bool go) {
  __shared__ int nRows;
  const LatencyView& v = a.view;
  LatencyState* state = stateOf(v);
  if (threadIdx.x < 32) {
    int n = 0;
    if (v.kind == ncclMoeLayoutRankMajor) {
      n = lists.all(v.nLocal);
    } else if (v.kind == ncclMoeLayoutExpertMajor) {
      n = lists.offsets[v.nLocal];
    } else {
#pragma unroll 1
      for (int l = threadIdx.x; l < v.nLocal; l += 32) n += lists.totals[l];
      n = __reduce_add_sync(~0u, n);
    }
    if (threadIdx.x == 0) nRows = n;
  }
  unsigned long long* expertTokens = v.comm.shared->expertTokens();
  int* hostCounts = reinterpret_cast<int*>(v.outcome + 1);
#pragma unroll 1
  for (int l = threadIdx.x; l < v.nLocal; l += kDispatchThreads) {
    const int n = lists.totals[l];
    if (a.expertCounts != nullptr) a.expertCounts[l] = n;
    if (v.hostCounts) hostCounts[l] = n;
    if (go && n > 0) atomicAdd(&expertTokens[l], static_cast<unsigned long long>(n));
  }
  if (a.expertOffsets != nullptr) {
#pragma unroll 1
    for (int l = threadIdx.x; l <= v.nLocal; l += kDispatchThreads) a.expertOffsets[l] = lists.offsets[l];
  }
  if (threadIdx.x < v.comm.nRanks) state->nTokens[threadIdx.x] = lists.nTokens[threadIdx.x];
  // Tokens without a row here are none of combine's.
  const uint32_t* any = lists.any(v);
#pragma unroll 1
  for (int i = threadIdx.x; i < v.comm.nRanks * v.layout.maxTokens * v.layout.topK; i += kDispatchThreads) {
    const int token = i / v.layout.topK;
    if ((any[token / 32] >> (token % 32) & 1) == 0) reinterpret_cast<int*>(own(v) + v.layout.map)[i] = -1;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (a.recvCount != nullptr) *a.recvCount = nRows;
  state->go = go ? 1 : 0;
  volatile RoutingOutcome* o = v.outcome;
  if (v.hostCounts || !go || state->reported != 0) o->nRows = nRows;
  const bool bad = *reinterpret_cast<volatile unsigned long long*>(&state->badCall) == call.number + 1;
  if (go && !bad && state->reported != 0) o->code = kOutcomeOk;
  state->reported = go && !bad ? 0 : 1;
  if (go) return;
  int r = 0;
#pragma unroll 1
  while (static_cast<uint32_t>(lists.needed[r]) <= lists.capacity[r]) r++;
  o->rank = r;
  o->needed = lists.needed[r];
  o->capacity = lists.capacity[r];
  __threadfence_system();
  o->code = kOutcomeCapacity;
}

} // namespace moe
