// Prints what a verbs library does in some fifty situations, one line each, without times or addresses.  tests/vm
// runs it on the fake library and on the kernel's rxe devices: the two outputs have to be the same.
#include <arpa/inet.h>
#include <cerrno>
#include <infiniband/verbs.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <poll.h>
#include <string>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t bufferSize = 1 << 20;
constexpr int allAccess =
  IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;

void say(const char* name, const std::string& value) {
  printf("%s: %s\n", name, value.c_str());
  fflush(stdout);
}

std::string words(const std::vector<int>& values) {
  std::string s;
  for (int v : values) s += (s.empty() ? "" : " ") + std::to_string(v);
  return s.empty() ? "none" : s;
}

// One end: a device with memory, a completion queue for each direction, and a queue pair.
struct End {
  ibv_context* context = nullptr;
  ibv_pd* pd = nullptr;
  ibv_cq *sendCq = nullptr, *recvCq = nullptr;
  ibv_qp* qp = nullptr;
  ibv_mr* mr = nullptr;
  std::vector<uint8_t> memory = std::vector<uint8_t>(bufferSize);
  ibv_gid gid = {};

  bool open(int index) {
    int n = 0;
    ibv_device** list = ibv_get_device_list(&n);
    if (list == nullptr || index >= n) return false;
    context = ibv_open_device(list[index]);
    ibv_free_device_list(list);
    if (context == nullptr || ibv_query_gid(context, 1, 1, &gid) != 0) return false;
    fcntl(context->async_fd, F_SETFL, O_NONBLOCK);
    pd = ibv_alloc_pd(context);
    return pd != nullptr;
  }

  bool make(int cqe = 256, int sendWr = 64, int inlineSize = 64) {
    sendCq = ibv_create_cq(context, cqe, nullptr, nullptr, 0);
    recvCq = ibv_create_cq(context, cqe, nullptr, nullptr, 0);
    mr = ibv_reg_mr(pd, memory.data(), memory.size(), allAccess);
    if (sendCq == nullptr || recvCq == nullptr || mr == nullptr) return false;
    ibv_qp_init_attr init = {};
    init.send_cq = sendCq;
    init.recv_cq = recvCq;
    init.qp_type = IBV_QPT_RC;
    init.cap.max_send_wr = uint32_t(sendWr);
    init.cap.max_recv_wr = 64;
    init.cap.max_send_sge = init.cap.max_recv_sge = 2;
    init.cap.max_inline_data = uint32_t(inlineSize);
    qp = ibv_create_qp(pd, &init);
    return qp != nullptr;
  }

  void unmake() {
    if (qp != nullptr) ibv_destroy_qp(qp);
    if (mr != nullptr) ibv_dereg_mr(mr);
    if (sendCq != nullptr) ibv_destroy_cq(sendCq);
    if (recvCq != nullptr) ibv_destroy_cq(recvCq);
    qp = nullptr;
    mr = nullptr;
    sendCq = recvCq = nullptr;
  }

  void close() {
    unmake();
    if (pd != nullptr) ibv_dealloc_pd(pd);
    if (context != nullptr) ibv_close_device(context);
  }

  int toInit(int access = allAccess) {
    ibv_qp_attr a = {};
    a.qp_state = IBV_QPS_INIT;
    a.port_num = 1;
    a.qp_access_flags = unsigned(access);
    return ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  }

