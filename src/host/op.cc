#include "host/op.h"

#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "host/host_backend.h"

namespace moe {
namespace {

constexpr const char* kValueNames[][kOpValues] = {
  {},
  {"config.topK", "config.maxTokens", "config.layout", "config.expertAlignment", "config.hostCounts"},
  {"routing", "args.quant", "args.type", "args.hidden", "args.scaleBytes", "args.flags", "args.topkWeights"},
  {"routing", "args.hidden", "args.type", "args.flags", "args.weights", "args.withGradWeights", "args.quant"},
  {"bytes"},
  {"ptr"},
};
constexpr const char* kKindNames[] = {"ncclMoeCommInitHost", "ncclMoeRoutingCreate", "ncclMoeDispatch",
                                      "ncclMoeCombine",      "ncclMoeMemAlloc",      "ncclMoeMemFree"};
constexpr const char* kTensorNames[] = {"args.x", "args.gradWeights"};
constexpr int kKinds = static_cast<int>(OpKind::memFree) + 1;

// Of these values the ranks compare only whether there is one.
bool isPointer(const char* name) {
  return name != nullptr && (strcmp(name, "args.topkWeights") == 0 || strcmp(name, "args.weights") == 0);
}

const char* kindName(int64_t kind) { return kind >= 0 && kind < kKinds ? kKindNames[kind] : "something unknown"; }

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  char out[400];
  va_list args;
  va_start(args, text);
  vsnprintf(out, sizeof(out), text, args);
  va_end(args);
  return out;
}

} // namespace

const char* opValueName(OpKind kind, int field) {
  return field >= 0 && field < kOpValues ? kValueNames[static_cast<int>(kind)][field] : nullptr;
}

Op::Op(HostBackend& host, OpKind kind, const char* function)
  : host_(host), kind_(kind), function_(function), sequence_(host.nextSequence()) {
  std::fill(std::begin(value_), std::end(value_), 0);
}

ncclResult_t Op::step(bool* progress) {
  const Phase before = phase_;
  switch (phase_) {
  case Phase::prepare:
    MOECHECK(prepare());
    break;
  case Phase::headers:
    MOECHECK(exchangeHeaders(progress));
    break;
  case Phase::verdicts:
    MOECHECK(exchangeVerdicts(progress));
    break;
  case Phase::rows: {
    bool finished = false;
    MOECHECK(moveRows(progress, &finished));
    if (finished) phase_ = Phase::flush;
    break;
  }
  case Phase::flush: {
    bool flushed = true;
    for (int r = 0; r < host_.nRanks(); r++) flushed &= r == host_.rank() || host_.channel(r).flushed();
    if (flushed) phase_ = Phase::done;
    break;
  }
  case Phase::done:
    break;
  }
  *progress |= phase_ != before;
  return ncclSuccess;
}

ncclResult_t Op::prepare() {
  const int nRanks = host_.nRanks();
  outAt_.assign(nRanks + 1, 0);
  sent_.assign(nRanks, 0);
  received_.assign(nRanks, 0);
  headers_.assign(nRanks, OpHeader{});
  verdicts_.assign(nRanks, Verdict{});
  counts_.assign(std::max(static_cast<size_t>(nRanks) * countsFrom(), static_cast<size_t>(host_.nLocal())), 0);
  out_.clear();
  for (int r = 0; r < nRanks; r++) {
    int n = 0;
    const int32_t* counts = countsTo(r, &n);
    OpHeader header{sequence_, static_cast<int32_t>(kind_), n, rowsTo(r), {}};
    std::copy(std::begin(value_), std::end(value_), header.value);
    if (r == host_.rank()) {
      headers_[r] = header;
      if (n > 0) std::copy(counts, counts + n, countsOf(r));
    } else {
      const auto* fixed = reinterpret_cast<const uint8_t*>(&header);
      const auto* rest = reinterpret_cast<const uint8_t*>(counts);
      out_.insert(out_.end(), fixed, fixed + sizeof(header));
      if (n > 0) out_.insert(out_.end(), rest, rest + static_cast<size_t>(n) * sizeof(int32_t));
    }
    outAt_[r + 1] = out_.size();
  }
  phase_ = Phase::headers;
  return ncclSuccess;
}

