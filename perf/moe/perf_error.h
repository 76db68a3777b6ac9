// How the perf program reports failure: a result code and the calling thread's sentence.  The library's own error layer
// is not exported, and the program uses nothing that a user could not.
#pragma once

#include "nccl_moe.h"

namespace moe::perf {

// Stores the sentence as the calling thread's last error and returns result.
ncclResult_t perfFail(ncclResult_t result, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* perfError();

} // namespace moe::perf

#define PERFCHECK(call)                                                                                                \
  do {                                                                                                                 \
    ncclResult_t perfResult_ = (call);                                                                                 \
    if (perfResult_ != ncclSuccess) return perfResult_;                                                                \
  } while (0)
