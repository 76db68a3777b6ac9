#include "base/error.h"

#include <cstdarg>
#include <cstdio>

namespace moe {
namespace {
thread_local char sentence[512] = "";
} // namespace

ncclResult_t fail(ncclResult_t result, const char* format, ...) {
  char text[sizeof(sentence)]; // an argument may point into the old sentence
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  memcpy(sentence, text, sizeof(sentence));
  MOE_WARN("%s", sentence);
  return result;
}

const char* lastError() { return sentence; }

void clearLastError() { sentence[0] = '\0'; }

} // namespace moe
