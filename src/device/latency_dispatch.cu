// Latency mode's dispatch: one kernel, no exchange of counts before rows travel.
//
// Send.  Items: 0 the headers; then for each token its unit 0 (its picks to every rank, so that every rank can work out every
// row's place; to the token's ranks the caller's scales and the weights), then for each token its segments.  Everything goes to
// fixed places, by source rank and token.
// Receive.  Each block reads the picks of all tokens as they come and marks them in bitmaps: one for each local expert, and one
// of the tokens that have any here.  From those follows the place of every row, in the order (source, token), by counting bits.
// Then warps take (token, unit) items, wait for the packets and store them where the caller wants them.  The last block, where
// there are several, tells the caller the counts instead.
// See latency.cuh for packets, waits and who sends.
#include <climits>

#include "device/cast.cuh"
#include "device/latency.cuh"

namespace moe {
namespace {

constexpr int kThreads = 512; // what leaves the registers that each needs
static_assert(kThreads / 32 <= kMaxLatencyWarps, "claims");

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

constexpr uint32_t kWeightedBit = 1u << 31;

// ------------------------------------------------------------------------------------------------------- send ------

__device__ void reportIndex(const LatencyDispatchArgs& a, const Call& call, int code, int token, int position,
                            long long expert) {
  if (atomicExch(&stateOf(a.view)->badCall, call.number + 1) == call.number + 1) return;
  volatile RoutingOutcome* o = a.view.outcome;
  o->token = token;
  o->position = position;
  o->expert = static_cast<int>(expert > INT32_MAX ? INT32_MAX : expert < INT32_MIN ? INT32_MIN : expert);
  __threadfence_system();
  o->code = code;
  __threadfence(); // before the token's picks are sent
}

// What a warp is about to send, its loads under way.
template <bool kCast> struct Outgoing {
  int item, unit, t;
  long long expert;         // lane k: selection k; -1: none
  uint4 raw[kCast ? 4 : 2]; // of a segment
};

template <bool kCast>
__device__ __forceinline__ Outgoing<kCast> fetch(const LatencyDispatchArgs& a, int nTokens, int item) {
  const int lane = threadIdx.x & 31, k = a.view.layout.topK;
  Outgoing<kCast> out{};
  out.item = item;
  out.expert = -1;
  if (item == 0) return out;
  out.unit = (item - 1) / nTokens;
  out.t = (item - 1) % nTokens;
  if (!a.keep && lane < k) {
    const size_t at = static_cast<size_t>(out.t) * k + lane;
    out.expert = a.idx64 ? static_cast<const long long*>(a.topkIdx)[at] : static_cast<const int*>(a.topkIdx)[at];
  }
  if (out.unit == 0) return out;
  const int nPackets = a.wireBytes / kPacketBytes, first = (out.unit - 1) * kSegmentPackets + lane;
  const uint4* row = reinterpret_cast<const uint4*>(a.x + static_cast<size_t>(out.t) * a.rowBytes);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int at = first + 32 * i;
    if (at >= nPackets) continue;
    if constexpr (kCast) {
      out.raw[2 * i] = loadOnce(row + 2 * at);
      out.raw[2 * i + 1] = loadOnce(row + 2 * at + 1);
    } else {
      out.raw[i] = loadOnce(row + at);
    }
  }
  return out;
}

// Lane k: position and rank of selection k, -1 for none.
struct Home {
  int position, rank;
};
__device__ __forceinline__ Home homeOf(const LatencyDispatchArgs& a, const Call& call, unsigned buffer, int t,
                                       long long expert, bool report) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31;
  Home home{-1, -1};
  if (a.keep) {
    const int pick = loadPick(v, buffer, v.comm.rank, t);
    if (pick != kNoPick) home = Home{pick, v.comm.positionRank[pick]};
    return home;
  }
  const bool bad = expert < -1 || expert >= v.comm.nExperts;
  if (!bad && expert >= 0) {
    const uint32_t packed = v.comm.homes[expert];
    home = Home{static_cast<int>(packed & 0xffff), static_cast<int>(packed >> 16)};
  }
  const unsigned same = __match_any_sync(~0u, home.position >= 0 ? home.position : -1 - lane);
  const bool repeated = (same & ((1u << lane) - 1)) != 0;
  if (__builtin_expect(report && (bad || repeated), 0)) {
    reportIndex(a, call, bad ? kOutcomeIndexRange : kOutcomeIndexRepeated, t, lane, expert);
  }
  if (repeated) home = Home{-1, -1};
  return home;
}

