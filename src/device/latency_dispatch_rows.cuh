// The arriving rows of latency mode's dispatch, unit by unit, into the caller's tensors.
#pragma once

#include "device/latency_dispatch_lists.cuh"

namespace moe {

// A unit of a token of any rank on its way to a warp of this rank.  Its picks and the first packets that the warp waits
// for have been asked for when it is made; they may not have come by then.
template <bool kCast> struct Arrival {
  static constexpr int kCount = kCast ? 3 : 2;
  int item = -1, unit = 0, source = 0, t = 0;
  uint4 picks{};                  // lane k: the packet of selection k
  const uint4* from[kCount] = {}; // of a segment its packets; of unit 0 that of the weights
  uint4 got[kCount] = {};

  __device__ __forceinline__ Arrival() {}
  // Item i of units of nTokens tokens.
  __device__ __forceinline__ Arrival(const LatencyDispatchArgs& a, const Call& call, unsigned buffer,
                                     const Lists& lists, int i, int nTokens)
    : item(i) {
    const LatencyView& v = a.view;
    const int lane = threadIdx.x & 31;
    const unsigned index = i, n = nTokens;
    unit = static_cast<int>(index / n);
    t = static_cast<int>(index % n);
    locate(lists.nTokens, &source, &t);
    picks = loadPicks(v, buffer, source, t);
    const uint4* record = packets(own(v), v.layout.record(call.parity, source, t));
    if (unit == 0) {
      if (lane < weightPackets(v, lists)) from[0] = record + v.layout.aux() + scalePackets(a) + lane;
    } else {
      const int segment = unit - 1, nPackets = a.wireBytes / kPacketBytes;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int at = segment * kSegmentPackets + lane + 32 * j;
        if (at < nPackets) from[j] = record + at;
      }
      if constexpr (kCast) {
        if (carriesScales(segment, nPackets)) from[2] = record + v.layout.extrasOf(segment) + lane;
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; j++) {
      if (from[j] != nullptr) got[j] = loadPacket(from[j]);
    }
  }

  // Once all picks have come: asks again for those that had not when they were asked for.
  __device__ __forceinline__ void completePicks(const LatencyDispatchArgs& a, const Call& call, unsigned buffer) {
    if (!a.keep && picks.w != call.tag) picks = loadPicks(a.view, buffer, source, t);
  }
  __device__ __forceinline__ int weightPackets(const LatencyView& v, const Lists& lists) const {
    return lists.weighted[source] != 0 ? (v.layout.topK + 3) / 4 : 0;
  }
  // Of the caller's scales.
  static __device__ __forceinline__ int scalePackets(const LatencyDispatchArgs& a) {
    return a.quant == ncclMoeQuantNone ? (a.scaleBytes + kPacketBytes - 1) / kPacketBytes : 0;
  }
};

// Where a token's rows go: lane k < K knows it of selection k; in RANK_MAJOR, where there is one row, all lanes do.
struct Places {
  int local;        // local expert, -1: the selection is not here
  int slot;         // row in the caller's tensors
  long long scales; // word of recvScales where its scales begin
  unsigned here;    // lanes that name a row
};

__device__ __forceinline__ Places findPlaces(const LatencyDispatchArgs& a, const Lists& lists, const uint4& picks,
                                             int source, int t) {
  const LatencyView& v = a.view;
  const bool rankMajor = v.kind == ncclMoeLayoutRankMajor, padded = v.kind == ncclMoeLayoutExpertPadded;
  const int pick = pickOfLane(v, picks) - v.firstPosition;
  Places p{pick >= 0 && pick < v.nLocal ? pick : -1, 0, 0, 0};
  p.here = __ballot_sync(~0u, p.local >= 0);
  if (rankMajor) p.here &= -p.here;
  if (!rankMajor && p.local < 0) return p;
  const int n = lists.before(rankMajor ? v.nLocal : p.local, source, t);
  const int start = rankMajor ? 0 : padded ? p.local * v.comm.nRanks * v.layout.maxTokens : lists.offsets[p.local];
  p.slot = start + n;
  const long long words = a.scaleBytes / 4;
  p.scales = !a.columnMajor ? p.slot * words : padded ? p.local * a.rows * words + n : p.slot;
  return p;
}

// Word w of the scales that begin at `scales`.
__device__ __forceinline__ uint32_t* scaleWord(const LatencyDispatchArgs& a, long long scales, int w) {
  return reinterpret_cast<uint32_t*>(a.recvScales) + scales + (a.columnMajor ? w * a.rows : w);
}

// What lies in packet p of the caller's scales.
__device__ __forceinline__ void storeScales(const LatencyDispatchArgs& a, int slot, long long scales, int p,
                                            const uint4& packet) {
  const int bytes = min(kPacketBytes, a.scaleBytes - p * kPacketBytes);
  if (a.scaleBytes % 4 == 0 && (reinterpret_cast<uintptr_t>(a.recvScales) & 3) == 0) {
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if (4 * w < bytes) *scaleWord(a, scales, 4 * p + w) = word(packet, w);
    }
    return;
  }
  char* to = a.recvScales + static_cast<long long>(slot) * a.scaleBytes + p * kPacketBytes;
#pragma unroll
  for (int b = 0; b < kPacketBytes; b++) {
    if (b < bytes) to[b] = static_cast<char>(word(packet, b / 4) >> (8 * (b % 4)));
  }
}

