// Combine: every rank reduces its rows of a token and streams the results to the token's owner, in the order in which
// dispatch delivered the rows; the owner takes the next row of each rank that it sent the token to, and adds.  All
// streams to an owner are in its token order, so it needs no staging.
#include <algorithm>

#include "base/types.h"
#include "host/host_backend.h"
#include "host/row_math.h"

namespace moe {
namespace {

constexpr int kBurst = 8; // rows made for, or tokens taken from the peers before the loop turns to something else

// What a combine's headers say; the names are in op.cc.
enum Value { vRouting, vHidden, vType, vFlags, vWeights, vGrads, vQuant };
enum Tensor { tX, tGradWeights };

class CombineOp final : public Op {
 public:
  CombineOp(HostBackend& host, const ncclMoeCombineArgs_t& args, HostRouting& routing)
    : Op(host, OpKind::combine, "ncclMoeCombine"), args_(args), send_(routing.send), recv_(routing.recv),
      topK_(routing.topK), rankMajor_(routing.layout == ncclMoeLayoutRankMajor),
      exact_((args.flags & NCCL_MOE_EXACT) != 0), cast_(args.quant != ncclMoeQuantNone),
      grads_(args.withGradWeights != 0), rowBytes_(static_cast<size_t>(args.hidden) * typeBytes(args.type)),
      made_(host.nRanks(), 0), madeSelections_(host.nRanks(), 0), taken_(host.nRanks(), 0) {
    const bool hasRows = recv_.rowBase(host.nRanks()) > 0;
    value_[vRouting] = routing.id;
    value_[vHidden] = args.hidden;
    value_[vType] = args.type;
    value_[vFlags] = args.flags;
    value_[vWeights] = hasRows ? args.weights != nullptr : kAny;
    value_[vGrads] = args.withGradWeights;
    value_[vQuant] = args.quant;
    if (hasRows && args.x == nullptr) mine_ = Verdict{Verdict::missing, tX, 0, 0, 0, 0, 0};
    if (hasRows && grads_ && args.gradWeights == nullptr)
      mine_ = Verdict{Verdict::missing, tGradWeights, 0, 0, 0, 0, 0};
  }

 protected:
  void begin() override {
    const size_t perRow = exact_ ? 1 : static_cast<size_t>(topK_);
    const size_t payload = cast_ ? static_cast<size_t>(args_.hidden) : rowBytes_;
    const size_t scales = NCCL_MOE_QUANT_SCALE_BYTES(args_.quant, args_.hidden); // 0 without the cast
    wire_ = WireRow::make(payload, scales, 0, exact_ && agreed(vWeights) == 1 ? 1 : 0, grads_ ? perRow : 0);
  }
  ncclResult_t moveRows(bool* progress, bool* finished) override;
  size_t rowBytesFrom(int peer) const override {
    return static_cast<size_t>((exact_ ? send_.selectionsTo(peer) : send_.rowsTo(peer)) - taken_[peer]) * wire_.stride;
  }
  bool rowsLeftTo(int peer) const override { return made_[peer] < recv_.rowsFrom(peer); }

 private:
  bool makeRow(int owner);
  bool makeExact(int owner);
  bool takeToken();
  bool takeExact();
  const void* reduce(int64_t i, uint8_t* to) const;
  // Row in x of selection k of row i (in the order of dispatch).
  int64_t rowAt(int64_t i, int k) const { return rankMajor_ ? i : recv_.group(recv_.ids(i)[k]) + recv_.slots(i)[k]; }
  const uint8_t* x(int64_t row) const {
    return static_cast<const uint8_t*>(args_.x) + static_cast<size_t>(row) * rowBytes_;
  }
  float grad(int64_t i, int k) const {
    if (recv_.ids(i)[k] < 0) return 0.0f;
    return args_.gradWeights[rankMajor_ ? i * topK_ + k : rowAt(i, k)];
  }
  float* gradOut(int k) const { return args_.gradTopkWeights + static_cast<size_t>(nextToken_) * topK_ + k; }
  uint8_t* out() const { return static_cast<uint8_t*>(args_.out) + static_cast<size_t>(nextToken_) * rowBytes_; }

