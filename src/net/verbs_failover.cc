// What happens when one of a connection's paths fails and others work.
//
// A path fails on a side when one of its queue pairs reports an error that is not the request's own fault, when an
// event says so, or when the peer says so.  What makes it hard: a write whose acknowledgement is lost may or may not
// have come; sent again it would overwrite memory that the receiver has used anew, and the first one may still arrive
// late.  So both sides bury the path before anything is sent again:
//   1. A side moves its queue pairs of the path to the error state, after which they take no writes from the peer.  The
//      receiver then polls until each of them has given back a posted receive: all that came before is counted now.
//   2. It tells the peer over the socket (PathDown), the receiver together with the pieces that have come.
//   3. A side that has told and was told knows that no write of this path comes or goes any more.  The sender posts
//      again on the other paths what it had posted on this one and the receiver does not have; the receiver writes
//      again the CTS entries of its open groups that it had written on this path, and uses none of those slots for
//      another group until they are there.  Entries that other paths carry are left alone: one that is written again
//      while the first write is still being retried lets its slot go on, and the first one then comes behind the
//      entries of the slot's next group.
// Meanwhile the other paths carry on.  A second failure goes through the same for its own path, whatever of the first
// is under way, since a piece belongs to exactly one path at a time.  With the last path, or when the peer does not
// answer in time, or with puts under way (whose target may be in use by now, which nobody counts), the connection fails
// with an error.  A path that has failed is not taken up again by its connection; new connections try it anew.
#include <sys/socket.h>

#include <algorithm>

#include "base/error.h"
#include "base/param.h"
#include "net/socket.h"
#include "net/stripe.h"
#include "net/verbs_connection.h"

