// What a block of latency mode's dispatch learns of the arriving rows: who sends what, whether it fits, where it goes.
#pragma once

#include "device/latency_dispatch_send.cuh"

namespace moe {

constexpr int kDispatchThreads = 512; // what leaves the registers that each needs
static_assert(kDispatchThreads / 32 <= kMaxLatencyWarps, "claims");

// A thread's place among those that gather: the last warps come first, for where there are few blocks the
// first ones have rows to send.
__device__ __forceinline__ int gatherer() { return kDispatchThreads - 1 - static_cast<int>(threadIdx.x); }

// What a block knows of the arriving rows, in shared memory: latencyListBytes (comm/limits.h) of it.
struct Lists {
  // [nLocal + 1][R * words + R] for each local expert, then for any: a bit for each token of each rank, and each rank's
  // count of them.
  uint32_t* lists;
  int* offsets;       // [nLocal + 1] first row of each group
  int* nTokens;       // [R]
  int* weighted;      // [R] the source sends weights
  uint32_t* capacity; // [R]
  int* nExperts;      // [R] EXPERT_MAJOR: of each rank
  int* needed;        // [R] rows that it receives; known only where a buffer might be too small
  int* demand;        // [nExperts + R] likewise: tokens of every expert, or of every rank
  int nRanks, words;

  __device__ __forceinline__ Lists(const LatencyView& v, uint32_t* at)
    : nRanks(v.comm.nRanks), words(v.layout.words()) {
    const auto ints = [&](int n) {
      uint32_t* from = at;
      at += n;
      return reinterpret_cast<int*>(from);
    };
    nTokens = ints(nRanks);
    weighted = ints(nRanks);
    lists = reinterpret_cast<uint32_t*>(ints((v.nLocal + 1) * stride()));
    capacity = reinterpret_cast<uint32_t*>(ints(nRanks));
    offsets = ints(v.nLocal + 1);
    nExperts = ints(nRanks);
    needed = ints(nRanks);
    demand = ints(v.comm.nExperts + nRanks);
  }

  __device__ __forceinline__ int stride() const { return nRanks * (words + 1); }
  __device__ __forceinline__ uint32_t* bits(int l, int source) const { return lists + l * stride() + source * words; }
  __device__ __forceinline__ uint32_t* count(int l, int source) const {
    return lists + l * stride() + nRanks * words + source;
  }
  __device__ __forceinline__ bool has(int l, int source, int t) const {
    return (bits(l, source)[t / 32] >> (t % 32) & 1) != 0;
  }
  // How many tokens in the order (source, token) come before this one in list l.
  __device__ __forceinline__ int before(int l, int source, int t) const {
    int n = 0;
#pragma unroll 1
    for (int s = 0; s < source; s++) n += static_cast<int>(*count(l, s));
    const uint32_t* own = bits(l, source);
#pragma unroll 1
    for (int w0 = 0; w0 <= t / 32; w0 += 4) {
#pragma unroll
      for (int w = w0; w < w0 + 4; w++) {
        const uint32_t wanted = w < t / 32 ? ~0u : w == t / 32 ? (1u << (t % 32)) - 1 : 0u;
        n += __popc((w <= t / 32 ? own[w] : 0u) & wanted);
      }
    }
    return n;
  }
  __device__ __forceinline__ int total(int l) const {
    int n = 0;
#pragma unroll 1
    for (int s = 0; s < nRanks; s++) n += static_cast<int>(*count(l, s));
    return n;
  }
  // Nothing is known yet, and masked ranks will say nothing.  By a whole block; a barrier must follow.
  __device__ __forceinline__ void clear(const LatencyView& v) const {
    const int n = static_cast<int>(reinterpret_cast<int*>(capacity) - nTokens);
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kDispatchThreads) nTokens[i] = 0; // weighted and lists too
    // The first warp has other things to load.
    const int r = gatherer();
    if (r >= nRanks) return;
    capacity[r] = ~0u;
    if (v.kind == ncclMoeLayoutExpertMajor) nExperts[r] = v.comm.rankStart[r + 1] - v.comm.rankStart[r];
  }
};

// Marks one token's picks.
__device__ __forceinline__ void mark(const LatencyView& v, const Lists& lists, const uint4& packet, int source, int t) {
  const uint32_t bit = 1u << (t % 32);
  bool here = false;
#pragma unroll
  for (int i = 0; i < kPicksPerPacket; i++) {
    const int local = pickOf(packet, i) - v.firstPosition;
    if (local < 0 || local >= v.nLocal) continue;
    atomicOr(&lists.bits(local, source)[t / 32], bit);
    atomicAdd(lists.count(local, source), 1u);
    here = true;
  }
  // A token may have more than one packet.
  if (here && (atomicOr(&lists.bits(v.nLocal, source)[t / 32], bit) & bit) == 0) {
    atomicAdd(lists.count(v.nLocal, source), 1u);
  }
}

