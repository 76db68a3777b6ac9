// A connection over RDMA verbs.
//
// Two-sided, as a rendezvous that the receiver drives: irecv writes a clear-to-send (CTS) entry for each member of the
// group (address, room, key, tag) by RDMA WRITE into the sender's ring of slots; isend looks for its tag in the slot of
// the oldest group that is not used up, finds no room (NULL) while there is none, writes the data to where the entry
// says, and ends with WRITE_WITH_IMM.  Who writes what:
//   cts[slot][member]      the receiver, into the sender's memory; `sequence` of each entry, written with it, says that
//                          it is there (an entry is half a cache line and never torn);
//   records[slot][member]  the sender, into the receiver's memory: the size of a message too long for the immediate
//                          value, on the queue pair of its first piece and ahead of that piece's immediate;
//   immediate value        slot, member, and the size, or, of a striped message, which piece of how many this is.
// A message is complete when the immediates of all its pieces have been polled; an immediate is delivered after the
// data of its queue pair.  Receives are posted ahead for every immediate that may come, so that receiver-not-ready
// never happens.  A slot is used again only after its group has been completed and taken back, which bounds everything.
//
// One-sided: all puts and signals go through one queue pair, whose writes are carried out in order, except under
// adaptive routing, where a signal comes behind a READ and with a fence, at the price of a round trip; memory that is
// signalled to must be registered with strict order.
//
// Paths: a connection between merged devices has queue pairs on every port; a path is a port of this side with one of
// the other.  What happens when one fails is in verbs_failover.cc.
//
// The socket of the handshake stays open: its end tells of a peer that is gone, which a receiver cannot see otherwise,
// and it carries what both sides have to agree on when a path fails.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/handle.h"
#include "net/engine.h"
#include "net/stats.h"
#include "net/verbs_group.h"
#include "net/wire.h"

namespace moe {
namespace net {

struct CtsEntry {
  uint64_t address = 0;
  uint64_t room = 0;
  uint32_t keys[maxPaths] = {};
  int32_t tag = 0;
  uint32_t members = 0;
  uint32_t reserved[5] = {};
  uint32_t sequence = 0; // number of the group, plus one
};
static_assert(sizeof(CtsEntry) == 64, "a cache line, so that it is written at once");

// The immediate value: slot 5 bits, member 3, striped 1, and 23 of the size (all ones: see the record) or, striped, of
// the piece (5) and their number less one (5); the size is in the record then.
struct Immediate {
  static constexpr uint32_t sizeInRecord = (1u << 23) - 1;
  uint32_t slot = 0, member = 0;
  uint32_t piece = 0, pieces = 1;
  uint32_t size = 0;
  uint32_t pack() const {
    return slot << 27 | member << 24 | (pieces > 1 ? 1u << 23 | (pieces - 1) << 5 | piece : size);
  }
  static Immediate unpack(uint32_t word) {
    Immediate out;
    out.slot = word >> 27;
    out.member = word >> 24 & 7;
    if ((word >> 23 & 1) != 0) {
      out.piece = word & 31;
      out.pieces = (word >> 5 & 31) + 1;
      out.size = sizeInRecord;
    } else {
      out.size = word & sizeInRecord;
    }
    return out;
  }
};

class VerbsConnection : public Connection {
 public:
  // Queue pairs in INIT; describe() is for the peer, establish() takes what the peer says.  nQueues: of all paths.
  static ncclResult_t create(PortGroup* group, const CommConfig& config, bool sender, uint32_t nPaths, uint32_t nQueues,
                             Stats* stats, std::unique_ptr<VerbsConnection>* connection);
  ~VerbsConnection() override;
  VerbsBody describe() const;
  ncclResult_t establish(const VerbsBody& peer, const std::string& peerName);
  void keepSocket(UniqueFd socket) { socket_ = std::move(socket); }

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
  enum Kind { kindFree, kindSend, kindPut, kindReceive, kindFlush };
  static constexpr int sendDepth = 512;
  static constexpr int maxSignals = sendDepth; // no more can be under way