  int toRtr(uint32_t qpn, const ibv_gid& peer, uint32_t psn = 100) {
    ibv_qp_attr a = {};
    a.qp_state = IBV_QPS_RTR;
    a.path_mtu = IBV_MTU_1024;
    a.dest_qp_num = qpn;
    a.rq_psn = psn;
    a.max_dest_rd_atomic = 4;
    a.min_rnr_timer = 12;
    a.ah_attr.is_global = 1;
    a.ah_attr.grh.dgid = peer;
    a.ah_attr.grh.sgid_index = 1;
    a.ah_attr.grh.hop_limit = 64;
    a.ah_attr.port_num = 1;
    return ibv_modify_qp(qp, &a,
                         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                           IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  }

  int toRts(int rnrRetry = 7, uint32_t psn = 100, int timeout = 14, int retries = 3) {
    ibv_qp_attr a = {};
    a.qp_state = IBV_QPS_RTS;
    a.timeout = uint8_t(timeout);
    a.retry_cnt = uint8_t(retries);
    a.rnr_retry = uint8_t(rnrRetry);
    a.sq_psn = psn;
    a.max_rd_atomic = 4;
    return ibv_modify_qp(qp, &a,
                         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                           IBV_QP_MAX_QP_RD_ATOMIC);
  }

  int to(ibv_qp_state state) {
    ibv_qp_attr a = {};
    a.qp_state = state;
    return ibv_modify_qp(qp, &a, IBV_QP_STATE);
  }

  int state() {
    ibv_qp_attr a = {};
    ibv_qp_init_attr i = {};
    return ibv_query_qp(qp, &a, IBV_QP_STATE, &i) == 0 ? int(a.qp_state) : -1;
  }

  int recv(size_t offset, uint32_t length, uint64_t id = 7) {
    ibv_sge sge = {uintptr_t(memory.data()) + offset, length, mr->lkey};
    ibv_recv_wr wr = {}, *bad = nullptr;
    wr.wr_id = id;
    wr.sg_list = &sge;
    wr.num_sge = 1;
    return ibv_post_recv(qp, &wr, &bad);
  }

  // Events so far, by type.
  std::string events() {
    std::vector<int> types;
    ibv_async_event event;
    usleep(20000);
    while (ibv_get_async_event(context, &event) == 0) {
      types.push_back(event.event_type);
      ibv_ack_async_event(&event);
    }
    return words(types);
  }
};

struct Post {
  ibv_wr_opcode op = IBV_WR_RDMA_WRITE;
  size_t from = 0, to = 0;
  uint32_t length = 64;
  unsigned flags = IBV_SEND_SIGNALED;
  uint32_t rkey = 0, lkey = 0;
  uint64_t raddr = 0, add = 0, swap = 0, id = 1;
};

int post(End& a, const End& b, const Post& p) {
  ibv_sge sge = {uintptr_t(a.memory.data()) + p.from, p.length, p.lkey != 0 ? p.lkey : a.mr->lkey};
  ibv_send_wr wr = {}, *bad = nullptr;
  wr.wr_id = p.id;
  wr.sg_list = &sge;
  wr.num_sge = 1;
  wr.opcode = p.op;
  wr.send_flags = p.flags;
  wr.imm_data = htonl(0x1234567);
  uint64_t raddr = p.raddr != 0 ? p.raddr : uintptr_t(b.memory.data()) + p.to;
  uint32_t rkey = p.rkey != 0 ? p.rkey : b.mr->rkey;
  if (p.op == IBV_WR_ATOMIC_FETCH_AND_ADD || p.op == IBV_WR_ATOMIC_CMP_AND_SWP) {
    wr.wr.atomic.remote_addr = raddr;
    wr.wr.atomic.rkey = rkey;
    wr.wr.atomic.compare_add = p.add;
    wr.wr.atomic.swap = p.swap;
  } else {
    wr.wr.rdma.remote_addr = raddr;
    wr.wr.rdma.rkey = rkey;
  }
  return ibv_post_send(a.qp, &wr, &bad);
}

bool next(ibv_cq* cq, ibv_wc* wc, int ms = 3000) {
  auto end = Clock::now() + std::chrono::milliseconds(ms);
  while (Clock::now() < end) {
    if (ibv_poll_cq(cq, 1, wc) > 0) return true;
    usleep(100);
  }
  return false;
}

// n statuses in order, -1 where none came.
std::string statuses(ibv_cq* cq, int n, int ms = 3000) {
  std::vector<int> list;
  ibv_wc wc;
  for (int i = 0; i < n; i++) list.push_back(next(cq, &wc, ms) ? int(wc.status) : -1);
  return words(list);
}

std::string one(ibv_cq* cq, bool immediate = false) {
  ibv_wc wc = {};
  if (!next(cq, &wc)) return "nothing";
  std::string s = "status " + std::to_string(wc.status);
  if (wc.status != IBV_WC_SUCCESS) return s;
  s += " opcode " + std::to_string(wc.opcode);
  if (wc.opcode & IBV_WC_RECV) s += " bytes " + std::to_string(wc.byte_len);
  if (immediate) s += " imm " + std::to_string((wc.wc_flags & IBV_WC_WITH_IMM) ? ntohl(wc.imm_data) : 0);
  return s;
}

void fill(End& e, unsigned seed) {
  for (size_t i = 0; i < e.memory.size(); i++) e.memory[i] = uint8_t(i * 31 + seed + (i >> 8));
}

bool same(const End& a, size_t from, const End& b, size_t to, size_t n) {
  return memcmp(a.memory.data() + from, b.memory.data() + to, n) == 0;
}

// Runs a case on a fresh connected pair.
void pair(const char* name, const std::function<void(End&, End&)>& body, int rnrRetry = 7, int peerAccess = allAccess,
          uint32_t psn = 100, int cqe = 256) {
  printf("-- %s\n", name);
  End a, b;
  bool ok = a.open(0) && b.open(1) && a.make(cqe) && b.make() && a.toInit() == 0 && b.toInit(peerAccess) == 0 &&
            a.toRtr(b.qp->qp_num, b.gid) == 0 && b.toRtr(a.qp->qp_num, a.gid, psn) == 0 && a.toRts(rnrRetry) == 0 &&
            b.toRts(rnrRetry) == 0;
  fill(a, 1);
  fill(b, 2);
  if (ok)
    body(a, b);
  else
    say("set-up", "failed");
  say("events", a.events() + " / " + b.events());
  a.close();
  b.close();
}

void transfers() {
  pair("transfers", [](End& a, End& b) {
    struct {
      const char* name;
      ibv_wr_opcode op;
      uint32_t length;
      unsigned flags;
    } cases[] = {{"write 1", IBV_WR_RDMA_WRITE, 1, 0},
                 {"write 0", IBV_WR_RDMA_WRITE, 0, 0},
                 {"write 500000", IBV_WR_RDMA_WRITE, 500000, 0},
                 {"write inline 64", IBV_WR_RDMA_WRITE, 64, IBV_SEND_INLINE},
                 {"write imm 0", IBV_WR_RDMA_WRITE_WITH_IMM, 0, 0},
                 {"write imm 100000", IBV_WR_RDMA_WRITE_WITH_IMM, 100000, 0},
                 {"send 4097", IBV_WR_SEND, 4097, 0},
                 {"send 0", IBV_WR_SEND, 0, 0},
                 {"send imm 17", IBV_WR_SEND_WITH_IMM, 17, 0},
                 {"read 300000", IBV_WR_RDMA_READ, 300000, 0},
                 {"read 0", IBV_WR_RDMA_READ, 0, 0}};
    for (auto& c : cases) {
      bool receives = c.op == IBV_WR_SEND || c.op == IBV_WR_SEND_WITH_IMM || c.op == IBV_WR_RDMA_WRITE_WITH_IMM;
      fill(a, 3);
      fill(b, 9);
      if (receives) b.recv(4096, 200000);
      Post p;
      p.op = c.op;
      p.length = c.length;
      p.flags |= c.flags;
      p.to = 4096;
      int rc = post(a, b, p);
      std::string s = "post " + std::to_string(rc) + ", " + one(a.sendCq);
      if (receives) s += ", receiver " + one(b.recvCq, c.op != IBV_WR_SEND);
      say(c.name, s + (same(a, 0, b, 4096, c.length) ? ", data right" : ", data WRONG"));
    }
    auto* word = reinterpret_cast<uint64_t*>(b.memory.data());
    auto* old = reinterpret_cast<uint64_t*>(a.memory.data());
    *word = 40;
    Post p;
    p.op = IBV_WR_ATOMIC_FETCH_AND_ADD;
    p.length = 8;
    p.add = 2;
    post(a, b, p);
    std::string s = one(a.sendCq);
    say("fetch add", s + " old " + std::to_string(*old) + " new " + std::to_string(*word));
    p.op = IBV_WR_ATOMIC_CMP_AND_SWP;
    p.add = 42;
    p.swap = 7;
    post(a, b, p);
    s = one(a.sendCq);
    say("compare swap", s + " old " + std::to_string(*old) + " new " + std::to_string(*word));
    p.length = 100;
    p.op = IBV_WR_RDMA_WRITE;
    p.flags = 0;
    for (int i = 0; i < 5; i++) post(a, b, p);
    p.flags = IBV_SEND_SIGNALED;
    p.id = 99;
    post(a, b, p);
    ibv_wc wc = {};
    bool got = next(a.sendCq, &wc);
    say("5 unsignaled, 1 signaled", got ? "id " + std::to_string(wc.wr_id) : "nothing");
    say("then", ibv_poll_cq(a.sendCq, 1, &wc) == 0 ? "empty" : "more");
  });
}

// Four writes behind one that fails: what each gets, and the states afterwards.
void failing(const char* name, const Post& bad, int rnrRetry = 7, int peerAccess = allAccess, int receive = -1,
             uint32_t psn = 100) {
  pair(
    name,
    [&](End& a, End& b) {
      for (uint64_t i = 0; i < 3; i++) b.recv(0, receive >= 0 && i == 0 ? uint32_t(receive) : 64, 50 + i);
      if (receive == -2) { // none posted: take them away again by a fresh receive queue
        b.to(IBV_QPS_RESET);
        b.toInit(peerAccess);
        b.toRtr(a.qp->qp_num, a.gid, psn);
        b.toRts();
      }
      Post p = bad;
      p.flags |= IBV_SEND_SIGNALED;
      Post good;
      good.flags = 0; // flushed ones complete although not signaled
      int rc = post(a, b, p);
      for (int i = 0; i < 3; i++) post(a, b, good);
      say("post", std::to_string(rc));
      say("statuses", statuses(a.sendCq, 4));
      say("peer", statuses(b.recvCq, 3, 300));
      say("states", std::to_string(a.state()) + " " + std::to_string(b.state()));
      rc = post(a, b, good);
      say("post to the failed one", std::to_string(rc) + ", " + statuses(a.sendCq, 1));
      // A receive posted now is flushed by the specification, and by the fake; rxe keeps it.
    },
    rnrRetry, peerAccess, psn);
}

void failures() {
  Post p;
  p.rkey = 0xdead00;
  failing("bad rkey, write", p);
  p.op = IBV_WR_RDMA_READ;
  failing("bad rkey, read", p);
  p = Post();
  p.to = bufferSize - 10;
  failing("write past the end", p);
  p = Post();
  failing("write without the queue pair's permission", p, 7, IBV_ACCESS_REMOTE_READ);
  p.lkey = 0xdead00;
  failing("bad lkey", p);
  p = Post();
  p.op = IBV_WR_SEND;
  p.length = 100;
  failing("receive too short", p, 7, allAccess, 20);
  p.length = 16;
  failing("no receive, rnr_retry 2", p, 2, allAccess, -2);
  p = Post();
  failing("sequence numbers differ", p, 7, allAccess, -1, 100000);
}

void deregistered() {
  pair("peer deregistered", [](End& a, End& b) {
    Post p;
    post(a, b, p);
    say("before", statuses(a.sendCq, 1));
    uint32_t rkey = b.mr->rkey;
    say("dereg", std::to_string(ibv_dereg_mr(b.mr)));
    b.mr = nullptr;
    p.rkey = rkey;
    p.raddr = uintptr_t(b.memory.data());
    post(a, b, p);
    say("after", statuses(a.sendCq, 1));
  });
}

void states() {
  printf("-- states\n");
  End a, b;
  if (!a.open(0) || !b.open(1) || !a.make() || !b.make()) return say("set-up", "failed");
  auto is = [](int rc) { return rc == 0 ? std::string("0") : std::string("error"); };
  say("receive in RESET", is(a.recv(0, 8)));
  say("send in RESET", is(post(a, b, Post())));
  say("RESET to RTR", is(a.toRtr(b.qp->qp_num, b.gid)));
  say("RESET to RTS", is(a.toRts()));
  say("RESET to INIT", is(a.toInit()));
  say("receive in INIT", is(a.recv(0, 8)));
  say("send in INIT", is(post(a, b, Post())));
  say("INIT to RTS", is(a.toRts()));
  say("INIT to RTR without an address", is(a.to(IBV_QPS_RTR)));
  say("INIT to RTR", is(a.toRtr(b.qp->qp_num, b.gid)));
  say("send in RTR", is(post(a, b, Post())));
  say("RTR to RTS", is(a.toRts()));
  say("RTS to INIT", is(a.toInit()));
  say("RTS to RTR", is(a.toRtr(b.qp->qp_num, b.gid)));
  say("RTS to ERR", is(a.to(IBV_QPS_ERR)));
  say("its receive", statuses(a.recvCq, 1));
  say("ERR to RTS", is(a.toRts()));
  say("ERR to RESET", is(a.to(IBV_QPS_RESET)));
  say("destroy a CQ in use", is(ibv_destroy_cq(a.sendCq)));
  say("free a PD in use", is(ibv_dealloc_pd(a.pd)));
  // A responder needs no RTS; a queue pair can be used again after RESET.  rxe keeps what it refused to send above and
  // flushes it later, so look only at what comes now.
  ibv_wc wc;
  while (ibv_poll_cq(a.sendCq, 1, &wc) > 0) continue;
  b.toInit();
  a.toInit();
  a.toRtr(b.qp->qp_num, b.gid);
  b.toRtr(a.qp->qp_num, a.gid);
  a.toRts();
  post(a, b, Post());
  say("write to a peer in RTR", statuses(a.sendCq, 1));
  errno = 0;
  ibv_mr* mr = ibv_reg_mr(a.pd, a.memory.data(), 64, IBV_ACCESS_REMOTE_WRITE);
  say("remote write without local write", mr == nullptr ? "refused" : "allowed");
  mr = ibv_reg_mr(a.pd, reinterpret_cast<void*>(4096), 64, IBV_ACCESS_LOCAL_WRITE);
  say("unmapped memory", mr == nullptr ? "refused" : "allowed");
  a.close();
  b.close();
}

// The peer accepts late: within its retries the requester does not notice.
void lateReceiver() {
  pair("late receiver", [](End& a, End& b) {
    Post p;
    p.op = IBV_WR_SEND;
    post(a, b, p);
    usleep(100000);
    b.recv(8192, 64);
    say("statuses", statuses(a.sendCq, 1) + " / " + statuses(b.recvCq, 1));
  });
}

void overrun() {
  pair(
    "completion queue overrun",
    [](End& a, End& b) {
      say("asked 8", "got " + std::to_string(a.sendCq->cqe));
      for (int i = 0; i < 40; i++) post(a, b, Post());
      usleep(300000);
      int n = 0;
      ibv_wc wc;
      while (ibv_poll_cq(a.sendCq, 1, &wc) > 0) n++;
      say("completions", n == a.sendCq->cqe ? "as many as fit" : std::to_string(n));
    },
    7, allAccess, 100, 8);
}

void inlineLimits() {
  printf("-- inline\n");
  for (int size : {512, 1024}) {
    End a;
    bool ok = a.open(0) && a.make(16, 16, size);
    say(std::to_string(size).c_str(), ok ? "allowed" : "refused");
    a.close();
  }
}

// The peer is another process, killed while 30 writes are on their way to it.
void deadPeer() {
  printf("-- dead peer\n");
  struct Hello {
    uint32_t qpn, rkey;
    uint64_t addr;
    ibv_gid gid;
  };
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) return;
  pid_t child = fork();
  End e;
  bool ok = e.open(child == 0 ? 1 : 0) && e.make() && e.toInit() == 0;
  Hello mine = {}, peer = {};
  if (ok) mine = {e.qp->qp_num, e.mr->rkey, uintptr_t(e.memory.data()), e.gid};
  int fd = fds[child == 0];
  ok = write(fd, &mine, sizeof(mine)) == ssize_t(sizeof(mine)) &&
       read(fd, &peer, sizeof(peer)) == ssize_t(sizeof(peer)) && e.toRtr(peer.qpn, peer.gid) == 0 && e.toRts() == 0;
  char byte = 0;
  if (child == 0) {
    if (write(fd, &byte, 1) == 1) pause();
    _exit(1);
  }
  if (!ok || read(fd, &byte, 1) != 1) say("set-up", "failed");
  End dummy;
  dummy.mr = e.mr;
  Post p;
  p.raddr = peer.addr;
  p.rkey = peer.rkey;
  p.length = 4096;
  post(e, dummy, p);
  say("alive", statuses(e.sendCq, 1));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  auto start = Clock::now();
  for (int i = 0; i < 5; i++) post(e, dummy, p);
  std::string s = statuses(e.sendCq, 5, 5000);
  auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start).count();
  say("dead", s);
  // Four timeouts of 67 ms.
  say("found out", ms > 150 && ms < 3000 ? "in time" : std::to_string(ms) + " ms");
  say("events", e.events());
  dummy.mr = nullptr;
  e.close();
}

} // namespace

int main() {
  deadPeer(); // first: it forks
  transfers();
  failures();
  deregistered();
  states();
  lateReceiver();
  overrun();
  inlineLimits();
  return 0;
}
