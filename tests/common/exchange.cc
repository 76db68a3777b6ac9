#include "common/exchange.h"

namespace moe::test {
namespace {

// A tensor that exists, though it may have no elements; those are NULL where the caller asks for it.
template <class T> T* pointer(const GuardedBuffer& buffer, bool emptyNull) {
  return buffer.given() && !(emptyNull && buffer.size() == 0) ? buffer.as<T>() : nullptr;
}

template <class T> void visitTensor(const TensorVisitor& visit, GuardedBuffer& buffer, T*& argument, bool output) {
  void* address = const_cast<void*>(static_cast<const void*>(argument));
  if (address == nullptr) return;
  visit(buffer, &address, output);
  argument = static_cast<T*>(address);
}

std::string checkGuards(const char* name, const GuardedBuffer& buffer) {
  if (!buffer.given() || buffer.guardsIntact()) return "";
  return std::string("bytes round ") + name + " were written";
}

} // namespace

DispatchCall::DispatchCall(const Reference& reference, int rank, const DispatchStyle& style)
  : reference_(reference), rank_(rank) {
  const DispatchProblem& p = reference.problem();
  const Source& source = p.sources[rank];
  const Delivery& delivery = reference.delivery(rank);
  const bool padded = p.layout == ncclMoeLayoutExpertPadded;
  int64_t rows = reference.rowsNeeded(rank);
  if (!padded) {
    rows += style.slack;
    if (p.scaleLayout == ncclMoeScaleColumnMajor) rows = (rows + 3) / 4 * 4;
  }
  const size_t nRows = static_cast<size_t>(rows);
  const size_t topK = static_cast<size_t>(p.topK);
  x_ = GuardedBuffer::input(source.x);
  if (style.idx32) {
    topkIdx_ = GuardedBuffer::input(std::vector<int32_t>(source.topkIdx.begin(), source.topkIdx.end()));
  } else {
    topkIdx_ = GuardedBuffer::input(source.topkIdx);
  }
  if (p.weighted) topkWeights_ = GuardedBuffer::input(source.topkWeights);
  if (p.quant == ncclMoeQuantNone && p.scaleBytes > 0) scales_ = GuardedBuffer::input(source.scales);
  recvX_ = GuardedBuffer(nRows * p.rowBytes());
  if (p.wireScaleBytes() > 0) recvScales_ = GuardedBuffer(nRows * static_cast<size_t>(p.wireScaleBytes()));
  if (style.wantTopkIdx && p.layout == ncclMoeLayoutRankMajor) recvTopkIdx_ = GuardedBuffer(nRows * topK * 4);
  if (style.wantWeights && p.weighted) {
    recvWeights_ = GuardedBuffer(nRows * 4 * (p.layout == ncclMoeLayoutRankMajor ? topK : 1));
  }
  if (style.wantCount) recvCount_ = GuardedBuffer(4);
  if (style.wantExpertCounts) expertCounts_ = GuardedBuffer(4 * static_cast<size_t>(delivery.nLocal));
  if (style.wantExpertOffsets && p.layout == ncclMoeLayoutExpertMajor) {
    expertOffsets_ = GuardedBuffer(4 * (static_cast<size_t>(delivery.nLocal) + 1));
  }
  const bool null = style.emptyNull;
  args_.x = pointer<void>(x_, null);
  args_.type = p.type;
  args_.hidden = p.hidden;
  args_.nTokens = source.nTokens;
  if (style.tokensDev) {
    // What lies outside 0..nTokens is clamped.
    const int beyond = source.nTokens == p.maxTokens ? 1 << 30 : source.nTokens == 0 ? -7 : source.nTokens;
    tokensDev_ = GuardedBuffer::input(std::vector<int>{beyond});
    args_.nTokensDev = tokensDev_.as<int>();
    args_.nTokens = p.maxTokens;
  }
  args_.topkIdx = (style.flags & NCCL_MOE_KEEP_ROUTING) != 0 ? nullptr : pointer<void>(topkIdx_, null);
  args_.topkIdxType = style.idx32 ? ncclInt32 : ncclInt64;
  args_.topkWeights = pointer<float>(topkWeights_, null);
  args_.scales = pointer<void>(scales_, null);
  args_.scaleBytes = p.quant == ncclMoeQuantNone ? p.scaleBytes : 0;
  args_.quant = p.quant;
  args_.scaleLayout = p.scaleLayout;
  args_.recvX = pointer<void>(recvX_, null);
  args_.recvCapacity = padded ? -12345 : rows; // ignored when padded
  args_.recvScales = pointer<void>(recvScales_, null);
  args_.recvTopkIdx = pointer<int>(recvTopkIdx_, null);
  args_.recvWeights = pointer<float>(recvWeights_, null);
  args_.recvCount = pointer<int>(recvCount_, null);
  args_.expertCounts = pointer<int>(expertCounts_, null);
  args_.expertOffsets = pointer<int>(expertOffsets_, null);
  args_.flags = style.flags;
  expected_ = image();
  reference.dispatch(rank, rows, &expected_);
}

DispatchImage DispatchCall::image() const {
  DispatchImage image;
  image.x = recvX_.content<uint8_t>();
  if (recvScales_.given()) image.scales = recvScales_.content<uint8_t>();
  if (recvTopkIdx_.given()) image.topkIdx = recvTopkIdx_.content<int>();
  if (recvWeights_.given()) image.weights = recvWeights_.content<float>();
  if (recvCount_.given()) image.count = recvCount_.content<int>();
  if (expertCounts_.given()) image.expertCounts = expertCounts_.content<int>();
  if (expertOffsets_.given()) image.expertOffsets = expertOffsets_.content<int>();
  return image;
}

std::string DispatchCall::verify() const {
  std::string wrong = compareDispatch(reference_, rank_, expected_, image());
  if (wrong.empty()) wrong = checkGuards("recvX", recvX_);
  if (wrong.empty()) wrong = checkGuards("recvScales", recvScales_);
  if (wrong.empty()) wrong = checkGuards("recvTopkIdx", recvTopkIdx_);
  if (wrong.empty()) wrong = checkGuards("recvWeights", recvWeights_);
  if (wrong.empty()) wrong = checkGuards("recvCount", recvCount_);
  if (wrong.empty()) wrong = checkGuards("expertCounts", expertCounts_);
  if (wrong.empty()) wrong = checkGuards("expertOffsets", expertOffsets_);
  return wrong;
}

std::string DispatchCall::verifyRowsUntouched() const {
  if (recvX_.given() && !recvX_.untouched()) return "recvX was written";
  if (recvScales_.given() && !recvScales_.untouched()) return "recvScales was written";
  if (recvTopkIdx_.given() && !recvTopkIdx_.untouched()) return "recvTopkIdx was written";
  if (recvWeights_.given() && !recvWeights_.untouched()) return "recvWeights was written";
  std::string wrong = checkGuards("recvCount", recvCount_);
  if (wrong.empty()) wrong = checkGuards("expertCounts", expertCounts_);
  if (wrong.empty()) wrong = checkGuards("expertOffsets", expertOffsets_);
  return wrong;
}

void DispatchCall::poison() {
  for (GuardedBuffer* buffer :
       {&recvX_, &recvScales_, &recvTopkIdx_, &recvWeights_, &recvCount_, &expertCounts_, &expertOffsets_}) {
    if (buffer->given()) buffer->refill();
  }
}

void DispatchCall::forEachTensor(const TensorVisitor& visit) {
  visitTensor(visit, x_, args_.x, false);
  visitTensor(visit, topkIdx_, args_.topkIdx, false);
  visitTensor(visit, topkWeights_, args_.topkWeights, false);
  visitTensor(visit, scales_, args_.scales, false);
  visitTensor(visit, tokensDev_, args_.nTokensDev, false);
  visitTensor(visit, recvX_, args_.recvX, true);
  visitTensor(visit, recvScales_, args_.recvScales, true);
  visitTensor(visit, recvTopkIdx_, args_.recvTopkIdx, true);
  visitTensor(visit, recvWeights_, args_.recvWeights, true);
  visitTensor(visit, recvCount_, args_.recvCount, true);
  visitTensor(visit, expertCounts_, args_.expertCounts, true);
  visitTensor(visit, expertOffsets_, args_.expertOffsets, true);
}

void CombineCall::forEachTensor(const TensorVisitor& visit) {
  visitTensor(visit, x_, args_.x, false);
  visitTensor(visit, weights_, args_.weights, false);
  visitTensor(visit, gradWeights_, args_.gradWeights, false);
  visitTensor(visit, out_, args_.out, true);
  visitTensor(visit, gradTopkWeights_, args_.gradTopkWeights, true);
}

CombineCall::CombineCall(const Reference& reference, const CombineProblem& problem, int rank, bool emptyNull,
                         unsigned int flags)
  : reference_(reference), problem_(problem), rank_(rank) {
  const size_t self = static_cast<size_t>(rank);
  const DispatchProblem& p = reference.problem();
  const size_t nTokens = static_cast<size_t>(p.sources[self].nTokens);
  x_ = GuardedBuffer::input(problem.x[self]);
  if (problem.weighted) weights_ = GuardedBuffer::input(problem.weights[self]);
  if (problem.withGradWeights) {
    gradWeights_ = GuardedBuffer::input(problem.gradWeights[self]);
    gradTopkWeights_ = GuardedBuffer(nTokens * static_cast<size_t>(p.topK) * 4);
  }
  out_ = GuardedBuffer(nTokens * static_cast<size_t>(problem.hidden) * elementBytes(problem.type));
  args_.x = pointer<void>(x_, emptyNull);
  args_.type = problem.type;
  args_.hidden = problem.hidden;
  args_.weights = pointer<float>(weights_, emptyNull);
  args_.gradWeights = pointer<float>(gradWeights_, emptyNull);
  args_.out = pointer<void>(out_, emptyNull);
  args_.gradTopkWeights = pointer<float>(gradTopkWeights_, emptyNull);
  args_.flags = flags | (problem.exact ? NCCL_MOE_EXACT : 0u);
  args_.withGradWeights = problem.withGradWeights ? 1 : 0;
  args_.quant = problem.cast ? ncclMoeQuantFp8 : ncclMoeQuantNone;
}

CombineImage CombineCall::image() const {
  CombineImage image;
  image.out = out_.content<uint8_t>();
  if (gradTopkWeights_.given()) image.gradTopkWeights = gradTopkWeights_.content<float>();
  return image;
}

std::string CombineCall::verify() const {
  CombineImage expected = image(); // every element is overwritten
  expectCombine(reference_, problem_, rank_, &expected);
  std::string wrong = compareCombine(reference_, problem_, rank_, expected, image());
  if (wrong.empty()) wrong = checkGuards("out", out_);
  if (wrong.empty()) wrong = checkGuards("gradTopkWeights", gradTopkWeights_);
  return wrong;
}

std::string CombineCall::verifyUntouched() const {
  if (!out_.untouched()) return "out was written";
  if (gradTopkWeights_.given() && !gradTopkWeights_.untouched()) return "gradTopkWeights was written";
  return "";
}

void CombineCall::poison() {
  out_.refill();
  if (gradTopkWeights_.given()) gradTopkWeights_.refill();
}

} // namespace moe::test
