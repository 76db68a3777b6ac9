// A verbs connection's queue pairs, completion queues and control memory: how they are made, connected and destroyed.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "base/error.h"
#include "base/param.h"
#include "net/verbs_connection.h"

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
IntParam slParam{"NCCL_MOE_NET_SL", 0, 0, 15, "RDMA service level"};
IntParam slLatencyParam{"NCCL_MOE_NET_SL_LATENCY", 0, 0, 15, "RDMA service level of latency traffic"};
IntParam slThroughputParam{"NCCL_MOE_NET_SL_THROUGHPUT", 0, 0, 15, "RDMA service level of throughput traffic"};
IntParam tcParam{"NCCL_MOE_NET_TC", 0, 0, 255, "RDMA traffic class"};
IntParam tcLatencyParam{"NCCL_MOE_NET_TC_LATENCY", 0, 0, 255, "RDMA traffic class of latency traffic"};
IntParam tcThroughputParam{"NCCL_MOE_NET_TC_THROUGHPUT", 0, 0, 255, "RDMA traffic class of throughput traffic"};

constexpr int ctsDepth = 128; // of a receiver's queue pairs
constexpr int receiveDepth = maxRequests * maxGroup + 32;
constexpr int flushDepth = 16;
constexpr uint32_t wantedInline = 4 * sizeof(CtsEntry); // groups are rarely bigger

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

} // namespace

VerbsConnection::VerbsConnection(PortGroup* group, const CommConfig& config, bool sender, Stats* stats)
  : group_(*group), config_(config), sender_(sender), stats_(stats), timed_(Stats::enabled()),
    lib_(group->ports()[0].context->lib()), control_(nullptr, free),
    requests_(sender ? maxRequests * maxGroup : maxRequests) {
  for (VerbsRequest& request : requests_) {
    request.connection = this;
    free_.push_back(&request);
  }
  std::reverse(free_.begin(), free_.end());
  const int64_t adaptive = adaptiveParam.get();
  adaptive_ = adaptive == 1 || (adaptive == -1 && group_.ports()[0].infiniband);
  stripeMin_ = static_cast<size_t>(stripeParam.get());
}

ncclResult_t VerbsConnection::create(PortGroup* group, const CommConfig& config, bool sender, uint32_t nPaths,
                                     uint32_t nQueues, Stats* stats, std::unique_ptr<VerbsConnection>* connection) {
  std::unique_ptr<VerbsConnection> fresh(new VerbsConnection(group, config, sender, stats));
  MOECHECK(fresh->open(nPaths, nQueues));
  *connection = std::move(fresh);
  return ncclSuccess;
}

std::string VerbsConnection::who() const {
  return std::string(sender_ ? "connection to peer " : "connection from peer ") + peerName_ + " on device " +
         group_.info().name + " (verbs)";
}

