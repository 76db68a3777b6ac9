// Queue pairs: their states, the posting of work and its completion.
#include <cerrno>
#include <cstring>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include "fake.h"

namespace fake {
namespace {

struct Transition {
  ibv_qp_state from, to;
  int required, optional;
};

constexpr int always = IBV_QP_STATE | IBV_QP_CUR_STATE;
constexpr Transition transitions[] = {
  {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, 0},
  {IBV_QPS_INIT, IBV_QPS_INIT, 0, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS},
  {IBV_QPS_INIT, IBV_QPS_RTR,
   IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
   IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX},
  {IBV_QPS_RTR, IBV_QPS_RTS,
   IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC,
   IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER},
  {IBV_QPS_RTS, IBV_QPS_RTS, 0, IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER},
};

// The device and port of this fabric that an address vector leads to.
bool resolve(Qp& qp, const ibv_ah_attr& ah) {
  State& s = state();
  if (!s.ib && !ah.is_global) return false;
  for (auto& dev : s.devices)
    for (int port = 1; port <= s.ports; port++) {
      ibv_gid gid;
      bool match = s.ib ? ah.dlid == deviceLid(*dev, port)
                        : deviceGid(*dev, port, ah.grh.sgid_index, &gid) && memcmp(&gid, &ah.grh.dgid, 16) == 0;
      if (!match) continue;
      qp.destDev = dev->index;
      qp.destPort = port;
      return true;
    }
  return false;
}

void pushCqe(Cq& cq, Qp& qp, Cqe entry) {
  State& s = state();
  if (int(cq.visible.size() + cq.delayed.size()) >= cq.cqe) {
    raiseEvent(*qp.dev(), IBV_EVENT_CQ_ERR, &cq, 0); // the completion is lost, as with rxe
    return;
  }
  entry.ready = Time();
  if (s.delayUs > 0) {
    Time ready = Clock::now() + std::chrono::microseconds(s.random() % unsigned(s.delayUs + 1));
    Time& last = qp.lastReady[entry.recv];
    entry.ready = last = std::max(last, ready);
  }
  cq.delayed.push_back(entry);
  s.delaying.insert(&cq);
  promoteDelayed(cq, s.delayUs > 0 ? Clock::now() : Time());
  if (!cq.delayed.empty()) engineWake(); // it keeps the time
}

void resetQueues(Qp& qp) {
  qp.sq.clear();
  qp.rq.clear();
  qp.next = 0;
  qp.sentBytes = qp.receivedBytes = 0;
  qp.sqUsed = qp.rqUsed = qp.unretired = qp.retries = qp.rnrRetries = 0;
  qp.stalled = false;
  qp.holdUntil = Time();
  state().active.erase(qp.qp_num);
}

ibv_wc errorWc(const Qp& qp, uint64_t wrId, ibv_wc_status status) {
  ibv_wc wc;
  memset(&wc, 0xa5, sizeof(wc)); // undefined on errors, so let nobody read it
  wc.wr_id = wrId;
  wc.status = status;
  wc.opcode = ibv_wc_opcode(0); // as rxe has it
  wc.vendor_err = 0;
  wc.qp_num = qp.qp_num;
  return wc;
}

uint64_t total(const std::vector<ibv_sge>& sges) {
  uint64_t n = 0;
  for (const auto& sge : sges) n += sge.length;
  return n;
}

int checkSend(const Qp& qp, const ibv_send_wr& wr, uint64_t length) {
  if (qp.state == IBV_QPS_RESET || qp.state == IBV_QPS_INIT || qp.state == IBV_QPS_RTR) return EINVAL;
  if (wr.num_sge < 0 || wr.num_sge > int(qp.cap.max_send_sge)) return EINVAL;
  if (qp.sqUsed >= int(qp.cap.max_send_wr)) return ENOMEM;
  if ((wr.send_flags & IBV_SEND_INLINE) && length > qp.cap.max_inline_data) return EINVAL;
  switch (wr.opcode) {
  case IBV_WR_RDMA_WRITE:
  case IBV_WR_RDMA_WRITE_WITH_IMM:
  case IBV_WR_SEND:
  case IBV_WR_SEND_WITH_IMM:
    return 0;
  case IBV_WR_RDMA_READ:
    return wr.send_flags & IBV_SEND_INLINE ? EINVAL : 0;
  case IBV_WR_ATOMIC_FETCH_AND_ADD:
  case IBV_WR_ATOMIC_CMP_AND_SWP:
    return length == 8 && !(wr.send_flags & IBV_SEND_INLINE) ? 0 : EINVAL;
  default:
    return EINVAL;
  }
}

Wqe makeWqe(const Qp& qp, const ibv_send_wr& wr, uint64_t length) {
  Wqe w;
  w.wrId = wr.wr_id;
  w.op = wr.opcode;
  w.flags = wr.send_flags;
  w.signaled = qp.signalAll || (wr.send_flags & IBV_SEND_SIGNALED);
  w.imm = wr.imm_data;
  w.length = length;
  w.sges.assign(wr.sg_list, wr.sg_list + wr.num_sge);
  if (wr.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || wr.opcode == IBV_WR_ATOMIC_CMP_AND_SWP) {
    w.raddr = wr.wr.atomic.remote_addr;
    w.rkey = wr.wr.atomic.rkey;
    w.compareAdd = wr.wr.atomic.compare_add;
    w.swap = wr.wr.atomic.swap;
  } else if (wr.opcode != IBV_WR_SEND && wr.opcode != IBV_WR_SEND_WITH_IMM) {
    w.raddr = wr.wr.rdma.remote_addr;
    w.rkey = wr.wr.rdma.rkey;
  }
  if (wr.send_flags & IBV_SEND_INLINE)
    for (const auto& sge : w.sges) {
      auto* from = reinterpret_cast<const char*>(uintptr_t(sge.addr));
      w.inlineData.insert(w.inlineData.end(), from, from + sge.length);
    }
  return w;
}

} // namespace

bool listOk(const Qp& qp, const std::vector<ibv_sge>& sges, unsigned access) {
  for (const auto& sge : sges)
    if (sge.length != 0 && !inMr(findMr(sge.lkey, false), qp.pd, sge.addr, sge.length, access)) return false;
  return true;
}

namespace {

// Visits the parts of the list that overlap [offset, offset + length).
template <class F> void forRange(const std::vector<ibv_sge>& sges, uint64_t offset, uint64_t length, F&& f) {
  uint64_t at = 0;
  for (const auto& sge : sges) {
    uint64_t from = std::max(at, offset), to = std::min(at + sge.length, offset + length);
    if (from < to) f(sge, from - at, from - offset, to - from);
    at += sge.length;
  }
}

char* place(const ibv_sge& sge) {
  Mr* mr = findMr(sge.lkey, false);
  return static_cast<char*>(mr->addr) + (sge.addr - mr->iova);
}

} // namespace

__attribute__((no_sanitize_thread)) void dmaCopy(char* to, const char* from, uint64_t length) {
  uint64_t i = 0;
  for (; i < length && (uintptr_t(to + i) & 7) != 0; i++) static_cast<volatile char*>(to)[i] = from[i];
  for (; i + 8 <= length; i += 8) {
    uint64_t word;
    __builtin_memcpy(&word, from + i, 8);
    *reinterpret_cast<volatile uint64_t*>(to + i) = word;
  }
  for (; i < length; i++) static_cast<volatile char*>(to)[i] = from[i];
}

bool gather(const Qp& qp, const Wqe& w, uint64_t offset, char* out, uint64_t length) {
  if (w.flags & IBV_SEND_INLINE) {
    memcpy(out, w.inlineData.data() + offset, length);
    return true;
  }
  if (!listOk(qp, w.sges, 0)) return false;
  forRange(w.sges, offset, length, [&](const ibv_sge& sge, uint64_t inSge, uint64_t inOut, uint64_t n) {
    memcpy(out + inOut, place(sge) + inSge, n);
  });
  return true;
}

bool scatter(const Qp& qp, const std::vector<ibv_sge>& sges, uint64_t offset, const char* data, uint64_t length) {
  if (!listOk(qp, sges, IBV_ACCESS_LOCAL_WRITE)) return false;
  forRange(sges, offset, length, [&](const ibv_sge& sge, uint64_t inSge, uint64_t inData, uint64_t n) {
    dmaCopy(place(sge) + inSge, data + inData, n);
  });
  return true;
}

void promoteDelayed(Cq& cq, Time now) {
  bool notify = false;
  for (auto it = cq.delayed.begin(); it != cq.delayed.end();) {
    if (it->ready > now) {
      ++it;
      continue;
    }
    notify = notify || cq.armed == 1 || (cq.armed == 2 && (it->solicited || it->wc.status != IBV_WC_SUCCESS));
    cq.visible.push_back(*it);
    it = cq.delayed.erase(it);
  }
  cq.count.store(int(cq.visible.size()), std::memory_order_release);
  if (cq.delayed.empty()) state().delaying.erase(&cq);
  if (!notify || cq.channel == nullptr) return;
  cq.armed = 0;
  ibv_cq* pointer = &cq;
  if (write(static_cast<Channel*>(cq.channel)->writeEnd, &pointer, sizeof(void*)) == -1) state().misuse++;
}

void qpToError(Qp& qp) {
  qp.state = IBV_QPS_ERR;
  state().active.erase(qp.qp_num);
  qp.next = 0;
  while (!qp.sq.empty()) {
    Cqe entry;
    entry.wc = errorWc(qp, qp.sq.front().wrId, IBV_WC_WR_FLUSH_ERR);
    entry.qpn = qp.qp_num;
    entry.retire = qp.unretired + 1;
    qp.unretired = 0;
    qp.sq.pop_front();
    pushCqe(*static_cast<Cq*>(qp.send_cq), qp, entry);
  }
  while (!qp.rq.empty()) {
    Cqe entry;
    entry.wc = errorWc(qp, qp.rq.front().wrId, IBV_WC_WR_FLUSH_ERR);
    entry.qpn = qp.qp_num;
    entry.retire = 1;
    entry.recv = true;
    qp.rq.pop_front();
    pushCqe(*static_cast<Cq*>(qp.recv_cq), qp, entry);
  }
}

void completeSend(Qp& qp, ibv_wc_status status) {
  Wqe w = std::move(qp.sq.front());
  qp.sq.pop_front();
  qp.headSeq++;
  if (qp.next > 0)
    qp.next--;
  else
    qp.sentBytes = 0;
  qp.retries = qp.rnrRetries = 0;
  qp.unretired++;
  if (w.signaled || status != IBV_WC_SUCCESS) status = faultStatus(status, "wc.send", qp.context);
  if (w.signaled || status != IBV_WC_SUCCESS) {
    Cqe entry;
    entry.wc = errorWc(qp, w.wrId, status);
    if (status == IBV_WC_SUCCESS) {
      entry.wc.wc_flags = 0;
      entry.wc.byte_len = uint32_t(w.length);
      switch (w.op) {
      case IBV_WR_RDMA_READ:
        entry.wc.opcode = IBV_WC_RDMA_READ;
        break;
      case IBV_WR_ATOMIC_FETCH_AND_ADD:
        entry.wc.opcode = IBV_WC_FETCH_ADD;
        break;
      case IBV_WR_ATOMIC_CMP_AND_SWP:
        entry.wc.opcode = IBV_WC_COMP_SWAP;
        break;
      case IBV_WR_SEND:
      case IBV_WR_SEND_WITH_IMM:
        entry.wc.opcode = IBV_WC_SEND;
        break;
      default:
        entry.wc.opcode = IBV_WC_RDMA_WRITE;
      }
    }
    entry.qpn = qp.qp_num;
    entry.retire = qp.unretired;
    qp.unretired = 0;
    pushCqe(*static_cast<Cq*>(qp.send_cq), qp, entry);
  }
  if (status != IBV_WC_SUCCESS) qpToError(qp);
}

ibv_wc_status completeRecv(Qp& qp, ibv_wc_status status, ibv_wc_opcode opcode, uint64_t bytes, bool withImm,
                           uint32_t imm, bool solicited) {
  RecvWqe w = std::move(qp.rq.front());
  qp.rq.pop_front();
  status = faultStatus(status, "wc.recv", qp.context);
  Cqe entry;
  entry.wc = errorWc(qp, w.wrId, status);
  if (status == IBV_WC_SUCCESS) {
    entry.wc.opcode = opcode;
    entry.wc.byte_len = uint32_t(bytes);
    entry.wc.wc_flags = withImm ? IBV_WC_WITH_IMM : 0;
    if (withImm) entry.wc.imm_data = imm;
    entry.wc.src_qp = qp.attr.dest_qp_num;
  }
  entry.qpn = qp.qp_num;
  entry.retire = 1;
  entry.recv = true;
  entry.solicited = solicited;
  pushCqe(*static_cast<Cq*>(qp.recv_cq), qp, entry);
  if (status != IBV_WC_SUCCESS) qpToError(qp);
  return status;
}

int pollCq(ibv_cq* c, int n, ibv_wc* wc) {
  auto* cq = static_cast<Cq*>(c);
  if (cq->count.load(std::memory_order_acquire) == 0) {
    // A real NIC does not need the processor that the poller keeps busy; the engine thread does.
    static thread_local unsigned empty = 0;
    if (++empty % 8 == 0) sched_yield();
    if (!faultsAny()) return 0; // scripts count empty polls too
  }
  Guard guard;
  if (faultAt("poll_cq", cq->context) != 0) return -1;
  int done = 0;
  while (done < n && !cq->visible.empty()) {
    const Cqe& entry = cq->visible.front();
    wc[done++] = entry.wc;
    auto it = state().qps.find(entry.qpn);
    if (it != state().qps.end()) (entry.recv ? it->second->rqUsed : it->second->sqUsed) -= entry.retire;
    cq->visible.pop_front();
  }
  cq->count.store(int(cq->visible.size()), std::memory_order_release);
  return done;
}

int armCq(ibv_cq* cq, int solicitedOnly) {
  Guard guard;
  if (int e = faultAt("req_notify_cq", cq->context)) return e;
  static_cast<Cq*>(cq)->armed = solicitedOnly ? 2 : 1;
  return 0;
}

int postSend(ibv_qp* q, ibv_send_wr* wr, ibv_send_wr** bad) {
  Guard guard;
  auto& qp = *static_cast<Qp*>(q);
  int result = 0;
  for (; wr != nullptr; wr = wr->next) {
    result = faultAt("post_send", qp.context);
    if (result == faultStall) {
      qp.holdUntil = Time::max();
      result = 0;
    }
    uint64_t length = 0;
    for (int i = 0; i < wr->num_sge; i++) length += wr->sg_list[i].length;
    if (result == 0) result = checkSend(qp, *wr, length);
    if (result != 0) break;
    qp.sqUsed++;
    qp.sq.push_back(makeWqe(qp, *wr, length));
    if (qp.state == IBV_QPS_ERR)
      qpToError(qp);
    else
      state().active.insert(qp.qp_num);
  }
  if (wr != nullptr) *bad = wr;
  engineWake();
  return result;
}

int postRecv(ibv_qp* q, ibv_recv_wr* wr, ibv_recv_wr** bad) {
  Guard guard;
  auto& qp = *static_cast<Qp*>(q);
  int result = 0;
  for (; wr != nullptr; wr = wr->next) {
    result = faultAt("post_recv", qp.context);
    if (result == 0 && (qp.state == IBV_QPS_RESET || wr->num_sge < 0 || wr->num_sge > int(qp.cap.max_recv_sge)))
      result = EINVAL;
    if (result == 0 && qp.rqUsed >= int(qp.cap.max_recv_wr)) result = ENOMEM;
    if (result != 0) break;
    RecvWqe w;
    w.wrId = wr->wr_id;
    w.sges.assign(wr->sg_list, wr->sg_list + wr->num_sge);
    w.length = total(w.sges);
    qp.rqUsed++;
    qp.rq.push_back(std::move(w));
    if (qp.state == IBV_QPS_ERR) qpToError(qp);
  }
  if (wr != nullptr) *bad = wr;
  return result;
}

} // namespace fake