  // Registered as one piece.  Which side writes what is above.
  struct Control {
    CtsEntry cts[maxRequests][maxGroup];     // sender: filled by the peer; receiver: what is written there
    uint64_t records[maxRequests][maxGroup]; // receiver: filled by the peer; sender: what is written there
    uint64_t signals[maxSignals];            // what signals are written from
    uint64_t flushed;                        // where flushes read to
  };
  struct Member {
    size_t room = 0, received = 0;
    uint32_t pieces = 0, arrived = 0; // how many there are, and a bit for each that has come
    bool done = false;
  };
  struct VerbsRequest : Request {
    int kind = kindFree;
    size_t bytes = 0;
    double begin = 0;
    // Receives.
    int n = 0, open = 0;
    Member members[maxGroup];
    uint32_t sequence = 0;                   // of the group, in a send too
    bool rewrite = false, rewriting = false; // its CTS entries have to be written again, or are on their way
    uint32_t ctsQueue = 0;                   // that its CTS entries were written on last
    // Sends and puts.
    uint32_t left = 0, again = 0; // a bit for each piece that is not acknowledged, and that is to be sent again
    uint32_t pieces = 1;
    uint8_t queueOf[maxQueues] = {};
    const char* data = nullptr;
    const GroupRegion* region = nullptr;
    CtsEntry entry;
    uint32_t slot = 0, member = 0;
    // Flushes.
    uint64_t flush[maxPaths] = {};
  };
  struct Queue {
    ibv_qp* qp = nullptr;
    uint32_t path = 0;
    int sendFree = 0;     // work requests that may still be posted
    int unsignaled = 0;   // posted since the last one that will tell
    int toPost = 0;       // receives taken and not posted again
    bool flushed = false; // in the error state a receive has come back: no more messages will
  };
  struct Path {
    const VerbsPort* port = nullptr;
    uint32_t portIndex = 0;
    VerbsHealth health;
    VerbsAddress address;
    ibv_cq* cq = nullptr;
    Queue flushQueue;
    uint64_t flushPosted = 0, flushDone = 0, flushWanted = 0;
    uint32_t flushKey = 0;
    // See verbs_failover.cc.
    bool up = true, told = false, peerTold = false, settled = false;
    std::string problem;
    double deadline = 0;
    PathDown report;
  };
  enum class Work : uint8_t { message = 1, control, rewrite, flush, receive };

  VerbsConnection(PortGroup* group, const CommConfig& config, bool sender, Stats* stats);
  ncclResult_t open(uint32_t nPaths, uint32_t nQueues);
  ncclResult_t openPath(uint32_t index, uint32_t nQueues);
  ncclResult_t makeQueue(const Path& path, int sends, int receives, Queue* queue);
  ncclResult_t toInit(const Path& path, ibv_qp* qp) const;
  ncclResult_t connectQueue(const Path& path, ibv_qp* qp, uint32_t peerNumber, const VerbsAddress& peer,
                            ibv_mtu mtu) const;
  std::string who() const;

  ncclResult_t broken(ncclResult_t code, const std::string& text);
  ncclResult_t check();
  ncclResult_t checkPeer();
  // The work of a connection: its completions, and after a failure the rest of verbs_failover.cc.
  ncclResult_t poll();
  ncclResult_t onCompletion(uint32_t path, const ibv_wc& wc);
  ncclResult_t onImmediate(const ibv_wc& wc);
  ncclResult_t postReceives(uint32_t queue, int count);
  // Posts a chain of `count` work requests; the last one tells if `signal`, or if it is time for one that does.
  ncclResult_t post(uint32_t queue, ibv_send_wr* first, int count, Work work, uint32_t index, bool signal);
  bool room(uint32_t queue, int count) const { return queues_[queue].sendFree >= count; }
  VerbsRequest* take(int kind);
  void finish(VerbsRequest* request);
  ncclResult_t postPiece(VerbsRequest& request, uint32_t piece);
  ncclResult_t writeCts(uint32_t slot, uint32_t queue, Work work);
  ncclResult_t postFlush(uint32_t path);
  int pieceWork(size_t bytes) const; // work requests of a piece, its record included

  ncclResult_t pathFailed(uint32_t path, ncclResult_t code, const std::string& text);
  ncclResult_t onPathDown(const PathDown& message);
  ncclResult_t settle();
  void tell(Path* path);
  void bury(uint32_t path);
  ncclResult_t resume();

  PortGroup& group_;
  const CommConfig config_;
  const bool sender_;
  Stats* const stats_;
  const bool timed_;
  const VerbsLib& lib_;
  std::unique_ptr<Control, void (*)(void*)> control_;
  GroupRegion* controlRegion_ = nullptr;
  std::vector<std::unique_ptr<Path>> paths_;
  std::vector<Queue> queues_;   // queue i belongs to path i modulo their number
  std::vector<uint32_t> alive_; // queues of the paths that are up
  uint32_t maxInline_ = UINT32_MAX;
  uint64_t maxMessage_ = 0;
  bool adaptive_ = false;
  size_t stripeMin_ = 0;
  UniqueFd socket_;
  VerbsBody peer_;
  std::string peerName_ = "(not connected)";
  Counters counters_;

  ncclResult_t failed_ = ncclSuccess;
  std::string problem_;
  double goneSince_ = 0;
  uint32_t polls_ = 0;
  int unsettled_ = 0;     // paths that have failed, about which the peer and this side do not agree yet
  bool resuming_ = false; // there is something to send again
  std::string socketOut_;
  PathDown socketIn_;
  size_t socketInBytes_ = 0;

  std::vector<VerbsRequest> requests_;
  std::vector<VerbsRequest*> free_; // sending side
  std::vector<ibv_send_wr> work_;
  std::vector<ibv_sge> pieces_;
  uint64_t next_ = 0;        // the group to be posted next, or, on the sending side, the oldest with room
  uint32_t usedMembers_ = 0; // of that group, on the sending side
  uint32_t nextQueue_ = 0;
  uint64_t signals_ = 0;

  // A flush makes visible what came before its READs were posted; requests share READs when many are under way.
  std::vector<std::unique_ptr<VerbsRequest>> flushes_;
  std::vector<VerbsRequest*> freeFlushes_;
  uint64_t flushAddress_ = 0;
};

} // namespace net
} // namespace moe
