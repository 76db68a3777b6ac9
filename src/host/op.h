// A collective call of the host backend, as a state machine that never waits.
//
// Every call goes through the same steps, all over the channels' rings, in which calls follow each other:
//   1. headers   each rank tells every other what it calls, with which arguments, and what it will send it
//   2. verdicts  each rank tells every other whether all headers agree with its own and suit it; any verdict but ok
//                ends the call on every rank with the same sentence, and leaves the communicator usable
//   3. rows      whatever the call moves; who sends how much to whom is known from the headers
//   4. flush     between hosts, until the sockets have taken everything
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "host/channel.h"

namespace moe {

class HostBackend;

enum class OpKind : int32_t { init, routingCreate, dispatch, combine, memAlloc, memFree };
constexpr int kOpValues = 8;

// First part of a header; nCounts int32 follow.
struct OpHeader {
  uint64_t sequence;
  int32_t kind;
  int32_t nCounts;
  int64_t rows;
  int64_t value[kOpValues]; // what must agree; kAny: this rank does not care
};
constexpr int64_t kAny = INT64_MIN;

struct Verdict {
  enum Kind : int32_t {
    ok,
    wrongCall,
    differs,
    badSelection,
    capacity,
    tooManyRows,
    implausible,
    tokens,
    missing,
    noMemory
  };
  int32_t kind;
  int32_t field;  // differs, missing: index of the value or tensor; tokens: whether nTokensDev says how many
  int32_t other;  // the rank that differs
  int32_t unused; // keeps the bytes that cross the wire defined
  int64_t a, b, c;
};

// How a call ended, for whoever waits for it.
struct Outcome {
  ncclResult_t result = ncclSuccess;
  std::string sentence;
};

class Op {
 public:
  Op(HostBackend& host, OpKind kind, const char* function);
  virtual ~Op() = default;
  Op(const Op&) = delete;
  Op& operator=(const Op&) = delete;

  // Moves what can be moved; progress: something did.  An error is final for the communicator.
  ncclResult_t step(bool* progress);
  bool done() const { return phase_ == Phase::done; }
  const Outcome& outcome() const { return outcome_; }
  // Whether this rank's own arguments end the call; the peers are told by the call itself.
  bool refused() const { return mine_.kind != Verdict::ok; }
  // Where to leave the outcome; nullptr: nobody asks.
  void reportTo(Outcome* outcome) { report_ = outcome; }
  Outcome* report() const { return report_; }

  // Bytes that are still to come from a peer, as far as is known, and whether something must still go to it.
  size_t needsFrom(int peer) const;
  bool needsTo(int peer) const;
  // Whether the step at hand waits for a peer.
  bool waitsFor(int peer) const;
  const char* function() const { return function_; }
  const char* phaseName() const;
  uint64_t sequence() const { return sequence_; }

 protected:
  // Set by the constructors of calls, before the first step.
  int64_t value_[kOpValues]; // what must agree
  Verdict mine_{};           // an error found before the call began

  // What the header to a peer says of rows, and the counts that follow it.
  virtual int64_t rowsTo(int /*peer*/) const { return 0; }
  virtual const int32_t* countsTo(int /*peer*/, int* n) const {
    *n = 0;
    return nullptr;
  }
  virtual int countsFrom() const { return 0; } // how many counts each header brings
  // All headers agree; says whether they suit this rank.
  virtual Verdict judge() { return Verdict{}; }
  // All ranks agree: before the rows.
  virtual void begin() {}
  virtual ncclResult_t moveRows(bool* progress, bool* finished) {
    (void)progress;
    *finished = true;
    return ncclSuccess;
  }
  virtual size_t rowBytesFrom(int /*peer*/) const { return 0; }
  virtual bool rowsLeftTo(int /*peer*/) const { return false; }

  const OpHeader& header(int rank) const { return headers_[rank]; }
  const int32_t* receivedCounts() const { return counts_.data(); } // [R, countsFrom()]
  int32_t* countsOf(int rank) { return counts_.data() + static_cast<size_t>(rank) * countsFrom(); }
  // The value that those ranks gave which care; kAny if none does.
  int64_t agreed(int field) const;

  HostBackend& host_;

 private:
  enum class Phase { prepare, headers, verdicts, rows, flush, done };

  ncclResult_t prepare();
  ncclResult_t exchangeHeaders(bool* progress);
  ncclResult_t exchangeVerdicts(bool* progress);
  Verdict compare() const;
  void resolve();
  Outcome judgement(int rank, const Verdict& verdict) const;
  std::string describe(int rank, const Verdict& verdict) const;

  const OpKind kind_;
  const char* const function_;
  const uint64_t sequence_;
  Phase phase_ = Phase::prepare;
  Outcome outcome_;
  Outcome* report_ = nullptr;
  std::vector<uint8_t> out_;      // all headers
  std::vector<size_t> outAt_;     // [R + 1] where each begins
  std::vector<size_t> sent_;      // [R] bytes of this phase
  std::vector<size_t> received_;  // [R]
  std::vector<OpHeader> headers_; // [R]
  std::vector<int32_t> counts_;   // [R, countsFrom()], and room for the counts of a call that this is not
  std::vector<Verdict> verdicts_; // [R]
};

// "config.topK" and the like: what value[field] of a kind of call is; nullptr past the last.
const char* opValueName(OpKind kind, int field);

} // namespace moe