using namespace fake;

extern "C" {

ibv_qp* ibv_create_qp(ibv_pd* pd, ibv_qp_init_attr* init) {
  Guard guard;
  State& s = state();
  errno = faultAt("create_qp", pd->context);
  if (errno != 0) return nullptr;
  errno = EINVAL;
  ibv_qp_cap& cap = init->cap;
  if (init->qp_type != IBV_QPT_RC) return errno = EOPNOTSUPP, nullptr;
  if (init->send_cq == nullptr || init->recv_cq == nullptr || init->srq != nullptr) return nullptr;
  if (cap.max_send_wr > maxWr || cap.max_recv_wr > maxWr || cap.max_send_sge > maxSge || cap.max_recv_sge > maxSge ||
      cap.max_inline_data > maxInline)
    return nullptr;
  if (s.qps.size() >= (1u << qpIndexBits) - 1) return errno = ENOMEM, nullptr;
  errno = 0;
  auto qp = std::make_unique<Qp>();
  static_cast<ibv_qp&>(*qp) = ibv_qp{};
  do s.cursor = (s.cursor + 1) % (1u << qpIndexBits);
  while (s.cursor == 0 || s.qps.count(s.slot << qpIndexBits | s.cursor) != 0);
  qp->qp_num = qp->handle = s.slot << qpIndexBits | s.cursor;
  qp->context = pd->context;
  qp->qp_context = init->qp_context;
  qp->pd = pd;
  qp->send_cq = init->send_cq;
  qp->recv_cq = init->recv_cq;
  qp->state = IBV_QPS_RESET;
  qp->qp_type = init->qp_type;
  cap.max_send_wr = std::max(cap.max_send_wr, 1u);
  cap.max_send_sge = std::max(cap.max_send_sge, 1u);
  cap.max_recv_sge = std::max(cap.max_recv_sge, 1u);
  qp->cap = cap;
  qp->signalAll = init->sq_sig_all != 0;
  qp->serial = ++s.lastSerial;
  pthread_mutex_init(&qp->mutex, nullptr);
  pthread_cond_init(&qp->cond, nullptr);
  s.pdUsers[pd]++;
  s.cqUsers[init->send_cq]++;
  s.cqUsers[init->recv_cq]++;
  s.qps[qp->qp_num] = qp.get();
  return qp.release();
}

int ibv_destroy_qp(ibv_qp* q) {
  Guard guard;
  State& s = state();
  auto* qp = static_cast<Qp*>(q);
  bool known = false;
  for (const auto& entry : s.qps) known = known || entry.second == qp;
  if (!known) return s.misuse++, EINVAL;
  if (int e = faultAt("destroy_qp", qp->context)) return e;
  s.qps.erase(qp->qp_num);
  s.active.erase(qp->qp_num);
  guard.awaitAcks(qp);
  s.pdUsers[qp->pd]--;
  s.cqUsers[qp->send_cq]--;
  s.cqUsers[qp->recv_cq]--;
  pthread_mutex_destroy(&qp->mutex);
  pthread_cond_destroy(&qp->cond);
  std::unique_ptr<Qp> owned(qp);
  return 0;
}

int ibv_modify_qp(ibv_qp* q, ibv_qp_attr* attr, int mask) {
  Guard guard;
  State& s = state();
  auto& qp = *static_cast<Qp*>(q);
  if (int e = faultAt("modify_qp", qp.context)) return e;
  ibv_qp_state to = mask & IBV_QP_STATE ? attr->qp_state : qp.state;
  if ((mask & IBV_QP_CUR_STATE) && attr->cur_qp_state != qp.state) return EINVAL;
  if (to == IBV_QPS_ERR || to == IBV_QPS_RESET) {
    if (to == IBV_QPS_ERR) {
      if (qp.state == IBV_QPS_RESET) return EINVAL;
      qpToError(qp);
    } else {
      resetQueues(qp);
    }
    qp.state = to;
    return 0;
  }
  const Transition* t = nullptr;
  for (const auto& candidate : transitions)
    if (candidate.from == qp.state && candidate.to == to) t = &candidate;
  if (t == nullptr || (mask & t->required) != t->required || (mask & ~(t->required | t->optional | always)))
    return EINVAL;
  if ((mask & IBV_QP_PORT) && (attr->port_num < 1 || attr->port_num > s.ports)) return EINVAL;
  if ((mask & IBV_QP_PKEY_INDEX) && attr->pkey_index != 0) return EINVAL;
  if ((mask & IBV_QP_PATH_MTU) && (attr->path_mtu < IBV_MTU_256 || attr->path_mtu > IBV_MTU_4096)) return EINVAL;
  if ((mask & IBV_QP_RETRY_CNT) && attr->retry_cnt > 7) return EINVAL;
  if ((mask & IBV_QP_RNR_RETRY) && attr->rnr_retry > 7) return EINVAL;
  if ((mask & IBV_QP_TIMEOUT) && attr->timeout > 31) return EINVAL;
  if ((mask & IBV_QP_MIN_RNR_TIMER) && attr->min_rnr_timer > 31) return EINVAL;
  if ((mask & IBV_QP_DEST_QPN) && attr->dest_qp_num > 0xffffff) return EINVAL;
  if ((mask & IBV_QP_AV) && !resolve(qp, attr->ah_attr)) return EINVAL;

  if (mask & IBV_QP_ACCESS_FLAGS) qp.attr.qp_access_flags = attr->qp_access_flags;
  if (mask & IBV_QP_PKEY_INDEX) qp.attr.pkey_index = attr->pkey_index;
  if (mask & IBV_QP_PORT) qp.attr.port_num = attr->port_num;
  if (mask & IBV_QP_AV) qp.attr.ah_attr = attr->ah_attr;
  if (mask & IBV_QP_PATH_MTU) qp.attr.path_mtu = attr->path_mtu;
  if (mask & IBV_QP_DEST_QPN) {
    qp.attr.dest_qp_num = attr->dest_qp_num;
    qp.destSlot = attr->dest_qp_num >> qpIndexBits;
  }
  if (mask & IBV_QP_RQ_PSN) qp.attr.rq_psn = qp.expectSeq = attr->rq_psn & 0xffffff;
  if (mask & IBV_QP_MAX_DEST_RD_ATOMIC) qp.attr.max_dest_rd_atomic = attr->max_dest_rd_atomic;
  if (mask & IBV_QP_MIN_RNR_TIMER) qp.attr.min_rnr_timer = attr->min_rnr_timer;
  if (mask & IBV_QP_TIMEOUT) qp.attr.timeout = attr->timeout;
  if (mask & IBV_QP_RETRY_CNT) qp.attr.retry_cnt = attr->retry_cnt;
  if (mask & IBV_QP_RNR_RETRY) qp.attr.rnr_retry = attr->rnr_retry;
  if (mask & IBV_QP_SQ_PSN) qp.attr.sq_psn = qp.headSeq = attr->sq_psn & 0xffffff;
  if (mask & IBV_QP_MAX_QP_RD_ATOMIC) qp.attr.max_rd_atomic = attr->max_rd_atomic;
  if (to == IBV_QPS_RTR) qp.receivedBytes = qp.refusedAttempt = 0;
  if (to == IBV_QPS_RTS && qp.state == IBV_QPS_RTR) qp.attempt = ++s.lastAttempt;
  qp.state = to;
  return 0;
}

int ibv_query_qp(ibv_qp* q, ibv_qp_attr* attr, int, ibv_qp_init_attr* init) {
  Guard guard;
  auto& qp = *static_cast<Qp*>(q);
  if (int e = faultAt("query_qp", qp.context)) return e;
  *attr = qp.attr;
  attr->qp_state = attr->cur_qp_state = qp.state;
  attr->cap = qp.cap;
  *init = ibv_qp_init_attr{};
  init->qp_context = qp.qp_context;
  init->send_cq = qp.send_cq;
  init->recv_cq = qp.recv_cq;
  init->cap = qp.cap;
  init->qp_type = qp.qp_type;
  init->sq_sig_all = qp.signalAll;
  return 0;
}
}