// Bit k: selection k is the token's first at a rank that takes part.
__device__ __forceinline__ unsigned leadersOf(const Home& home, unsigned long long masked) {
  const int lane = threadIdx.x & 31;
  const bool there = home.rank >= 0 && (masked >> home.rank & 1) == 0;
  const unsigned same = __match_any_sync(~0u, there ? home.rank : -1 - lane);
  return __ballot_sync(~0u, there && lane == __ffs(same) - 1);
}

__device__ __forceinline__ void sendPicks(const LatencyDispatchArgs& a, const Call& call, unsigned long long masked,
                                          unsigned buffer, int t, const Home& home) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31;
  const uint32_t pick = home.position >= 0 ? static_cast<uint32_t>(home.position) : kNoPick;
  unsigned long long low = 0, high = 0; // picks 0 to 4 and 5 to 7 of packet `lane`
#pragma unroll
  for (int i = 0; i < kPicksPerPacket; i++) {
    const unsigned long long p = __shfl_sync(~0u, pick, (lane * kPicksPerPacket + i) & 31);
    if (i < 5) low |= p << (12 * i);
    if (i >= 5) high |= p << (12 * (i - 5));
  }
  low |= high << 60;
  high >>= 4;
  if (lane >= v.layout.pickPackets) return;
  const uint4 packet =
    make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high), call.tag);
#pragma unroll 1
  for (int r = 0; r < v.comm.nRanks; r++) {
    if ((masked >> r & 1) == 0) storePacket(packets(v.peers[r], v.layout.pick(buffer, v.comm.rank, t)) + lane, packet);
  }
}

