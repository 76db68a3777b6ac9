// What lies where in the window of a routing that latency mode serves, and what its kernels are given.
//
// Peers write (p: parity of the routing's call, s: the source rank):
//   headers[p][s]            one packet: tokens of s, signature of its call, capacity of its receive buffer, tag
//   picks[b][s][t]           packets of 8 picks of 12 bits and a tag: where the experts of token t are, in the order
//                            (rank, local expert); b alternates with the dispatches that choose experts anew, so that
//                            the last choice stays
//   literals[p][plane][t][u] tag: "unit u of this record may hold kEmpty as data"; hardly ever written
//   records[p][plane][t]     one row.  Dispatch: plane = source rank, t = its token.  Combine: t = this rank's token,
//                            plane = the rank that sends its sum, or with EXACT the selection.
// A record is [segments][64] packets of the row, then two extra packets a segment (scales of the cast, or EXACT's
// weight), then the auxiliary packets (the caller's scales, then weights, or weight gradients).  The work on a record
// is divided into units: 0 the auxiliary packets, 1 + n segment n.
// Only this rank uses map[s][t][k] (the row of selection k of token t of s in the caller's tensors, -1 if it is not
// here), claims (who sends what) and the state.
#pragma once

#include "device/layout.h"

namespace moe {

constexpr int kPacketBytes = 16;
constexpr int kSegmentPackets = 64;
constexpr int kSegmentExtras = 2;
constexpr int kPicksPerPacket = 8;
constexpr int kNoPick = 0xfff;
constexpr int kEmptyByte = 0xa5; // an empty packet holds nothing but this
static_assert(kMaxLatencyExperts < kNoPick, "picks");
constexpr int kMaxLatencyBlocks = 256;
constexpr int kMaxLatencyWarps = 32; // of a block

// Calls are counted by what the blocks of a grid add up to once they have read the count: 1 each, and block 0 what is
// missing to this.
constexpr int kTicketBits = 20;

// The tag of a call: n % (2^32 - 1) + 1, so never 0, which headers and picks hold that were never stored.
MOE_HD uint32_t tagOf(unsigned long long n) {
  uint32_t sum = static_cast<uint32_t>(n) + static_cast<uint32_t>(n >> 32);
  sum += sum < static_cast<uint32_t>(n) ? 1 : 0; // the carry, which 2^32 - 1 takes round
  return sum == UINT32_MAX ? 1 : sum + 1;
}

struct LatencyState {
  unsigned long long calls;      // << kTicketBits
  unsigned long long dispatches; // << kTicketBits; those that chose experts anew
  unsigned long long badCall;    // 1 + number of the last call that reported an index
  int go;                        // 0: the last dispatch was refused
  int reported;                  // 1: the outcome in host memory is an error
  int nTokens[kMaxDeviceRanks];  // of each rank in the last dispatch
};

struct LatencyLayout {
  int nRanks = 0, maxTokens = 0, topK = 0, nPlanes = 0;
  int pickPackets = 0; // of a token
  int maxSegments = 0, auxPackets = 0;
  size_t headers = 0, picks = 0, literals = 0, records = 0, recordBytes = 0, map = 0, claims = 0, state = 0, bytes = 0;

  LatencyLayout() = default;
  LatencyLayout(int ranks, int tokens, int k, size_t maxRowBytes, size_t maxScaleBytes)
    : nRanks(ranks), maxTokens(tokens), topK(k), nPlanes(ranks > k ? ranks : k),
      pickPackets((k + kPicksPerPacket - 1) / kPicksPerPacket) {
    constexpr size_t segmentBytes = kSegmentPackets * kPacketBytes;
    maxSegments = static_cast<int>((maxRowBytes + segmentBytes - 1) / segmentBytes);
    auxPackets = static_cast<int>((maxScaleBytes + kPacketBytes - 1) / kPacketBytes) + (k + 3) / 4;
    recordBytes = align128(kPacketBytes * (static_cast<size_t>(maxSegments) * (kSegmentPackets + kSegmentExtras) +
                                           static_cast<size_t>(auxPackets)));
    const size_t rows = static_cast<size_t>(ranks) * tokens;
    const size_t slots = static_cast<size_t>(nPlanes) * tokens;
    headers = 0;
    picks = align128(2 * kPacketBytes * static_cast<size_t>(ranks));
    literals = picks + align128(2 * kPacketBytes * rows * pickPackets);
    records = literals + align128(2 * sizeof(uint32_t) * slots * (maxSegments + 1));
    map = records + 2 * slots * recordBytes;
    claims = map + align128(sizeof(int) * rows * k);
    state = claims + sizeof(uint32_t) * kMaxLatencyBlocks * kMaxLatencyWarps;
    bytes = state + align128(sizeof(LatencyState));
  }
  MOE_HD int extrasOf(int segment) const { return maxSegments * kSegmentPackets + segment * kSegmentExtras; }
  MOE_HD int aux() const { return maxSegments * (kSegmentPackets + kSegmentExtras); }
  MOE_HD size_t header(unsigned parity, int source) const {
    return headers + kPacketBytes * (static_cast<size_t>(parity) * nRanks + source);
  }
  MOE_HD size_t pick(unsigned buffer, int source, int t) const {
    return picks + kPacketBytes * pickPackets * ((static_cast<size_t>(buffer) * nRanks + source) * maxTokens + t);
  }
  MOE_HD size_t record(unsigned parity, int plane, int t) const {
    return records + recordBytes * ((static_cast<size_t>(parity) * nPlanes + plane) * maxTokens + t);
  }
  MOE_HD size_t literal(unsigned parity, int plane, int t, int unit) const {
    return literals + sizeof(uint32_t) *
                        (((static_cast<size_t>(parity) * nPlanes + plane) * maxTokens + t) * (maxSegments + 1) + unit);
  }
  // Of a bit for each token of a rank.
  MOE_HD int words() const { return (maxTokens + 31) / 32; }
};

} // namespace moe
