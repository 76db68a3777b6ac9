#include "perf/moe/reference.h"

#include <algorithm>
#include <cstring>

#include "perf/moe/numeric.h"

namespace moe::perf {

size_t Shape::sendRowBytes() const { return static_cast<size_t>(hidden) * typeBytes(type); }
size_t Shape::recvRowBytes() const { return static_cast<size_t>(hidden) * typeBytes(recvType); }
size_t Shape::combineRowBytes() const { return static_cast<size_t>(hidden) * typeBytes(combineType); }

Shape shapeOf(const Options& o, int nRanks, int nTokens) {
  Shape s;
  s.nRanks = nRanks;
  s.nTokens = nTokens;
  s.maxTokens = o.routingTokens != 0 ? o.routingTokens : nTokens;
  s.hidden = o.hidden;
  s.topK = o.topK;
  s.nExperts = o.experts;
  s.layout = o.layout;
  s.align = o.align;
  s.type = o.type;
  s.recvType = o.quant == ncclMoeQuantNone ? o.type : ncclMoeFloat8e4m3;
  s.combineType = o.type == ncclMoeFloat8e4m3 ? ncclBfloat16 : o.type;
  s.quant = o.quant;
  s.scaleLayout = o.scaleLayout;
  const ncclMoeQuant_t scales = o.type == ncclMoeFloat8e4m3 ? ncclMoeQuantFp8 : o.quant;
  s.scaleBytes = NCCL_MOE_QUANT_SCALE_BYTES(scales, o.hidden);
  s.weightsInside = o.weightsInside;
  s.exact = o.exact;
  s.combineQuant = o.combineQuant;
  s.seed = o.seed;
  return s;
}

int firstExpert(const Shape& s, int rank) {
  return rank * (s.nExperts / s.nRanks) + std::min(rank, s.nExperts % s.nRanks);
}
int nLocalExperts(const Shape& s, int rank) { return firstExpert(s, rank + 1) - firstExpert(s, rank); }
int rankOfExpert(const Shape& s, int expert) {
  int rank = 0;
  while (firstExpert(s, rank + 1) <= expert) rank++;
  return rank;
}

Routing::Routing(const Shape& s, const RoutingSource& source)
  : nTokens_(s.nTokens), topK_(s.topK), idx_(static_cast<size_t>(s.nRanks) * s.nTokens * s.topK) {
  for (int r = 0; r < s.nRanks; r++) {
    for (int t = 0; t < s.nTokens; t++) source.select(r, t, &idx_[(r * nTokens_ + t) * topK_]);
  }
}

namespace {

int64_t roundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The token's rows on one rank: calls visit(k, local expert) for each selection that the rank holds.
template <typename Visit> void forSelections(const Shape& s, const int* idx, int rank, const Visit& visit) {
  const int first = firstExpert(s, rank);
  const int last = firstExpert(s, rank + 1);
  for (int k = 0; k < s.topK; k++) {
    if (idx[k] >= first && idx[k] < last) visit(k, idx[k] - first);
  }
}

} // namespace

Delivery deliveryOf(const Shape& s, const Routing& routing, int rank) {
  const int nLocal = nLocalExperts(s, rank);
  Delivery d;
  std::vector<std::vector<DeliveredRow>> groups(nLocal); // per expert, in the order (source, token)
  for (int source = 0; source < s.nRanks; source++) {
    for (int t = 0; t < s.nTokens; t++) {
      bool here = false;
      forSelections(s, routing.of(source, t), rank, [&](int k, int local) {
        groups[local].push_back(DeliveredRow{source, t, k});
        here = true;
      });
      if (here && s.layout == ncclMoeLayoutRankMajor) d.rows.push_back(DeliveredRow{source, t, -1});
    }
  }
  for (const auto& group : groups) d.counts.push_back(static_cast<int>(group.size()));
  if (s.layout == ncclMoeLayoutRankMajor) {
    d.nRows = static_cast<int64_t>(d.rows.size());
    d.rowAt.resize(d.rows.size());
    for (size_t i = 0; i < d.rows.size(); i++) d.rowAt[i] = static_cast<int32_t>(i);
    return d;
  }
  for (int l = 0; l < nLocal; l++) {
    const bool padded = s.layout == ncclMoeLayoutExpertPadded;
    const auto begin = static_cast<int64_t>(d.rowAt.size());
    const auto count = static_cast<int64_t>(groups[l].size());
    d.offsets.push_back(static_cast<int>(begin));
    d.rowAt.resize(begin + (padded ? int64_t{s.nRanks} * s.maxTokens : roundUp(count, s.align)), -1);
    for (int64_t i = 0; i < count; i++) {
      d.rowAt[begin + i] = static_cast<int32_t>(d.rows.size());
      d.rows.push_back(groups[l][i]);
    }
  }
  d.nRows = static_cast<int64_t>(d.rowAt.size());
  d.offsets.push_back(static_cast<int>(d.nRows));
  // In EXPERT_PADDED the count of rows is that of the rows delivered: no group is rounded up.
  if (s.layout == ncclMoeLayoutExpertPadded) d.nRows = static_cast<int64_t>(d.rows.size());
  return d;
}

int64_t slotsOf(const Shape& s, const Routing& routing, int rank) {
  const int nLocal = nLocalExperts(s, rank);
  if (s.layout == ncclMoeLayoutExpertPadded) return int64_t{nLocal} * s.nRanks * s.maxTokens;
  std::vector<int64_t> counts(nLocal);
  int64_t nRows = 0;
  for (int source = 0; source < s.nRanks; source++) {
    for (int t = 0; t < s.nTokens; t++) {
      bool here = false;
      forSelections(s, routing.of(source, t), rank, [&](int, int local) {
        counts[local]++;
        here = true;
      });
      if (here) nRows++;
    }
  }
  if (s.layout == ncclMoeLayoutRankMajor) return nRows;
  int64_t nSlots = 0;
  for (const int64_t n : counts) nSlots += roundUp(n, s.align);
  return nSlots;
}

int64_t mostSlotsOf(const Shape& s, int rank) {
  const int64_t tokens = int64_t{s.nRanks} * s.nTokens, nLocal = nLocalExperts(s, rank);
  if (s.layout == ncclMoeLayoutRankMajor) return tokens;
  if (s.layout == ncclMoeLayoutExpertPadded) return nLocal * s.nRanks * s.maxTokens;
  return tokens * std::min<int64_t>(s.topK, nLocal) + nLocal * (s.align - 1);
}

Traffic trafficOf(const Shape& s, const Routing& routing) {
  int64_t pairs = 0;      // (token, other rank)
  int64_t selections = 0; // of experts on other ranks
  int64_t allPairs = 0;   // the same with the own rank
  int64_t allSelections = 0;
  for (int r = 0; r < s.nRanks; r++) {
    for (int t = 0; t < s.nTokens; t++) {
      for (int to = 0; to < s.nRanks; to++) {
        int n = 0;
        forSelections(s, routing.of(r, t), to, [&](int, int) { n++; });
        allPairs += n > 0 ? 1 : 0;
        allSelections += n;
        if (to == r) continue;
        pairs += n > 0 ? 1 : 0;
        selections += n;
      }
    }
  }
  const double ranks = s.nRanks;
  const auto dispatchRow = static_cast<double>(s.recvRowBytes()) + s.scaleBytes;
  const auto combineRow = static_cast<double>(s.combineRowBytes());
  const double combineWire =
    s.combineQuant == ncclMoeQuantNone ? combineRow : s.hidden + NCCL_MOE_QUANT_SCALE_BYTES(s.combineQuant, s.hidden);
  const auto delivered = static_cast<double>(s.layout == ncclMoeLayoutRankMajor ? allPairs : allSelections);
  Traffic traffic;
  traffic.wireDispatch = static_cast<double>(pairs) * (dispatchRow + 8.0 * s.topK) / ranks;
  traffic.wireCombine = static_cast<double>(s.exact ? selections : pairs) * combineWire / ranks;
  traffic.allDispatch = delivered * dispatchRow / ranks;
  traffic.allCombine = delivered * combineRow / ranks;
  return traffic;
}

int64_t rowsBetween(const Shape& s, const Routing& routing, int from, int to, bool perSelection) {
  int64_t rows = 0;
  for (int t = 0; t < s.nTokens; t++) {
    int n = 0;
    forSelections(s, routing.of(from, t), to, [&](int, int) { n++; });
    rows += perSelection ? n : std::min(n, 1);
  }
  return rows;
}

void tokenRow(const Shape& s, int rank, int token, void* row) {
  fillRow(s.type, keyOf(s.seed, Purpose::row, rank, token), s.hidden, row);
}

void tokenScales(const Shape& s, int rank, int token, void* scales) {
  fillBytes(keyOf(s.seed, Purpose::scale, rank, token), s.scaleBytes, scales);
}

float tokenWeight(const Shape& s, int rank, int token, int k) {
  return static_cast<float>(unitOf(keyOf(s.seed, Purpose::weight, rank, token, k)));
}

void receivedRow(const Shape& s, int rank, int token, void* row, void* scales) {
  if (s.quant == ncclMoeQuantNone) {
    tokenRow(s, rank, token, row);
    if (s.scaleBytes > 0) tokenScales(s, rank, token, scales);
    return;
  }
  std::vector<uint16_t> original(s.hidden);
  tokenRow(s, rank, token, original.data());
  quantizeRow(s.quant, original.data(), s.hidden, static_cast<uint8_t*>(row), static_cast<uint8_t*>(scales));
}

void expertRow(const Shape& s, int holder, const DeliveredRow& what, void* row) {
  const uint64_t key = keyOf(s.seed, Purpose::expertOutput, holder, what.source, what.token, what.k + 1);
  fillRow(s.combineType, key, s.hidden, row);
}

void combinedRow(const Shape& s, const Routing& routing, int rank, int token, void* row) {
  const int* idx = routing.of(rank, token);
  std::vector<float> sum(s.hidden, 0.0f);
  std::vector<float> partial(s.hidden);
  std::vector<float> value(s.hidden);
  std::vector<uint8_t> bytes(s.combineRowBytes());
  const auto addSelection = [&](int holder, int k, std::vector<float>& to) {
    expertRow(s, holder, DeliveredRow{rank, token, k}, bytes.data());
    rowToFloat(s.combineType, bytes.data(), s.hidden, value.data());
    const float weight = s.weightsInside && k >= 0 ? tokenWeight(s, rank, token, k) : 1.0f;
    for (int h = 0; h < s.hidden; h++) {
      const float product = value[h] * weight;
      to[h] = to[h] + product;
    }
  };
  if (s.exact) {
    for (int k = 0; k < s.topK; k++) {
      if (idx[k] >= 0) addSelection(rankOfExpert(s, idx[k]), k, sum);
    }
    rowFromFloat(s.combineType, sum.data(), s.hidden, row);
    return;
  }
  for (int holder = 0; holder < s.nRanks; holder++) {
    bool here = false;
    std::fill(partial.begin(), partial.end(), 0.0f);
    forSelections(s, idx, holder, [&](int k, int) {
      if (s.layout == ncclMoeLayoutRankMajor && here) return; // one row stands for all of them
      addSelection(holder, s.layout == ncclMoeLayoutRankMajor ? -1 : k, partial);
      here = true;
    });
    if (!here) continue;
    if (s.combineQuant != ncclMoeQuantNone) {
      castAndBack(partial.data(), s.hidden, value.data());
    } else {
      rowFromFloat(s.combineType, partial.data(), s.hidden, bytes.data());
      rowToFloat(s.combineType, bytes.data(), s.hidden, value.data());
    }
    for (int h = 0; h < s.hidden; h++) sum[h] = sum[h] + value[h];
  }
  rowFromFloat(s.combineType, sum.data(), s.hidden, row);
}

} // namespace moe::perf
