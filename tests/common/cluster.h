// Runs the ranks of a job: as threads of one process, as processes, or as several processes of several threads, on one
// pretended host or on several.  Every process is forked fresh from the test, so the test itself never initialises the
// library: a crash, a hang, a leak or a cached environment variable stays in that one run.
//
// A rank's body returns "" or the sentence of what went wrong.  Whatever has not returned when the time limit passes is
// killed and reported as a hang.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "nccl_moe.h"

namespace moe::test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
// How much less to do, and how much longer to wait, under a sanitizer.
constexpr int kFewer = kSanitized ? 6 : 1;
constexpr int kSlow = kSanitized ? 3 : 1;

inline void sleepMs(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// The seed of this run: MOE_TEST_SEED, or else new at each start.  Printed by every test that fails.
uint64_t testSeed();

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// A directory of its own under /tmp, removed with what is in it.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// A TCP port of the loopback interface that nobody listens on at the moment.
int freePort();

struct ClusterOptions {
  int nRanks = 1;
  int ranksPerProcess = 0; // threads of a process; 0: all ranks in one process
  int nHosts = 0;          // processes take turns on so many pretended hosts (NCCL_HOSTID); 0: leave NCCL_HOSTID alone
  std::string rendezvous;  // "": a fresh file:// one
  int timeLimitMs = 30000 * kSlow;
  uint64_t seed = 1;                                            // of the ranks' random numbers
  bool jitter = false;                                          // Rank::jitter sleeps
  std::vector<std::pair<std::string, std::string>> environment; // of the processes
};

// Where the ranks of a parameterised test run.
struct Place {
  const char* name;
  int ranksPerProcess;
  int nHosts;
};
inline void PrintTo(const Place& place, std::ostream* out) { *out << place.name; } // NOLINT: GoogleTest's name for it

// What a rank's body sees.
class Rank {
 public:
  Rank(const ClusterOptions& options, int rank, const std::string& rendezvous);
  ~Rank();
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  int rank() const { return rank_; }
  int nRanks() const { return nRanks_; }
  const std::string& rendezvous() const { return rendezvous_; }
  ncclMoeComm_t comm() const { return comm_; }
  std::mt19937_64& random() { return random_; }
  void jitter();
  // ncclMoeCommInitHost and ncclMoeCommDestroy; the destructor destroys too.
  ncclResult_t init(const ncclMoeConfig_t& config);
  ncclResult_t destroy();

 private:
  int rank_;
  int nRanks_;
  std::string rendezvous_;
  bool jitter_;
  std::mt19937_64 random_;
  ncclMoeComm_t comm_ = nullptr;
};

using Body = std::function<std::string(Rank&)>;

struct ClusterResult {
  std::vector<std::string> ranks; // [R] "": fine
  int elapsedMs = 0;

  // "" if every rank is fine, or else all the sentences.
  std::string failures() const;
};

ClusterResult runRanks(const ClusterOptions& options, const Body& body);
// The same with something to do meanwhile in the parent, which gets the processes' ids.
ClusterResult runRanks(const ClusterOptions& options, const Body& body,
                       const std::function<void(const std::vector<pid_t>&)>& meanwhile);

// A config with its initializer and the required fields.
ncclMoeConfig_t makeConfig(int nExperts, int maxTokens, int maxTopK, size_t maxRowBytes, int timeoutMs = 20000 * kSlow);

const char* resultName(ncclResult_t result);
// "" or what a call returned instead of what it should have, with the library's sentence.  mentions: words that the
// sentence must have (comma-separated; "" for none).
std::string expectResult(const char* where, ncclResult_t got, ncclResult_t want, ncclMoeComm_t comm,
                         const std::string& mentions = "");

} // namespace moe::test

#define MOE_TEST_STRING2(x) #x
#define MOE_TEST_STRING(x) MOE_TEST_STRING2(x)
#define MOE_TEST_HERE __FILE__ ":" MOE_TEST_STRING(__LINE__) ": "

// In a rank's body: leave with a sentence unless the condition holds / the call returns what is wanted.
#define RANK_CHECK(condition, ...)                                                                                     \
  do {                                                                                                                 \
    if (!(condition)) return MOE_TEST_HERE #condition ":" + ::moe::test::format(" " __VA_ARGS__);                      \
  } while (0)
#define RANK_RESULT(call, want, comm, mentions)                                                                        \
  do {                                                                                                                 \
    const ncclResult_t result_ = (call);                                                                               \
    std::string wrong_ = ::moe::test::expectResult(MOE_TEST_HERE #call, result_, want, comm, mentions);                \
    if (!wrong_.empty()) return wrong_;                                                                                \
  } while (0)
#define RANK_OK(call, comm) RANK_RESULT(call, ncclSuccess, comm, "")
#define RANK_TRY(call)                                                                                                 \
  do {                                                                                                                 \
    std::string wrong_ = (call);                                                                                       \
    if (!wrong_.empty()) return MOE_TEST_HERE + wrong_;                                                                \
  } while (0)