// Unit 0 of a row.
template <bool kCast>
__device__ __forceinline__ Progress receiveAux(const LatencyDispatchArgs& a, const Call& call, const Lists& lists,
                                               Arrival<kCast>& arrival, const Places& places, bool go, bool mayStall) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31, k = v.layout.topK;
  const int source = arrival.source, t = arrival.t;
  const auto peer = [&](int) { return source; };
  const auto literal = [&](int) { return isLiteral(v, call, source, t, 0); };
  uint4* aux = packets(own(v), v.layout.record(call.parity, source, t)) + v.layout.aux();
  const int nScales = arrival.scalePackets(a), nWeights = arrival.weightPackets(v, lists);
#pragma unroll 1
  for (int first = 0; first < nScales; first += 32) {
    const int p = first + lane;
    const uint4* const from[1] = {p < nScales ? aux + p : nullptr};
    uint4 got[1];
    const Progress progress =
      take<false>(v.comm, kPhaseLatencyDispatchRow, peer, call.tag, mayStall, from, got, literal);
    if (progress != Progress::done) return progress;
#pragma unroll 1
    for (unsigned rest = go ? places.here : 0; rest != 0; rest &= rest - 1) {
      const int at = __ffs(rest) - 1, slot = __shfl_sync(~0u, places.slot, at);
      const long long scales = __shfl_sync(~0u, places.scales, at);
      if (p < nScales) storeScales(a, slot, scales, p, got[0]);
    }
  }
  float weight = 0.0f;
  if (nWeights > 0) {
    const Progress progress =
      take<true>(v.comm, kPhaseLatencyDispatchRow, peer, call.tag, mayStall, arrival.from, arrival.got, literal);
    if (progress != Progress::done) return progress;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t bits = __shfl_sync(~0u, word(arrival.got[0], i), lane / 4);
      if (lane % 4 == i) weight = __uint_as_float(bits);
    }
  }
  const bool here = places.local >= 0;
  if (lane < k) {
    const size_t at = (static_cast<size_t>(source) * v.layout.maxTokens + t) * k + lane;
    reinterpret_cast<int*>(own(v) + v.layout.map)[at] = here ? places.slot : -1;
  }
  if (go && v.kind == ncclMoeLayoutRankMajor) {
    const long long at = static_cast<long long>(places.slot) * k + lane;
    if (a.recvTopkIdx != nullptr && lane < k) a.recvTopkIdx[at] = places.local;
    if (a.recvWeights != nullptr && lane < k) a.recvWeights[at] = here ? weight : 0.0f;
  } else if (go && a.recvWeights != nullptr && here) {
    a.recvWeights[places.slot] = weight;
  }
#pragma unroll 1
  for (int p = lane; p < nScales + nWeights; p += 32) aux[p] = emptyPacket();
  return Progress::done;
}

// Unit 1 + segment of a row.
template <bool kCast>
__device__ __forceinline__ Progress receiveSegment(const LatencyDispatchArgs& a, const Call& call,
                                                   Arrival<kCast>& arrival, const Places& places, bool go,
                                                   bool mayStall) {
  constexpr int kAtATime = 4; // rows
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31, segment = arrival.unit - 1;
  auto& got = arrival.got;
  const Progress progress = take<true>(
    v.comm, kPhaseLatencyDispatchRow, [&](int) { return arrival.source; }, call.tag, mayStall, arrival.from, got,
    [&](int) { return isLiteral(v, call, arrival.source, arrival.t, 1 + segment); });
  if (progress != Progress::done) return progress;
  const int nWords = a.scaleBytes / 4;
  int w = nWords; // word of the scales that this lane stores
  uint32_t scale = 0;
  if constexpr (kCast) {
    if (a.quant == ncclMoeQuantFp8Ue8m0) { // lanes 0 and 1: four exponents each
      scale = got[2].x >> 23 | got[2].y >> 23 << 8 | got[2].z >> 23 << 16 | got[2].w >> 23 << 24;
      if (lane < 2) w = 2 * segment + lane;
    } else { // lanes 0 to 7: a scale each
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t bits = __shfl_sync(~0u, word(got[2], i), (lane / 4) & 1);
        if (lane % 4 == i) scale = bits;
      }
      if (lane < 8) w = 8 * segment + lane;
    }
  }
  uint4* const column = reinterpret_cast<uint4*>(a.recvX) + segment * kSegmentPackets + lane;
#pragma unroll 1
  for (unsigned rest = go ? places.here : 0; rest != 0;) {
    const Few<kAtATime> few(&rest);
    int slot[kAtATime];
    long long scales[kAtATime] = {};
#pragma unroll
    for (int j = 0; j < kAtATime; j++) {
      slot[j] = __shfl_sync(~0u, places.slot, few.bit[j]);
      if constexpr (kCast) scales[j] = __shfl_sync(~0u, places.scales, few.bit[j]);
    }
#pragma unroll
    for (int j = 0; j < kAtATime; j++) {
      if (j >= few.n) continue;
      uint4* to = column + static_cast<long long>(slot[j]) * (a.wireBytes / kPacketBytes);
      if (arrival.from[0] != nullptr) to[0] = got[0];
      if (arrival.from[1] != nullptr) to[32] = got[1];
      if constexpr (kCast) {
        if (w < nWords) *scaleWord(a, scales[j], w) = scale;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < arrival.kCount; i++) {
    if (arrival.from[i] != nullptr) *const_cast<uint4*>(arrival.from[i]) = emptyPacket();
  }
  return Progress::done;
}

} // namespace moe
