// How a warp sees one token of this rank: lane k < K holds selection k.
#pragma once

#include "device/primitives.cuh"

namespace moe {

struct Token {
  int rank;     // of the selection's expert, -1: none
  int position; // of the expert in the order (rank, local expert)
  int row;      // index of this token among this rank's rows to that rank
  int slot;     // where the row lies there, in the routing's layout
  bool leader;  // lowest selection of the token on that rank
};

__device__ __forceinline__ Token loadToken(const CommView& c, const RoutingView& routing, int t) {
  const int lane = threadIdx.x & 31;
  const RoutingLayout& layout = routing.layout;
  Token token{-1, -1, 0, 0, false};
  if (lane < layout.topK) {
    const Selection sel =
      reinterpret_cast<const Selection*>(routing.self + layout.selections)[static_cast<size_t>(t) * layout.topK + lane];
    if (sel.position >= 0) {
      const int* base = routing.ints(layout.chunkBase) + static_cast<size_t>(t / kChunkTokens) * layout.nColumns;
      token.position = sel.position;
      token.rank = sel.rank;
      token.row = base[c.nExperts + token.rank] + sel.inRank;
      token.slot = routing.kind == ncclMoeLayoutRankMajor
                     ? routing.perRank()[token.rank].sendBase + token.row
                     : routing.ints(layout.expertBase)[sel.position] + base[sel.position] + sel.inExpert;
    }
  }
  const unsigned same = __match_any_sync(~0u, token.rank >= 0 ? token.rank : -1 - lane);
  token.leader = token.rank >= 0 && lane == __ffs(same) - 1;
  return token;
}

// Index of row `row` of rank `source` in the routing's tokens, and with selection k in its map and weights.
__device__ __forceinline__ size_t tokenIndex(const RoutingView& routing, int source, int row) {
  return static_cast<size_t>(source) * routing.layout.maxTokens + row;
}
__device__ __forceinline__ size_t mapIndex(const RoutingView& routing, int source, int row, int k) {
  return tokenIndex(routing, source, row) * routing.layout.topK + k;
}

} // namespace moe