  const ncclMoeCombineArgs_t args_;
  const SendPlan& send_;
  const RecvPlan& recv_;
  const int topK_;
  const bool rankMajor_, exact_, cast_, grads_;
  const size_t rowBytes_;
  WireRow wire_{};
  std::vector<int64_t> made_;       // [R] rows of each owner reduced and sent
  std::vector<int> madeSelections_; // [R] EXACT: position in the next row from which selections have still to be sent
  int nextToken_ = 0;
  std::vector<int64_t> taken_; // [R] rows taken from each rank's stream
};

ncclResult_t CombineOp::moveRows(bool* progress, bool* finished) {
  *finished = true;
  for (int r = 0; r < host_.nRanks(); r++) {
    if (r == host_.rank()) continue;
    for (int i = 0; i < kBurst && rowsLeftTo(r) && (exact_ ? makeExact(r) : makeRow(r)); i++) *progress = true;
    *finished &= !rowsLeftTo(r);
  }
  for (int i = 0; i < kBurst && nextToken_ < send_.nTokens() && (exact_ ? takeExact() : takeToken()); i++)
    *progress = true;
  *finished &= nextToken_ == send_.nTokens();
  return ncclSuccess;
}

// This rank's part of row i, as it crosses the wire: where it lies if it need not be computed, or else in `to`.
const void* CombineOp::reduce(int64_t i, uint8_t* to) const {
  if (rankMajor_ && !cast_) return x(i);
  const void* rows[NCCL_MOE_MAX_TOPK];
  float weights[NCCL_MOE_MAX_TOPK];
  size_t n = 0;
  if (rankMajor_) {
    rows[n++] = x(i);
  } else {
    for (int k = 0; k < topK_; k++) {
      if (recv_.ids(i)[k] < 0) continue;
      const int64_t row = rowAt(i, k);
      if (args_.weights != nullptr) weights[n] = args_.weights[row];
      rows[n++] = x(row);
    }
  }
  const auto hidden = static_cast<size_t>(args_.hidden);
  const float* factors = args_.weights != nullptr ? weights : nullptr;
  if (cast_) {
    castSum(hidden, rows, factors, n, to, to + wire_.scaleAt);
  } else {
    sumRows(args_.type, hidden, rows, factors, n, to);
  }
  return to;
}

// Makes and sends the owner's next row; false if its ring is full.
bool CombineOp::makeRow(int owner) {
  uint8_t* to = host_.channel(owner).out().reserve(wire_.stride);
  if (to == nullptr) return false;
  const int64_t i = recv_.rowBase(owner) + made_[owner];
  const void* row = reduce(i, to);
  if (row != to) memcpy(to, row, rowBytes_);
  if (grads_) {
    auto* grads = reinterpret_cast<float*>(to + wire_.gradAt);
    for (int k = 0; k < topK_; k++) grads[k] = grad(i, k);
  }
  host_.channel(owner).out().commit(wire_.stride);
  made_[owner]++;
  return true;
}

// Sends the owner's next selections, as many of one row as its ring takes; false if that is none.
bool CombineOp::makeExact(int owner) {
  const int64_t i = recv_.rowBase(owner) + made_[owner];
  RingWriter& ring = host_.channel(owner).out();
  for (int& k = madeSelections_[owner]; k < topK_; k++) {
    if (recv_.ids(i)[k] < 0) continue;
    uint8_t* to = ring.reserve(wire_.stride);
    if (to == nullptr) return false;
    const int64_t row = rowAt(i, k);
    memcpy(to, x(row), rowBytes_);
    if (wire_.nWeights > 0) memcpy(to + wire_.weightAt, &args_.weights[row], sizeof(float));
    if (grads_) memcpy(to + wire_.gradAt, &args_.gradWeights[row], sizeof(float));
    ring.commit(wire_.stride);
  }
  madeSelections_[owner] = 0;
  made_[owner]++;
  return true;
}

// Adds up the next token if all its ranks' rows are there.
bool CombineOp::takeToken() {
  const int16_t* dests = send_.dests(nextToken_);
  const int nDests = send_.nDests(nextToken_);
  const void* rows[NCCL_MOE_MAX_TOPK];
  for (int i = 0; i < nDests; i++) {
    if (dests[i] == host_.rank()) continue;
    rows[i] = host_.channel(dests[i]).in().peek(wire_.stride);
    if (rows[i] == nullptr) return false;
  }
  const int64_t own = recv_.rowBase(host_.rank()) + taken_[host_.rank()];
  for (int i = 0; i < nDests; i++) {
    if (dests[i] == host_.rank()) rows[i] = reduce(own, host_.scratchRow());
  }
  const auto hidden = static_cast<size_t>(args_.hidden), n = static_cast<size_t>(nDests);
  if (cast_) {
    sumCasts(hidden, rows, n, wire_.scaleAt, out());
  } else {
    sumRows(args_.type, hidden, rows, nullptr, n, out());
  }
  const ExpertHome* homes = send_.homes(nextToken_);
  for (int k = 0; k < topK_ && grads_; k++) {
    *gradOut(k) = 0.0f;
    if (homes[k].rank == host_.rank()) *gradOut(k) = grad(own, k);
    for (int i = 0; i < nDests; i++) {
      if (dests[i] != homes[k].rank || dests[i] == host_.rank()) continue;
      memcpy(gradOut(k), static_cast<const uint8_t*>(rows[i]) + wire_.gradAt + static_cast<size_t>(k) * sizeof(float),
             sizeof(float));
    }
  }
  for (int i = 0; i < nDests; i++) {
    taken_[dests[i]]++;
    if (dests[i] != host_.rank()) host_.channel(dests[i]).in().consume(wire_.stride);
  }
  nextToken_++;
  return true;
}

// The same with one row per selection.
bool CombineOp::takeExact() {
  const ExpertHome* homes = send_.homes(nextToken_);
  const int16_t* dests = send_.dests(nextToken_);
  const int nDests = send_.nDests(nextToken_);
  const uint8_t* next[NCCL_MOE_MAX_TOPK]; // of each rank: the row of its next selection
  size_t bytes[NCCL_MOE_MAX_TOPK];
  for (int i = 0; i < nDests; i++) {
    if (dests[i] == host_.rank()) continue;
    bytes[i] = static_cast<size_t>(
                 std::count_if(homes, homes + topK_, [&](const ExpertHome& home) { return home.rank == dests[i]; })) *
               wire_.stride;
    next[i] = host_.channel(dests[i]).in().peek(bytes[i]);
    if (next[i] == nullptr) return false;
  }
  const int64_t own = recv_.rowBase(host_.rank()) + taken_[host_.rank()];
  const bool weighted = wire_.nWeights > 0;
  const void* rows[NCCL_MOE_MAX_TOPK];
  float weights[NCCL_MOE_MAX_TOPK];
  size_t n = 0;
  for (int k = 0; k < topK_; k++) {
    float grad = 0.0f;
    if (homes[k].rank == host_.rank()) {
      const int64_t row = rowAt(own, k);
      if (weighted) weights[n] = args_.weights[row];
      if (grads_) grad = args_.gradWeights[row];
      rows[n++] = x(row);
    } else if (homes[k].rank >= 0) {
      const auto i = std::find(dests, dests + nDests, homes[k].rank) - dests;
      if (weighted) memcpy(&weights[n], next[i] + wire_.weightAt, sizeof(float));
      if (grads_) memcpy(&grad, next[i] + wire_.gradAt, sizeof(float));
      rows[n++] = next[i];
      next[i] += wire_.stride;
    }
    if (grads_) *gradOut(k) = grad;
  }
  sumRows(args_.type, static_cast<size_t>(args_.hidden), rows, weighted ? weights : nullptr, n, out());
  for (int i = 0; i < nDests; i++) {
    if (dests[i] == host_.rank()) {
      taken_[dests[i]]++;
    } else {
      taken_[dests[i]] += static_cast<int64_t>(bytes[i] / wire_.stride);
      host_.channel(dests[i]).in().consume(bytes[i]);
    }
  }
  nextToken_++;
  return true;
}

} // namespace

std::unique_ptr<Op> makeCombine(HostBackend& host, const ncclMoeCombineArgs_t& args, HostRouting& routing) {
  return std::make_unique<CombineOp>(host, args, routing);
}

} // namespace moe
