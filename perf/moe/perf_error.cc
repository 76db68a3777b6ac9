#include "perf/moe/perf_error.h"

#include <cstdarg>
#include <cstdio>

namespace moe::perf {

namespace {
thread_local char sentence[1024];
} // namespace

ncclResult_t perfFail(ncclResult_t result, const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(sentence, sizeof(sentence), format, args);
  va_end(args);
  return result;
}

const char* perfError() { return sentence; }

} // namespace moe::perf
