// Dispatch: rows stream through the rings in token order, once per (token, rank), and receivers put each straight into
// its final places, which the counts of the headers and the ids beside the row give.
#include <algorithm>

#include "base/types.h"
#include "host/host_backend.h"
#include "host/row_math.h"

namespace moe {
namespace {

constexpr int kBurst = 16; // rows sent before the loop turns to receiving

// What a dispatch's headers say; the names are in op.cc.
enum Value { vRouting, vQuant, vType, vHidden, vScaleBytes, vFlags, vWeights };

class DispatchOp final : public Op {
 public:
  DispatchOp(HostBackend& host, const ncclMoeDispatchArgs_t& args, HostRouting& routing)
    : Op(host, OpKind::dispatch, "ncclMoeDispatch"), args_(args), routing_(routing), topK_(routing.topK),
      sentRows_(host.nRanks(), 0) {
    nTokens_ = args.nTokensDev != nullptr ? std::clamp(*args.nTokensDev, 0, args.nTokens) : args.nTokens;
    scaleBytes_ =
      args.quant != ncclMoeQuantNone ? NCCL_MOE_QUANT_SCALE_BYTES(args.quant, args.hidden) : args.scaleBytes;
    payloadBytes_ = static_cast<size_t>(args.hidden) * (args.quant != ncclMoeQuantNone ? 1 : typeBytes(args.type));
    value_[vRouting] = routing.id;
    value_[vHidden] = args.hidden;
    value_[vType] = args.type;
    value_[vQuant] = args.quant;
    value_[vScaleBytes] = args.scaleBytes;
    value_[vFlags] = args.flags;
    value_[vWeights] = nTokens_ == 0 ? kAny : args.topkWeights != nullptr;
    plan();
  }

 protected:
  // Of a kept routing also when the call is refused: with them the peers have what they had.
  bool planned() const { return mine_.kind == Verdict::ok || (args_.flags & NCCL_MOE_KEEP_ROUTING) != 0; }
  int64_t rowsTo(int peer) const override { return planned() ? routing_.send.rowsTo(peer) : 0; }
  const int32_t* countsTo(int peer, int* n) const override {
    *n = planned() ? host_.nLocal(peer) : 0;
    return routing_.send.counts() + host_.firstLocal(peer);
  }
  int countsFrom() const override { return host_.nLocal(); }
  Verdict judge() override;
  void begin() override;
  ncclResult_t moveRows(bool* progress, bool* finished) override;
  size_t rowBytesFrom(int peer) const override {
    return static_cast<size_t>(routing_.recv.rowsFrom(peer) - routing_.recv.placed(peer)) * wire_.stride;
  }
  bool rowsLeftTo(int peer) const override { return sentRows_[peer] < routing_.send.rowsTo(peer); }

 private:
  void plan();
  bool sendToken();
  void describeRow(int rank, int32_t* ids) const;
  bool place(int source, const int32_t* ids, const uint8_t* row, const uint8_t* scales, const float* weights);
  void placeScales(int64_t row, int64_t plane, int64_t inPlane, const uint8_t* scales);

