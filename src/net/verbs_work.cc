// What a verbs connection posts and polls.
#include <arpa/inet.h>
#include <sys/socket.h>

#include <algorithm>

#include "base/error.h"
#include "net/socket.h"
#include "net/verbs_connection.h"

namespace moe {
namespace net {
namespace {

constexpr int repostAt = 16;
constexpr int signalEvery = 16;
constexpr double goneGrace = 0.5;

uint64_t workId(uint8_t work, uint32_t queue, int count, uint32_t index) {
  return static_cast<uint64_t>(work) << 56 | static_cast<uint64_t>(queue & 0xff) << 48 |
         static_cast<uint64_t>(count & 0xffff) << 32 | index;
}

const char* hint(ibv_wc_status status) {
  switch (status) {
  case IBV_WC_RETRY_EXC_ERR:
    return "; the peer is gone, or the network between the two loses packets (NCCL_MOE_NET_TIMEOUT, "
           "NCCL_MOE_NET_RETRY_CNT)";
  case IBV_WC_WR_FLUSH_ERR:
    return "; the queue pair had failed before";
  case IBV_WC_REM_ACCESS_ERR:
    return "; the peer's memory is not registered any more";
  case IBV_WC_LOC_PROT_ERR:
  case IBV_WC_LOC_QP_OP_ERR:
    return "; the memory given is not registered for this device";
  default:
    return "";
  }
}

const char* workName(uint8_t work) {
  static const char* const names[] = {"?",     "RDMA write", "RDMA write of control data", "RDMA write of control data",
                                      "flush", "receive"};
  return names[work <= 5 ? work : 0];
}

// What the request itself is to blame for, and no other path would do better.
bool isOfRequest(ibv_wc_status status) {
  switch (status) {
  case IBV_WC_LOC_LEN_ERR:
  case IBV_WC_LOC_QP_OP_ERR:
  case IBV_WC_LOC_PROT_ERR:
  case IBV_WC_LOC_ACCESS_ERR:
  case IBV_WC_REM_INV_REQ_ERR:
  case IBV_WC_REM_ACCESS_ERR:
    return true;
  default:
    return false;
  }
}

} // namespace

ncclResult_t VerbsConnection::broken(ncclResult_t code, const std::string& text) {
  if (failed_ == ncclSuccess) {
    failed_ = code;
    problem_ = text;
    counters_.errors++;
    if (socket_) shutdown(socket_.get(), SHUT_RDWR); // tells the peer
  }
  return fail(failed_, "%s: %s", who().c_str(), problem_.c_str());
}

ncclResult_t VerbsConnection::check() {
  if (failed_ != ncclSuccess) return fail(failed_, "%s: %s", who().c_str(), problem_.c_str());
  for (uint32_t i = 0; i < paths_.size(); i++) {
    if (!paths_[i]->up) continue;
    for (VerbsHealth* health : {&paths_[i]->health, &paths_[i]->port->context->health()}) {
      const int event = health->event.load(std::memory_order_relaxed);
      if (event < 0) continue;
      const auto type = static_cast<ibv_event_type>(event);
      const std::string text = std::string("asynchronous event: ") + lib_.eventTypeStr(type);
      // Completions are lost, and with them what has come and what has not.
      if (type == IBV_EVENT_CQ_ERR) return broken(ncclSystemError, text);
      MOECHECK(pathFailed(i, ncclSystemError, text));
      break;
    }
  }
  return ncclSuccess;
}

// The peer's end of the socket says whether it is still there.  What it had written before may still be in the
// completion queue.
ncclResult_t VerbsConnection::checkPeer() {
  while (!socketOut_.empty() && goneSince_ == 0) {
    const ssize_t n = send(socket_.get(), socketOut_.data(), socketOut_.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0) socketOut_.erase(0, static_cast<size_t>(n));
    if (n < 0 && errno != EINTR) break; // if it is broken, recv says so
  }
  while (goneSince_ == 0) {
    char* const to = reinterpret_cast<char*>(&socketIn_) + socketInBytes_;
    const ssize_t n = recv(socket_.get(), to, sizeof(socketIn_) - socketInBytes_, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return ncclSuccess;
    if (n <= 0) {
      goneSince_ = nowSeconds();
      break;
    }
    socketInBytes_ += static_cast<size_t>(n);
    if (socketInBytes_ < sizeof(socketIn_)) continue;
    socketInBytes_ = 0;
    PathDown message;
    const ParseResult parsed =
      parsePathDown(&socketIn_, sizeof(socketIn_), static_cast<uint32_t>(paths_.size()), &message);
    if (parsed != ParseResult::ok) {
      return broken(ncclRemoteError,
                    std::string("the peer sent a message that is none over the socket: ") + parseResultText(parsed));
    }
    MOECHECK(onPathDown(message));
  }
  if (nowSeconds() - goneSince_ < goneGrace) return ncclSuccess;
  return broken(ncclRemoteError, "the peer has closed the connection or is gone");
}

VerbsConnection::VerbsRequest* VerbsConnection::take(int kind) {
  if (free_.empty()) {
    counters_.retries++;
    return nullptr;
  }
  VerbsRequest* request = free_.back();
  free_.pop_back();
  request->kind = kind;
  request->left = request->again = 0;
  counters_.begin();
  if (timed_) request->begin = nowSeconds();
  return request;
}

void VerbsConnection::finish(VerbsRequest* request) {
  counters_.end(timed_ ? nowSeconds() - request->begin : 0);
  if (request->kind == kindFlush) {
    freeFlushes_.push_back(request);
  } else if (sender_) {
    free_.push_back(request);
  }
  request->kind = kindFree;
}

ncclResult_t VerbsConnection::postReceives(uint32_t index, int count) {
  ibv_recv_wr work[repostAt];
  while (count > 0) {
    const int n = std::min(count, repostAt);
    for (int i = 0; i < n; i++) {
      work[i] = ibv_recv_wr();
      work[i].wr_id = workId(static_cast<uint8_t>(Work::receive), index, 0, 0);
      work[i].next = i + 1 < n ? &work[i + 1] : nullptr;
    }
    ibv_recv_wr* bad = nullptr;
    if (int error = ibv_post_recv(queues_[index].qp, work, &bad)) {
      return pathFailed(queues_[index].path, ncclSystemError, std::string("ibv_post_recv: ") + strerror(error));
    }
    count -= n;
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::post(uint32_t index, ibv_send_wr* first, int count, Work work, uint32_t request,
                                   bool signal) {
  Queue& queue = work == Work::flush ? paths_[index]->flushQueue : queues_[index];
  queue.sendFree -= count;
  queue.unsignaled += count;
  ibv_send_wr* last = first;
  for (int i = 0; i < count; i++) {
    if (i > 0) last = last->next;
    last->wr_id = workId(static_cast<uint8_t>(work), index, 0, request); // a failure completes any of them
  }
  if (signal || queue.unsignaled >= signalEvery) {
    last->send_flags |= IBV_SEND_SIGNALED;
    // A completion without a request of its own only gives queue slots back.
    last->wr_id = workId(static_cast<uint8_t>(signal ? work : Work::control), index, queue.unsignaled, request);
    queue.unsignaled = 0;
  }
  ibv_send_wr* bad = nullptr;
  if (int error = ibv_post_send(queue.qp, first, &bad)) {
    const std::string text = std::string("ibv_post_send: ") + strerror(error);
    return work == Work::flush ? broken(ncclSystemError, text) : pathFailed(queue.path, ncclSystemError, text);
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::poll() {
  ibv_wc entries[16];
  for (uint32_t path = 0; path < paths_.size(); path++) {
    for (int round = 0; round < 16; round++) {
      const int n = ibv_poll_cq(paths_[path]->cq, 16, entries);
      if (n < 0) return broken(ncclSystemError, "ibv_poll_cq failed");
      for (int i = 0; i < n; i++) MOECHECK(onCompletion(path, entries[i]));
      if (n < 16) break;
    }
  }
  if (unsettled_ > 0) MOECHECK(settle());
  return resuming_ ? resume() : ncclSuccess;
}

ncclResult_t VerbsConnection::onCompletion(uint32_t pathIndex, const ibv_wc& wc) {
  const auto work = static_cast<Work>(wc.wr_id >> 56);
  const auto queue = static_cast<uint32_t>(wc.wr_id >> 48 & 0xff);
  const auto count = static_cast<int>(wc.wr_id >> 32 & 0xffff);
  const auto index = static_cast<uint32_t>(wc.wr_id);
  Path& path = *paths_[pathIndex];
  if (wc.status != IBV_WC_SUCCESS) {
    if (!path.up && work != Work::flush) { // of a queue pair that was given up
      if (work == Work::receive) queues_[queue].flushed = true;
      return ncclSuccess;
    }
    const std::string text = std::string(workName(static_cast<uint8_t>(work))) +
                             " failed: " + lib_.wcStatusStr(wc.status) + " (" + std::to_string(wc.status) +
                             ", vendor " + std::to_string(wc.vendor_err) + ")" + hint(wc.status);
    // Without its flush nobody knows whether what the device wrote can be seen.
    if (work == Work::flush || isOfRequest(wc.status)) return broken(ncclRemoteError, text);
    if (work == Work::receive) queues_[queue].flushed = true;
    return pathFailed(pathIndex, ncclRemoteError, text);
  }
  switch (work) {
  case Work::receive:
    return onImmediate(wc);
  case Work::flush:
    path.flushQueue.sendFree += count;
    path.flushDone++;
    return path.flushWanted > path.flushPosted ? postFlush(pathIndex) : ncclSuccess;
  case Work::message: {
    VerbsRequest& request = requests_[index & 0xffff];
    const uint32_t piece = index >> 16;
    // After a failure the piece may have gone another way, and the request may be another one.
    if (request.queueOf[piece] == queue) request.left &= ~(1u << piece);
    break;
  }
  case Work::rewrite:
    if (requests_[index].ctsQueue == queue) requests_[index].rewriting = false;
    break;
  case Work::control:
    break;
  }
  queues_[queue].sendFree += count;
  return ncclSuccess;
}

ncclResult_t VerbsConnection::onImmediate(const ibv_wc& wc) {
  const auto index = static_cast<uint32_t>(wc.wr_id >> 48 & 0xff);
  Queue& queue = queues_[index];
  queue.toPost++;
  const Immediate immediate = Immediate::unpack(ntohl(wc.imm_data));
  VerbsRequest& request = requests_[immediate.slot];
  if (wc.opcode != IBV_WC_RECV_RDMA_WITH_IMM || request.kind != kindReceive ||
      static_cast<int>(immediate.member) >= request.n || request.members[immediate.member].done) {
    return broken(ncclRemoteError, "the peer completed a receive that is not there");
  }
  Member& member = request.members[immediate.member];
  if (immediate.piece >= immediate.pieces || (member.pieces != 0 && member.pieces != immediate.pieces) ||
      (member.arrived >> immediate.piece & 1) != 0) {
    return broken(ncclRemoteError, "the peer sent pieces that do not make a message");
  }
  member.pieces = immediate.pieces;
  member.arrived |= 1u << immediate.piece;
  if (member.arrived == UINT32_MAX >> (32 - member.pieces)) {
    uint64_t bytes = immediate.size;
    if (immediate.size == Immediate::sizeInRecord) {
      bytes = __atomic_load_n(&control_->records[immediate.slot][immediate.member], __ATOMIC_ACQUIRE);
    }
    if (bytes > member.room) return broken(ncclRemoteError, "the peer says that it sent more than there is room for");
    member.received = bytes;
    member.done = true;
    request.open--;
  }
  if (queue.toPost >= repostAt && paths_[queue.path]->up) {
    const int count = queue.toPost;
    queue.toPost = 0;
    return postReceives(index, count);
  }
  return ncclSuccess;
}

} // namespace net
} // namespace moe
