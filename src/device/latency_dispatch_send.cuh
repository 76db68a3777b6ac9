// The sending half of latency mode's dispatch; latency_dispatch.cu tells the protocol.
#pragma once

#include "device/cast.cuh"
#include "device/latency.cuh"

namespace moe {

constexpr uint32_t kWeightedBit = 1u << 31; // in a header's word x, beside the number of tokens: they have weights

static __device__ void reportIndex(const LatencyDispatchArgs& a, const Call& call, int code, int token, int position,
                                   long long expert) {
  if (atomicExch(&stateOf(a.view)->badCall, call.number + 1) == call.number + 1) return;
  storeIndexOutcome(a.view.outcome, code, token, position, expert);
}

// What a warp is about to send, its loads under way.
template <bool kCast> struct Outgoing {
  int item, unit, t;
  long long expert;         // lane k: selection k; -1: none
  float weight;             // of unit 0, lane k: of selection k
  uint4 raw[kCast ? 4 : 2]; // of a segment
};

template <bool kCast>
__device__ __forceinline__ Outgoing<kCast> fetch(const LatencyDispatchArgs& a, int nTokens, int item) {
  const int lane = threadIdx.x & 31, k = a.view.layout.topK;
  Outgoing<kCast> out{};
  out.item = item;
  out.expert = -1;
  if (item == 0) return out;
  const unsigned i = item - 1, n = nTokens;
  out.unit = static_cast<int>(i / n);
  out.t = static_cast<int>(i % n);
  if (!a.keep && lane < k) {
    const size_t at = static_cast<size_t>(out.t) * k + lane;
    out.expert = a.idx64 ? static_cast<const long long*>(a.topkIdx)[at] : static_cast<const int*>(a.topkIdx)[at];
  }
  if (out.unit == 0) {
    if (a.topkWeights != nullptr && lane < k) out.weight = a.topkWeights[static_cast<size_t>(out.t) * k + lane];
    return out;
  }
  const int nPackets = a.wireBytes / kPacketBytes, first = (out.unit - 1) * kSegmentPackets + lane;
  const uint4* row = reinterpret_cast<const uint4*>(a.x + static_cast<size_t>(out.t) * a.rowBytes);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int at = first + 32 * i;
    if (at >= nPackets) continue;
    if constexpr (kCast) {
      out.raw[2 * i] = loadInput(row + 2 * at);
      out.raw[2 * i + 1] = loadInput(row + 2 * at + 1);
    } else {
      out.raw[i] = loadInput(row + at);
    }
  }
  return out;
}

// Lane k: where selection k goes, as v.comm.homes has it: the expert's position, and << 16 its rank.
constexpr uint32_t kNowhere = ~0u;
__device__ __forceinline__ int rankOf(uint32_t home) { return home == kNowhere ? -1 : static_cast<int>(home >> 16); }

// Without keep its load is under way.  A repeated selection is still there.
__device__ __forceinline__ uint32_t homeOf(const LatencyDispatchArgs& a, unsigned buffer, int t, long long expert) {
  const LatencyView& v = a.view;
  if (a.keep) {
    const int pick = pickOfLane(v, loadPicks(v, buffer, v.comm.rank, t));
    return pick != kNoPick ? static_cast<uint32_t>(pick | v.comm.positionRank[pick] << 16) : kNowhere;
  }
  return expert >= 0 && expert < v.comm.nExperts ? v.comm.homes[expert] : kNowhere;
}

// Takes repeated selections out.  Bit k of the result: selection k is the token's first at a rank that takes part.
// Each lane looks at those before its own: __match_any_sync takes 0.2 us where all lanes differ.
__device__ __forceinline__ unsigned leadersOf(uint32_t* home, int k, unsigned long long masked) {
  constexpr int kAtATime = 8;
  const int lane = threadIdx.x & 31;
  const uint32_t mine = *home;
  bool repeated = false, led = false;
#pragma unroll 1
  for (int first = 0; first < k; first += kAtATime) {
#pragma unroll
    for (int i = first; i < first + kAtATime; i++) {
      const uint32_t other = __shfl_sync(~0u, mine, i);
      repeated = repeated || (i < lane && other == mine);
      led = led || (i < lane && other >> 16 == mine >> 16);
    }
  }
  if (repeated) *home = kNowhere;
  const int rank = rankOf(mine);
  return __ballot_sync(~0u, rank >= 0 && !led && (masked >> rank & 1) == 0);
}