// Sixteen bytes from anywhere, zeros behind the end.
__device__ __forceinline__ uint4 gatherBytes(const char* from, int bytes) {
  uint32_t words[4] = {};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if (4 * w + 4 <= bytes && (reinterpret_cast<uintptr_t>(from) & 3) == 0) {
      words[w] = reinterpret_cast<const uint32_t*>(from)[w];
    } else {
#pragma unroll
      for (int b = 0; b < 4; b++) {
        if (4 * w + b < bytes)
          words[w] |= static_cast<uint32_t>(static_cast<unsigned char>(from[4 * w + b])) << (8 * b);
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class Store> __device__ __forceinline__ void forEachRank(unsigned leaders, const Home& home, Store store) {
#pragma unroll 1
  for (unsigned rest = leaders; rest != 0; rest &= rest - 1) store(__shfl_sync(~0u, home.rank, __ffs(rest) - 1));
}

// False: the share is another's.
template <bool kCast>
__device__ __forceinline__ bool send(const LatencyDispatchArgs& a, const Call& call, unsigned long long masked,
                                     unsigned buffer, int nTokens, const Outgoing<kCast>& out, const Claim& claim) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31;
  if (out.item == 0) {
    if (!claim.mine()) return false;
    const uint32_t x = static_cast<uint32_t>(nTokens) | (a.topkWeights != nullptr ? kWeightedBit : 0u);
    sendHeaders(v, call, masked, x, a.signature, static_cast<uint32_t>(min(a.capacity, 0xffffffffll)));
    return true;
  }
  const Home home = homeOf(a, call, buffer, out.t, out.expert, out.unit == 0);
  const unsigned leaders = leadersOf(home, masked);
  if (!claim.mine()) return false;
  const auto record = [&](int r) { return packets(v.peers[r], v.layout.record(call.parity, v.comm.rank, out.t)); };
  bool looksEmpty = false;
  if (out.unit == 0) {
    const int k = v.layout.topK;
    if (!a.keep) sendPicks(a, call, masked, buffer, out.t, home);
    const int nScales = a.scales != nullptr ? (a.scaleBytes + kPacketBytes - 1) / kPacketBytes : 0;
    const int nPackets = nScales + (a.topkWeights != nullptr ? (k + 3) / 4 : 0);
#pragma unroll 1
    for (int first = 0; first < nPackets; first += 32) {
      const int p = first + lane;
      const bool isScale = p < nScales;
      const char* from = isScale ? a.scales + static_cast<size_t>(out.t) * a.scaleBytes
                                 : reinterpret_cast<const char*>(a.topkWeights + static_cast<size_t>(out.t) * k);
      const int at = (isScale ? p : p - nScales) * kPacketBytes;
      uint4 packet{};
      if (p < nPackets) packet = gatherBytes(from + at, (isScale ? a.scaleBytes : k * 4) - at);
      looksEmpty = looksEmpty || isEmpty(packet);
      forEachRank(leaders, home, [&](int r) {
        if (p < nPackets) storePacket(record(r) + v.layout.aux() + p, packet);
      });
    }
  } else {
    const int segment = out.unit - 1, nPackets = a.wireBytes / kPacketBytes;
    const int at[2] = {segment * kSegmentPackets + lane, segment * kSegmentPackets + lane + 32};
    uint4 packet[2];
    uint4 extras{}; // lane i: scales of half i of the segment
    bool hasExtras = false;
    if constexpr (kCast) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 raw[2] = {out.raw[2 * i], out.raw[2 * i + 1]};
        float scale;
        packet[i] = castSixteen(raw, a.quant == ncclMoeQuantFp8Ue8m0, &scale);
        packScales(scale, at[i] < nPackets, i, &extras);
      }
      hasExtras = lane < 2 && segment * kSegmentPackets + 32 * lane < nPackets;
    } else {
      packet[0] = out.raw[0], packet[1] = out.raw[1];
    }
    forEachRank(leaders, home, [&](int r) {
      uint4* to = record(r);
      if (at[0] < nPackets) storePacket(to + at[0], packet[0]);
      if (at[1] < nPackets) storePacket(to + at[1], packet[1]);
      if (hasExtras) storePacket(to + v.layout.extrasOf(segment) + lane, extras);
    });
    looksEmpty = isEmpty(packet[0]) || isEmpty(packet[1]) || isEmpty(extras);
  }
  if (__builtin_expect(__any_sync(~0u, looksEmpty), 0)) {
    forEachRank(leaders, home, [&](int r) { sendLiteral(v, call, r, v.comm.rank, out.t, out.unit); });
  }
  return true;
}

