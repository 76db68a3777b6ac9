// The arriving rows of latency mode's dispatch, unit by unit, into the caller's tensors.
#pragma once

#include <climits>

#include "device/latency_dispatch_lists.cuh"

namespace moe {

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

} // namespace moe
