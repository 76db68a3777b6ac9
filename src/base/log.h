// Logging in NCCL's format.  NCCL_MOE_DEBUG (or else NCCL_DEBUG) is VERSION, WARN, INFO or TRACE; NCCL_MOE_DEBUG_FILE
// (or else NCCL_DEBUG_FILE) names a file, in which %h stands for the host name and %p for the process id.
#pragma once

namespace moe {

enum class LogLevel { none = 0, version = 1, warn = 2, info = 3, trace = 5 };

LogLevel logLevel();
// Lines go to sink instead, as long as NCCL_MOE_DEBUG is not set; nullptr: not any more.  The plugin passes NCCL's
// logger on, since both may write to the same file.
using LogSink = void (*)(LogLevel level, const char* file, int line, const char* text);
void setLogSink(LogSink sink);
void logLine(LogLevel level, const char* file, int line, const char* format, ...) __attribute__((format(printf, 4, 5)));

} // namespace moe

#define MOE_LOG(level, ...)                                                                                            \
  do {                                                                                                                 \
    if (moe::logLevel() >= (level)) moe::logLine((level), __FILE__, __LINE__, __VA_ARGS__);                            \
  } while (0)
#define MOE_WARN(...) MOE_LOG(moe::LogLevel::warn, __VA_ARGS__)
#define MOE_INFO(...) MOE_LOG(moe::LogLevel::info, __VA_ARGS__)
#define MOE_TRACE(...) MOE_LOG(moe::LogLevel::trace, __VA_ARGS__)
