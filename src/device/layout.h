// What lies where in device memory: one description for host code and kernels.
//
// A rank's communicator window (peers write into it):
//   Control           counters and sticky failure of this rank; only its own kernels use it
//   mailbox[2][R]     what each rank says at the start of a dispatch, by parity of the epoch: packets of 16 bytes whose
//                     last word is the epoch.  Two of the rank's receive buffer (route.cu), then its nExperts + R
//                     counts, three in a packet
//   ready[R]          "rank r has begun the call of this epoch" for calls that exchange no message
//   meeting[R]        how far rank r is in ncclMoeCommMaskRanks
//   rowFlags[R][T][4] epoch in which each piece of row i of source rank r arrived (RowPieces)
//   scales[R][T][..]  scale bytes of arriving rows, on their way to where recvScales wants them; an EXACT
//                     combine's weights
//   grads[R][T][K]    weight gradients of arriving rows (combine)
//   rows[R-1][T][..]  arriving rows: dispatch's where recvX cannot be reached by peers, and combine's partial sums.  An
//                     EXACT combine takes it as [tokens][K], for as many tokens at a time as fit: one at least
// A routing's window (peers write map, weights and tokens):
//   map[R][T][K]      for row i of source rank r and each of its token's selections: the slot here (expert layouts) or
//                     the local expert id (RANK_MAJOR); -1: that selection is not here
//   weights[R][T][K]  its weights
//   tokens[R][T]      expert layouts: its token's number at the source
// T stands for maxTokens, K for top-k, rows and tables are aligned to 128 bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/hd.h"
#include "comm/limits.h"
#include "routing/layout.h"

namespace moe {

constexpr int kChunkTokens = 128; // tokens that one block of the route kernel takes
constexpr int kMaxWindows = 256;

MOE_HD size_t align128(size_t bytes) { return (bytes + 127) / 128 * 128; }

// Phases that a failure names.
enum WaitPhase : int {
  kPhaseNone = 0,
  kPhaseExchange = 1,
  kPhaseReady = 2,
  kPhaseDispatchRow = 3,
  kPhaseCombineRow = 4,
  kPhaseHeader = 5, // from here on: latency mode
  kPhaseLatencyDispatchRow = 6,
  kPhaseLatencyCombineRow = 7,
  kPhasePicks = 8,
  kPhaseMeeting = 9
};

// First failure of this rank's kernels, in host memory that the device writes: fields first, code last.
struct Failure {
  int code; // 0, or a FailureCode
  int phase;
  int peer;
  uint32_t epoch;
  uint32_t seen; // signature that the peer sent, for kFailMismatch
};
enum FailureCode : int { kFailNone = 0, kFailTimeout = 1, kFailAborted = 2, kFailMismatch = 3 };

// Outcome of a routing's last dispatch, in host memory that the device writes.
struct RoutingOutcome {
  int code; // 0, or an OutcomeCode
  int rank; // whose capacity was exceeded
  long long needed, capacity;
  int token, position, expert; // of an index that is out of range or repeated
  long long nRows;
  // int expertCounts[L] follows
};
enum OutcomeCode : int { kOutcomeOk = 0, kOutcomeCapacity = 1, kOutcomeIndexRange = 2, kOutcomeIndexRepeated = 3 };

struct Control {
  uint32_t epoch;    // of the last call that this rank's kernels have begun
  uint32_t failed;   // sticky: waits end at once
  uint32_t ticket;   // blocks that have finished the running kernel
  uint32_t pushNext; // next item of the running kernel that nobody has taken: what this rank sends ...
  uint32_t recvNext; // ... and what it receives
};

// What all calls of a communicator share, in memory that only this rank uses.
struct CommShared {
  unsigned long long masked;                  // bit r: rank r takes no part (latency mode)
  unsigned long long leftOut;                 // selections that combine left out, for their ranks were masked
  unsigned long long waitNs[kMaxDeviceRanks]; // spent waiting for the rank to begin a call that this one has begun

  // [L], behind the struct: tokens that came for each local expert
  MOE_HD unsigned long long* expertTokens() { return reinterpret_cast<unsigned long long*>(this + 1); }
};

// The epoch of the call after that of epoch.  Never 0, which flags hold that were never stored; odd and even alternate,
// for mailboxes go by parity.
MOE_HD uint32_t nextEpoch(uint32_t epoch) { return epoch == UINT32_MAX ? 2 : epoch + 1; }

// Rows are sent, and their arrival is told, in up to kMaxPieces pieces of nVec vectors of 16 bytes; the last may be
// shorter, or empty.  Pieces begin at multiples of 32 vectors, so that a warp's accesses stay aligned and blocks of
// scales whole.
constexpr int kMaxPieces = 4;
struct RowPieces {
  int n, nVec;
  RowPieces() = default;
  MOE_HD explicit RowPieces(int vectorsOfRow) {
    constexpr int kLeast = 64; // vectors of a piece: its flag and its handling should not cost more than they bring
    n = vectorsOfRow / kLeast;
    n = n < 1 ? 1 : n > kMaxPieces ? kMaxPieces : n;
    nVec = (vectorsOfRow + n * 32 - 1) / (n * 32) * 32;
  }
};

constexpr int kMessageHeaders = 2; // packets
constexpr int kCountsPerPacket = 3;
MOE_HD int countPackets(int nColumns) { return (nColumns + kCountsPerPacket - 1) / kCountsPerPacket; }

// One selection of a token: position of its expert in the order (rank, local expert), -1 for none, the expert's rank,
// and how many earlier tokens of the chunk chose that expert, and that rank.
struct Selection {
  int16_t position;
  int16_t rank;
  uint16_t inExpert;
  uint16_t inRank;
};

// Bytes of scales that a row has room for: the fused cast makes 4 per 128 elements of two bytes; a caller's scales may
// take as much as fits.
inline size_t scaleRoom(size_t maxRowBytes) {
  return std::min<size_t>(std::max<size_t>(maxRowBytes / 16, 256), WireRow::kMaxScaleBytes);
}

// Offsets in the communicator window.
struct CommLayout {
  int nRanks, nExperts, maxTokens, maxTopK;
  size_t rowStride, scaleStride, nRows;
  size_t mailbox, mailboxStride, ready, meeting, rowFlags, scales, grads, rows, bytes;

