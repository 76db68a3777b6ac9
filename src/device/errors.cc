// Errors that kernels left in host memory, in words.
#include <atomic>
#include <cstdio>

#include "device/device_backend.h"

namespace moe {

ncclResult_t DeviceBackend::failureOf(std::string* sentence) const {
  const volatile Failure* f = &host_->failure;
  static const char* const phases[] = {"",
                                       "the counts of dispatch",
                                       "the start of combine",
                                       "a row of dispatch",
                                       "a row of combine",
                                       "the start of a call",
                                       "a row of dispatch",
                                       "a row of combine",
                                       "the experts of a dispatch's tokens",
                                       "ncclMoeCommMaskRanks"};
  const int code = f->code;
  std::atomic_thread_fence(std::memory_order_acquire); // what it tells of was stored before it
  const char* const whose = f->phase >= kPhaseHeader && f->phase != kPhaseMeeting ? "routing" : "communicator";
  char text[256];
  switch (code) {
  case kFailNone:
    return ncclSuccess;
  case kFailTimeout:
    snprintf(text, sizeof(text), "rank %d waited %d ms for %s from rank %d, call %u of the %s", moe_.rank,
             config_.timeoutMs, phases[f->phase], f->peer, f->epoch, whose);
    break;
  case kFailAborted:
    snprintf(text, sizeof(text), "rank %d was aborted while it waited for %s from rank %d, call %u of the %s",
             moe_.rank, phases[f->phase], f->peer, f->epoch, whose);
    break;
  default:
    snprintf(text, sizeof(text),
             "rank %d and rank %d disagree about call %u of the %s: not the same collective, "
             "routing, hidden, type, quant or scaleBytes",
             moe_.rank, f->peer, f->epoch, whose);
  }
  *sentence = text;
  return code == kFailMismatch ? ncclInvalidUsage : ncclRemoteError;
}

ncclResult_t DeviceBackend::outcomeOf(const DeviceRouting& state, std::string* sentence) {
  const volatile RoutingOutcome* o = state.outcome;
  const int code = o->code;
  std::atomic_thread_fence(std::memory_order_acquire);
  char text[256];
  switch (code) {
  case kOutcomeOk:
    return ncclSuccess;
  case kOutcomeCapacity:
    snprintf(text, sizeof(text), "ncclMoeDispatch: rank %d receives %lld rows, more than its args.recvCapacity %lld",
             o->rank, o->needed, o->capacity);
    *sentence = text;
    return ncclInvalidUsage;
  default:
    snprintf(text, sizeof(text), "ncclMoeDispatch: args.topkIdx of token %d, position %d, is %d, %s", o->token,
             o->position, o->expert, code == kOutcomeIndexRange ? "out of range" : "named twice by that token");
    *sentence = text;
    return ncclInvalidArgument;
  }
}

ncclResult_t DeviceBackend::usable(const char* function) const {
  std::string sentence;
  const ncclResult_t result = failureOf(&sentence);
  if (result != ncclSuccess) return fail(result, "%s: the communicator has failed: %s", function, sentence.c_str());
  if (*static_cast<volatile const int*>(&host_->abortFlag) != 0)
    return fail(ncclRemoteError, "%s: the communicator was aborted", function);
  return ncclSuccess;
}

ncclResult_t DeviceBackend::asyncError(std::string* sentence) {
  const ncclResult_t result = failureOf(sentence);
  if (result != ncclSuccess) return result;
  std::lock_guard<std::mutex> lock(liveMutex_);
  for (const DeviceRouting* routing : live_) {
    const ncclResult_t outcome = outcomeOf(*routing, sentence);
    if (outcome != ncclSuccess) return outcome;
  }
  return ncclSuccess;
}

} // namespace moe
