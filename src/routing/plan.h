// The two halves of a routing, as pure functions: what a rank sends where (SendPlan), and where a rank puts what it
// receives (RecvPlan).  Their tables serve dispatch, and inverted they serve combine.
//
// The tables are sized once, for maxTokens; building a plan allocates nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "base/error.h"
#include "base/handle.h"
#include "routing/layout.h"
#include "routing/placement.h"
#include "routing/topk.h"

namespace moe {

// A table whose pages are taken from the system when they are first written: most routings use far less than their
// maxTokens on every rank allow.
template <class T> class Table {
 public:
  ncclResult_t allocate(size_t n) {
    if (n == 0) return ncclSuccess;
    size_t bytes = 0;
    if (__builtin_mul_overflow(n, sizeof(T), &bytes)) return fail(ncclSystemError, "%zu elements overflow memory", n);
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return fail(ncclSystemError, "no %zu bytes of memory: %s", bytes, strerror(errno));
    map_ = UniqueMap(base, bytes);
    return ncclSuccess;
  }
  T* get() const { return static_cast<T*>(map_.get()); }
  T& operator[](size_t i) const { return get()[i]; }
  size_t bytes() const { return map_.size(); }

 private:
  UniqueMap map_;
};

// The first bad selection of a call's topkIdx.
struct BadSelection {
  int token;
  int position;
  int64_t expert;
};

class SendPlan {
 public:
  ncclResult_t allocate(int nRanks, int nExperts, int maxTokens, int topK);
  static size_t bytesNeeded(int nRanks, int nExperts, int maxTokens, int topK);

  // Checks the tokens' selections and fills the tables.  False, with *bad filled, if a selection is out of range or
  // repeated; the plan is then of no use.  firstLocal[r]: experts of ranks before r.
  bool build(const TopkView& topk, int nTokens, const Placement& placement, const int* firstLocal, BadSelection* bad);

  int nTokens() const { return nTokens_; }
  // The distinct ranks that token's selections lead to, ascending.
  int nDests(int token) const { return nDests_[token]; }
  const int16_t* dests(int token) const { return dests_.get() + static_cast<size_t>(token) * topK_; }
  // Home of selection k; rank -1: no expert.
  const ExpertHome* homes(int token) const { return homes_.get() + static_cast<size_t>(token) * topK_; }
  int64_t rowsTo(int rank) const { return rowsTo_[rank]; }             // one per (token, rank)
  int64_t selectionsTo(int rank) const { return selectionsTo_[rank]; } // one per (token, expert there)
  const int32_t* counts() const { return counts_.data(); } // rows per expert, experts in order of (rank, local id)

 private:
  int topK_ = 0;
  int nTokens_ = 0;
  Table<ExpertHome> homes_;
  Table<int16_t> dests_;
  Table<uint8_t> nDests_;
  std::vector<int64_t> rowsTo_, selectionsTo_;
  std::vector<int32_t> counts_;
};

class RecvPlan {
 public:
  ncclResult_t allocate(ncclMoeLayout_t layout, int nRanks, int nLocal, int maxTokens, int topK, int alignment);
  static size_t bytesNeeded(ncclMoeLayout_t layout, int nRanks, int nLocal, int maxTokens, int topK);

  // Checks what one rank says it will send: no more rows than tokens, no more rows per expert than rows, and between
  // one and topK selections per row.
  bool plausible(int64_t rows, const int32_t* counts) const;
  // rows[r] rows come from rank r, counts[r * nLocal + l] of them for local expert l.  False if N exceeds INT_MAX.
  bool build(const int64_t* rows, const int32_t* counts);
  // Sets every source's position back to its first row: before the rows of a dispatch are placed.
  void rewind();
  // Takes the next row of a source into the tables: its local ids (-1: not here), checked, and each selection's slot.
  // False if an id is out of range or an expert gets more rows than it was said to.
  bool place(int source, const int32_t* ids);

  int64_t nRows() const { return nRows_; } // N: with alignment padding; EXPERT_PADDED: sum of the counts
  int64_t rowsFrom(int rank) const { return rowBase_[rank + 1] - rowBase_[rank]; }
  int64_t rowBase(int rank) const { return rowBase_[rank]; } // index of a source's first row, in (source, token) order
  int64_t placed(int rank) const { return placed_[rank]; }   // rows of a source placed so far
  const int32_t* expertCounts() const { return expertCounts_.data(); } // [L]
  int64_t group(int local) const { return group_[local]; }             // first row of a local expert's group
  // Of row i, in (source, token) order: local ids [K], and slots [K] within their expert's group.
  const int32_t* ids(int64_t i) const { return ids_.get() + i * topK_; }
  const int32_t* slots(int64_t i) const { return slots_.get() + i * topK_; }

 private:
  ncclMoeLayout_t layout_ = ncclMoeLayoutRankMajor;
  int nRanks_ = 0, nLocal_ = 0, maxTokens_ = 0, topK_ = 0, alignment_ = 1;
  int64_t nRows_ = 0;
  std::vector<int64_t> rowBase_, placed_, group_;
  std::vector<int32_t> expertCounts_;
  std::vector<int32_t> first_, next_, end_; // [R, L] slots within the group: of a source's first, next, last + 1 row
  Table<int32_t> ids_, slots_;
};

} // namespace moe
