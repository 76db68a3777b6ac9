// The connection between this rank and one peer: a ring of bytes in each direction, and the end of the peer.
//
// On one host both rings lie in memory that the two ranks share, and the socket only carries the peer's last words.
// Between hosts each side has private rings, and pump() moves their bytes over the socket, as data messages.  Either
// way the socket tells within moments that a peer has gone: by a bye that says why, or by its end.
//
// Used by the thread that makes the communicator's calls; only abort() may be called by another.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "comm/message_socket.h"
#include "host/ring.h"

namespace moe {

class Channel {
 public:
  Channel(int peer, UniqueFd socket, bool sameHost, size_t ringBytes)
    : peer_(peer), socket_(std::move(socket)), sameHost_(sameHost), ringBytes_(ringBytes) {}
  ~Channel();

  // Agrees with the peer on shared memory (the lower rank offers, the higher opens it and answers) or TCP.  Called
  // until ready.
  ncclResult_t setUp(int myRank, bool* ready);

  RingWriter& out() { return out_; }
  RingReader& in() { return in_; }
  bool shared() const { return shared_; }
  size_t memoryBytes() const { return pair_.bytes(); }

  // Moves what can be moved without waiting, and notices the peer's end.  progress: something moved.
  void pump(bool* progress);
  // Everything written has been handed over.
  bool flushed();
  // What to poll for: fd, and events; 0 while there is nothing to wait for.
  int fd() const { return socket_.get(); }
  int setupFd() const { return setup_.fd(); } // readable when setUp() can go on
  short wants();

  // The peer will send nothing more than what is in the ring already.
  bool gone() const { return gone_; }
  // "has aborted", "died (connection reset)", ...
  const std::string& epitaph() const { return epitaph_; }
  // Died, aborted or left by itself, rather than because of another rank.
  bool goneByItself() const { return goneByItself_; }

  // Says why this rank leaves, as far as the socket takes it at once, and ends the connection.  Any thread.
  void leave(const Bye& bye);

 private:
  void useRings(RingPair& pair, bool lower);
  void receive(bool* progress);
  bool receiveSome(bool* progress);
  void messageDone();
  void send(bool* progress);
  void end(std::string epitaph, bool byItself);

  const int peer_;
  UniqueFd socket_;
  const bool sameHost_;
  const size_t ringBytes_;
  MessageSocket setup_; // has the socket until ready
  bool setupBegun_ = false;
  RingPair pair_;
  bool shared_ = false;
  RingWriter out_;
  RingReader in_;
  // Between hosts: the other ends of the two rings.
  RingReader toSend_;
  RingWriter received_;
  // The message being received: its header so far, then how much of its body is left.
  uint8_t header_[kMessageHeaderBytes] = {};
  size_t headerHas_ = 0;
  MessageHeader message_{};
  size_t bodyLeft_ = 0;
  std::vector<uint8_t> bye_;
  bool inFull_ = false; // the reader has to make room before more is received
  // The data message being sent.
  std::mutex sendMutex_; // against leave() from another thread
  uint8_t sendHeader_[kMessageHeaderBytes] = {};
  size_t sendHeaderLeft_ = 0;
  size_t sendLeft_ = 0;
  bool sendBroken_ = false;
  bool left_ = false;
  bool gone_ = false;
  bool goneByItself_ = false;
  std::string epitaph_;
};

} // namespace moe