ncclResult_t VerbsConnection::open(uint32_t nPaths, uint32_t nQueues) {
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
  MOECHECK(group_.add(strict, &controlRegion_));
  queues_.resize(nQueues);
  for (uint32_t i = 0; i < nQueues; i++) {
    queues_[i].path = i % nPaths;
    alive_.push_back(i);
  }
  maxMessage_ = UINT64_MAX;
  for (uint32_t i = 0; i < nPaths; i++) {
    paths_.push_back(std::make_unique<Path>());
    MOECHECK(openPath(i, nQueues / nPaths));
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::openPath(uint32_t index, uint32_t nQueues) {
  Path& path = *paths_[index];
  // Where the peer has more ports, several paths begin at one of this side's.
  path.portIndex = index % static_cast<uint32_t>(group_.ports().size());
  path.port = &group_.ports()[path.portIndex];
  maxMessage_ = std::min(maxMessage_, path.port->maxMessage);
  MOECHECK(portAddress(*path.port, &path.address));
  const int sends = sender_ ? sendDepth : ctsDepth;
  const int receives = sender_ ? 0 : receiveDepth;
  const int entries = static_cast<int>(nQueues) * (sends + receives) + flushDepth;
  errno = ENOMEM;
  path.cq = lib_.createCq(path.port->context->get(), entries, &path.health, nullptr, 0);
  if (path.cq == nullptr) {
    return fail(ncclSystemError, "%s: ibv_create_cq of %d entries: %s", who().c_str(), entries, strerror(errno));
  }
  for (uint32_t i = 0; i < queues_.size(); i++) {
    if (queues_[i].path != index) continue;
    MOECHECK(makeQueue(path, sends, receives, &queues_[i]));
    if (!sender_) MOECHECK(postReceives(i, receives));
  }
  if (!sender_ && (group_.info().ptrKinds & (ptrCuda | ptrDmabuf)) != 0) {
    path.flushQueue.path = index;
    MOECHECK(makeQueue(path, flushDepth, 0, &path.flushQueue));
    MOECHECK(connectQueue(path, path.flushQueue.qp, path.flushQueue.qp->qp_num, path.address, path.address.mtu));
  }
  return ncclSuccess;
}

ncclResult_t VerbsConnection::makeQueue(const Path& path, int sends, int receives, Queue* queue) {
  ibv_qp_init_attr attr = {};
  attr.qp_context = const_cast<VerbsHealth*>(&path.health);
  attr.send_cq = attr.recv_cq = path.cq;
  attr.qp_type = IBV_QPT_RC;
  attr.cap.max_send_wr = static_cast<uint32_t>(sends);
  attr.cap.max_recv_wr = static_cast<uint32_t>(receives);
  attr.cap.max_send_sge = attr.cap.max_recv_sge = 1;
  attr.cap.max_inline_data = wantedInline;
  errno = ENOMEM;
  queue->qp = lib_.createQp(path.port->context->pd(), &attr);
  if (queue->qp == nullptr && errno == EINVAL) { // some devices take less inline data, or none
    attr.cap.max_inline_data = 0;
    queue->qp = lib_.createQp(path.port->context->pd(), &attr);
  }
  if (queue->qp == nullptr) {
    return fail(ncclSystemError, "%s: ibv_create_qp: %s", who().c_str(), strerror(errno));
  }
  maxInline_ = std::min(maxInline_, attr.cap.max_inline_data);
  queue->sendFree = sends;
  return toInit(path, queue->qp);
}

ncclResult_t VerbsConnection::toInit(const Path& path, ibv_qp* qp) const {
  ibv_qp_attr attr = {};
  attr.qp_state = IBV_QPS_INIT;
  attr.port_num = path.port->port;
  attr.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  const int error = lib_.modifyQp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  if (error != 0) return fail(ncclSystemError, "%s: ibv_modify_qp to INIT: %s", who().c_str(), strerror(error));
  return ncclSuccess;
}

ncclResult_t VerbsConnection::connectQueue(const Path& path, ibv_qp* qp, uint32_t peerNumber, const VerbsAddress& peer,
                                           ibv_mtu mtu) const {
  ibv_qp_attr attr = {};
  attr.qp_state = IBV_QPS_RTR;
  attr.path_mtu = mtu;
  attr.dest_qp_num = peerNumber;
  attr.max_dest_rd_atomic = 1;
  attr.min_rnr_timer = 12;
  attr.ah_attr.sl = serviceLevel(config_.traffic);
  attr.ah_attr.port_num = path.port->port;
  attr.ah_attr.dlid = peer.lid;
  if (path.address.global) {
    attr.ah_attr.is_global = 1;
    attr.ah_attr.grh.dgid = peer.gid;
    attr.ah_attr.grh.sgid_index = static_cast<uint8_t>(path.address.gidIndex);
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
  body.nPaths = static_cast<uint32_t>(paths_.size());
  for (size_t i = 0; i < queues_.size(); i++) body.queueNumber[i] = queues_[i].qp->qp_num;
  for (size_t i = 0; i < paths_.size(); i++) {
    const Path& path = *paths_[i];
    body.path[i].remoteKey = controlRegion_->held[path.portIndex]->remoteKey;
    memcpy(body.path[i].gid, path.address.gid.raw, sizeof(body.path[i].gid));
    body.path[i].lid = path.address.lid;
    body.path[i].mtu = static_cast<uint8_t>(path.address.mtu);
    body.path[i].infiniband = path.port->infiniband ? 1 : 0;
  }
  body.base = reinterpret_cast<uint64_t>(control_.get());
  group_.info().name.copy(body.device, sizeof(body.device) - 1);
  return body;
}

ncclResult_t VerbsConnection::establish(const VerbsBody& peer, const std::string& peerName) {
  peer_ = peer;
  peerName_ = peerName + " (" + peer.device + ")";
  if (peer.nQueues != queues_.size() || peer.nPaths != paths_.size()) {
    return fail(ncclRemoteError, "%s: the peer has %u queue pairs on %u paths, this side %zu on %zu", who().c_str(),
                peer.nQueues, peer.nPaths, queues_.size(), paths_.size());
  }
  for (size_t i = 0; i < paths_.size(); i++) {
    const bool infiniband = paths_[i]->port->infiniband;
    if ((peer.path[i].infiniband != 0) == infiniband) continue;
    return fail(ncclRemoteError, "%s: the peer's port is %s, this side's %s %s", who().c_str(),
                infiniband ? "RoCE" : "InfiniBand", paths_[i]->port->info.name.c_str(),
                infiniband ? "InfiniBand" : "RoCE");
  }
  for (size_t i = 0; i < queues_.size(); i++) {
    const Path& path = *paths_[queues_[i].path];
    const VerbsPathBody& theirs = peer.path[queues_[i].path];
    VerbsAddress address;
    memcpy(address.gid.raw, theirs.gid, sizeof(theirs.gid));
    address.lid = theirs.lid;
    const ibv_mtu mtu = std::min(path.address.mtu, static_cast<ibv_mtu>(theirs.mtu));
    MOECHECK(connectQueue(path, queues_[i].qp, peer.queueNumber[i], address, mtu));
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
  for (auto& path : paths_) {
    if (path->flushQueue.qp != nullptr) warn("ibv_destroy_qp", lib_.destroyQp(path->flushQueue.qp));
    if (path->cq != nullptr) warn("ibv_destroy_cq", lib_.destroyCq(path->cq));
  }
  if (controlRegion_ != nullptr && group_.remove(controlRegion_) != ncclSuccess) MOE_WARN("%s", lastError());
  if (stats_ != nullptr && socket_) {
    stats_->add(group_.info().name, peerName_, sender_ ? "send" : "receive", counters_);
  }
}

} // namespace net
} // namespace moe
