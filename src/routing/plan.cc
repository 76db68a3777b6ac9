#include "routing/plan.h"

#include <algorithm>
#include <climits>

namespace moe {

ncclResult_t SendPlan::allocate(int nRanks, int nExperts, int maxTokens, int topK) {
  topK_ = topK;
  rowsTo_.assign(nRanks, 0);
  selectionsTo_.assign(nRanks, 0);
  counts_.assign(nExperts, 0);
  const size_t n = static_cast<size_t>(maxTokens) * topK;
  MOECHECK(homes_.allocate(n));
  MOECHECK(dests_.allocate(n));
  return nDests_.allocate(maxTokens);
}

size_t SendPlan::bytesNeeded(int nRanks, int nExperts, int maxTokens, int topK) {
  const size_t perSelection = sizeof(ExpertHome) + sizeof(int16_t);
  return static_cast<size_t>(maxTokens) * (topK * perSelection + sizeof(uint8_t)) +
         static_cast<size_t>(nRanks) * 2 * sizeof(int64_t) + static_cast<size_t>(nExperts) * sizeof(int32_t);
}

bool SendPlan::build(const TopkView& topk, int nTokens, const Placement& placement, const int* firstLocal,
                     BadSelection* bad) {
  nTokens_ = nTokens;
  std::fill(rowsTo_.begin(), rowsTo_.end(), 0);
  std::fill(selectionsTo_.begin(), selectionsTo_.end(), 0);
  std::fill(counts_.begin(), counts_.end(), 0);
  for (int t = 0; t < nTokens; t++) {
    const int wrong = badSelection(topk, t, placement.nExperts);
    if (wrong < topK_) {
      *bad = BadSelection{t, wrong, topk.at(t, wrong)};
      return false;
    }
    ExpertHome* homes = homes_.get() + static_cast<size_t>(t) * topK_;
    int16_t* dests = dests_.get() + static_cast<size_t>(t) * topK_;
    int n = 0;
    for (int k = 0; k < topK_; k++) {
      const int64_t expert = topk.at(t, k);
      homes[k] = expert == kNoExpert ? ExpertHome{-1, -1} : placement.home[expert];
      if (expert == kNoExpert) continue;
      n = addRank(dests, n, homes[k].rank);
      selectionsTo_[homes[k].rank]++;
      counts_[firstLocal[homes[k].rank] + homes[k].local]++;
    }
    nDests_[t] = static_cast<uint8_t>(n);
    for (int i = 0; i < n; i++) rowsTo_[dests[i]]++;
  }
  return true;
}

ncclResult_t RecvPlan::allocate(ncclMoeLayout_t layout, int nRanks, int nLocal, int maxTokens, int topK,
                                int alignment) {
  layout_ = layout;
  nRanks_ = nRanks;
  nLocal_ = nLocal;
  maxTokens_ = maxTokens;
  topK_ = topK;
  alignment_ = alignment;
  rowBase_.assign(nRanks + 1, 0);
  placed_.assign(nRanks, 0);
  group_.assign(nLocal + 1, 0);
  expertCounts_.assign(nLocal, 0);
  const size_t perSource = static_cast<size_t>(nRanks) * nLocal;
  if (layout != ncclMoeLayoutRankMajor) {
    first_.assign(perSource, 0);
    next_.assign(perSource, 0);
    end_.assign(perSource, 0);
  }
  const size_t n = nLocal > 0 ? static_cast<size_t>(nRanks) * maxTokens * topK : 0;
  MOECHECK(ids_.allocate(n));
  return layout == ncclMoeLayoutRankMajor ? ncclSuccess : slots_.allocate(n);
}

size_t RecvPlan::bytesNeeded(ncclMoeLayout_t layout, int nRanks, int nLocal, int maxTokens, int topK) {
  const size_t tables = layout == ncclMoeLayoutRankMajor ? 1 : 2;
  const size_t rows = nLocal > 0 ? static_cast<size_t>(nRanks) * maxTokens : 0;
  const size_t perSource = static_cast<size_t>(nRanks) * nLocal * (layout == ncclMoeLayoutRankMajor ? 0 : 3);
  return rows * topK * tables * sizeof(int32_t) + perSource * sizeof(int32_t) +
         static_cast<size_t>(nRanks + 1 + nRanks + nLocal + 1) * sizeof(int64_t) + nLocal * sizeof(int32_t);
}

bool RecvPlan::plausible(int64_t rows, const int32_t* counts) const {
  if (rows < 0 || rows > (nLocal_ > 0 ? maxTokens_ : 0)) return false;
  int64_t selections = 0;
  for (int l = 0; l < nLocal_; l++) {
    if (counts[l] < 0 || counts[l] > rows) return false;
    selections += counts[l];
  }
  return selections >= rows && selections <= rows * topK_;
}

bool RecvPlan::build(const int64_t* rows, const int32_t* counts) {
  for (int r = 0; r < nRanks_; r++) rowBase_[r + 1] = rowBase_[r] + rows[r];
  const int64_t planeRows = static_cast<int64_t>(nRanks_) * maxTokens_;
  int64_t total = 0;
  for (int l = 0; l < nLocal_; l++) {
    int64_t inGroup = 0;
    for (int r = 0; r < nRanks_; r++) {
      const size_t at = static_cast<size_t>(r) * nLocal_ + l;
      if (layout_ != ncclMoeLayoutRankMajor) {
        first_[at] = static_cast<int32_t>(inGroup);
        end_[at] = static_cast<int32_t>(inGroup + counts[at]);
      }
      inGroup += counts[at];
    }
    if (inGroup > INT_MAX) return false;
    expertCounts_[l] = static_cast<int32_t>(inGroup);
    group_[l + 1] = nextGroup(layout_, group_[l], inGroup, alignment_, planeRows);
    total += inGroup;
  }
  nRows_ = layout_ == ncclMoeLayoutRankMajor     ? rowBase_[nRanks_]
           : layout_ == ncclMoeLayoutExpertMajor ? group_[nLocal_]
                                                 : total;
  rewind();
  return nRows_ <= INT_MAX;
}

void RecvPlan::rewind() {
  std::fill(placed_.begin(), placed_.end(), 0);
  next_ = first_;
}

bool RecvPlan::place(int source, const int32_t* ids) {
  if (placed_[source] >= rowsFrom(source)) return false;
  const size_t row = static_cast<size_t>(rowBase_[source] + placed_[source]) * topK_;
  const size_t base = static_cast<size_t>(source) * nLocal_;
  for (int k = 0; k < topK_; k++) {
    const int32_t id = ids[k];
    if (id < -1 || id >= nLocal_) return false;
    ids_[row + k] = id;
    if (layout_ == ncclMoeLayoutRankMajor) continue;
    if (id >= 0 && next_[base + id] >= end_[base + id]) return false;
    slots_[row + k] = id < 0 ? -1 : next_[base + id]++;
  }
  placed_[source]++;
  return true;
}

} // namespace moe