ncclResult_t Op::exchangeHeaders(bool* progress) {
  bool finished = true;
  for (int r = 0; r < host_.nRanks(); r++) {
    if (r == host_.rank()) continue;
    Channel& channel = host_.channel(r);
    const size_t toSend = outAt_[r + 1] - outAt_[r] - sent_[r];
    const size_t wrote = toSend > 0 ? channel.out().write(out_.data() + outAt_[r] + sent_[r], toSend) : 0;
    sent_[r] += wrote;
    *progress |= wrote > 0;
    finished &= wrote == toSend;
    for (;;) {
      const size_t has = received_[r];
      OpHeader& header = headers_[r];
      const bool fixed = has < sizeof(OpHeader);
      if (!fixed && header.nCounts == 0) break;
      auto* to = fixed ? reinterpret_cast<uint8_t*>(&header) + has
                       : reinterpret_cast<uint8_t*>(countsOf(r)) + (has - sizeof(OpHeader));
      const size_t whole = sizeof(OpHeader) + (fixed ? 0 : static_cast<size_t>(header.nCounts) * sizeof(int32_t));
      if (has == whole) break;
      const size_t got = channel.in().read(to, whole - has);
      received_[r] += got;
      *progress |= got > 0;
      if (got < whole - has) {
        finished = false;
        break;
      }
      if (!fixed) break;
      // Counts may come even where this call has none: then the ranks make different calls, which the verdicts tell.
      if (header.sequence != sequence_ || (header.nCounts != 0 && header.nCounts != host_.nLocal())) {
        return fail(ncclRemoteError, "%s (call %" PRIu64 "): rank %d sent a malformed header", function_, sequence_, r);
      }
    }
  }
  if (!finished) return ncclSuccess;
  if (mine_.kind == Verdict::ok) mine_ = compare();
  if (mine_.kind == Verdict::ok) mine_ = judge();
  verdicts_[host_.rank()] = mine_;
  std::fill(sent_.begin(), sent_.end(), 0);
  std::fill(received_.begin(), received_.end(), 0);
  phase_ = Phase::verdicts;
  return ncclSuccess;
}

ncclResult_t Op::exchangeVerdicts(bool* progress) {
  bool finished = true;
  for (int r = 0; r < host_.nRanks(); r++) {
    if (r == host_.rank()) continue;
    Channel& channel = host_.channel(r);
    const size_t wrote =
      channel.out().write(reinterpret_cast<const uint8_t*>(&mine_) + sent_[r], sizeof(Verdict) - sent_[r]);
    const size_t got =
      channel.in().read(reinterpret_cast<uint8_t*>(&verdicts_[r]) + received_[r], sizeof(Verdict) - received_[r]);
    sent_[r] += wrote;
    received_[r] += got;
    *progress |= wrote + got > 0;
    finished &= sent_[r] == sizeof(Verdict) && received_[r] == sizeof(Verdict);
  }
  if (finished) resolve();
  return ncclSuccess;
}

// Whether every rank makes the same call.
Verdict Op::compare() const {
  for (int r = 0; r < host_.nRanks(); r++) {
    const OpHeader& theirs = headers_[r];
    if (theirs.kind != static_cast<int32_t>(kind_)) {
      return Verdict{Verdict::wrongCall, 0, r, 0, static_cast<int64_t>(kind_), theirs.kind, 0};
    }
    for (int field = 0; field < kOpValues; field++) {
      const int64_t a = value_[field], b = theirs.value[field];
      if (a != b && a != kAny && b != kAny) return Verdict{Verdict::differs, field, r, 0, a, b, 0};
    }
  }
  return Verdict{};
}

int64_t Op::agreed(int field) const {
  for (const OpHeader& header : headers_) {
    if (header.value[field] != kAny) return header.value[field];
  }
  return kAny;
}

void Op::resolve() {
  const auto bad =
    std::find_if(verdicts_.begin(), verdicts_.end(), [](const Verdict& v) { return v.kind != Verdict::ok; });
  if (bad == verdicts_.end()) {
    begin();
    phase_ = Phase::rows;
    return;
  }
  outcome_ = judgement(static_cast<int>(bad - verdicts_.begin()), *bad);
  phase_ = Phase::flush;
}

