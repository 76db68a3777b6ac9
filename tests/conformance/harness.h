// Cases and the processes that they run in.
//
// Every case runs in processes of its own, one a rank, forked before the plugin is loaded; they reach one another over
// socket pairs.  A case ends by returning (passed), by require (failed) or by skip.  A rank that lost its peers' end of
// the socket pairs has no opinion: the rank that ended them has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <sys/types.h>
#include <vector>

#include "net.h"

namespace conformance {

struct Options {
  std::string plugin;
  int version = 0;
  std::vector<int> devs = {0}; // by rank, over and over
  std::vector<int> merge;      // devices to be used as one
  bool big = false, quick = false, verbose = false;
  double scale = 1;       // of time limits, for slow machines
  double errorBound = 60; // seconds within which a dead peer has to be noticed
  uint64_t seed = 1;
};

struct Failure {
  std::string text;
};
struct Skip {
  std::string text;
};
struct PeerGone {};

[[noreturn]] void failed(const char* file, int line, const char* format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void skip(const char* format, ...) __attribute__((format(printf, 1, 2)));
// require(condition, "sentence", ...): the sentence says what was expected.
#define require(condition, ...)                                                                                        \
  do {                                                                                                                 \
    if (!(condition)) conformance::failed(__FILE__, __LINE__, __VA_ARGS__);                                            \
  } while (0)
#define requireOk(call)                                                                                                \
  do {                                                                                                                 \
    ncclResult_t result_ = (call);                                                                                     \
    if (result_ != ncclSuccess) conformance::failed(__FILE__, __LINE__, "%s returned %d", #call, int(result_));        \
  } while (0)

double seconds(); // since some moment

class Rank {
 public:
  int rank = 0, n = 1;
  const Options* options = nullptr;
  std::mt19937_64 random;
  Net net;

  // Loads the plugin and initialises it; the device to use is dev.
  void start();
  void stop(); // finalize
  int dev = 0;
  int maxRecvs = 1;
  int count(int full) const { return options->quick ? full / 4 : full; }
  double bound() const { return options->errorBound * options->scale; }

  // Messages to the other ranks.  receive throws PeerGone when the peer ended.
  void send(int peer, const void* data, size_t bytes);
  void receive(int peer, void* data, size_t bytes);
  template <class T> void sendValue(int peer, const T& value) { send(peer, &value, sizeof(value)); }
  template <class T> T receiveValue(int peer) {
    T value;
    receive(peer, &value, sizeof(value));
    return value;
  }
  void meet(int peer); // both have come here
  void killSelf();     // kill -9
  pid_t pidOf(int peer) const { return pids[size_t(peer)]; }

  std::vector<int> channels; // by rank; -1 for the own
  std::vector<pid_t> pids;
};

struct Case {
  const char* name;
  int ranks;
  double limit; // seconds
  std::function<void(Rank&)> run;
  // Ranks that the case kills.
  std::vector<int> victims;
};

std::vector<Case>& cases();

struct Register {
  Register(const char* name, int ranks, double limit, std::function<void(Rank&)> run, std::vector<int> victims = {}) {
    cases().push_back({name, ranks, limit, std::move(run), std::move(victims)});
  }
};
#define CASE_NAME2(line) register_##line
#define CASE_NAME(line) CASE_NAME2(line)
#define CASE static conformance::Register CASE_NAME(__COUNTER__)

enum class Verdict { passed, failed, skipped };
struct Result {
  Verdict verdict = Verdict::passed;
  std::string reason;
  double time = 0;
};
Result runCase(const Case& c, const Options& options);

// ---- what most cases do ----

// Memory with guard zones; everything outside of what was expected must keep the poison.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t misalign = 0);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  uint8_t* data() { return data_; }
  size_t size() const { return size_; }
  void poison();
  void fill(uint64_t seed); // a stream that depends on the seed
  // The first bytes are the seed's stream, and the rest is poison still.
  void check(uint64_t seed, size_t bytes, const char* what);
  void checkRange(uint64_t seed, size_t offset, size_t bytes, const char* what); // no look at the rest
  void checkGuards(const char* what);

 private:
  size_t size_, mapped_;
  uint8_t *base_, *data_;
};

// Calls connect or accept until the comm is there; fails after the error bound, or when a call takes too long.
void* connectLoop(Rank& r, void* handle);
void* acceptLoop(Rank& r, void* listenComm);
struct Handle {
  alignas(64) char bytes[NCCL_NET_HANDLE_MAXSIZE];
};
void* listenOn(Rank& r, Handle* handle);
// One connection from a rank to another; the receiving side makes a listen comm of its own for it.
void* connectTo(Rank& r, int peer);
void* acceptFrom(Rank& r, int peer);
void closeSend(Rank& r, void* comm);
void closeRecv(Rank& r, void* comm);

void* reg(Rank& r, void* comm, Buffer& buffer);
void dereg(Rank& r, void* comm, void* mhandle);
// Post until it is taken, then test until done; these fail after the bound.
void* postSend(Rank& r, void* comm, void* data, size_t bytes, int tag, void* mhandle);
void* postRecv(Rank& r, void* comm, void* data, size_t bytes, int tag, void* mhandle);
int waitDone(Rank& r, void* request);
// The first error that posting and testing give within the bound, or ncclSuccess if everything went through.
ncclResult_t trySend(Rank& r, void* comm, void* data, size_t bytes, int tag, void* mhandle);
ncclResult_t tryRecv(Rank& r, void* comm, void* data, size_t bytes, int tag, void* mhandle);
// Sends and receives one message of random data on a fresh registration.
void sendMessage(Rank& r, void* comm, size_t bytes, uint64_t seed);
void recvMessage(Rank& r, void* comm, size_t bytes, uint64_t seed);

int openFds();
int threads();

} // namespace conformance
