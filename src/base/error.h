// Errors: a result code and, per thread, the sentence that belongs to it.
#pragma once

#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "nccl_moe.h"

namespace moe {

// Stores the sentence as the calling thread's last error, logs it, and returns result.
ncclResult_t fail(ncclResult_t result, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The calling thread's last sentence; "" if none.
const char* lastError();
void clearLastError();

} // namespace moe

#define MOECHECK(call)                                                                                                 \
  do {                                                                                                                 \
    ncclResult_t moeResult_ = (call);                                                                                  \
    if (moeResult_ != ncclSuccess) return moeResult_;                                                                  \
  } while (0)

// For system calls that return -1 and set errno.
#define SYSCHECK(call, name)                                                                                           \
  do {                                                                                                                 \
    if ((call) == -1) return moe::fail(ncclSystemError, "%s failed: %s", (name), strerror(errno));                     \
  } while (0)
