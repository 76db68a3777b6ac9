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
//   immediate value        slot, member, whether every queue pair carries a piece, and the size.
// A message is complete when the immediates of all its pieces have been polled; an immediate is delivered after the data
// of its queue pair.  Receives are posted ahead for every immediate that may come, so that receiver-not-ready never
// happens.  A slot is used again only after its group has been completed and taken back, which bounds everything.
//
// One-sided: all puts and signals go through queue pair 0, whose writes are carried out in order; memory that is
// signalled to must be registered with strict order.
//
// The socket of the handshake stays open: its end tells of a peer that is gone, which a receiver cannot see otherwise.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/handle.h"
#include "net/engine.h"
#include "net/stats.h"
#include "net/verbs_device.h"
#include "net/wire.h"

namespace moe {
namespace net {

struct CtsEntry {
  uint64_t address = 0;
  uint64_t room = 0;
  uint32_t key = 0;
  int32_t tag = 0;
  uint32_t members = 0;
  uint32_t sequence = 0; // number of the group, plus one
};
static_assert(sizeof(CtsEntry) == 32, "half a cache line, so that it is written at once");

// The immediate value: slot 5 bits, member 3, striped 1, size 23 (all ones: see the record).
struct Immediate {
  static constexpr uint32_t sizeInRecord = (1u << 23) - 1;
  uint32_t slot = 0, member = 0;
  bool striped = false;
  uint32_t size = 0;
  uint32_t pack() const { return slot << 27 | member << 24 | (striped ? 1u : 0u) << 23 | size; }
  static Immediate unpack(uint32_t word) {
    return {word >> 27, (word >> 24) & 7, ((word >> 23) & 1) != 0, word & sizeInRecord};
  }
};

class VerbsConnection : public Connection {
 public:
  // Queue pairs in INIT; describe() is for the peer, establish() takes what the peer says.
  static ncclResult_t create(const VerbsPort& port, const CommConfig& config, bool sender, uint32_t nQueues,
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
  struct Control;
  struct VerbsRequest;
  struct Queue {
    ibv_qp* qp = nullptr;
    int sendFree = 0;   // work requests that may still be posted
    int unsignaled = 0; // posted since the last one that will tell
    int toPost = 0;     // receives taken and not posted again
  };
  enum class Work : uint8_t { message = 1, control, flush, receive };

  VerbsConnection(const VerbsPort& port, const CommConfig& config, bool sender, Stats* stats);
  ncclResult_t open(uint32_t nQueues);
  ncclResult_t makeQueue(int sendDepth, int receiveDepth, Queue* queue);
  ncclResult_t toInit(ibv_qp* qp) const;
  ncclResult_t connectQueue(ibv_qp* qp, uint32_t peerNumber, const VerbsAddress& peer, ibv_mtu mtu) const;
  ncclResult_t postReceives(Queue* queue, int count);
  std::string who() const;

  ncclResult_t broken(ncclResult_t code, const std::string& text);
  ncclResult_t check();
  ncclResult_t checkPeer();
  ncclResult_t poll();
  ncclResult_t onCompletion(const ibv_wc& wc);
  ncclResult_t onImmediate(const ibv_wc& wc);
  // Posts a chain of `count` work requests; the last one tells if `signal`, or if it is time for one that does.
  ncclResult_t post(uint32_t queue, ibv_send_wr* first, int count, Work work, uint32_t index, bool signal);
  bool room(uint32_t queue, int count) const { return queues_[queue].sendFree >= count; }
  VerbsRequest* take(int kind);
  void finish(VerbsRequest* request);
  ncclResult_t postFlush();
  int pieceWork(size_t bytes) const; // work requests of a piece, its record included

  const VerbsPort port_;
  const CommConfig config_;
  const bool sender_;
  Stats* const stats_;
  const bool timed_;
  const VerbsLib& lib_;
  VerbsHealth health_;
  VerbsAddress address_;
  std::unique_ptr<Control, void (*)(void*)> control_;
  RegistrationCache::Held* controlRegion_ = nullptr;
  ibv_cq* cq_ = nullptr;
  std::vector<Queue> queues_;
  Queue flushQueue_;
  uint32_t maxInline_ = 0;
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

  std::vector<VerbsRequest> requests_;
  std::vector<VerbsRequest*> free_; // sending side
  std::vector<ibv_send_wr> work_;
  std::vector<ibv_sge> pieces_;
  uint64_t group_ = 0;       // the next to be posted, or, on the sending side, the oldest with room
  uint32_t usedMembers_ = 0; // of that group, on the sending side
  uint32_t nextQueue_ = 0;
  uint64_t signals_ = 0;

  // A flush makes visible what came before its READ was posted; requests share READs when many are under way.
  std::vector<std::unique_ptr<VerbsRequest>> flushes_;
  std::vector<VerbsRequest*> freeFlushes_;
  uint64_t flushPosted_ = 0, flushDone_ = 0, flushWanted_ = 0;
  uint64_t flushAddress_ = 0;
  uint32_t flushKey_ = 0;
};

} // namespace net
} // namespace moe
