// Counters of connections, written as JSON when an engine ends and when the process does (NCCL_MOE_NET_STATS).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace moe {
namespace net {

struct Counters {
  static constexpr int nBuckets = 32;
  uint64_t sends = 0, sendBytes = 0, receives = 0, receiveBytes = 0, puts = 0, putBytes = 0, signals = 0, flushes = 0;
  uint64_t retries = 0; // operations that found no room and were left to be tried again
  uint64_t errors = 0;
  uint64_t failovers = 0;            // paths that failed while others carried on
  uint64_t depth = 0, maxDepth = 0;  // requests outstanding
  uint64_t latencyUs[nBuckets] = {}; // [i]: requests that took less than 2^i microseconds (the last: all longer ones)

  void begin() {
    if (++depth > maxDepth) maxDepth = depth;
  }
  void end(double seconds);
  void add(const Counters& other);
};

// "%h" and "%p" become the host name and the process id.
std::string expandFileName(const std::string& pattern);

class Stats {
 public:
  // One for all engines of a process, one after the other, for they write the same file.  Never destroyed.
  static Stats& process();
  static bool enabled();
  void add(const std::string& device, const std::string& peer, const char* role, const Counters& counters);
  // Does nothing unless a file is named.
  void write();

 private:
  // A child of fork begins with nothing: what it has is its parent's.  Callers hold the mutex.
  void dropInherited();
  struct Entry {
    std::string device, peer, role;
    Counters counters;
  };
  std::mutex mutex_;
  pid_t pid_ = 0;
  std::vector<Entry> connections_; // the first few thousand
  std::vector<Entry> devices_;     // sums
};

} // namespace net
} // namespace moe
