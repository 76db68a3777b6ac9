// A token's selections: reading, checking, and which ranks they lead to.  Written once for host and device.
#pragma once

#include <cstdint>

#include "base/hd.h"
#include "nccl_moe.h"
#include "routing/placement.h"

namespace moe {

// View of a caller's topkIdx, [T, topK] of int32 or int64.
struct TopkView {
  const void* idx;
  bool is64;
  int topK;

  MOE_HD int64_t at(int token, int k) const {
    const int64_t i = static_cast<int64_t>(token) * topK + k;
    return is64 ? static_cast<const int64_t*>(idx)[i] : static_cast<const int32_t*>(idx)[i];
  }
};

constexpr int64_t kNoExpert = -1;

// Position k of a token's first selection that is out of range or repeats an earlier one; topK if all are good.
MOE_HD int badSelection(const TopkView& topk, int token, int nExperts) {
  for (int k = 0; k < topk.topK; k++) {
    const int64_t expert = topk.at(token, k);
    if (expert == kNoExpert) continue;
    if (expert < 0 || expert >= nExperts) return k;
    for (int j = 0; j < k; j++) {
      if (topk.at(token, j) == expert) return k;
    }
  }
  return topk.topK;
}

// Adds rank to a token's ascending list of distinct ranks; returns the list's new length.
MOE_HD int addRank(int16_t* ranks, int n, int rank) {
  int at = n;
  while (at > 0 && ranks[at - 1] >= rank) at--;
  if (at < n && ranks[at] == rank) return n;
  for (int i = n; i > at; i--) ranks[i] = ranks[i - 1];
  ranks[at] = static_cast<int16_t>(rank);
  return n + 1;
}

} // namespace moe
