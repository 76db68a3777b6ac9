// A connection over TCP.
//
// Socket 0 is the stream: small messages with their payload, puts and signals go to the receiver in order; grants and
// acks come back.  It is moved by the threads that call the connection.  The other sockets carry the chunks of big
// messages and are moved by the pollers.
//
// A small message (up to inlineMax) is sent at once.  The receiver keeps it if its receive is not posted yet; the
// sender stops when `window` small messages are not consumed, which bounds what the receiver must keep.  A big message
// needs a grant, which the receiver sends when a big receive is posted, so that it usually is there before the send.
// NCCL posts big receives for small messages too: after some grants in vain the receiver keeps them back, until a big
// message has come.  Where there is no grant, isend finds no room, and the sender says `want`: at once if it has sent
// so many small messages that the receiver may have stopped, otherwise after a moment (the receive may be a small one).
// Puts and signals need no such thing: stream order makes a signal visible after the data of all earlier puts.
#pragma once

#include <atomic>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "net/engine.h"
#include "net/match.h"
#include "net/stats.h"
#include "net/tcp_poller.h"

namespace moe {
namespace net {

struct TcpOptions {
  bool sender = false;
  uint64_t inlineMax = 0; // of a small message; what both sides allow
  uint64_t window = 0;    // the receiver's
  std::string device, peer;
  Stats* stats = nullptr;
};

class TcpConnection : public Connection {
 public:
  TcpConnection(const TcpOptions& options, std::vector<UniqueFd> sockets, const std::vector<Poller*>& pollers);
  ~TcpConnection() override;

  ncclResult_t registerMemory(const Memory& memory, Region** region) override;
  ncclResult_t deregisterMemory(Region* region) override;
  ncclResult_t remoteRegion(const Region* region, RemoteRegion* remote) override;
  ncclResult_t isend(const void* data, size_t bytes, int tag, Region* region, Request** request) override;
  ncclResult_t irecv(int n, void* const* data, const size_t* bytes, const int* tags, Region* const* regions,
                     Request** request) override;
  ncclResult_t iflush(int n, void* const* data, const int* bytes, Region* const* regions, Request** request) override;
  ncclResult_t put(const void* data, size_t bytes, Region* region, const RemoteRegion& remote, uint64_t offset,
                   Request** request) override;
  ncclResult_t putSignal(const void* data, size_t bytes, Region* region, const RemoteRegion& remote, uint64_t offset,
                         const RemoteRegion& signal, uint64_t signalOffset, uint64_t value, Request** request) override;
  ncclResult_t test(Request* request, bool* done, size_t* bytes) override;
  ncclResult_t progress() override;

 private:
  enum Kind { kindFree, kindSend, kindReceive };
  static constexpr int maxVainGrants = 8;
  struct TcpRegion : Region {
    uint64_t key = 0;
    char* data = nullptr;
    size_t bytes = 0;
  };
  struct Member {
    char* data = nullptr;
    size_t room = 0, received = 0;
    int tag = 0;
    uint64_t index = 0;
    bool granted = false, done = false;
  };
  struct TcpRequest : Request {
    int kind = kindFree;
    int n = 0, open = 0; // members, and those that have not received
    Member members[maxGroup];
    size_t bytes = 0;
    int queued = 0;                     // pieces in the outgoing stream
    std::atomic<uint64_t> remaining{0}; // bytes with the pollers
    double begin = 0;
  };
  struct Want {
    int tag = 0;
    uint64_t index = 0;
    double since = 0;
    bool sent = false;
  };
  struct OutItem {
    MessageHeader header;
    const char* payload = nullptr;
    size_t bytes = 0, moved = 0;
    TcpRequest* request = nullptr;
  };
  struct Unexpected {
    int tag = 0;
    uint64_t index = 0;
    std::vector<char> payload;
    bool complete = false, claimed = false;
    uint32_t slot = 0;
  };

  ncclResult_t broken(ncclResult_t code, const std::string& text);
  ncclResult_t check();
  TcpRequest* take(int kind);
  void give(TcpRequest* request);
  Member& member(uint32_t slot);

  ncclResult_t send(const MessageHeader& header, const void* payload, size_t bytes, TcpRequest* request);
  ncclResult_t flushOut();
  ncclResult_t readStream();
  ncclResult_t onHeader(const MessageHeader& header);
  ncclResult_t onGrant(const MessageHeader& header);
  ncclResult_t onWant(const MessageHeader& header);
  ncclResult_t onSignal(const MessageHeader& header);
  ncclResult_t payloadDone();
  char* target(uint64_t key, uint64_t offset, uint64_t bytes);
  void deliver(uint32_t slot, size_t bytes);
  ncclResult_t grant(uint32_t slot);
  ncclResult_t acknowledge();
  ncclResult_t want(int tag, uint64_t index);
  ncclResult_t sendChunks(const Grants::Entry& grant, const void* data, size_t bytes, TcpRequest* request);
  ncclResult_t stream(const MessageHeader& header, const void* data, TcpRequest* request);
  void finish(TcpRequest* request);

  const TcpOptions options_;
  UniqueFd stream_;
  std::unique_ptr<TcpShared> shared_;
  std::vector<std::unique_ptr<DataSocket>> data_;
  Poller* lingerer_ = nullptr;
  std::vector<TcpRequest> requests_;
  std::vector<TcpRequest*> free_;
  Counters counters_;
  const bool timed_;

  ncclResult_t failed_ = ncclSuccess;
  std::string problem_;
  bool peerClosed_ = false, peerSaidBye_ = false;
  double closedSince_ = 0; // for sends that were under way
  uint32_t quietReads_ = 0;

  // Outgoing stream.
  std::deque<OutItem> out_;

  // Incoming stream: bytes [inBegin_, inEnd_) of in_ are not looked at yet; of the current payload the first sinkLeft_
  // bytes go to sink_ and the last discardLeft_ nowhere.
  std::vector<char> in_;
  size_t inBegin_ = 0, inEnd_ = 0;
  bool inPayload_ = false;
  MessageHeader inHeader_;
  char* sink_ = nullptr;
  size_t sinkLeft_ = 0, discardLeft_ = 0;
  Unexpected* sinkUnexpected_ = nullptr;

  // Receiving side.
  PostedReceives posted_;
  std::list<Unexpected> unexpected_;
  std::vector<std::pair<int, uint64_t>> wanted_; // asked for before they were posted
  uint64_t consumed_ = 0, acknowledged_ = 0, generation_ = 0;
  int vainGrants_ = 0; // in a row

  // Sending side.
  TagCounters sendCounters_;
  Grants grants_;
  uint64_t smallSent_ = 0, smallConsumed_ = 0;
  size_t nextSocket_ = 0;
  std::vector<Want> wants_; // messages that found no grant, until they are sent
  int smallInARow_ = 0;

  std::mutex regionMutex_;
  std::unordered_map<uint64_t, TcpRegion*> regions_;
  uint64_t nextKey_ = 1;
};

} // namespace net
} // namespace moe