namespace moe {
namespace net {
namespace {

IntParam failoverParam{"NCCL_MOE_NET_FAILOVER_TIMEOUT_MS", 30000, 1, INT32_MAX,
                       "milliseconds that the peer has to confirm that a port of a connection with several has failed"};

static_assert(pathDownSlots == maxRequests && pathDownMembers == maxGroup, "PathDown has room for every member");

} // namespace

ncclResult_t VerbsConnection::pathFailed(uint32_t index, ncclResult_t code, const std::string& text) {
  Path& path = *paths_[index];
  if (!path.up) return ncclSuccess;
  const auto up = std::count_if(paths_.begin(), paths_.end(), [](const auto& p) { return p->up; });
  if (up == 1 || !socket_) {
    std::string all = text;
    for (const auto& other : paths_) {
      if (!other->up) all += "; " + other->port->info.name + " had failed before: " + other->problem;
    }
    return broken(code, all);
  }
  path.up = false;
  path.problem = text;
  path.deadline = nowSeconds() + static_cast<double>(failoverParam.get()) * 1e-3;
  unsettled_++;
  counters_.failovers++;
  MOE_WARN("NET %s: port %s failed and is given up: %s; %td other(s) carry on", who().c_str(),
           path.port->info.name.c_str(), text.c_str(), up - 1);
  alive_.clear();
  for (uint32_t i = 0; i < queues_.size(); i++) {
    if (paths_[queues_[i].path]->up) alive_.push_back(i);
    if (queues_[i].path != index) continue;
    ibv_qp_attr attr = {};
    attr.qp_state = IBV_QPS_ERR;
    if (int error = lib_.modifyQp(queues_[i].qp, &attr, IBV_QP_STATE)) {
      return broken(ncclSystemError, text + "; and ibv_modify_qp to ERR: " + strerror(error));
    }
  }
  for (const VerbsRequest& request : requests_) {
    if (request.kind != kindPut || request.left == 0 || queues_[request.queueOf[0]].path != index) continue;
    return broken(code, text + "; a put was under way, which cannot be sent again");
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::onPathDown(const PathDown& message) {
  Path& path = *paths_[message.path];
  if (path.peerTold) return broken(ncclRemoteError, "the peer gave up the same port twice");
  path.peerTold = true;
  path.report = message;
  return pathFailed(message.path, ncclRemoteError, "the peer has given up this path");
}

void VerbsConnection::tell(Path* path) {
  PathDown message;
  for (uint32_t i = 0; i < paths_.size(); i++) {
    if (paths_[i].get() == path) message.path = i;
  }
  for (uint32_t slot = 0; !sender_ && slot < maxRequests; slot++) {
    const VerbsRequest& request = requests_[slot];
    message.sequence[slot] = request.sequence;
    for (int i = 0; i < request.n; i++) {
      message.arrived[slot][i] = request.members[i].done ? UINT32_MAX : request.members[i].arrived;
    }
  }
  socketOut_.append(reinterpret_cast<const char*>(&message), sizeof(message));
  path->told = true;
}

ncclResult_t VerbsConnection::settle() {
  for (uint32_t i = 0; i < paths_.size(); i++) {
    Path& path = *paths_[i];
    if (path.up || path.settled) continue;
    const bool drained =
      sender_ || std::all_of(queues_.begin(), queues_.end(), [i](const Queue& q) { return q.path != i || q.flushed; });
    if (!path.told && drained) tell(&path);
    if (path.told && path.peerTold) {
      bury(i);
    } else if (nowSeconds() > path.deadline) {
      return broken(ncclRemoteError, path.problem +
                                       (drained ? "; the peer did not confirm it within "
                                                : "; its queue "
                                                  "pairs gave nothing back within ") +
                                       std::to_string(failoverParam.get()) + " ms (NCCL_MOE_NET_FAILOVER_TIMEOUT_MS)");
    }
  }
  return checkPeer();
}

void VerbsConnection::bury(uint32_t index) {
  Path& path = *paths_[index];
  path.settled = true;
  unsettled_--;
  resuming_ = true;
  for (VerbsRequest& request : requests_) {
    if (!sender_ && queues_[request.ctsQueue].path == index) {
      request.rewriting = false;
      request.rewrite = request.kind == kindReceive && request.open > 0;
    }
    if (request.kind != kindSend) continue;
    // The receiver may have gone on to later groups after its report, or before it.
    const uint32_t reported = path.report.sequence[request.slot];
    const auto ahead = static_cast<int32_t>(request.sequence - reported);
    for (uint32_t i = 0; i < request.pieces; i++) {
      const uint32_t bit = 1u << i;
      if ((request.left & bit) == 0 || (request.again & bit) != 0 || queues_[request.queueOf[i]].path != index)
        continue;
      const bool arrived = ahead < 0 || (ahead == 0 && (path.report.arrived[request.slot][request.member] & bit) != 0);
      (arrived ? request.left : request.again) ^= bit;
    }
  }
}

ncclResult_t VerbsConnection::resume() {
  resuming_ = false;
  for (VerbsRequest& request : requests_) {
    for (uint32_t i = 0; request.again != 0 && i < request.pieces; i++) {
      if ((request.again >> i & 1) == 0) continue;
      const uint32_t queue = alive_[nextQueue_ % alive_.size()];
      const Stripe piece = stripe(request.bytes, static_cast<int>(request.pieces), static_cast<int>(i));
      if (!room(queue, pieceWork(piece.bytes))) {
        resuming_ = true;
        continue;
      }
      nextQueue_++;
      request.again &= ~(1u << i);
      request.queueOf[i] = static_cast<uint8_t>(queue);
      MOECHECK(postPiece(request, i));
    }
    if (!request.rewrite) continue;
    if (request.kind == kindReceive && request.open > 0) {
      const uint32_t queue = alive_[nextQueue_ % alive_.size()];
      if (request.rewriting || !room(queue, 1)) {
        resuming_ = true;
        continue;
      }
      nextQueue_++;
      request.rewriting = true;
      request.ctsQueue = queue;
      MOECHECK(writeCts(static_cast<uint32_t>(&request - requests_.data()), queue, Work::rewrite));
    }
    request.rewrite = false;
  }
  return ncclSuccess;
}

} // namespace net
} // namespace moe