// ---------------------------------------------------------------------------------------------------- receive ------

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
  for (int i = threadIdx.x; i < nRanks * perRank; i += kThreads) {
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
  for (int i = threadIdx.x; i < v.comm.nExperts + nRanks; i += kThreads) lists.counts[i] = 0;
  __syncthreads();
  const int perToken = v.layout.pickPackets;
#pragma unroll 1
  for (int i = threadIdx.x; i < nRanks * v.layout.maxTokens; i += kThreads) {
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
  for (int r = threadIdx.x / 32; r < nRanks; r += kThreads / 32) {
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
  for (int l = warp; l < v.nLocal; l += kThreads / 32) {
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
  unsigned long long* expertTokens = reinterpret_cast<unsigned long long*>(v.shared + 1);
  int* hostCounts = reinterpret_cast<int*>(v.outcome + 1);
#pragma unroll 1
  for (int l = threadIdx.x; l < v.nLocal; l += kThreads) {
    const int n = lists.totals[l];
    if (a.expertCounts != nullptr) a.expertCounts[l] = n;
    if (v.hostCounts) hostCounts[l] = n;
    if (go && n > 0) atomicAdd(&expertTokens[l], static_cast<unsigned long long>(n));
  }
  if (a.expertOffsets != nullptr) {
#pragma unroll 1
    for (int l = threadIdx.x; l <= v.nLocal; l += kThreads) a.expertOffsets[l] = lists.offsets[l];
  }
  if (threadIdx.x < v.comm.nRanks) state->nTokens[threadIdx.x] = lists.nTokens[threadIdx.x];
  // Tokens without a row here are none of combine's.
  const uint32_t* any = lists.any(v);
#pragma unroll 1
  for (int i = threadIdx.x; i < v.comm.nRanks * v.layout.maxTokens * v.layout.topK; i += kThreads) {
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

// Word w of a row's scales, to the places of the caller's tensor that the slots name.
__device__ __forceinline__ uint32_t* scaleWord(const LatencyDispatchArgs& a, long long slot, int w) {
  uint32_t* to = reinterpret_cast<uint32_t*>(a.recvScales);
  if (!a.columnMajor) return to + slot * (a.scaleBytes / 4) + w;
  if (a.view.kind == ncclMoeLayoutExpertPadded) {
    to += slot / a.rows * a.rows * (a.scaleBytes / 4);
    slot %= a.rows;
  }
  return to + w * a.rows + slot;
}

// What lies in packet p of the caller's scales.
__device__ __forceinline__ void storeScales(const LatencyDispatchArgs& a, long long slot, int p, const uint4& packet) {
  const int bytes = min(kPacketBytes, a.scaleBytes - p * kPacketBytes);
  if (a.scaleBytes % 4 == 0 && (reinterpret_cast<uintptr_t>(a.recvScales) & 3) == 0) {
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if (4 * w < bytes) *scaleWord(a, slot, 4 * p + w) = word(packet, w);
    }
    return;
  }
  char* to = a.recvScales + slot * a.scaleBytes + p * kPacketBytes;
#pragma unroll
  for (int b = 0; b < kPacketBytes; b++) {
    if (b < bytes) to[b] = static_cast<char>(word(packet, b / 4) >> (8 * (b % 4)));
  }
}

// A token of any rank as a warp of this rank sees it: lane k < K holds selection k.
struct Arrival {
  int source, t;
  int token;     // its bit in the lists
  int local;     // local expert, -1: the selection is not here
  int slot;      // its row in the caller's tensors
  unsigned here; // selections to store a row for
};

__device__ __forceinline__ Arrival locate(const LatencyView& v, const Lists& lists, int t) {
  int source = 0;
#pragma unroll 1
  while (t >= lists.nTokens[source]) t -= lists.nTokens[source++];
  return Arrival{source, t, source * v.layout.maxTokens + t, -1, 0, 0};
}
__device__ __forceinline__ bool comesHere(const LatencyView& v, const Lists& lists, const Arrival& arrival) {
  return (lists.any(v)[arrival.token / 32] >> (arrival.token % 32) & 1) != 0;
}

__device__ __forceinline__ void findPlaces(const LatencyView& v, const Lists& lists, unsigned buffer,
                                           Arrival* arrival) {
  const int lane = threadIdx.x & 31;
  const int local = loadPick(v, buffer, arrival->source, arrival->t) - v.firstPosition;
  if (local >= 0 && local < v.nLocal) arrival->local = local;
  const unsigned all = __ballot_sync(~0u, arrival->local >= 0);
  if (v.kind == ncclMoeLayoutRankMajor) {
    arrival->slot = lists.before(v.nLocal, arrival->token);
    arrival->here = all & -all;
    return;
  }
#pragma unroll 1
  for (unsigned rest = all; rest != 0; rest &= rest - 1) {
    const int k = __ffs(rest) - 1;
    const int l = __shfl_sync(~0u, arrival->local, k);
    const int n = lists.before(l, arrival->token);
    if (lane == k) {
      arrival->slot =
        n + (v.kind == ncclMoeLayoutExpertPadded ? l * v.comm.nRanks * v.layout.maxTokens : lists.offsets[l]);
    }
  }
  arrival->here = all;
}

// Unit 0 of a row.
__device__ __forceinline__ Progress receiveAux(const LatencyDispatchArgs& a, const Call& call, const Lists& lists,
                                               const Arrival& arrival, bool go, bool mayStall) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31, k = v.layout.topK;
  const int source = arrival.source, t = arrival.t;
  const auto peer = [&](int) { return source; };
  const auto literal = [&](int) { return isLiteral(v, call, source, t, 0); };
  uint4* aux = packets(own(v), v.layout.record(call.parity, source, t)) + v.layout.aux();
  const int nScales = a.quant == ncclMoeQuantNone ? (a.scaleBytes + kPacketBytes - 1) / kPacketBytes : 0;
  const int nWeights = lists.weighted[source] != 0 ? (k + 3) / 4 : 0;
#pragma unroll 1
  for (int first = 0; first < nScales; first += 32) {
    const int p = first + lane;
    const uint4* const from[1] = {p < nScales ? aux + p : nullptr};
    uint4 got[1];
    const Progress progress =
      take<false>(v.comm, kPhaseLatencyDispatchRow, peer, call.tag, mayStall, from, got, literal);
    if (progress != Progress::done) return progress;
#pragma unroll 1
    for (unsigned rest = go ? arrival.here : 0; rest != 0; rest &= rest - 1) {
      const long long slot = __shfl_sync(~0u, arrival.slot, __ffs(rest) - 1);
      if (p < nScales) storeScales(a, slot, p, got[0]);
    }
  }
  float weight = 0.0f;
  if (nWeights > 0) {
    const uint4* const from[1] = {lane < nWeights ? aux + nScales + lane : nullptr};
    uint4 got[1] = {};
    const Progress progress =
      take<false>(v.comm, kPhaseLatencyDispatchRow, peer, call.tag, mayStall, from, got, literal);
    if (progress != Progress::done) return progress;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t bits = __shfl_sync(~0u, word(got[0], i), lane / 4);
      if (lane % 4 == i) weight = __uint_as_float(bits);
    }
  }
  const bool here = arrival.local >= 0;
  if (lane < k) {
    const size_t at = (static_cast<size_t>(source) * v.layout.maxTokens + t) * k + lane;
    reinterpret_cast<int*>(own(v) + v.layout.map)[at] = here ? arrival.slot : -1;
  }
  if (go && v.kind == ncclMoeLayoutRankMajor) {
    const long long at = static_cast<long long>(arrival.slot) * k + lane;
    if (a.recvTopkIdx != nullptr && lane < k) a.recvTopkIdx[at] = arrival.local;
    if (a.recvWeights != nullptr && lane < k) a.recvWeights[at] = here ? weight : 0.0f;
  } else if (go && a.recvWeights != nullptr && here) {
    a.recvWeights[arrival.slot] = weight;
  }
#pragma unroll 1
  for (int p = lane; p < nScales + nWeights; p += 32) aux[p] = emptyPacket();
  return Progress::done;
}

// The packets of a warp's lane in one segment; none of a unit 0.
template <bool kCast> struct Packets {
  static constexpr int kCount = kCast ? 3 : 2;
  int at[2];
  const uint4* from[kCount];
  uint4 got[kCount];

  // Their first loads are on their way when it returns.
  __device__ __forceinline__ Packets(const LatencyDispatchArgs& a, const Call& call, const Arrival& arrival, int unit) {
    const LatencyView& v = a.view;
    const int lane = threadIdx.x & 31, segment = unit - 1;
    const int nPackets = unit == 0 ? INT_MIN : a.wireBytes / kPacketBytes; // unit 0 would have places before the record
    uint4* record = packets(own(v), v.layout.record(call.parity, arrival.source, arrival.t));
    at[0] = segment * kSegmentPackets + lane;
    at[1] = at[0] + 32;
    from[0] = at[0] < nPackets ? record + at[0] : nullptr;
    from[1] = at[1] < nPackets ? record + at[1] : nullptr;
    if constexpr (kCast) {
      const bool has = lane < 2 && segment * kSegmentPackets + 32 * lane < nPackets;
      from[2] = has ? record + v.layout.extrasOf(segment) + lane : nullptr;
    }
#pragma unroll
    for (int i = 0; i < kCount; i++) got[i] = from[i] != nullptr ? loadPacket(from[i]) : uint4{};
  }
};

// Unit 1 + segment of a row.
template <bool kCast>
__device__ __forceinline__ Progress receiveSegment(const LatencyDispatchArgs& a, const Call& call,
                                                   const Arrival& arrival, Packets<kCast>& p, int segment, bool go,
                                                   bool mayStall) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31;
  auto& got = p.got;
  const Progress progress = take<true>(
    v.comm, kPhaseLatencyDispatchRow, [&](int) { return arrival.source; }, call.tag, mayStall, p.from, got,
    [&](int) { return isLiteral(v, call, arrival.source, arrival.t, 1 + segment); });
  if (progress != Progress::done) return progress;
#pragma unroll 1
  for (unsigned rest = go ? arrival.here : 0; rest != 0; rest &= rest - 1) {
    const long long slot = __shfl_sync(~0u, arrival.slot, __ffs(rest) - 1);
    uint4* to = reinterpret_cast<uint4*>(a.recvX + slot * a.wireBytes);
    if (p.from[0] != nullptr) to[p.at[0]] = got[0];
    if (p.from[1] != nullptr) to[p.at[1]] = got[1];
  }
  if constexpr (kCast) {
    const int nWords = a.scaleBytes / 4;
    int w;
    uint32_t value = 0;
    if (a.quant == ncclMoeQuantFp8Ue8m0) { // lanes 0 and 1: four exponents each
      w = 2 * segment + lane;
      value = got[2].x >> 23 | got[2].y >> 23 << 8 | got[2].z >> 23 << 16 | got[2].w >> 23 << 24;
      if (lane >= 2) w = nWords;
    } else { // lanes 0 to 7: a scale each
      w = 8 * segment + lane;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t scale = __shfl_sync(~0u, word(got[2], i), (lane / 4) & 1);
        if (lane % 4 == i) value = scale;
      }
      if (lane >= 8) w = nWords;
    }
#pragma unroll 1
    for (unsigned rest = go ? arrival.here : 0; rest != 0; rest &= rest - 1) {
      const long long slot = __shfl_sync(~0u, arrival.slot, __ffs(rest) - 1);
      if (w < nWords) *scaleWord(a, slot, w) = value;
    }
  }
#pragma unroll
  for (int i = 0; i < p.kCount; i++) {
    if (p.from[i] != nullptr) *const_cast<uint4*>(p.from[i]) = emptyPacket();
  }
  return Progress::done;
}

