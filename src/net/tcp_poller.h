// Threads that move the chunks of big TCP messages.
//
// A data socket belongs to one poller from attach to detach.  The connection's thread hands it chunks to send through
// a ring (one producer, one consumer) and kicks the poller; the poller writes the chunk's bytes to the socket and then
// subtracts them from the request's counter (release).  Received chunks are written to the slot that their header
// names, and then added to the slot's counter (release).  The connection's thread reads both counters (acquire).
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/handle.h"
#include "nccl_moe.h"
#include "net/wire.h"

namespace moe {
namespace net {

// Where chunks of one message go.  Written by the connection's thread while generation is 0; the store of generation
// (release) opens the slot for the pollers (acquire), and the grant that names it is sent after that.
struct Slot {
  std::atomic<uint64_t> generation{0};
  char* data = nullptr;
  uint64_t room = 0;
  std::atomic<uint64_t> total{0};
  std::atomic<uint64_t> received{0};
  std::atomic<uint64_t> claimed{0}; // of total by chunks whose headers have come; cameWhole: no chunk may come any more
  static constexpr uint64_t cameWhole = UINT64_MAX;
};

struct ChunkJob {
  ChunkHeader header;
  const char* data = nullptr;
  std::atomic<uint64_t>* remaining = nullptr; // bytes of the request that are not in the kernel yet
};

// What the data sockets of a connection share with its thread.
struct TcpShared {
  std::vector<Slot> slots;
  std::atomic<int> openSockets{0}; // data sockets whose peer has not closed
  std::atomic<bool> failed{false};
  std::mutex mutex; // of problem
  std::string problem;
  void fail(const std::string& text);
};

class Poller;

class DataSocket {
 public:
  static constexpr size_t ringSize = 512; // more than the chunks that all requests of a connection can have per socket
  UniqueFd fd;
  TcpShared* shared = nullptr;
  Poller* poller = nullptr;

  // The connection's thread.
  bool full() const;
  void push(const ChunkJob& job);

 private:
  friend class Poller;
  bool empty() const;
  // Poller's thread: true if bytes moved.
  bool pump(bool* blocked);
  bool receive();
  bool receiveHeader();
  void broken(const char* what);

  std::array<ChunkJob, ringSize> ring_;
  std::atomic<uint64_t> head_{0}, tail_{0};
  std::atomic<bool> scheduled_{false};
  size_t sent_ = 0; // of the chunk at the ring's tail, header included
  bool armed_ = false;
  bool dead_ = false;
  ChunkHeader in_;
  size_t inHeader_ = 0, inBytes_ = 0; // how much of header and payload has come
  Slot* slot_ = nullptr;
};

class Poller {
 public:
  ncclResult_t start();
  ~Poller();
  void attach(DataSocket* socket);
  // Waits until the thread has let go of the socket.
  void detach(DataSocket* socket);
  void kick(DataSocket* socket);
  // Takes over a socket that was shut down for writing: reads until the peer closes too, so that what is under way to
  // it is not lost to a reset.
  void linger(UniqueFd fd);

 private:
  struct Command {
    enum Kind { attach, detach, kick } kind;
    DataSocket* socket;
    bool* done;
  };
  struct Lingering {
    UniqueFd fd;
    double deadline;
  };
  void run();
  void submit(const Command& command);
  bool takeCommands();
  bool pumpActive();
  bool handleEvents(int timeoutMs);
  void sweepLingering();
  void arm(DataSocket* socket, bool forWriting);

  UniqueFd epoll_, event_;
  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable detached_;
  std::vector<Command> inbox_;
  std::vector<Lingering> incoming_;
  std::atomic<bool> haveInbox_{false};
  bool sleeping_ = false;
  bool stop_ = false;
  // The thread's own.
  std::vector<Command> commands_;
  std::vector<DataSocket*> active_;
  std::vector<Lingering> lingering_;
};

} // namespace net
} // namespace moe