__device__ __forceinline__ void sendPicks(const LatencyDispatchArgs& a, const Call& call, unsigned long long masked,
                                          unsigned buffer, int t, uint32_t home) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31;
  const uint32_t pick = home != kNowhere ? home & 0xffff : kNoPick;
  const int bit = 12 * (lane % kPicksPerPacket);
#pragma unroll 1
  for (int p = 0; p < v.layout.pickPackets; p++) {
    uint32_t words[3];
#pragma unroll
    for (int w = 0; w < 3; w++) {
      const int shift = bit - 32 * w;
      const uint32_t part = shift <= -12 || shift >= 32 ? 0u : shift >= 0 ? pick << shift : pick >> -shift;
      words[w] = __reduce_or_sync(~0u, lane / kPicksPerPacket == p ? part : 0u);
    }
    const uint4 packet = make_uint4(words[0], words[1], words[2], call.tag);
#pragma unroll 1
    for (int r = lane; r < v.comm.nRanks; r += 32) {
      if ((masked >> r & 1) == 0) storePacket(packets(v.peers[r], v.layout.pick(buffer, v.comm.rank, t)) + p, packet);
    }
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

template <class Store> __device__ __forceinline__ void forEachRank(unsigned leaders, uint32_t home, Store store) {
  constexpr int kAtATime = 2;
#pragma unroll 1
  for (unsigned rest = leaders; rest != 0;) {
    const Few<kAtATime> few(&rest);
    int ranks[kAtATime];
#pragma unroll
    for (int j = 0; j < kAtATime; j++) ranks[j] = rankOf(__shfl_sync(~0u, home, few.bit[j]));
#pragma unroll
    for (int j = 0; j < kAtATime; j++) {
      if (j < few.n) store(ranks[j]);
    }
  }
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
  const int k = v.layout.topK, segment = out.unit - 1, nPackets = a.wireBytes / kPacketBytes;
  const int at[2] = {segment * kSegmentPackets + lane, segment * kSegmentPackets + lane + 32};
  uint32_t home = homeOf(a, buffer, out.t, out.expert);
  uint4 packet[2] = {};
  uint4 extras{}; // lane i: scales of half i of the segment
  bool hasExtras = false;
  if (out.unit != 0) { // while homes come
    if constexpr (kCast) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 raw[2] = {out.raw[2 * i], out.raw[2 * i + 1]};
        float scale;
        packet[i] = castSixteen(raw, a.quant == ncclMoeQuantFp8Ue8m0, &scale);
        packScales(scale, at[i] < nPackets, i, &extras);
      }
      hasExtras = carriesScales(segment, nPackets);
    } else {
      packet[0] = out.raw[0], packet[1] = out.raw[1];
    }
  }
  const unsigned leaders = leadersOf(&home, k, masked);
  if (!claim.mine()) return false;
  const auto record = [&](int r) { return packets(v.peers[r], v.layout.record(call.parity, v.comm.rank, out.t)); };
  bool looksEmpty = false;
  if (out.unit == 0) {
    const bool bad = !a.keep && out.expert != -1 && home == kNowhere;
    if (__builtin_expect(__any_sync(~0u, bad), 0)) {
      const bool inRange = out.expert >= 0 && out.expert < v.comm.nExperts;
      if (bad) reportIndex(a, call, inRange ? kOutcomeIndexRepeated : kOutcomeIndexRange, out.t, lane, out.expert);
      __syncwarp();
      __threadfence(); // before the token's picks are sent, by whichever lanes
    }
    if (!a.keep) sendPicks(a, call, masked, buffer, out.t, home);
    const int nScales = a.scales != nullptr ? (a.scaleBytes + kPacketBytes - 1) / kPacketBytes : 0;
    const uint4 weights = packFours(out.weight, k);
    const int nWeights = a.topkWeights != nullptr ? (k + 3) / 4 : 0;
#pragma unroll 1
    for (int first = 0; first < nScales; first += 32) {
      const int p = first + lane, from = p * kPacketBytes;
      uint4 scales{};
      if (p < nScales) {
        scales = gatherBytes(a.scales + static_cast<size_t>(out.t) * a.scaleBytes + from, a.scaleBytes - from);
      }
      looksEmpty = looksEmpty || isEmpty(scales);
      forEachRank(leaders, home, [&](int r) {
        if (p < nScales) storePacket(record(r) + v.layout.aux() + p, scales);
      });
    }
    looksEmpty = looksEmpty || (lane < nWeights && isEmpty(weights));
    forEachRank(leaders, home, [&](int r) {
      if (lane < nWeights) storePacket(record(r) + v.layout.aux() + nScales + lane, weights);
    });
  } else {
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

} // namespace moe