template <bool kCast>
__global__ void __launch_bounds__(kThreads, 1) latencyDispatchKernel(const __grid_constant__ LatencyDispatchArgs a) {
  extern __shared__ uint32_t dynamicShared[];
  const LatencyView& v = a.view;
  LatencyState* state = stateOf(v);
  const unsigned long long tickets = loadTickets(&state->calls), dispatches = loadTickets(&state->dispatches);
  const unsigned long long masked = *reinterpret_cast<volatile unsigned long long*>(&v.shared->masked);
  const int nUnits = 1 + (a.wireBytes + kSegmentPackets * kPacketBytes - 1) / (kSegmentPackets * kPacketBytes);
  int nTokens = a.nTokens;
  if (a.keep) {
    nTokens = state->nTokens[v.comm.rank];
  } else if (a.nTokensDev != nullptr) {
    nTokens = max(0, min(nTokens, *a.nTokensDev));
  }
  const int nItems = 1 + nTokens * nUnits;
  int share = a.halves.send && Shares::first() < min(nItems, Shares::stride()) ? Shares::first() : -1;
  const Lists lists(v, dynamicShared);
  const int nReceivers = max(1, static_cast<int>(gridDim.x) - 1);
  const bool publisher = blockIdx.x == gridDim.x - 1;
  int item = threadIdx.x / 32 * nReceivers + blockIdx.x; // to receive
  int nArrivals = -1;                                    // tokens of all ranks, once they are known
  Call call{};
  bool go = false, cleared = false, allTaken = false, stalled = false;
#pragma unroll 1
  for (bool working = true; working;) {
    // Nothing waits for the tickets before a warp's first loads are on their way.
    Outgoing<kCast> out{};
    if (share >= 0) out = fetch<kCast>(a, nTokens, share);
    if (a.halves.receive && !cleared) {
#pragma unroll 1
      for (int i = threadIdx.x; i < (v.nLocal + 1) * lists.words; i += kThreads) lists.bits[i] = 0;
      cleared = true;
    }
    call = callOf(tickets);
    const unsigned buffer = static_cast<unsigned>((dispatches >> kTicketBits) + (a.keep ? 0 : 1)) & 1;
    Shares shares(v, call, nItems, allTaken);
    if (share >= 0) {
      const Claim claim = shares.claim(share);
#pragma unroll 1
      while (send<kCast>(a, call, masked, buffer, nTokens, out, claim) && out.item + Shares::stride() < nItems) {
        out = fetch<kCast>(a, nTokens, out.item + Shares::stride());
      }
      share = stalled ? shares.unclaimed() : -1;
      allTaken = shares.allTaken;
      if (share >= 0) continue;
    }
    if (!a.halves.receive) break;
    const bool mayStall = a.halves.send && !shares.allTaken;
    if (nArrivals < 0) { // the same in the whole block
      __syncthreads();   // the bitmaps are clear
      const Progress progress = gather(a, call, masked, buffer, lists, mayStall);
      if (__builtin_expect(__syncthreads_or(progress != Progress::done) != 0, 0)) {
        if (__syncthreads_or(progress == Progress::failed) != 0) break;
        share = shares.unclaimed();
        allTaken = shares.allTaken;
        stalled = true;
        continue;
      }
      go = fits(a, buffer, lists);
      if (v.kind == ncclMoeLayoutExpertMajor || publisher) measure(v, lists);
      nArrivals = 0;
#pragma unroll 1
      for (int r = 0; r < v.comm.nRanks; r++) nArrivals += lists.nTokens[r];
      if (publisher && gridDim.x > 1) break;
    }
    working = false;
#pragma unroll 1
    for (; item < nArrivals * nUnits; item += nReceivers * (kThreads / 32)) {
      Arrival arrival = locate(v, lists, item % nArrivals);
      if (!comesHere(v, lists, arrival)) continue;
      const int unit = item / nArrivals;
      Packets<kCast> packetsOfLane(a, call, arrival, unit);
      findPlaces(v, lists, buffer, &arrival);
      const Progress progress = unit == 0
                                  ? receiveAux(a, call, lists, arrival, go, mayStall)
                                  : receiveSegment<kCast>(a, call, arrival, packetsOfLane, unit - 1, go, mayStall);
      if (__builtin_expect(progress == Progress::failed, 0)) break;
      if (__builtin_expect(progress == Progress::stalled, 0)) {
        share = shares.unclaimed();
        allTaken = shares.allTaken;
        stalled = true;
        working = true;
        break;
      }
    }
  }
  if (!a.halves.receive) return;
  if (publisher && nArrivals >= 0) publish(a, call, lists, go);
  __syncthreads(); // all threads have read the counters
  if (threadIdx.x == 0) {
    addTicket(&state->calls);
    if (!a.keep) addTicket(&state->dispatches);
  }
}

} // namespace