// The headers, by the last warp; with more than 32 ranks by the last two.  Were all threads that want to know whether a
// token exists to look there, thousands of loads would queue up at the lines that peers write to.  A barrier must
// follow.  counts: as for receiveHeaders.
__device__ __forceinline__ Progress gatherHeaders(const LatencyDispatchArgs& a, const Call& call,
                                                  const Opening& opening, const Lists& lists, bool mayStall,
                                                  bool counts) {
  if (gatherer() >= kMaxDeviceRanks) return Progress::done;
  return receiveHeaders(a.view, call, opening.masked, a.signature, gatherer() / 32 * 32, kMaxDeviceRanks, mayStall,
                        counts, [&](int r, const uint4& header) {
                          lists.nTokens[r] = a.keep ? opening.nTokens[r] : static_cast<int>(header.x & ~kWeightedBit);
                          lists.weighted[r] = (header.x & kWeightedBit) != 0 ? 1 : 0;
                          lists.capacity[r] = header.z;
                        });
}

// The picks of all ranks' nTokens tokens, as far as this thread looks at them.  By whole warps.  The next ones are
// asked for before these are marked.
__device__ __forceinline__ Progress gatherPicks(const LatencyDispatchArgs& a, const Call& call, unsigned buffer,
                                                int nTokens, const Lists& lists, bool mayStall) {
  constexpr int kAsking = 4; // lanes
  const LatencyView& v = a.view;
  const int perToken = v.layout.pickPackets, n = nTokens * perToken, lane = threadIdx.x & 31;
  struct Pick {
    int source = 0, t = 0;
    const uint4* at = nullptr;
    uint4 packet{};
  };
  const auto ask = [&](int i) {
    Pick pick;
    if (i >= n) return pick;
    pick.t = i / perToken;
    locate(lists.nTokens, &pick.source, &pick.t);
    pick.at = packets(own(v), v.layout.pick(buffer, pick.source, pick.t)) + i % perToken;
    pick.packet = loadPacket(pick.at);
    return pick;
  };
  Pick next = ask(gatherer());
#pragma unroll 1
  for (int first = gatherer() / 32 * 32; first < n; first += kDispatchThreads) {
    Pick pick = next;
    const auto there = [&] { return a.keep || pick.at == nullptr || pick.packet.w == call.tag; };
    const auto ready = [&] {
      if (there()) return true;
      pick.packet = loadPacket(pick.at);
      return false;
    };
#pragma unroll 1
    for (unsigned missing; (missing = __ballot_sync(~0u, !there())) != 0;) {
      // Not all lanes: every block wants these lines, and peers write to them.
      const bool asks = !there() && __popc(missing >> lane) <= kAsking;
      Progress progress = Progress::done;
      if (asks) progress = await(v.comm, kPhasePicks, pick.source, call.tag, mayStall, ready);
      if (__any_sync(~0u, progress == Progress::failed)) return Progress::failed;
      if (__any_sync(~0u, progress == Progress::stalled)) return Progress::stalled;
      if (!there()) pick.packet = loadPacket(pick.at);
    }
    next = ask(first + gatherer() % 32 + kDispatchThreads);
    if (pick.at != nullptr) mark(v, lists, pick.packet, pick.source, pick.t);
  }
  return Progress::done;
}

// Whether every rank's buffer holds what it receives; in EXPERT_MAJOR also the sizes of the groups, as offsets.  By a
// whole block, the same answer in all threads; but for EXPERT_PADDED a barrier is on the way.
__device__ __forceinline__ bool fits(const LatencyDispatchArgs& a, unsigned buffer, const Lists& lists) {
  const LatencyView& v = a.view;
  if (v.kind == ncclMoeLayoutExpertPadded) return true;
  if (v.kind == ncclMoeLayoutExpertMajor) {
#pragma unroll 1
    for (int l = threadIdx.x; l < v.nLocal; l += kDispatchThreads) {
      lists.offsets[l] = (lists.total(l) + v.alignment - 1) / v.alignment * v.alignment;
    }
  }
  const bool rankMajor = v.kind == ncclMoeLayoutRankMajor;
  const int nRanks = v.comm.nRanks, k = v.layout.topK;
  bool enough = true;
  if (threadIdx.x < nRanks) {
    long long most = 0;
#pragma unroll 1
    for (int s = 0; s < nRanks; s++) most += lists.nTokens[s];
    if (!rankMajor) {
      const int experts = lists.nExperts[threadIdx.x];
      most = most * min(k, experts) + static_cast<long long>(experts) * (v.alignment - 1);
    }
    enough = most <= lists.capacity[threadIdx.x];
  }
  if (__builtin_expect(__syncthreads_and(enough) != 0, 1)) return true;
    // It might be too small: everything is counted.
#pragma unroll 1
  for (int i = threadIdx.x; i < v.comm.nExperts + nRanks; i += kDispatchThreads) lists.demand[i] = 0;
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
          atomicAdd(&lists.demand[pick], 1);
        }
      }
    }