  const ncclMoeDispatchArgs_t args_;
  HostRouting& routing_;
  const int topK_;
  int nTokens_ = 0;
  int scaleBytes_ = 0;
  size_t payloadBytes_ = 0;
  bool streaming_ = false;
  WireRow wire_{};
  int nextToken_ = 0;
  std::vector<int64_t> sentRows_;
  uint8_t ownScales_[WireRow::kMaxScaleBytes];
};

void DispatchOp::plan() {
  SendPlan& send = routing_.send;
  if ((args_.flags & NCCL_MOE_KEEP_ROUTING) != 0) {
    const int onDevice = args_.nTokensDev != nullptr ? 1 : 0;
    if (nTokens_ != send.nTokens()) mine_ = Verdict{Verdict::tokens, onDevice, 0, 0, nTokens_, send.nTokens(), 0};
    return;
  }
  const Placement placement = host_.placement();
  const TopkView topk{args_.topkIdx, args_.topkIdxType == ncclInt64, topK_};
  BadSelection bad{};
  if (send.build(topk, nTokens_, placement, host_.firstLocals(), &bad)) return;
  const bool repeated = bad.expert >= 0 && bad.expert < placement.nExperts;
  mine_ = Verdict{Verdict::badSelection, repeated ? 1 : 0, 0, 0, bad.token, bad.position, bad.expert};
}

Verdict DispatchOp::judge() {
  std::vector<int64_t> rows(host_.nRanks());
  for (int r = 0; r < host_.nRanks(); r++) {
    rows[r] = header(r).rows;
    if (!routing_.recv.plausible(rows[r], countsOf(r))) return Verdict{Verdict::implausible, 0, r, 0, 0, 0, 0};
  }
  if (!routing_.recv.build(rows.data(), receivedCounts())) return Verdict{Verdict::tooManyRows, 0, 0, 0, 0, 0, 0};
  routing_.counted = true;
  const int64_t nRows = routing_.recv.nRows();
  if (routing_.layout != ncclMoeLayoutExpertPadded && nRows > args_.recvCapacity) {
    return Verdict{Verdict::capacity, 0, 0, 0, args_.recvCapacity, nRows, 0};
  }
  return Verdict{};
}

void DispatchOp::begin() {
  const RecvPlan& recv = routing_.recv;
  const int nLocal = host_.nLocal();
  if (args_.recvCount != nullptr) *args_.recvCount = static_cast<int>(recv.nRows());
  if (args_.expertCounts != nullptr) std::copy_n(recv.expertCounts(), nLocal, args_.expertCounts);
  if (args_.expertOffsets != nullptr) {
    for (int l = 0; l < nLocal; l++) args_.expertOffsets[l] = static_cast<int>(recv.group(l));
    args_.expertOffsets[nLocal] = static_cast<int>(recv.nRows());
  }
  const size_t k = static_cast<size_t>(topK_);
  wire_ = WireRow::make(payloadBytes_, static_cast<size_t>(scaleBytes_), k, agreed(vWeights) == 1 ? k : 0, 0);
  streaming_ = host_.streams(static_cast<size_t>(recv.nRows()) * payloadBytes_);
}

ncclResult_t DispatchOp::moveRows(bool* progress, bool* finished) {
  for (int i = 0; i < kBurst && nextToken_ < nTokens_ && sendToken(); i++) *progress = true;
  *finished = nextToken_ == nTokens_;
  const RecvPlan& recv = routing_.recv;
  for (int r = 0; r < host_.nRanks(); r++) {
    if (r == host_.rank()) continue;
    RingReader& in = host_.channel(r).in();
    while (recv.placed(r) < recv.rowsFrom(r)) {
      const uint8_t* row = in.peek(wire_.stride);
      if (row == nullptr) break;
      int32_t ids[NCCL_MOE_MAX_TOPK]; // a copy: what is checked is what is used
      memcpy(ids, row + wire_.idAt, wire_.nIds * sizeof(int32_t));
      const auto* weights = wire_.nWeights > 0 ? reinterpret_cast<const float*>(row + wire_.weightAt) : nullptr;
      if (!place(r, ids, row, row + wire_.scaleAt, weights)) {
        return fail(ncclRemoteError, "ncclMoeDispatch: rank %d sent a row that its counts do not allow", r);
      }
      in.consume(wire_.stride);
      *progress = true;
    }
    *finished &= recv.placed(r) == recv.rowsFrom(r);
  }
  if (*finished && streaming_) streamFence();
  return ncclSuccess;
}

// The local ids at a rank of the next token's selections.
void DispatchOp::describeRow(int rank, int32_t* ids) const {
  const ExpertHome* homes = routing_.send.homes(nextToken_);
  for (int k = 0; k < topK_; k++) ids[k] = homes[k].rank == rank ? homes[k].local : -1;
}

// Sends the next token to all its ranks; false if one of their rings is full.
bool DispatchOp::sendToken() {
  const int t = nextToken_;
  const SendPlan& send = routing_.send;
  const int16_t* dests = send.dests(t);
  const int nDests = send.nDests(t);
  uint8_t* slot[NCCL_MOE_MAX_TOPK];
  uint8_t* first = nullptr;
  for (int i = 0; i < nDests; i++) {
    if (dests[i] == host_.rank()) continue;
    slot[i] = host_.channel(dests[i]).out().reserve(wire_.stride);
    if (slot[i] == nullptr) return false;
    if (first == nullptr) first = slot[i];
  }
  const size_t wideRow = static_cast<size_t>(args_.hidden) * typeBytes(args_.type);
  const uint8_t* row = static_cast<const uint8_t*>(args_.x) + static_cast<size_t>(t) * wideRow;
  const uint8_t* scales = args_.scales != nullptr
                            ? static_cast<const uint8_t*>(args_.scales) + static_cast<size_t>(t) * scaleBytes_
                            : nullptr;
  const float* weights = wire_.nWeights > 0 ? args_.topkWeights + static_cast<size_t>(t) * topK_ : nullptr;
  if (args_.quant != ncclMoeQuantNone && nDests > 0) {
    // Cast once, straight into the first ring if there is one.
    uint8_t* to = first != nullptr ? first : host_.scratchRow();
    castRow(args_.quant, row, args_.hidden, to, ownScales_);
    row = to;
    scales = ownScales_;
  }
  for (int i = 0; i < nDests; i++) {
    int32_t ids[NCCL_MOE_MAX_TOPK];
    describeRow(dests[i], ids);
    if (dests[i] == host_.rank()) {
      place(dests[i], ids, row, scales, weights); // these are this rank's own counts
      continue;
    }
    if (slot[i] != row) memcpy(slot[i], row, payloadBytes_);
    if (wire_.scaleBytes > 0) memcpy(slot[i] + wire_.scaleAt, scales, wire_.scaleBytes);
    memcpy(slot[i] + wire_.idAt, ids, wire_.nIds * sizeof(int32_t));
    if (wire_.nWeights > 0) memcpy(slot[i] + wire_.weightAt, weights, wire_.nWeights * sizeof(float));
  }
  for (int i = 0; i < nDests; i++) {
    if (dests[i] == host_.rank()) continue;
    host_.channel(dests[i]).out().commit(wire_.stride);
    sentRows_[dests[i]]++;
  }
  nextToken_++;
  return true;
}

// Puts a row where it belongs.  False if it contradicts its source's counts; then nothing was written.
bool DispatchOp::place(int source, const int32_t* ids, const uint8_t* row, const uint8_t* scales,
                       const float* weights) {
  RecvPlan& recv = routing_.recv;
  const int64_t at = recv.rowBase(source) + recv.placed(source);
  if (!recv.place(source, ids)) return false;
  auto* out = static_cast<uint8_t*>(args_.recvX);
  if (routing_.layout == ncclMoeLayoutRankMajor) {
    copyRow(out + static_cast<size_t>(at) * payloadBytes_, row, payloadBytes_, streaming_);
    if (scaleBytes_ > 0) placeScales(at, 0, at, scales);
    if (args_.recvTopkIdx != nullptr)
      memcpy(args_.recvTopkIdx + at * topK_, ids, static_cast<size_t>(topK_) * sizeof(int));
    if (args_.recvWeights != nullptr && weights != nullptr) {
      for (int k = 0; k < topK_; k++) args_.recvWeights[at * topK_ + k] = ids[k] >= 0 ? weights[k] : 0.0f;
    }
    return true;
  }
  const int32_t* slots = recv.slots(at);
  const bool padded = routing_.layout == ncclMoeLayoutExpertPadded;
  for (int k = 0; k < topK_; k++) {
    if (ids[k] < 0) continue;
    const int64_t to = recv.group(ids[k]) + slots[k];
    copyRow(out + static_cast<size_t>(to) * payloadBytes_, row, payloadBytes_, streaming_);
    if (scaleBytes_ > 0) placeScales(to, padded ? ids[k] : 0, padded ? slots[k] : to, scales);
    if (args_.recvWeights != nullptr && weights != nullptr) args_.recvWeights[to] = weights[k];
  }
  return true;
}

void DispatchOp::placeScales(int64_t row, int64_t plane, int64_t inPlane, const uint8_t* scales) {
  auto* out = static_cast<uint8_t*>(args_.recvScales);
  if (args_.scaleLayout == ncclMoeScaleRowMajor) {
    memcpy(out + row * scaleBytes_, scales, static_cast<size_t>(scaleBytes_));
    return;
  }
  const int64_t ld = routing_.layout == ncclMoeLayoutExpertPadded
                       ? static_cast<int64_t>(host_.nRanks()) * routing_.maxTokens
                       : args_.recvCapacity;
  const int64_t nWords = scaleBytes_ / 4;
  for (int64_t w = 0; w < nWords; w++) memcpy(out + columnScaleAt(plane, inPlane, w, nWords, ld), scales + w * 4, 4);
}

} // namespace

std::unique_ptr<Op> makeDispatch(HostBackend& host, const ncclMoeDispatchArgs_t& args, HostRouting& routing) {
  return std::make_unique<DispatchOp>(host, args, routing);
}

} // namespace moe
