#include "net/verbs_connection.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "base/error.h"
#include "base/param.h"
#include "net/socket.h"
#include "net/stripe.h"

namespace moe {
namespace net {
namespace {

IntParam timeoutParam{"NCCL_MOE_NET_TIMEOUT", 18, 1, 31,
                      "RDMA acknowledgement timeout, 4.096 us times two to this power, for each try"};
IntParam retryParam{"NCCL_MOE_NET_RETRY_CNT", 6, 0, 6, "RDMA retries before a connection fails"};
IntParam stripeParam{"NCCL_MOE_NET_STRIPE_MIN", 128 << 10, 4096, 1 << 30,
                     "bytes from which an RDMA message goes over all queue pairs of its connection"};
IntParam adaptiveParam{"NCCL_MOE_NET_ADAPTIVE_ROUTING", -1, -1, 1,
                       "keep data apart from the write that tells, for adaptive routing; -1: on InfiniBand only"};
IntParam adaptiveMinParam{"NCCL_MOE_NET_ADAPTIVE_MIN", 8192, 0, 1 << 30, "bytes from which adaptive routing counts"};
IntParam slParam{"NCCL_MOE_NET_SL", 0, 0, 15, "RDMA service level"};
IntParam slLatencyParam{"NCCL_MOE_NET_SL_LATENCY", 0, 0, 15, "RDMA service level of latency traffic"};
IntParam slThroughputParam{"NCCL_MOE_NET_SL_THROUGHPUT", 0, 0, 15, "RDMA service level of throughput traffic"};
IntParam tcParam{"NCCL_MOE_NET_TC", 0, 0, 255, "RDMA traffic class"};
IntParam tcLatencyParam{"NCCL_MOE_NET_TC_LATENCY", 0, 0, 255, "RDMA traffic class of latency traffic"};
IntParam tcThroughputParam{"NCCL_MOE_NET_TC_THROUGHPUT", 0, 0, 255, "RDMA traffic class of throughput traffic"};

constexpr int sendDepth = 512;
constexpr int ctsDepth = 128; // of a receiver's queue pairs
constexpr int receiveDepth = maxRequests * maxGroup + 32;
constexpr int flushDepth = 16;
constexpr int repostAt = 16;
constexpr int signalEvery = 16;
constexpr int maxSignals = sendDepth; // no more can be under way
constexpr uint32_t wantedInline = maxGroup * sizeof(CtsEntry);
constexpr double goneGrace = 0.5;

enum Kind { kindFree, kindSend, kindReceive, kindFlush };

uint64_t workId(uint8_t work, uint32_t queue, int count, uint32_t index) {
  return static_cast<uint64_t>(work) << 56 | static_cast<uint64_t>(queue & 0xff) << 48 |
         static_cast<uint64_t>(count & 0xffff) << 32 | index;
}

uint8_t serviceLevel(TrafficKind kind) {
  IntParam& param = kind == TrafficKind::latency      ? slLatencyParam
                    : kind == TrafficKind::throughput ? slThroughputParam
                                                      : slParam;
  return static_cast<uint8_t>(param.get());
}

uint8_t trafficClass(const CommConfig& config) {
  if (config.trafficClass >= 0) return static_cast<uint8_t>(config.trafficClass);
  IntParam& param = config.traffic == TrafficKind::latency      ? tcLatencyParam
                    : config.traffic == TrafficKind::throughput ? tcThroughputParam
                                                                : tcParam;
  return static_cast<uint8_t>(param.get());
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
  static const char* const names[] = {"?", "RDMA write", "RDMA write of control data", "flush", "receive"};
  return names[work <= 4 ? work : 0];
}

} // namespace

// Registered as one piece.  Which side writes what is in the header.
struct VerbsConnection::Control {
  CtsEntry cts[maxRequests][maxGroup];     // sender: filled by the peer; receiver: what is written there
  uint64_t records[maxRequests][maxGroup]; // receiver: filled by the peer; sender: what is written there
  uint64_t signals[maxSignals];            // what signals are written from
  uint64_t flushed;                        // where flushes read to
};

struct VerbsConnection::VerbsRequest : Request {
  struct Member {
    size_t room = 0, received = 0;
    int pieces = 0; // that have come
    bool done = false;
  };
  int kind = kindFree;
  int n = 0, open = 0;
  Member members[maxGroup];
  size_t bytes = 0;
  int pending = 0; // completions to come
  uint64_t flush = 0;
  double begin = 0;
};

// ---- life ----

VerbsConnection::VerbsConnection(const VerbsPort& port, const CommConfig& config, bool sender, Stats* stats)
  : port_(port), config_(config), sender_(sender), stats_(stats), timed_(Stats::enabled()), lib_(port.context->lib()),
    control_(nullptr, free), requests_(sender ? maxRequests * maxGroup : maxRequests) {
  for (VerbsRequest& request : requests_) {
    request.connection = this;
    free_.push_back(&request);
  }
  std::reverse(free_.begin(), free_.end());
  const int64_t adaptive = adaptiveParam.get();
  adaptive_ = adaptive == 1 || (adaptive == -1 && port_.infiniband);
  stripeMin_ = static_cast<size_t>(stripeParam.get());
}

ncclResult_t VerbsConnection::create(const VerbsPort& port, const CommConfig& config, bool sender, uint32_t nQueues,
                                     Stats* stats, std::unique_ptr<VerbsConnection>* connection) {
  std::unique_ptr<VerbsConnection> fresh(new VerbsConnection(port, config, sender, stats));
  MOECHECK(fresh->open(nQueues));
  *connection = std::move(fresh);
  return ncclSuccess;
}

std::string VerbsConnection::who() const {
  return std::string(sender_ ? "connection to peer " : "connection from peer ") + peerName_ + " on device " +
         port_.info.name + " (verbs)";
}

ncclResult_t VerbsConnection::open(uint32_t nQueues) {
  MOECHECK(portAddress(port_, &address_));
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = (sizeof(Control) + page - 1) / page * page;
  void* memory = nullptr;
  if (posix_memalign(&memory, page, bytes) != 0) return fail(ncclSystemError, "out of memory for %zu bytes", bytes);
  memset(memory, 0, bytes);
  control_.reset(static_cast<Control*>(memory));
  Memory strict;
  strict.data = memory;
  strict.bytes = bytes;
  strict.strictOrder = true;
  if (int error = port_.context->cache().add(strict, port_.context->access(strict), &controlRegion_)) {
    return fail(ncclSystemError, "%s: ibv_reg_mr of %zu bytes: %s", who().c_str(), bytes, strerror(error));
  }
  const int sends = sender_ ? sendDepth : ctsDepth;
  const int receives = sender_ ? 0 : receiveDepth;
  const int entries = static_cast<int>(nQueues) * (sends + receives) + flushDepth;
  errno = ENOMEM;
  cq_ = lib_.createCq(port_.context->get(), entries, &health_, nullptr, 0);
  if (cq_ == nullptr) {
    return fail(ncclSystemError, "%s: ibv_create_cq of %d entries: %s", who().c_str(), entries, strerror(errno));
  }
  queues_.resize(nQueues);
  for (Queue& queue : queues_) {
    MOECHECK(makeQueue(sends, receives, &queue));
    if (!sender_) MOECHECK(postReceives(&queue, receives));
  }
  if (!sender_ && (port_.info.ptrKinds & (ptrCuda | ptrDmabuf)) != 0) {
    MOECHECK(makeQueue(flushDepth, 0, &flushQueue_));
    MOECHECK(connectQueue(flushQueue_.qp, flushQueue_.qp->qp_num, address_, address_.mtu));
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::makeQueue(int sends, int receives, Queue* queue) {
  ibv_qp_init_attr attr = {};
  attr.qp_context = &health_;
  attr.send_cq = attr.recv_cq = cq_;
  attr.qp_type = IBV_QPT_RC;
  attr.cap.max_send_wr = static_cast<uint32_t>(sends);
  attr.cap.max_recv_wr = static_cast<uint32_t>(receives);
  attr.cap.max_send_sge = attr.cap.max_recv_sge = 1;
  attr.cap.max_inline_data = wantedInline;
  errno = ENOMEM;
  queue->qp = lib_.createQp(port_.context->pd(), &attr);
  if (queue->qp == nullptr && errno == EINVAL) { // some devices take less inline data, or none
    attr.cap.max_inline_data = 0;
    queue->qp = lib_.createQp(port_.context->pd(), &attr);
  }
  if (queue->qp == nullptr) {
    return fail(ncclSystemError, "%s: ibv_create_qp: %s", who().c_str(), strerror(errno));
  }
  maxInline_ = attr.cap.max_inline_data;
  queue->sendFree = sends;
  return toInit(queue->qp);
}

ncclResult_t VerbsConnection::toInit(ibv_qp* qp) const {
  ibv_qp_attr attr = {};
  attr.qp_state = IBV_QPS_INIT;
  attr.port_num = port_.port;
  attr.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  const int error = lib_.modifyQp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  if (error != 0) return fail(ncclSystemError, "%s: ibv_modify_qp to INIT: %s", who().c_str(), strerror(error));
  return ncclSuccess;
}

ncclResult_t VerbsConnection::connectQueue(ibv_qp* qp, uint32_t peerNumber, const VerbsAddress& peer,
                                           ibv_mtu mtu) const {
  ibv_qp_attr attr = {};
  attr.qp_state = IBV_QPS_RTR;
  attr.path_mtu = mtu;
  attr.dest_qp_num = peerNumber;
  attr.max_dest_rd_atomic = 1;
  attr.min_rnr_timer = 12;
  attr.ah_attr.sl = serviceLevel(config_.traffic);
  attr.ah_attr.port_num = port_.port;
  attr.ah_attr.dlid = peer.lid;
  if (address_.global) {
    attr.ah_attr.is_global = 1;
    attr.ah_attr.grh.dgid = peer.gid;
    attr.ah_attr.grh.sgid_index = static_cast<uint8_t>(address_.gidIndex);
    attr.ah_attr.grh.hop_limit = 255;
    attr.ah_attr.grh.traffic_class = trafficClass(config_);
  }
  int error = lib_.modifyQp(qp, &attr,
                            IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                              IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  if (error != 0) {
    return fail(ncclSystemError, "%s: ibv_modify_qp to RTR: %s (is there a route to the peer's GID?)", who().c_str(),
                strerror(error));
  }
  attr = ibv_qp_attr();
  attr.qp_state = IBV_QPS_RTS;
  attr.timeout = static_cast<uint8_t>(timeoutParam.get());
  attr.retry_cnt = static_cast<uint8_t>(retryParam.get());
  attr.rnr_retry = 6; // 7 would be for ever
  attr.max_rd_atomic = 1;
  error = lib_.modifyQp(qp, &attr,
                        IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                          IBV_QP_MAX_QP_RD_ATOMIC);
  if (error != 0) return fail(ncclSystemError, "%s: ibv_modify_qp to RTS: %s", who().c_str(), strerror(error));
  return ncclSuccess;
}

VerbsBody VerbsConnection::describe() const {
  VerbsBody body;
  body.nQueues = static_cast<uint32_t>(queues_.size());
  for (size_t i = 0; i < queues_.size(); i++) body.queueNumber[i] = queues_[i].qp->qp_num;
  body.remoteKey = controlRegion_->remoteKey;
  body.base = reinterpret_cast<uint64_t>(control_.get());
  memcpy(body.gid, address_.gid.raw, sizeof(body.gid));
  body.lid = address_.lid;
  body.mtu = static_cast<uint8_t>(address_.mtu);
  body.infiniband = port_.infiniband ? 1 : 0;
  port_.info.name.copy(body.device, sizeof(body.device) - 1);
  return body;
}

ncclResult_t VerbsConnection::establish(const VerbsBody& peer, const std::string& peerName) {
  peer_ = peer;
  peerName_ = peerName + " (" + peer.device + ")";
  if (peer.nQueues != queues_.size() || (peer.infiniband != 0) != port_.infiniband) {
    return fail(ncclRemoteError, "%s: the peer has %u queue pairs on %s, this side %zu on %s", who().c_str(),
                peer.nQueues, peer.infiniband != 0 ? "InfiniBand" : "RoCE", queues_.size(),
                port_.infiniband ? "InfiniBand" : "RoCE");
  }
  VerbsAddress address;
  memcpy(address.gid.raw, peer.gid, sizeof(peer.gid));
  address.lid = peer.lid;
  const ibv_mtu mtu = std::min(address_.mtu, static_cast<ibv_mtu>(peer.mtu));
  for (size_t i = 0; i < queues_.size(); i++) {
    MOECHECK(connectQueue(queues_[i].qp, peer.queueNumber[i], address, mtu));
  }
  return ncclSuccess;
}

VerbsConnection::~VerbsConnection() {
  auto warn = [this](const char* verb, int error) {
    if (error != 0) MOE_WARN("%s: %s: %s", who().c_str(), verb, strerror(error));
  };
  for (Queue& queue : queues_) {
    if (queue.qp != nullptr) warn("ibv_destroy_qp", lib_.destroyQp(queue.qp));
  }
  if (flushQueue_.qp != nullptr) warn("ibv_destroy_qp", lib_.destroyQp(flushQueue_.qp));
  if (cq_ != nullptr) warn("ibv_destroy_cq", lib_.destroyCq(cq_));
  if (controlRegion_ != nullptr) warn("ibv_dereg_mr", port_.context->cache().remove(controlRegion_));
  if (stats_ != nullptr && socket_) {
    stats_->add(port_.info.name, peerName_, sender_ ? "send" : "receive", counters_);
  }
}

ncclResult_t VerbsConnection::broken(ncclResult_t code, const std::string& text) {
  if (failed_ == ncclSuccess) {
    failed_ = code;
    problem_ = text;
    counters_.errors++;
    if (socket_) shutdown(socket_.get(), SHUT_RDWR); // tells the peer
  }
  return check();
}

ncclResult_t VerbsConnection::check() {
  if (failed_ != ncclSuccess) return fail(failed_, "%s: %s", who().c_str(), problem_.c_str());
  for (VerbsHealth* health : {&health_, &port_.context->health()}) {
    const int event = health->event.load(std::memory_order_relaxed);
    if (event >= 0) {
      return broken(ncclSystemError,
                    std::string("asynchronous event: ") + lib_.eventTypeStr(static_cast<ibv_event_type>(event)));
    }
  }
  return ncclSuccess;
}

// The peer's end of the socket says whether it is still there.  What it had written before may still be in the
// completion queue.
ncclResult_t VerbsConnection::checkPeer() {
  if (goneSince_ == 0) {
    char byte;
    const ssize_t n = recv(socket_.get(), &byte, 1, MSG_DONTWAIT);
    if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR))) return ncclSuccess;
    goneSince_ = nowSeconds();
  }
  if (nowSeconds() - goneSince_ < goneGrace) return ncclSuccess;
  return broken(ncclRemoteError, "the peer has closed the connection or is gone");
}

// ---- memory ----

ncclResult_t VerbsConnection::registerMemory(const Memory& memory, Region** region) {
  *region = nullptr;
  if (memory.data == nullptr && memory.kind != ptrDmabuf) return fail(ncclInvalidArgument, "memory.data is NULL");
  if ((port_.info.ptrKinds & memory.kind) == 0) {
    return fail(ncclInvalidArgument, "memory kind %d: device %s cannot reach it (is nvidia-peermem loaded?)",
                memory.kind, port_.info.name.c_str());
  }
  RegistrationCache::Held* held = nullptr;
  if (int error = port_.context->cache().add(memory, port_.context->access(memory), &held)) {
    return fail(ncclSystemError, "%s: registering %zu bytes at %p: %s", who().c_str(), memory.bytes, memory.data,
                strerror(error));
  }
  *region = held;
  return ncclSuccess;
}

ncclResult_t VerbsConnection::deregisterMemory(Region* region) {
  if (region == nullptr) return ncclSuccess;
  const int error = port_.context->cache().remove(region);
  if (error == EINVAL) {
    return fail(ncclInvalidArgument, "region %p is not registered on device %s", static_cast<void*>(region),
                port_.info.name.c_str());
  }
  if (error != 0) return fail(ncclSystemError, "%s: ibv_dereg_mr: %s", who().c_str(), strerror(error));
  return ncclSuccess;
}

ncclResult_t VerbsConnection::remoteRegion(const Region* region, RemoteRegion* remote) {
  if (region == nullptr) return fail(ncclInvalidArgument, "region is NULL");
  const auto* held = static_cast<const RegistrationCache::Held*>(region);
  remote->base = reinterpret_cast<uint64_t>(held->data);
  remote->bytes = held->bytes;
  remote->key = held->remoteKey;
  return ncclSuccess;
}

// ---- work ----

VerbsConnection::VerbsRequest* VerbsConnection::take(int kind) {
  if (free_.empty()) {
    counters_.retries++;
    return nullptr;
  }
  VerbsRequest* request = free_.back();
  free_.pop_back();
  request->kind = kind;
  request->pending = 0;
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

ncclResult_t VerbsConnection::postReceives(Queue* queue, int count) {
  ibv_recv_wr work[repostAt];
  while (count > 0) {
    const int n = std::min(count, repostAt);
    for (int i = 0; i < n; i++) {
      work[i] = ibv_recv_wr();
      work[i].wr_id = workId(static_cast<uint8_t>(Work::receive), static_cast<uint32_t>(queue - queues_.data()), 0, 0);
      work[i].next = i + 1 < n ? &work[i + 1] : nullptr;
    }
    ibv_recv_wr* bad = nullptr;
    if (int error = ibv_post_recv(queue->qp, work, &bad)) {
      return broken(ncclSystemError, std::string("ibv_post_recv: ") + strerror(error));
    }
    count -= n;
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::post(uint32_t index, ibv_send_wr* first, int count, Work work, uint32_t request,
                                   bool signal) {
  Queue& queue = work == Work::flush ? flushQueue_ : queues_[index];
  queue.sendFree -= count;
  queue.unsignaled += count;
  ibv_send_wr* last = first;
  for (int i = 1; i < count; i++) last = last->next;
  if (signal || queue.unsignaled >= signalEvery) {
    last->send_flags |= IBV_SEND_SIGNALED;
    // A completion without a request of its own only gives queue slots back.
    last->wr_id = workId(static_cast<uint8_t>(signal ? work : Work::control), index, queue.unsignaled, request);
    queue.unsignaled = 0;
  }
  ibv_send_wr* bad = nullptr;
  if (int error = ibv_post_send(queue.qp, first, &bad)) {
    return broken(ncclSystemError, std::string("ibv_post_send: ") + strerror(error));
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::poll() {
  ibv_wc entries[16];
  for (int round = 0; round < 16; round++) {
    const int n = ibv_poll_cq(cq_, 16, entries);
    if (n < 0) return broken(ncclSystemError, "ibv_poll_cq failed");
    for (int i = 0; i < n; i++) MOECHECK(onCompletion(entries[i]));
    if (n < 16) break;
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::onCompletion(const ibv_wc& wc) {
  const auto work = static_cast<Work>(wc.wr_id >> 56);
  const auto queue = static_cast<uint32_t>(wc.wr_id >> 48 & 0xff);
  const auto count = static_cast<int>(wc.wr_id >> 32 & 0xffff);
  const auto index = static_cast<uint32_t>(wc.wr_id);
  if (wc.status != IBV_WC_SUCCESS) {
    return broken(ncclRemoteError, std::string(workName(static_cast<uint8_t>(work))) +
                                     " failed: " + lib_.wcStatusStr(wc.status) + " (" + std::to_string(wc.status) +
                                     ", vendor " + std::to_string(wc.vendor_err) + ")" + hint(wc.status));
  }
  switch (work) {
  case Work::receive:
    return onImmediate(wc);
  case Work::flush:
    flushQueue_.sendFree += count;
    flushDone_++;
    return flushWanted_ > flushPosted_ ? postFlush() : ncclSuccess;
  case Work::message:
    requests_[index].pending--;
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
  VerbsRequest::Member& member = request.members[immediate.member];
  member.pieces++;
  if (member.pieces == (immediate.striped ? static_cast<int>(queues_.size()) : 1)) {
    uint64_t bytes = immediate.size;
    if (immediate.size == Immediate::sizeInRecord) {
      bytes = __atomic_load_n(&control_->records[immediate.slot][immediate.member], __ATOMIC_ACQUIRE);
    }
    if (bytes > member.room) return broken(ncclRemoteError, "the peer says that it sent more than there is room for");
    member.received = bytes;
    member.done = true;
    request.open--;
  }
  if (queue.toPost >= repostAt) {
    const int count = queue.toPost;
    queue.toPost = 0;
    return postReceives(&queue, count);
  }
  return ncclSuccess;
}

// ---- two-sided ----

int VerbsConnection::pieceWork(size_t bytes) const {
  const size_t writes = std::max<size_t>(1, (bytes + port_.maxMessage - 1) / port_.maxMessage);
  return static_cast<int>(std::min<size_t>(writes + 2, sendDepth + 1));
}

ncclResult_t VerbsConnection::isend(const void* data, size_t bytes, int tag, Region* region, Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (!sender_) return fail(ncclInvalidUsage, "isend on a receiving connection");
  const auto* held = static_cast<const RegistrationCache::Held*>(region);
  if (bytes != 0 && (data == nullptr || held == nullptr)) {
    return fail(ncclInvalidArgument, "data or its memory handle is NULL with %zu bytes", bytes);
  }
  const auto slot = static_cast<uint32_t>(group_ % maxRequests);
  const auto sequence = static_cast<uint32_t>(group_ + 1);
  const CtsEntry* entries = control_->cts[slot];
  uint32_t members = 0, chosen = maxGroup;
  if (__atomic_load_n(&entries[0].sequence, __ATOMIC_ACQUIRE) == sequence) {
    members = entries[0].members;
    if (members < 1 || members > maxGroup)
      return broken(ncclRemoteError, "the peer posted a group of no possible size");
    for (uint32_t i = 0; i < members; i++) {
      if (__atomic_load_n(&entries[i].sequence, __ATOMIC_ACQUIRE) != sequence) members = 0; // not all there yet
    }
    for (uint32_t i = 0; i < members && chosen == maxGroup; i++) {
      if (entries[i].tag == tag && (usedMembers_ >> i & 1) == 0) chosen = i;
    }
  }
  if (chosen == maxGroup) {
    counters_.retries++;
    MOECHECK(poll());
    return (polls_++ & 255) == 0 ? checkPeer() : ncclSuccess;
  }
  const CtsEntry entry = entries[chosen];
  bytes = std::min<size_t>(bytes, entry.room);
  const auto nQueues = static_cast<uint32_t>(queues_.size());
  const bool striped = nQueues > 1 && bytes >= stripeMin_;
  const uint32_t nPieces = striped ? nQueues : 1;
  const uint32_t first = striped ? 0 : nextQueue_;
  const int needed = pieceWork(stripe(bytes, static_cast<int>(nPieces), 0).bytes);
  if (needed > sendDepth) return fail(ncclInvalidArgument, "bytes: %zu are more than one message can have", bytes);
  for (uint32_t i = 0; i < nPieces; i++) {
    if (room(first + i, needed)) continue;
    MOECHECK(poll());
    if (room(first + i, needed)) continue;
    counters_.retries++;
    return ncclSuccess;
  }
  VerbsRequest* r = take(kindSend);
  if (r == nullptr) {
    MOECHECK(poll());
    return ncclSuccess;
  }
  r->bytes = bytes;
  r->pending = static_cast<int>(nPieces);
  const auto index = static_cast<uint32_t>(r - requests_.data());
  Immediate immediate;
  immediate.slot = slot;
  immediate.member = chosen;
  immediate.striped = striped;
  immediate.size = static_cast<uint32_t>(std::min<size_t>(bytes, Immediate::sizeInRecord));
  const bool record = immediate.size == Immediate::sizeInRecord;
  const bool apart = adaptive_ && bytes >= static_cast<size_t>(adaptiveMinParam.get());
  for (uint32_t i = 0; i < nPieces; i++) {
    const Stripe piece = stripe(bytes, static_cast<int>(nPieces), static_cast<int>(i));
    work_.assign(static_cast<size_t>(needed), ibv_send_wr());
    pieces_.assign(static_cast<size_t>(needed), ibv_sge());
    int n = 0;
    if (record && i == 0) {
      control_->records[slot][chosen] = bytes;
      pieces_[n] = {reinterpret_cast<uint64_t>(&control_->records[slot][chosen]), sizeof(uint64_t),
                    controlRegion_->localKey};
      work_[n].opcode = IBV_WR_RDMA_WRITE;
      work_[n].num_sge = 1;
      work_[n].wr.rdma.remote_addr =
        peer_.base + offsetof(Control, records) + (slot * maxGroup + chosen) * sizeof(uint64_t);
      work_[n].wr.rdma.rkey = peer_.remoteKey;
      n++;
    }
    size_t done = 0;
    while (done < piece.bytes) {
      const size_t step = std::min<size_t>(piece.bytes - done, port_.maxMessage);
      pieces_[n] = {reinterpret_cast<uint64_t>(data) + piece.offset + done, static_cast<uint32_t>(step),
                    held->localKey};
      work_[n].opcode = IBV_WR_RDMA_WRITE;
      work_[n].num_sge = 1;
      if (step <= maxInline_ && held->kind == ptrHost) work_[n].send_flags = IBV_SEND_INLINE;
      work_[n].wr.rdma.remote_addr = entry.address + piece.offset + done;
      work_[n].wr.rdma.rkey = entry.key;
      done += step;
      n++;
    }
    if (apart || piece.bytes == 0) {
      // Nothing in it, but it comes after the data.
      work_[n].wr.rdma.remote_addr = entry.address;
      work_[n].wr.rdma.rkey = entry.key;
      n++;
    }
    work_[n - 1].opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    work_[n - 1].imm_data = htonl(immediate.pack());
    for (int k = 0; k < n; k++) {
      work_[k].sg_list = &pieces_[k];
      work_[k].next = k + 1 < n ? &work_[k + 1] : nullptr;
    }
    MOECHECK(post(first + i, work_.data(), n, Work::message, index, true));
  }
  if (!striped) nextQueue_ = (nextQueue_ + 1) % nQueues;
  usedMembers_ |= 1u << chosen;
  if (usedMembers_ == (1u << members) - 1) {
    usedMembers_ = 0;
    group_++;
  }
  counters_.sends++;
  counters_.sendBytes += bytes;
  *request = r;
  return ncclSuccess;
}

ncclResult_t VerbsConnection::irecv(int n, void* const* data, const size_t* bytes, const int* tags,
                                    Region* const* regions, Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (sender_) return fail(ncclInvalidUsage, "irecv on a sending connection");
  if (n < 1 || n > maxGroup) return fail(ncclInvalidArgument, "n is %d, but a group has 1 to %d members", n, maxGroup);
  for (int i = 0; i < n; i++) {
    if (bytes[i] != 0 && (data[i] == nullptr || regions == nullptr || regions[i] == nullptr)) {
      return fail(ncclInvalidArgument, "data[%d] or its memory handle is NULL", i);
    }
  }
  const auto slot = static_cast<uint32_t>(group_ % maxRequests);
  const auto nQueues = static_cast<uint32_t>(queues_.size());
  const auto queue = static_cast<uint32_t>(group_ % nQueues);
  VerbsRequest* r = &requests_[slot];
  if (r->kind != kindFree || !room(queue, 1)) {
    counters_.retries++;
    return poll();
  }
  r->kind = kindReceive;
  r->n = r->open = r->nSizes = n;
  counters_.begin();
  if (timed_) r->begin = nowSeconds();
  for (int i = 0; i < n; i++) {
    r->members[i] = VerbsRequest::Member();
    r->members[i].room = bytes[i];
    const auto* held = bytes[i] != 0 ? static_cast<const RegistrationCache::Held*>(regions[i]) : controlRegion_;
    CtsEntry& entry = control_->cts[slot][i];
    // A write of nothing goes nowhere, but its address is checked by some devices.
    entry.address = bytes[i] != 0 ? reinterpret_cast<uint64_t>(data[i]) : reinterpret_cast<uint64_t>(control_.get());
    entry.room = bytes[i];
    entry.key = held->remoteKey;
    entry.tag = tags[i];
    entry.members = static_cast<uint32_t>(n);
    entry.sequence = static_cast<uint32_t>(group_ + 1);
  }
  ibv_sge piece = {reinterpret_cast<uint64_t>(control_->cts[slot]), static_cast<uint32_t>(n * sizeof(CtsEntry)),
                   controlRegion_->localKey};
  ibv_send_wr work = {};
  work.opcode = IBV_WR_RDMA_WRITE;
  work.sg_list = &piece;
  work.num_sge = 1;
  if (piece.length <= maxInline_) work.send_flags = IBV_SEND_INLINE;
  work.wr.rdma.remote_addr = peer_.base + offsetof(Control, cts) + slot * maxGroup * sizeof(CtsEntry);
  work.wr.rdma.rkey = peer_.remoteKey;
  MOECHECK(post(queue, &work, 1, Work::control, 0, false));
  group_++;
  *request = r;
  return ncclSuccess;
}

// ---- flush ----

ncclResult_t VerbsConnection::postFlush() {
  ibv_sge piece = {reinterpret_cast<uint64_t>(&control_->flushed), 1, controlRegion_->localKey};
  ibv_send_wr work = {};
  work.opcode = IBV_WR_RDMA_READ;
  work.sg_list = &piece;
  work.num_sge = 1;
  work.wr.rdma.remote_addr = flushAddress_;
  work.wr.rdma.rkey = flushKey_;
  flushPosted_++;
  return post(0, &work, 1, Work::flush, 0, true);
}

ncclResult_t VerbsConnection::iflush(int n, void* const* data, const int* bytes, Region* const* regions,
                                     Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (sender_) return fail(ncclInvalidUsage, "iflush on a sending connection");
  int last = -1;
  for (int i = 0; i < n; i++) {
    const auto* held = static_cast<const RegistrationCache::Held*>(regions[i]);
    if (bytes[i] > 0 && held != nullptr && held->kind != ptrHost) last = i;
  }
  if (last < 0) return ncclSuccess; // host memory is visible as soon as test says so
  if (freeFlushes_.empty()) {
    flushes_.push_back(std::make_unique<VerbsRequest>());
    flushes_.back()->connection = this;
    flushes_.back()->nSizes = 0;
    freeFlushes_.push_back(flushes_.back().get());
  }
  flushAddress_ = reinterpret_cast<uint64_t>(data[last]);
  flushKey_ = static_cast<const RegistrationCache::Held*>(regions[last])->remoteKey;
  if (flushQueue_.sendFree > 0) {
    MOECHECK(postFlush());
    flushWanted_ = flushPosted_;
  } else {
    flushWanted_ = flushPosted_ + 1; // one READ, as soon as there is room, for all who come until then
  }
  VerbsRequest* r = freeFlushes_.back();
  freeFlushes_.pop_back();
  r->kind = kindFlush;
  r->flush = flushWanted_;
  counters_.flushes++;
  counters_.begin();
  if (timed_) r->begin = nowSeconds();
  *request = r;
  return ncclSuccess;
}

// ---- one-sided ----

ncclResult_t VerbsConnection::put(const void* data, size_t bytes, Region* region, const RemoteRegion& remote,
                                  uint64_t offset, Request** request) {
  return putSignal(data, bytes, region, remote, offset, RemoteRegion(), 0, 0, request);
}

ncclResult_t VerbsConnection::putSignal(const void* data, size_t bytes, Region* region, const RemoteRegion& remote,
                                        uint64_t offset, const RemoteRegion& signal, uint64_t signalOffset,
                                        uint64_t value, Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (!sender_) return fail(ncclInvalidUsage, "put on a receiving connection");
  const auto* held = static_cast<const RegistrationCache::Held*>(region);
  if (bytes != 0 && (data == nullptr || held == nullptr)) {
    return fail(ncclInvalidArgument, "data or its region is NULL with %zu bytes", bytes);
  }
  if (bytes != 0 && (offset > remote.bytes || bytes > remote.bytes - offset)) {
    return fail(ncclInvalidArgument, "offset %llu with %zu bytes is outside the remote region of %llu bytes",
                static_cast<unsigned long long>(offset), bytes, static_cast<unsigned long long>(remote.bytes));
  }
  const bool signals = signal.key != 0;
  if (signals && (signalOffset % 8 != 0 || (signal.base + signalOffset) % 8 != 0 || signal.bytes < sizeof(uint64_t) ||
                  signalOffset > signal.bytes - sizeof(uint64_t))) {
    return fail(ncclInvalidArgument, "signalOffset %llu is not a multiple of 8 inside the signal region",
                static_cast<unsigned long long>(signalOffset));
  }
  const int needed = pieceWork(bytes);
  if (needed > sendDepth) return fail(ncclInvalidArgument, "bytes: %zu are more than one put can have", bytes);
  if (!room(0, needed)) {
    MOECHECK(poll());
    if (!room(0, needed)) {
      counters_.retries++;
      return ncclSuccess;
    }
  }
  VerbsRequest* r = take(kindSend);
  if (r == nullptr) return poll();
  r->bytes = bytes;
  work_.assign(static_cast<size_t>(needed), ibv_send_wr());
  pieces_.assign(static_cast<size_t>(needed), ibv_sge());
  int n = 0;
  for (size_t done = 0; done < bytes; n++) {
    const size_t step = std::min<size_t>(bytes - done, port_.maxMessage);
    pieces_[n] = {reinterpret_cast<uint64_t>(data) + done, static_cast<uint32_t>(step), held->localKey};
    if (step <= maxInline_ && held->kind == ptrHost) work_[n].send_flags = IBV_SEND_INLINE;
    work_[n].wr.rdma.remote_addr = remote.base + offset + done;
    work_[n].wr.rdma.rkey = static_cast<uint32_t>(remote.key);
    done += step;
  }
  if (signals) {
    uint64_t* from = &control_->signals[signals_++ % maxSignals];
    *from = value;
    pieces_[n] = {reinterpret_cast<uint64_t>(from), sizeof(value), controlRegion_->localKey};
    if (sizeof(value) <= maxInline_) work_[n].send_flags = IBV_SEND_INLINE;
    work_[n].wr.rdma.remote_addr = signal.base + signalOffset;
    work_[n].wr.rdma.rkey = static_cast<uint32_t>(signal.key);
    n++;
    counters_.signals++;
  }
  for (int k = 0; k < n; k++) {
    work_[k].opcode = IBV_WR_RDMA_WRITE;
    work_[k].sg_list = &pieces_[k];
    work_[k].num_sge = 1;
    work_[k].next = k + 1 < n ? &work_[k + 1] : nullptr;
  }
  if (n > 0) {
    r->pending = 1;
    MOECHECK(post(0, work_.data(), n, Work::message, static_cast<uint32_t>(r - requests_.data()), true));
  }
  counters_.puts++;
  counters_.putBytes += bytes;
  *request = r;
  return ncclSuccess;
}

// ---- completion ----

ncclResult_t VerbsConnection::test(Request* request, bool* done, size_t* bytes) {
  *done = false;
  auto* r = static_cast<VerbsRequest*>(request);
  if (r->kind == kindFree) return fail(ncclInvalidArgument, "request: it has completed already");
  auto complete = [&] {
    if (r->kind == kindSend) return r->pending == 0;
    if (r->kind == kindFlush) return flushDone_ >= r->flush;
    return r->open == 0;
  };
  if (!complete()) {
    MOECHECK(check());
    MOECHECK(poll());
  }
  if (!complete()) return (polls_++ & 255) == 0 ? checkPeer() : ncclSuccess;
  if (r->kind == kindReceive) {
    for (int i = 0; i < r->n; i++) {
      if (bytes != nullptr) bytes[i] = r->members[i].received;
      counters_.receiveBytes += r->members[i].received;
    }
    counters_.receives += static_cast<uint64_t>(r->n);
  } else if (r->kind == kindSend && bytes != nullptr) {
    *bytes = r->bytes;
  }
  *done = true;
  finish(r);
  return ncclSuccess;
}

ncclResult_t VerbsConnection::progress() {
  MOECHECK(check());
  MOECHECK(poll());
  return (polls_++ & 255) == 0 ? checkPeer() : ncclSuccess;
}

} // namespace net
} // namespace moe