#pragma unroll 1
    for (; ranks != 0; ranks &= ranks - 1) {
      atomicAdd(&lists.demand[v.comm.nExperts + __ffsll(static_cast<long long>(ranks)) - 1], 1);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < nRanks; r += kDispatchThreads / 32) {
    int needed = lists.demand[v.comm.nExperts + r];
    if (!rankMajor) {
      needed = 0;
#pragma unroll 1
      for (int p = v.comm.rankStart[r] + (threadIdx.x & 31); p < v.comm.rankStart[r + 1]; p += 32) {
        needed += (lists.demand[p] + v.alignment - 1) / v.alignment * v.alignment;
      }
      needed = __reduce_add_sync(~0u, needed);
    }
    if ((threadIdx.x & 31) == 0) lists.needed[r] = needed;
  }
  __syncthreads();
  enough = threadIdx.x >= nRanks || static_cast<uint32_t>(lists.needed[threadIdx.x]) <= lists.capacity[threadIdx.x];
  return __syncthreads_and(enough) != 0;
}

// Where the groups of EXPERT_MAJOR start, from their sizes.  By a whole block; ends in a barrier.
__device__ __forceinline__ void addOffsets(const LatencyView& v, const Lists& lists) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x, each = (v.nLocal + 31) / 32;
    const int begin = min(lane * each, v.nLocal), end = min(begin + each, v.nLocal);
    int n = 0;
#pragma unroll 4
    for (int l = begin; l < end; l++) n += lists.offsets[l];
    int start = n;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, start, d);
      if (lane >= d) start += other;
    }
    if (lane == 31) lists.offsets[v.nLocal] = start;
    start -= n;
#pragma unroll 4
    for (int l = begin; l < end; l++) {
      const int size = lists.offsets[l];
      lists.offsets[l] = start;
      start += size;
    }
  }
  __syncthreads();
}

// Tells the caller the counts, and later calls of the routing what they need.  By one block.  reported: of the call
// before; nRows: in shared memory, 0.
__device__ __forceinline__ void publish(const LatencyDispatchArgs& a, const Call& call, const Lists& lists,
                                        int nArrivals, bool go, bool reported, int* nRows) {
  const LatencyView& v = a.view;
  LatencyState* state = stateOf(v);
  const bool tells = threadIdx.x == 0;
  bool bad = false;
  if (tells) {
    __threadfence(); // behind the picks
    bad = *reinterpret_cast<volatile unsigned long long*>(&state->badCall) == call.number + 1;
  }
  unsigned long long* expertTokens = v.comm.shared->expertTokens();
  int* hostCounts = reinterpret_cast<int*>(v.outcome + 1);
#pragma unroll 1
  for (int l = threadIdx.x; l < v.nLocal; l += kDispatchThreads) {
    const int n = lists.total(l);
    if (a.expertCounts != nullptr) a.expertCounts[l] = n;
    if (v.hostCounts) hostCounts[l] = n;
    if (go && n > 0) atomicAdd(&expertTokens[l], static_cast<unsigned long long>(n));
    if (v.kind == ncclMoeLayoutExpertPadded) atomicAdd(nRows, n);
  }
  if (a.expertOffsets != nullptr) {
#pragma unroll 1
    for (int l = threadIdx.x; l <= v.nLocal; l += kDispatchThreads) a.expertOffsets[l] = lists.offsets[l];
  }
  if (threadIdx.x < v.comm.nRanks) state->nTokens[threadIdx.x] = lists.nTokens[threadIdx.x];
    // Tokens without a row here are none of combine's.
#pragma unroll 1
  for (int i = threadIdx.x; i < nArrivals; i += kDispatchThreads) {
    int source, t = i;
    locate(lists.nTokens, &source, &t);
    if (lists.has(v.nLocal, source, t)) continue;
    int* map = reinterpret_cast<int*>(own(v) + v.layout.map) + (source * v.layout.maxTokens + t) * v.layout.topK;
#pragma unroll 1
    for (int k = 0; k < v.layout.topK; k++) map[k] = -1;
  }
  __syncthreads();
  if (!tells) return;
  int n = *nRows;
  if (v.kind == ncclMoeLayoutRankMajor) n = lists.total(v.nLocal);
  if (v.kind == ncclMoeLayoutExpertMajor) n = lists.offsets[v.nLocal];
  if (a.recvCount != nullptr) *a.recvCount = n;
  state->go = go ? 1 : 0;
  volatile RoutingOutcome* o = v.outcome;
  if (v.hostCounts) o->nRows = n;
  if (go && !bad && reported) o->code = kOutcomeOk;
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