Outcome Op::judgement(int rank, const Verdict& verdict) const {
  const bool argument =
    verdict.kind == Verdict::badSelection || verdict.kind == Verdict::missing || verdict.kind == Verdict::tokens;
  const ncclResult_t result = argument                            ? ncclInvalidArgument
                              : verdict.kind == Verdict::noMemory ? ncclSystemError
                                                                  : ncclInvalidUsage;
  return Outcome{result, describe(rank, verdict)};
}

std::string Op::describe(int rank, const Verdict& v) const {
  const std::string start = std::string(function_) + ": ";
  switch (v.kind) {
  case Verdict::wrongCall:
    return start + format("rank %d calls %s while rank %d calls %s", rank, kindName(v.a), v.other, kindName(v.b));
  case Verdict::differs: {
    const char* name = opValueName(kind_, v.field);
    if (isPointer(name)) {
      const auto what = [](int64_t given) { return given != 0 ? "given" : "NULL"; };
      return start + format("%s differs: %s on rank %d, %s on rank %d", name, what(v.a), rank, what(v.b), v.other);
    }
    return start + format("%s differs: %" PRId64 " on rank %d, %" PRId64 " on rank %d", name != nullptr ? name : "?",
                          v.a, rank, v.b, v.other);
  }
  case Verdict::badSelection:
    return start + format("args.topkIdx on rank %d: token %" PRId64 ", position %" PRId64 ": %" PRId64 " %s", rank, v.a,
                          v.b, v.c, v.field != 0 ? "repeats an expert of that token" : "is not an expert");
  case Verdict::capacity:
    return start + format("args.recvCapacity %" PRId64 " on rank %d is less than the %" PRId64 " rows that it receives",
                          v.a, rank, v.b);
  case Verdict::tooManyRows:
    return start + format("rank %d would receive more rows than an int counts", rank);
  case Verdict::implausible:
    return start + format("rank %d got impossible row counts from rank %d", rank, v.other);
  case Verdict::tokens:
    return start + format("args.nTokens%s on rank %d %s %" PRId64 ", the kept routing has %" PRId64,
                          v.field != 0 ? "Dev" : "", rank, v.field != 0 ? "holds" : "is", v.a, v.b);
  case Verdict::missing: {
    const bool known = v.field >= 0 && v.field < static_cast<int32_t>(std::size(kTensorNames));
    return start + format("%s is NULL on rank %d, which has rows", known ? kTensorNames[v.field] : "?", rank);
  }
  case Verdict::noMemory:
    return start + format("rank %d has no memory for it", rank);
  default:
    return start + format("rank %d refused the call", rank);
  }
}

size_t Op::needsFrom(int peer) const {
  switch (phase_) {
  case Phase::prepare:
    return sizeof(OpHeader) + sizeof(Verdict);
  case Phase::headers: {
    const size_t fixed = sizeof(OpHeader);
    const size_t whole =
      received_[peer] < fixed ? fixed : fixed + static_cast<size_t>(headers_[peer].nCounts) * sizeof(int32_t);
    return whole - received_[peer] + sizeof(Verdict);
  }
  case Phase::verdicts:
    return sizeof(Verdict) - received_[peer];
  case Phase::rows:
    return rowBytesFrom(peer);
  default:
    return 0;
  }
}

bool Op::needsTo(int peer) const {
  switch (phase_) {
  case Phase::prepare:
  case Phase::headers:
    return true;
  case Phase::verdicts:
    return sent_[peer] < sizeof(Verdict);
  case Phase::rows:
    return rowsLeftTo(peer);
  default:
    return false;
  }
}

bool Op::waitsFor(int peer) const {
  const bool onlyVerdictLeft = phase_ == Phase::headers && needsFrom(peer) == sizeof(Verdict);
  return (needsFrom(peer) > 0 && !onlyVerdictLeft) || (phase_ == Phase::rows && rowsLeftTo(peer)) ||
         !host_.channel(peer).flushed();
}

const char* Op::phaseName() const {
  switch (phase_) {
  case Phase::prepare:
  case Phase::headers:
    return "counts";
  case Phase::verdicts:
    return "agreement";
  case Phase::rows:
    return "rows";
  default:
    return "flush";
  }
}

} // namespace moe