size_t latencyShared(const LatencyLayout& layout, int nExperts, int nLocal) {
  const size_t words = static_cast<size_t>(layout.words()), r = static_cast<size_t>(layout.nRanks);
  return sizeof(int) * ((static_cast<size_t>(nLocal) + 1) * words + 2 * static_cast<size_t>(nLocal) + 1 + 5 * r +
                        static_cast<size_t>(nExperts));
}

cudaError_t prepareLatencyDispatch() {
  cudaError_t result = cudaSuccess;
#pragma unroll 1
  for (auto* kernel : {latencyDispatchKernel<false>, latencyDispatchKernel<true>}) {
    if (result == cudaSuccess) {
      result = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxLatencyShared);
    }
  }
  return result;
}

cudaError_t launchLatencyDispatch(const LatencyDispatchArgs& args, int maxSms, cudaStream_t stream) {
  auto* kernel = args.quant == ncclMoeQuantNone ? latencyDispatchKernel<false> : latencyDispatchKernel<true>;
  return launchKernel<LatencyDispatchArgs>(
    kernel, latencyBlocks(args.view, args.nTokens, args.wireBytes, maxSms), kThreads,
    latencyShared(args.view.layout, args.view.comm.nExperts, args.view.nLocal), stream, args);
}

} // namespace moe
