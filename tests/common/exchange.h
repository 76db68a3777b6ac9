// One rank's side of a dispatch and of a combine: guarded buffers, arguments, and the check against the reference.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "common/buffer.h"
#include "common/reference.h"

namespace moe::test {

// How a dispatch is called; what the reference does not depend on.
struct DispatchStyle {
  bool idx32 = false;
  bool tokensDev = false; // nTokens is larger and nTokensDev says T
  bool wantTopkIdx = true;
  bool wantWeights = true;
  bool wantCount = true;
  bool wantExpertCounts = true;
  bool wantExpertOffsets = true;
  int slack = 3;          // rows of recvCapacity beyond what is needed
  bool emptyNull = false; // tensors without elements are NULL
  unsigned int flags = 0;
};

// Gets a buffer, where the arguments point to it, and whether the call writes it.
using TensorVisitor = std::function<void(GuardedBuffer& buffer, void** argument, bool output)>;

class DispatchCall {
 public:
  DispatchCall(const Reference& reference, int rank, const DispatchStyle& style);
  const ncclMoeDispatchArgs_t& args() const { return args_; }
  ncclMoeDispatchArgs_t& args() { return args_; }
  // After the work is done: every output buffer against the reference, guards included.  "" or a sentence.
  std::string verify() const;
  // Nothing but recvCount, expertCounts and expertOffsets may have been written.
  std::string verifyRowsUntouched() const;
  void poison(); // for another call into the same buffers
  DispatchImage image() const;
  // Every tensor that args() points to, for a backend whose memory is elsewhere.
  void forEachTensor(const TensorVisitor& visit);

 private:
  const Reference& reference_;
  int rank_;
  ncclMoeDispatchArgs_t args_ = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  GuardedBuffer x_, topkIdx_, topkWeights_, scales_, tokensDev_;
  GuardedBuffer recvX_, recvScales_, recvTopkIdx_, recvWeights_, recvCount_, expertCounts_, expertOffsets_;
  DispatchImage expected_;
};

class CombineCall {
 public:
  CombineCall(const Reference& reference, const CombineProblem& problem, int rank, bool emptyNull, unsigned int flags);
  const ncclMoeCombineArgs_t& args() const { return args_; }
  ncclMoeCombineArgs_t& args() { return args_; }
  std::string verify() const;
  std::string verifyUntouched() const;
  void poison();
  CombineImage image() const;
  void forEachTensor(const TensorVisitor& visit);

 private:
  const Reference& reference_;
  const CombineProblem& problem_;
  int rank_;
  ncclMoeCombineArgs_t args_ = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
  GuardedBuffer x_, weights_, gradWeights_, out_, gradTopkWeights_;
};

} // namespace moe::test
