#include "base/log.h"

#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace moe {
namespace {

const char* envOr(const char* name, const char* fallback) {
  const char* value = getenv(name);
  return value != nullptr ? value : getenv(fallback);
}

// As in NCCL, words count in any case.
LogLevel parseLevel(const char* text) {
  if (text == nullptr) return LogLevel::none;
  if (strcasecmp(text, "VERSION") == 0) return LogLevel::version;
  if (strcasecmp(text, "WARN") == 0) return LogLevel::warn;
  if (strcasecmp(text, "INFO") == 0) return LogLevel::info;
  if (strcasecmp(text, "TRACE") == 0) return LogLevel::trace;
  return LogLevel::none;
}

std::string hostName() {
  char name[256] = "unknown";
  gethostname(name, sizeof(name) - 1);
  if (char* dot = strchr(name, '.')) *dot = '\0';
  return name;
}

FILE* openLogFile() {
  const char* pattern = envOr("NCCL_MOE_DEBUG_FILE", "NCCL_DEBUG_FILE");
  if (pattern == nullptr || *pattern == '\0') return stdout;
  std::string path;
  for (const char* p = pattern; *p != '\0'; p++) {
    if (p[0] == '%' && p[1] == 'h') {
      path += hostName();
      p++;
    } else if (p[0] == '%' && p[1] == 'p') {
      path += std::to_string(getpid());
      p++;
    } else {
      path += *p;
    }
  }
  FILE* file = fopen(path.c_str(), "a");
  return file != nullptr ? file : stdout;
}

std::atomic<LogSink> logSink{nullptr};

} // namespace

void setLogSink(LogSink sink) { logSink.store(getenv("NCCL_MOE_DEBUG") == nullptr ? sink : nullptr); }

LogLevel logLevel() {
  static const LogLevel level = parseLevel(envOr("NCCL_MOE_DEBUG", "NCCL_DEBUG"));
  return level;
}

void logLine(LogLevel level, const char* file, int line, const char* format, ...) {
  static FILE* const out = openLogFile();
  static const std::string host = hostName();
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  if (LogSink sink = logSink.load()) return sink(level, file, line, text);
  const long tid = syscall(SYS_gettid);
  if (level == LogLevel::warn) {
    const char* base = strrchr(file, '/');
    fprintf(out, "\n%s:%d:%ld MOE %s:%d NCCL WARN %s\n", host.c_str(), getpid(), tid, base != nullptr ? base + 1 : file,
            line, text);
  } else {
    fprintf(out, "%s:%d:%ld MOE NCCL INFO %s\n", host.c_str(), getpid(), tid, text);
  }
  fflush(out);
}

} // namespace moe
