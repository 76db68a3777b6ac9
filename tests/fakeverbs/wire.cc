// The engine thread of a process: it sends the requests of the local queue pairs, answers those of the peers, and
// keeps the timers.
//
// Every process listens on an abstract unix socket named after its slot, a number that is also the upper part of its
// queue pair numbers.  A requester connects to its peer's slot; requests go one way over that stream, acknowledgements
// and read data the other.  Requests are cut into fragments, so that queue pairs take turns, and execute in order for
// each queue pair.  Where a stream ends or a queue pair refuses, the requester starts over after its timeout, until
// retry_cnt is used up: that is what a dead peer looks like on a real network.
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#include "fake.h"

namespace fake {

namespace {

constexpr uint32_t wireMagic = 0x46414b45;
constexpr uint64_t fragmentSize = 64 << 10;

socklen_t addressOf(uint32_t slot, sockaddr_un* addr) {
  memset(addr, 0, sizeof(*addr));
  addr->sun_family = AF_UNIX;
  int n = snprintf(addr->sun_path + 1, sizeof(addr->sun_path) - 1, "fakeverbs.%s.%u", state().job.c_str(), slot);
  return socklen_t(offsetof(sockaddr_un, sun_path) + 1 + size_t(n));
}

void watch(int fd, bool writable, bool add) {
  epoll_event event = {};
  event.events = EPOLLIN | (writable ? EPOLLOUT : 0u);
  event.data.fd = fd;
  epoll_ctl(state().epollFd, add ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
}

// The answer that never came: starts over after the timeout, or gives up.
void lost(Qp& qp) {
  if (qp.sq.empty() || qp.state != IBV_QPS_RTS) return;
  if (qp.retries++ >= qp.attr.retry_cnt) {
    completeSend(qp, IBV_WC_RETRY_EXC_ERR);
    return;
  }
  qp.next = 0;
  qp.sentBytes = 0;
  qp.attempt = ++state().lastAttempt;
  // A timeout of 0 means to wait for ever.
  auto wait = qp.attr.timeout == 0 ? std::chrono::nanoseconds(std::chrono::hours(24))
                                   : std::chrono::nanoseconds(4096ll << qp.attr.timeout);
  qp.holdUntil = Clock::now() + wait;
  state().active.insert(qp.qp_num);
}

void closeConn(int fd) {
  State& s = state();
  auto it = s.conns.find(fd);
  if (it == s.conns.end()) return;
  uint32_t slot = it->second->slot;
  auto out = s.outgoing.find(slot);
  bool outgoing = out != s.outgoing.end() && out->second == fd;
  if (outgoing) s.outgoing.erase(out);
  s.conns.erase(it);
  if (!outgoing) return;
  std::vector<Qp*> affected;
  for (auto& entry : s.qps)
    if (entry.second->destSlot == slot && entry.second->next + (entry.second->sentBytes > 0) > 0)
      affected.push_back(entry.second);
  for (Qp* qp : affected) lost(*qp);
}

Conn* addConn(int fd, uint32_t slot) {
  State& s = state();
  auto conn = std::make_unique<Conn>();
  conn->fd = fd;
  conn->slot = slot;
  watch(fd, false, true);
  return (s.conns[fd] = std::move(conn)).get();
}

// null: nobody is there; *busy: try again.
Conn* connTo(uint32_t slot, bool* busy) {
  State& s = state();
  *busy = false;
  if (auto it = s.outgoing.find(slot); it != s.outgoing.end()) return s.conns[it->second].get();
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd == -1) return nullptr;
  int size = 1 << 20;
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
  sockaddr_un addr;
  socklen_t length = addressOf(slot, &addr);
  if (connect(fd, reinterpret_cast<sockaddr*>(&addr), length) == -1) {
    *busy = errno == EAGAIN;
    close(fd);
    return nullptr;
  }
  s.outgoing[slot] = fd;
  return addConn(fd, slot);
}

// False if the stream broke.
bool flush(Conn& conn) {
  while (conn.outPos < conn.out.size()) {
    ssize_t n = send(conn.fd, conn.out.data() + conn.outPos, conn.out.size() - conn.outPos, MSG_NOSIGNAL);
    if (n == -1 && errno == EINTR) continue;
    if (n == -1 && errno == EAGAIN) {
      watch(conn.fd, true, false);
      return true;
    }
    if (n == -1) return false;
    conn.outPos += size_t(n);
  }
  if (!conn.out.empty()) watch(conn.fd, false, false);
  conn.out.clear();
  conn.outPos = 0;
  return true;
}

void append(Conn& conn, const Header& header, const char* data) {
  auto* bytes = reinterpret_cast<const char*>(&header);
  conn.out.insert(conn.out.end(), bytes, bytes + sizeof(header));
  if (header.length > 0) conn.out.insert(conn.out.end(), data, data + header.length);
}

// Starts or continues the next request of a queue pair.  True if something moved.
bool sendFragment(Qp& qp, Time now) {
  State& s = state();
  if (qp.state != IBV_QPS_RTS || qp.next >= qp.sq.size()) {
    s.active.erase(qp.qp_num);
    return false;
  }
  if (now < qp.holdUntil) return false;
  Wqe& w = qp.sq[qp.next];
  if (qp.sentBytes == 0) {
    if (s.reorder && !qp.stalled) {
      qp.stalled = true;
      if (s.random() % 4 == 0) {
        qp.holdUntil = now + std::chrono::microseconds(1 + s.random() % 500); // not now: the timer is for later
        return false;
      }
    }
    if (!(w.flags & IBV_SEND_INLINE) && !listOk(qp, w.sges, w.reads() ? IBV_ACCESS_LOCAL_WRITE : 0)) {
      if (qp.next > 0) return false; // those before it come first
      completeSend(qp, IBV_WC_LOC_QP_OP_ERR);
      return true;
    }
    if (w.length > maxMsg) {
      if (qp.next > 0) return false;
      completeSend(qp, IBV_WC_LOC_LEN_ERR);
      return true;
    }
    int reading = 0;
    for (size_t i = 0; i < qp.next; i++) reading += qp.sq[i].reads();
    if (((w.flags & IBV_SEND_FENCE) && reading > 0) || (w.reads() && reading >= qp.attr.max_rd_atomic)) return false;
  }
  bool busy = false;
  Conn* conn = qp.dev()->portDown[qp.attr.port_num] ? nullptr : connTo(qp.destSlot, &busy);
  if (conn == nullptr) {
    if (busy)
      qp.holdUntil = now + std::chrono::milliseconds(1);
    else
      lost(qp);
    return true;
  }
  if (!conn->out.empty()) return false;
  Header h = {};
  h.magic = wireMagic;
  h.kind = kindRequest;
  h.op = uint8_t(w.op);
  h.dstQpn = qp.attr.dest_qp_num;
  h.srcQpn = qp.qp_num;
  h.seq = qp.headSeq + uint32_t(qp.next);
  h.attempt = qp.attempt;
  h.imm = w.imm;
  h.rkey = w.rkey;
  h.raddr = w.raddr;
  h.offset = qp.sentBytes;
  h.total = w.length;
  h.compareAdd = w.compareAdd;
  h.swap = w.swap;
  h.dstDev = uint8_t(qp.destDev);
  h.dstPort = uint8_t(qp.destPort);
  h.length = w.reads() ? 0 : uint32_t(std::min(fragmentSize, w.length - qp.sentBytes));
  bool last = w.reads() || qp.sentBytes + h.length == w.length;
  h.flags = uint8_t((qp.sentBytes == 0 ? flagFirst : 0) | (last ? flagLast : 0) |
                    (w.flags & IBV_SEND_SOLICITED ? flagSolicited : 0));
  static thread_local std::vector<char> buffer(fragmentSize);
  if (h.length > 0 && !gather(qp, w, qp.sentBytes, buffer.data(), h.length)) {
    // The region went away under a request that is on its way; those before it complete first.
    if (qp.next > 0) return false;
    completeSend(qp, IBV_WC_LOC_QP_OP_ERR);
    return true;
  }
  append(*conn, h, buffer.data());
  if (last) {
    qp.next++;
    qp.sentBytes = 0;
    qp.stalled = false;
  } else {
    qp.sentBytes += h.length;
  }
  if (!flush(*conn)) closeConn(conn->fd);
  return true;
}

void answer(Conn& conn, const Header& request, Kind kind, Syndrome syndrome, uint8_t rnrTimer) {
  Header h = {};
  h.magic = wireMagic;
  h.kind = kind;
  h.syndrome = syndrome;
  h.dstQpn = request.srcQpn;
  h.srcQpn = request.dstQpn;
  h.seq = request.seq;
  h.attempt = request.attempt;
  h.rnrTimer = rnrTimer;
  h.flags = flagLast;
  append(conn, h, nullptr);
}

void respond(Conn& conn, const Header& request, const char* data, uint64_t length) {
  std::vector<char> buffer(std::min(fragmentSize, length));
  uint64_t offset = 0;
  do {
    Header h = {};
    h.magic = wireMagic;
    h.kind = kindResponse;
    h.dstQpn = request.srcQpn;
    h.srcQpn = request.dstQpn;
    h.seq = request.seq;
    h.attempt = request.attempt;
    h.offset = offset;
    h.length = uint32_t(std::min(fragmentSize, length - offset));
    if (offset + h.length == length) h.flags = flagLast;
    dmaCopy(buffer.data(), data + offset, h.length);
    append(conn, h, buffer.data());
    offset += h.length;
  } while (offset < length);
}

// What the responder's memory looks like at an address of a request; null if the access is not allowed.
char* target(const Qp& qp, const Header& h, uint64_t addr, uint64_t length, unsigned access) {
  Mr* mr = findMr(h.rkey, true);
  return inMr(mr, qp.pd, addr, length, access) ? static_cast<char*>(mr->addr) + (addr - mr->iova) : nullptr;
}

// Executes one fragment.  The return value is the syndrome, nakDropped - 1 standing for success.
constexpr int executed = -1;
int execute(Conn& conn, Qp& qp, const Header& h, const char* data) {
  bool last = h.flags & flagLast;
  unsigned rights = qp.attr.qp_access_flags;
  if (h.op != IBV_WR_RDMA_WRITE && last) placeHeld(qp, Time::max());
  switch (h.op) {
  case IBV_WR_RDMA_WRITE:
  case IBV_WR_RDMA_WRITE_WITH_IMM: {
    if (!(rights & IBV_ACCESS_REMOTE_WRITE)) return nakInvalid;
    // The whole range is checked with every fragment: the region may have gone since the first.
    char* to = h.total == 0 ? nullptr : target(qp, h, h.raddr, h.total, IBV_ACCESS_REMOTE_WRITE);
    if (h.total > 0 && to == nullptr) return nakAccess;
    if (h.op == IBV_WR_RDMA_WRITE_WITH_IMM && qp.rq.empty()) return nakNotReady;
    if (h.length > 0 && findMr(h.rkey, true)->map != nullptr) {
      qp.dev()->unflushed.push_back({to + h.offset, std::vector<char>(data, data + h.length), Time()});
    } else if (state().adaptive && h.op == IBV_WR_RDMA_WRITE && h.total > 8) {
      qp.held.push_back({to + h.offset, std::vector<char>(data, data + h.length),
                         Clock::now() + std::chrono::microseconds(state().random() % 500)});
    } else if (h.length > 0) {
      dmaCopy(to + h.offset, data, h.length);
    }
    if (last && h.op == IBV_WR_RDMA_WRITE_WITH_IMM &&
        completeRecv(qp, IBV_WC_SUCCESS, IBV_WC_RECV_RDMA_WITH_IMM, h.total, true, h.imm, h.flags & flagSolicited) !=
          IBV_WC_SUCCESS)
      return nakOperation;
    break;
  }
  case IBV_WR_SEND:
  case IBV_WR_SEND_WITH_IMM: {
    if (qp.rq.empty()) return nakNotReady;
    const RecvWqe& r = qp.rq.front();
    bool ok = h.total <= r.length && scatter(qp, r.sges, h.offset, data, h.length);
    if (ok && !last) break;
    ibv_wc_status status = completeRecv(qp, ok ? IBV_WC_SUCCESS : IBV_WC_LOC_QP_OP_ERR, IBV_WC_RECV, h.total,
                                        h.op == IBV_WR_SEND_WITH_IMM, h.imm, h.flags & flagSolicited);
    if (status != IBV_WC_SUCCESS) return nakOperation;
    break;
  }
  case IBV_WR_RDMA_READ: {
    if (!(rights & IBV_ACCESS_REMOTE_READ)) return nakInvalid;
    char* from = h.total == 0 ? nullptr : target(qp, h, h.raddr, h.total, IBV_ACCESS_REMOTE_READ);
    if (h.total > 0 && from == nullptr) return nakAccess;
    if (h.total > 0 && findMr(h.rkey, true)->map != nullptr) flushDevice(*qp.dev());
    respond(conn, h, from, h.total);
    break;
  }
  default: {
    if (!(rights & IBV_ACCESS_REMOTE_ATOMIC) || h.raddr % 8 != 0) return nakInvalid;
    char* at = target(qp, h, h.raddr, 8, IBV_ACCESS_REMOTE_ATOMIC);
    if (at == nullptr) return nakAccess;
    auto* word = reinterpret_cast<uint64_t*>(at);
    uint64_t old = h.compareAdd;
    if (h.op == IBV_WR_ATOMIC_FETCH_AND_ADD)
      old = __atomic_fetch_add(word, h.compareAdd, __ATOMIC_SEQ_CST);
    else
      __atomic_compare_exchange_n(word, &old, h.swap, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    respond(conn, h, reinterpret_cast<const char*>(&old), 8);
  }
  }
  qp.receivedBytes = last ? 0 : h.offset + h.length;
  if (last) {
    qp.expectSeq++;
    if (h.op != IBV_WR_RDMA_READ && h.op != IBV_WR_ATOMIC_FETCH_AND_ADD && h.op != IBV_WR_ATOMIC_CMP_AND_SWP)
      answer(conn, h, kindAck, nakDropped, 0);
  }
  return executed;
}

void onRequest(Conn& conn, const Header& h, const char* data) {
  State& s = state();
  auto it = s.qps.find(h.dstQpn);
  Qp* qp = it == s.qps.end() ? nullptr : it->second;
  bool ready = qp != nullptr && (qp->state == IBV_QPS_RTR || qp->state == IBV_QPS_RTS) &&
               qp->attr.dest_qp_num == h.srcQpn && qp->dev()->index == h.dstDev && qp->attr.port_num == h.dstPort &&
               !qp->dev()->portDown[h.dstPort];
  if (ready && qp->refusedAttempt == h.attempt) return; // it follows one that was refused
  if (!ready || h.seq != qp->expectSeq || h.offset != qp->receivedBytes) {
    if (h.flags & (flagFirst | flagLast)) answer(conn, h, kindNak, nakDropped, 0);
    if (ready) {
      qp->refusedAttempt = h.attempt;
      qp->receivedBytes = 0;
    }
    return;
  }
  int result = execute(conn, *qp, h, data);
  if (result == executed) return;
  answer(conn, h, kindNak, Syndrome(result), qp->attr.min_rnr_timer);
  qp->refusedAttempt = h.attempt;
  qp->receivedBytes = 0;
  if (result != nakNotReady && qp->state != IBV_QPS_ERR) qpToError(*qp);
}

std::chrono::microseconds rnrDelay(unsigned timer) {
  // The table of the InfiniBand specification, in units of 10 us.
  static const int units[32] = {65536, 1,    2,    3,    4,    6,     8,     12,    16,    24,   32,
                                48,    64,   96,   128,  192,  256,   384,   512,   768,   1024, 1536,
                                2048,  3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152};
  return std::chrono::microseconds(units[timer & 31] * 10);
}

void onAnswer(const Header& h, const char* data) {
  State& s = state();
  auto it = s.qps.find(h.dstQpn);
  if (it == s.qps.end()) return;
  Qp& qp = *it->second;
  if (qp.state != IBV_QPS_RTS || qp.attempt != h.attempt || qp.sq.empty()) return;
  if (h.kind == kindNak && h.syndrome == nakDropped) {
    lost(qp);
    return;
  }
  if (h.seq != qp.headSeq) return;
  if (h.kind == kindNak && h.syndrome == nakNotReady) {
    if (qp.attr.rnr_retry != 7 && qp.rnrRetries++ >= qp.attr.rnr_retry) {
      completeSend(qp, IBV_WC_RNR_RETRY_EXC_ERR);
      return;
    }
    qp.next = 0;
    qp.sentBytes = 0;
    qp.attempt = ++s.lastAttempt;
    qp.holdUntil = Clock::now() + rnrDelay(h.rnrTimer);
    s.active.insert(qp.qp_num);
    return;
  }
  ibv_wc_status status = IBV_WC_SUCCESS;
  if (h.kind == kindResponse) {
    if (h.length > 0 && !scatter(qp, qp.sq.front().sges, h.offset, data, h.length)) status = IBV_WC_LOC_QP_OP_ERR;
    if (status == IBV_WC_SUCCESS && !(h.flags & flagLast)) return;
  } else if (h.kind == kindNak) {
    status = h.syndrome == nakAccess    ? IBV_WC_REM_ACCESS_ERR
             : h.syndrome == nakInvalid ? IBV_WC_REM_INV_REQ_ERR
                                        : IBV_WC_REM_OP_ERR;
  }
  completeSend(qp, status);
}

// Takes at most one fragment; false if the stream ended.  *more: there may be another.
bool receive(Conn& conn, bool* more) {
  *more = false;
  for (;;) {
    bool inHeader = conn.got < sizeof(Header);
    size_t whole = sizeof(Header) + (inHeader ? 0 : conn.header.length);
    if (!inHeader && conn.got == whole) break;
    char* to =
      inHeader ? reinterpret_cast<char*>(&conn.header) + conn.got : conn.payload.data() + (conn.got - sizeof(Header));
    size_t want = inHeader ? sizeof(Header) - conn.got : whole - conn.got;
    ssize_t n = recv(conn.fd, to, want, 0);
    if (n == -1 && errno == EINTR) continue;
    if (n == -1 && errno == EAGAIN) return true;
    if (n <= 0) return false;
    conn.got += size_t(n);
    if (!inHeader || conn.got < sizeof(Header)) continue;
    if (conn.header.magic != wireMagic || conn.header.length > fragmentSize) return false;
    conn.payload.resize(fragmentSize);
  }
  conn.got = 0;
  *more = true;
  if (conn.header.kind == kindRequest) {
    onRequest(conn, conn.header, conn.payload.data());
    return flush(conn);
  }
  onAnswer(conn.header, conn.payload.data());
  return true;
}

void acceptAll() {
  for (;;) {
    int fd = accept4(state().listenFd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd == -1) return;
    int size = 1 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    addConn(fd, 0);
  }
}

void setTimer(Time deadline, Time now) {
  itimerspec spec = {};
  if (deadline != Time::max()) {
    auto ns = std::max<int64_t>(1, std::chrono::nanoseconds(deadline - now).count());
    spec.it_value.tv_sec = ns / 1000000000;
    spec.it_value.tv_nsec = ns % 1000000000;
  }
  timerfd_settime(state().timerFd, 0, &spec, nullptr);
}

// Lets callers of verbs in; without it the thread that just released the lock mostly gets it again.
void breathe(std::unique_lock<std::mutex>& lock) {
  if (state().waiting.load() == 0) return;
  lock.unlock();
  sched_yield();
  lock.lock();
}

void engineMain() {
  State& s = state();
  std::unique_lock<std::mutex> lock(s.mutex);
  while (!s.stop) {
    // Requests, a fragment of each queue pair in turn.
    bool moved = true;
    Time looked; // when the queue pairs last had their turn
    for (int round = 0; moved && round < 16; round++) {
      moved = false;
      breathe(lock); // first: what is posted meanwhile must have its turn before we sleep
      std::vector<uint32_t> turn(s.active.begin(), s.active.end());
      if (s.reorder) std::shuffle(turn.begin(), turn.end(), s.random);
      looked = Clock::now();
      for (uint32_t qpn : turn) {
        auto it = s.qps.find(qpn);
        if (it != s.qps.end() && s.active.count(qpn) != 0) moved = sendFragment(*it->second, looked) || moved;
      }
    }
    Time now = Clock::now(), deadline = moved ? now : Time::max();
    std::vector<Cq*> delaying(s.delaying.begin(), s.delaying.end());
    for (Cq* cq : delaying) {
      promoteDelayed(*cq, now);
      for (const auto& entry : cq->delayed) deadline = std::min(deadline, entry.ready);
    }
    if (s.adaptive)
      for (auto& entry : s.qps) {
        placeHeld(*entry.second, now);
        if (!entry.second->held.empty()) deadline = std::min(deadline, entry.second->held.front().ready);
      }
    for (uint32_t qpn : s.active)
      if (Time hold = s.qps[qpn]->holdUntil; hold > looked) deadline = std::min(deadline, hold);
    setTimer(deadline, now);
    s.sleeping = !moved;
    lock.unlock();
    epoll_event events[64];
    int n = epoll_wait(s.epollFd, events, 64, moved ? 0 : -1);
    lock.lock();
    s.sleeping = false;
    for (int i = 0; i < n; i++) {
      int fd = events[i].data.fd;
      uint64_t ignored;
      if (fd == s.wakeFd || fd == s.timerFd) {
        if (read(fd, &ignored, sizeof(ignored)) == -1 && errno != EAGAIN) s.misuse++;
      } else if (fd == s.listenFd) {
        acceptAll();
      } else {
        bool more = true;
        for (int j = 0; j < 16 && more; j++) {
          auto it = s.conns.find(fd);
          if (it == s.conns.end()) break;
          bool ok = (!(events[i].events & EPOLLOUT) || flush(*it->second)) && receive(*it->second, &more);
          if (!ok) {
            closeConn(fd);
            break;
          }
          breathe(lock);
        }
      }
    }
  }
}

void closeAll() {
  State& s = state();
  s.conns.clear();
  s.outgoing.clear();
  for (int* fd : {&s.epollFd, &s.listenFd, &s.wakeFd, &s.timerFd}) {
    if (*fd != -1) close(*fd);
    *fd = -1;
  }
}

} // namespace

void placeHeld(Qp& qp, Time now) {
  for (; !qp.held.empty() && qp.held.front().ready <= now; qp.held.pop_front())
    dmaCopy(qp.held.front().to, qp.held.front().data.data(), qp.held.front().data.size());
}

void flushDevice(Device& dev) {
  for (const Held& held : dev.unflushed) dmaCopy(held.to, held.data.data(), held.data.size());
  dev.unflushed.clear();
}

int engineStart() {
  State& s = state();
  if (s.engine.joinable()) return 0;
  s.epollFd = epoll_create1(EPOLL_CLOEXEC);
  s.wakeFd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  s.timerFd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  s.listenFd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  int result = s.epollFd == -1 || s.wakeFd == -1 || s.timerFd == -1 || s.listenFd == -1 ? errno : EADDRINUSE;
  if (result == EADDRINUSE)
    for (uint32_t i = 0; i < maxSlots && result == EADDRINUSE; i++) {
      s.slot = 1 + (uint32_t(getpid()) + i) % (maxSlots - 1);
      sockaddr_un addr;
      socklen_t length = addressOf(s.slot, &addr);
      result = bind(s.listenFd, reinterpret_cast<sockaddr*>(&addr), length) == 0 ? 0 : errno;
    }
  if (result == 0 && listen(s.listenFd, 4096) == -1) result = errno;
  if (result != 0) {
    closeAll();
    return result;
  }
  for (int fd : {s.wakeFd, s.timerFd, s.listenFd}) watch(fd, false, true);
  s.stop = false;
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old); // signals are for the program's threads
  s.engine = std::thread(engineMain);
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  return 0;
}

void engineStop() {
  State& s = state();
  if (!s.engine.joinable()) return;
  s.stop = true;
  s.sleeping = true;
  engineWake();
  s.mutex.unlock();
  s.engine.join();
  s.mutex.lock();
  closeAll();
}

void engineWake() {
  State& s = state();
  if (!s.sleeping) return;
  s.sleeping = false;
  uint64_t one = 1;
  if (write(s.wakeFd, &one, sizeof(one)) == -1 && errno != EAGAIN) s.misuse++;
}

// The child of a fork has no engine thread, and its sockets are the parent's: it starts afresh with its first context.
void engineForget() {
  State& s = state();
  s.mutex.~mutex();
  new (&s.mutex) std::mutex;
  if (s.engine.joinable()) s.engine.detach();
  s.waiting = 0;
  s.sleeping = false;
  closeAll();
}

} // namespace fake