  CommLayout() = default;
  CommLayout(int ranks, int experts, int tokens, int topK, size_t maxRowBytes)
    : nRanks(ranks), nExperts(experts), maxTokens(tokens), maxTopK(topK), rowStride(align128(maxRowBytes)),
      scaleStride(align128(scaleRoom(maxRowBytes))) {
    const size_t slots = static_cast<size_t>(ranks) * tokens;
    mailbox = align128(sizeof(Control));
    mailboxStride = align128(16 * static_cast<size_t>(kMessageHeaders + countPackets(experts + ranks)));
    ready = mailbox + 2 * ranks * mailboxStride;
    meeting = ready + align128(sizeof(unsigned long long) * ranks);
    rowFlags = meeting + align128(sizeof(unsigned long long) * ranks);
    scales = rowFlags + align128(sizeof(uint32_t) * slots * kMaxPieces);
    grads = scales + slots * scaleStride;
    rows = grads + align128(sizeof(float) * slots * topK);
    nRows = slots - tokens;
    if (nRows > 0 && nRows < static_cast<size_t>(topK)) nRows = topK;
    bytes = rows + nRows * rowStride;
  }
  MOE_HD size_t mailboxOf(unsigned parity, int source) const {
    return mailbox + (static_cast<size_t>(parity) * nRanks + source) * mailboxStride;
  }
  MOE_HD size_t rowFlag(int source, int i, int piece) const {
    return rowFlags + sizeof(uint32_t) * (slot(source, i) * kMaxPieces + piece);
  }
  MOE_HD size_t slot(int source, int i) const { return static_cast<size_t>(source) * maxTokens + i; }
  // Row i of source in the window of rank owner, which keeps none for itself.
  MOE_HD size_t rowOf(int owner, int source, int i) const {
    return rows + (static_cast<size_t>(source - (source > owner ? 1 : 0)) * maxTokens + i) * rowStride;
  }
  // The row of selection k of the i-th token of a pass of an EXACT combine, of which a pass takes so many.
  MOE_HD size_t exactRowOf(int i, int k, int topK) const {
    return rows + (static_cast<size_t>(i) * topK + k) * rowStride;
  }
  int exactTokens(int topK) const { return nRanks == 1 ? maxTokens : static_cast<int>(nRows / topK); }
};

// Offsets in a routing's window.
struct RoutingLayout {
  int nRanks, maxTokens, topK, nChunks, nColumns;
  size_t map, weights, tokens, selections, chunkBase, expertBase, expertTotal, expertOffset, perRank, bytes;

  RoutingLayout() = default;
  RoutingLayout(int ranks, int experts, int nTokens, int k)
    : nRanks(ranks), maxTokens(nTokens), topK(k), nChunks((nTokens + kChunkTokens - 1) / kChunkTokens),
      nColumns(experts + ranks) {
    const size_t slots = static_cast<size_t>(ranks) * nTokens;
    map = 0;
    weights = map + align128(sizeof(int) * slots * k);
    tokens = weights + align128(sizeof(float) * slots * k);
    selections = tokens + align128(sizeof(int) * slots);
    chunkBase = selections + align128(sizeof(Selection) * static_cast<size_t>(nTokens) * k);
    expertBase = chunkBase + align128(sizeof(int) * static_cast<size_t>(nChunks) * nColumns);
    expertTotal = expertBase + align128(sizeof(int) * experts);
    expertOffset = expertTotal + align128(sizeof(int) * (experts + 1));
    perRank = expertOffset + align128(sizeof(int) * (experts + 1));
    bytes = perRank + align128(kPerRankBytes * ranks) + 128;
  }
  // State of one rank of a routing, as seen by the routing's owner.
  struct PerRank {
    char* recvX;      // where that rank wants its rows; NULL: in its communicator window
    long long needed; // rows that it receives, in its layout's count
    int sendRows;     // rows from here to there
    int recvRows;     // rows from there to here
    int sendBase;     // RANK_MAJOR: slot there of the first row from here
    int recvBase;     // RANK_MAJOR: slot here of the first row from there
  };
  static constexpr size_t kPerRankBytes = sizeof(PerRank);
  // One for the routing.
  struct State {
    int nTokens;
    int go;       // 0: the dispatch was refused (a receive buffer is too small)
    int badIndex; // 1: an index of the running dispatch was reported; 0 between dispatches
  };
  MOE_HD size_t state() const { return bytes - 128; }
};

} // namespace moe
