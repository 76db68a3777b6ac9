// How connections come about: interleavings, many, stuck and dying peers, garbage.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <memory>
#include <netinet/in.h>
#include <set>
#include <string>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>

#include "harness.h"

namespace conformance {
namespace {

void finish(Rank& r, int peer, void* sendComm, void* recvComm) {
  r.meet(peer);
  if (sendComm != nullptr) closeSend(r, sendComm);
  if (recvComm != nullptr) closeRecv(r, recvComm);
}

CASE("connect.basic", 2, 40, [](Rank& r) {
  r.start();
  if (r.rank == 0) {
    void* comm = connectTo(r, 1);
    sendMessage(r, comm, 1000, 7);
    finish(r, 1, comm, nullptr);
  } else {
    void* comm = acceptFrom(r, 0);
    recvMessage(r, comm, 1000, 7);
    finish(r, 0, nullptr, comm);
  }
  r.stop();
});

CASE("connect.handle_is_plain_bytes", 2, 40, [](Rank& r) {
  r.start();
  if (r.rank == 0) {
    // At another address, and not aligned.
    auto handle = r.receiveValue<Handle>(1);
    std::vector<char> room(2 * sizeof(Handle));
    char* odd = room.data() + 8;
    memcpy(odd, handle.bytes, sizeof(handle));
    void* comm = connectLoop(r, odd);
    sendMessage(r, comm, 100, 7);
    finish(r, 1, comm, nullptr);
  } else {
    void* comm = acceptFrom(r, 0);
    recvMessage(r, comm, 100, 7);
    finish(r, 0, nullptr, comm);
  }
  r.stop();
});

CASE("connect.accept_first", 2, 40, [](Rank& r) {
  r.start();
  if (r.rank == 1) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    for (int i = 0; i < 50; i++) {
      void* comm = nullptr;
      requireOk(r.net.accept(listenComm, &comm));
      require(comm == nullptr, "accept gave a comm, but nobody has connected");
      usleep(2000);
    }
    r.sendValue(0, handle);
    void* comm = acceptLoop(r, listenComm);
    requireOk(r.net.closeListen(listenComm));
    recvMessage(r, comm, 1000, 7);
    finish(r, 0, nullptr, comm);
  } else {
    void* comm = connectTo(r, 1);
    sendMessage(r, comm, 1000, 7);
    finish(r, 1, comm, nullptr);
  }
  r.stop();
});

CASE("connect.connect_first", 2, 40, [](Rank& r) {
  r.start();
  if (r.rank == 1) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    r.sendValue(0, handle);
    require(r.receiveValue<char>(0) == 'g', "out of step"); // the other has tried for a while
    void* comm = acceptLoop(r, listenComm);
    requireOk(r.net.closeListen(listenComm));
    recvMessage(r, comm, 1000, 7);
    finish(r, 0, nullptr, comm);
  } else {
    auto handle = r.receiveValue<Handle>(1);
    void* comm = nullptr;
    for (int i = 0; i < 50 && comm == nullptr; i++) {
      requireOk(r.net.connect(r.dev, handle.bytes, &comm));
      usleep(2000);
    }
    r.sendValue(1, 'g');
    if (comm == nullptr) comm = connectLoop(r, handle.bytes);
    sendMessage(r, comm, 1000, 7);
    finish(r, 1, comm, nullptr);
  }
  r.stop();
});

// Both ends in one process, a call of each in turn.
void* loopback(Rank& r, void** recvComm) {
  Handle handle = {};
  void* listenComm = listenOn(r, &handle);
  void* sendComm = nullptr;
  double begin = seconds();
  while (sendComm == nullptr || *recvComm == nullptr) {
    if (sendComm == nullptr) requireOk(r.net.connect(r.dev, handle.bytes, &sendComm));
    if (*recvComm == nullptr) requireOk(r.net.accept(listenComm, recvComm));
    require(seconds() - begin < r.bound(), "no connection inside one process in %.0f s", r.bound());
  }
  requireOk(r.net.closeListen(listenComm));
  return sendComm;
}

CASE("connect.same_process", 1, 40, [](Rank& r) {
  r.start();
  void* in = nullptr;
  void* out = loopback(r, &in);
  Buffer a(100000), b(100000);
  a.fill(5);
  void* ma = reg(r, out, a);
  void* mb = reg(r, in, b);
  void* recv = postRecv(r, in, b.data(), b.size(), 3, mb);
  void* send = postSend(r, out, a.data(), a.size(), 3, ma);
  double begin = seconds();
  for (int left = 2; left > 0;) {
    for (void** q : {&recv, &send}) {
      int done = 0, sizes[8];
      if (*q != nullptr) requireOk(r.net.test(*q, &done, sizes));
      if (done) {
        *q = nullptr;
        left--;
      }
    }
    require(seconds() - begin < r.bound(), "a message inside one process is not done in %.0f s", r.bound());
  }
  b.check(5, b.size(), "message");
  dereg(r, out, ma);
  dereg(r, in, mb);
  closeSend(r, out);
  closeRecv(r, in);
  r.stop();
});

CASE("connect.interleaved", 2, 60, [](Rank& r) {
  // 16 connections through one listen comm, all under way at once; each is used.
  constexpr int n = 16;
  r.start();
  if (r.rank == 1) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    r.sendValue(0, handle);
    std::vector<void*> comms;
    for (int i = 0; i < n; i++) comms.push_back(acceptLoop(r, listenComm));
    requireOk(r.net.closeListen(listenComm));
    // They may be accepted in any order: which of them is which, the first message says.
    Buffer ids(8 * n);
    std::vector<void*> mhandles, requests, byId(n, nullptr);
    for (size_t i = 0; i < n; i++) {
      void* m = nullptr;
      requireOk(r.net.regMr(comms[i], ids.data() + 8 * i, 8, &m));
      mhandles.push_back(m);
      requests.push_back(postRecv(r, comms[i], ids.data() + 8 * i, 8, 0, m));
    }
    std::vector<bool> finished(n, false);
    double begin = seconds();
    for (int left = n; left > 0;)
      for (size_t i = 0; i < n; i++) {
        int done = 0, sizes[8];
        if (!finished[i]) requireOk(r.net.test(requests[i], &done, sizes));
        require(seconds() - begin < r.bound(), "%d of %d connections deliver nothing", left, n);
        if (!done) continue;
        uint64_t id;
        memcpy(&id, ids.data() + 8 * i, 8);
        require(id < n && byId[id] == nullptr, "connection %llu came twice or is none", (unsigned long long)id);
        byId[id] = comms[i];
        finished[i] = true;
        left--;
      }
    for (size_t i = 0; i < n; i++) dereg(r, comms[i], mhandles[i]);
    for (uint64_t id = 0; id < n; id++) recvMessage(r, byId[id], 2000, id);
    r.meet(0);
    for (void* comm : comms) closeRecv(r, comm);
  } else {
    auto handle = r.receiveValue<Handle>(1);
    std::vector<Handle> handles(n, handle);
    std::vector<void*> comms(n, nullptr);
    double begin = seconds();
    for (int left = n; left > 0;)
      for (int i = 0; i < n; i++) {
        if (comms[size_t(i)] != nullptr) continue;
        requireOk(r.net.connect(r.dev, handles[size_t(i)].bytes, &comms[size_t(i)]));
        if (comms[size_t(i)] != nullptr) left--;
        require(seconds() - begin < r.bound(), "%d connections are missing after %.0f s", left, r.bound());
      }
    for (uint64_t i = 0; i < n; i++) {
      Buffer b(8);
      memcpy(b.data(), &i, 8);
      void* m = reg(r, comms[i], b);
      waitDone(r, postSend(r, comms[i], b.data(), 8, 0, m));
      dereg(r, comms[i], m);
    }
    for (uint64_t i = 0; i < n; i++) sendMessage(r, comms[i], 2000, i);
    r.meet(1);
    for (void* comm : comms) closeSend(r, comm);
  }
  r.stop();
});

CASE("connect.listen_reuse", 2, 60, [](Rank& r) {
  r.start();
  if (r.rank == 1) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    r.sendValue(0, handle);
    for (int i = 0; i < 20; i++) {
      void* comm = acceptLoop(r, listenComm);
      recvMessage(r, comm, 100, 7);
      finish(r, 0, nullptr, comm);
    }
    requireOk(r.net.closeListen(listenComm));
  } else {
    auto handle = r.receiveValue<Handle>(1);
    for (int i = 0; i < 20; i++) {
      Handle copy = handle;
      void* comm = connectLoop(r, copy.bytes);
      sendMessage(r, comm, 100, 7);
      finish(r, 1, comm, nullptr);
    }
  }
  r.stop();
});

CASE("connect.listen_only", 1, 40, [](Rank& r) {
  r.start();
  for (int round = 0; round < 3; round++) {
    std::vector<void*> comms;
    std::set<std::string> handles;
    for (int i = 0; i < 64; i++) {
      Handle handle = {};
      comms.push_back(listenOn(r, &handle));
      require(handles.insert(std::string(handle.bytes, sizeof(handle))).second, "two listen comms have one handle");
      void* comm = nullptr;
      requireOk(r.net.accept(comms.back(), &comm));
      require(comm == nullptr, "accept gave a comm, but nobody has connected");
    }
    for (void* comm : comms) requireOk(r.net.closeListen(comm));
  }
  r.stop();
});

CASE("connect.handle_size", 1, 20, [](Rank& r) {
  r.start();
  struct {
    char before[64];
    Handle handle;
    char after[64];
  } room;
  memset(&room, 0xd5, sizeof(room));
  void* comm = listenOn(r, &room.handle);
  for (char c : room.before) require(c == char(0xd5), "listen wrote before the handle");
  for (char c : room.after) require(c == char(0xd5), "listen wrote past the handle's 128 bytes");
  requireOk(r.net.closeListen(comm));
  r.stop();
});

CASE("connect.closed_unaccepted", 2, 90, [](Rank& r) {
  // The listener goes away without having accepted: the other side must not wait for ever.
  r.start();
  if (r.rank == 1) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    r.sendValue(0, handle);
    require(r.receiveValue<char>(0) == 'g', "out of step");
    requireOk(r.net.closeListen(listenComm));
    r.sendValue(0, 'c');
    require(r.receiveValue<char>(0) == 'e', "out of step");
  } else {
    auto handle = r.receiveValue<Handle>(1);
    void* comm = nullptr;
    for (int i = 0; i < 20 && comm == nullptr; i++) {
      requireOk(r.net.connect(r.dev, handle.bytes, &comm));
      usleep(1000);
    }
    r.sendValue(1, 'g');
    r.receiveValue<char>(1);
    double begin = seconds();
    ncclResult_t result = ncclSuccess;
    while (result == ncclSuccess && comm == nullptr) {
      result = r.net.connect(r.dev, handle.bytes, &comm);
      require(seconds() - begin < r.bound(), "connect to a closed listener gave no error in %.0f s", r.bound());
      usleep(1000);
    }
    if (comm != nullptr) {
      // Connected before anyone accepted: then using it has to fail.
      Buffer b(1 << 20);
      void* m = nullptr;
      if (r.net.regMr(comm, b.data(), b.size(), &m) == ncclSuccess) {
        require(trySend(r, comm, b.data(), b.size(), 0, m) != ncclSuccess, "a message to a closed listener was sent");
        r.net.deregMr(comm, m);
      }
      r.net.closeSend(comm);
    }
    r.sendValue(1, 'e');
  }
  r.stop();
});

CASE("connect.churn", 2, 120, [](Rank& r) {
  // Up and down 1000 times, or where that is slow as often as 20 s allow and at least 100 times; descriptors and
  // threads do not grow.
  const int least = r.count(100), most = r.count(1000);
  r.start();
  int fds = 0, tasks = 0;
  auto check = [&](int round) {
    usleep(100000);
    require(openFds() <= fds + 2, "%d descriptors are open after %d connections, %d were after 10", openFds(), round,
            fds);
    require(threads() <= tasks + 1, "%d threads run after %d connections, %d did after 10", threads(), round, tasks);
  };
  const double begin = seconds();
  for (int i = 0;; i++) {
    if (i == least) check(i); // before it may run out of them
    bool more = i < least || (i < most && seconds() - begin < 20);
    if (r.rank == 0) r.sendValue(1, more);
    if (r.rank == 1) more = r.receiveValue<bool>(0);
    if (!more) {
      check(i);
      break;
    }
    if (r.rank == 0) {
      void* comm = connectTo(r, 1);
      sendMessage(r, comm, 64, 7);
      finish(r, 1, comm, nullptr);
    } else {
      void* comm = acceptFrom(r, 0);
      recvMessage(r, comm, 64, 7);
      finish(r, 0, nullptr, comm);
    }
    if (i == 10) {
      fds = openFds();
      tasks = threads();
    }
  }
  r.stop();
});

CASE("connect.many", 2, 240, [](Rank& r) {
  // 256 connections each way, all open at once, a message over each.
  const auto n = size_t(r.count(256));
  r.start();
  Properties props;
  requireOk(r.net.properties(r.dev, &props));
  if (props.maxComms < int(2 * n)) skip("maxComms is %d", props.maxComms);
  int peer = 1 - r.rank;
  Handle mine = {};
  void* listenComm = listenOn(r, &mine);
  r.sendValue(peer, mine);
  auto theirs = r.receiveValue<Handle>(peer);
  std::vector<void*> out, in;
  double begin = seconds();
  Handle handle = theirs;
  while (out.size() < n || in.size() < n) {
    void* comm = nullptr;
    if (out.size() < n) {
      requireOk(r.net.connect(r.dev, handle.bytes, &comm));
      if (comm != nullptr) {
        out.push_back(comm);
        handle = theirs;
      }
    }
    comm = nullptr;
    if (in.size() < n) {
      requireOk(r.net.accept(listenComm, &comm));
      if (comm != nullptr) in.push_back(comm);
    }
    require(seconds() - begin < 180 * r.options->scale, "%zu and %zu of %zu connections after %.0f s", out.size(),
            in.size(), n, seconds() - begin);
  }
  requireOk(r.net.closeListen(listenComm));
  Buffer a(512), b(512 * n);
  a.fill(9);
  std::vector<void*> regs, recvs, sends;
  for (size_t i = 0; i < n; i++) {
    void* m = nullptr;
    requireOk(r.net.regMr(in[i], b.data() + 512 * i, 512, &m));
    regs.push_back(m);
    recvs.push_back(postRecv(r, in[i], b.data() + 512 * i, 512, 0, m));
  }
  std::vector<void*> sendRegs;
  for (size_t i = 0; i < n; i++) {
    sendRegs.push_back(reg(r, out[i], a));
    sends.push_back(postSend(r, out[i], a.data(), 512, 0, sendRegs.back()));
  }
  for (void* q : sends) waitDone(r, q);
  for (size_t i = 0; i < n; i++) {
    waitDone(r, recvs[i]);
    b.checkRange(9, 512 * i, 512, "one of many connections");
  }
  r.meet(peer);
  for (size_t i = 0; i < n; i++) {
    dereg(r, out[i], sendRegs[i]);
    dereg(r, in[i], regs[i]);
    closeSend(r, out[i]);
    closeRecv(r, in[i]);
  }
  r.stop();
});

CASE("connect.threads", 2, 120, [](Rank& r) {
  // Eight threads each make, use and close connections of their own.
  r.start();
  constexpr int n = 8, rounds = 5;
  std::vector<Handle> handles(n);
  std::vector<void*> listenComms(n, nullptr);
  if (r.rank == 1) {
    for (size_t i = 0; i < n; i++) listenComms[i] = listenOn(r, &handles[i]);
    for (auto& h : handles) r.sendValue(0, h);
  } else {
    for (auto& h : handles) h = r.receiveValue<Handle>(1);
  }
  std::vector<std::string> errors(n);
  std::vector<std::thread> workers;
  for (size_t i = 0; i < n; i++)
    workers.emplace_back([&, i] {
      try {
        for (int k = 0; k < rounds; k++) {
          if (r.rank == 0) {
            Handle copy = handles[i];
            void* comm = connectLoop(r, copy.bytes);
            sendMessage(r, comm, 5000, i);
            // The receiver has it all before this end closes: it answers by its own close.
            closeSend(r, comm);
          } else {
            void* comm = acceptLoop(r, listenComms[i]);
            recvMessage(r, comm, 5000, i);
            closeRecv(r, comm);
          }
        }
      } catch (const Failure& f) {
        errors[i] = f.text;
      }
    });
  for (auto& w : workers) w.join();
  for (const auto& e : errors) require(e.empty(), "in a thread: %s", e.c_str());
  r.meet(1 - r.rank);
  for (void* comm : listenComms)
    if (comm != nullptr) requireOk(r.net.closeListen(comm));
  r.stop();
});

// Rank 2 stops for ever (it is not killed: its sockets stay open) after `calls` calls of connect; rank 0 then has to
// get its connection through the same listen comm.
void stuckConnector(Rank& r, int calls) {
  if (r.rank == 1) {
    r.start();
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    r.sendValue(2, handle);
    for (bool ready = false; !ready;) {
      void* comm = nullptr;
      requireOk(r.net.accept(listenComm, &comm));
      if (comm != nullptr) closeRecv(r, comm); // the stuck one came through before it stopped
      char byte;
      ready = recv(r.channels[2], &byte, 1, MSG_DONTWAIT) == 1;
    }
    r.sendValue(0, handle);
    // The stuck one may come through too, if it was complete before it stopped: listen to all until one says something.
    struct Candidate {
      void *comm, *mhandle, *request;
      std::unique_ptr<Buffer> buffer;
    };
    std::vector<Candidate> candidates;
    size_t right = SIZE_MAX;
    double begin = seconds();
    while (right == SIZE_MAX) {
      void* comm = nullptr;
      requireOk(r.net.accept(listenComm, &comm));
      if (comm != nullptr) {
        auto buffer = std::make_unique<Buffer>(64);
        void* m = reg(r, comm, *buffer);
        void* q = postRecv(r, comm, buffer->data(), 64, 0, m);
        candidates.push_back({comm, m, q, std::move(buffer)});
      }
      for (size_t i = 0; i < candidates.size(); i++) {
        int done = 0, sizes[8] = {};
        if (r.net.test(candidates[i].request, &done, sizes) == ncclSuccess && done) right = i;
      }
      require(seconds() - begin < 60 * r.options->scale, "no connection past a stuck peer");
      usleep(50);
    }
    candidates[right].buffer->check(77, 64, "message past a stuck peer");
    r.meet(0);
    for (auto& c : candidates) {
      r.net.deregMr(c.comm, c.mhandle);
      r.net.closeRecv(c.comm);
    }
    requireOk(r.net.closeListen(listenComm));
    r.sendValue(2, 'k');
    r.stop();
  } else if (r.rank == 0) {
    r.start();
    double begin = seconds();
    void* comm = connectTo(r, 1);
    require(seconds() - begin < 30 * r.options->scale, "a stuck peer delayed connect by %.0f s", seconds() - begin);
    sendMessage(r, comm, 64, 77);
    finish(r, 1, comm, nullptr);
    r.stop();
  } else {
    r.start();
    auto handle = r.receiveValue<Handle>(1);
    void* comm = nullptr;
    for (int i = 0; i < calls && comm == nullptr; i++) {
      requireOk(r.net.connect(r.dev, handle.bytes, &comm));
      usleep(1000);
    }
    r.sendValue(1, 's');
    r.receiveValue<char>(1); // stuck until everybody else is done
    r.killSelf();
  }
}
CASE("connect.stuck_peer_1_call", 3, 100, [](Rank& r) { stuckConnector(r, 1); }, {2});
CASE("connect.stuck_peer_3_calls", 3, 100, [](Rank& r) { stuckConnector(r, 3); }, {2});

// ---- garbage ----

void garbageHandle(Rank& r, const Handle& handle, const char* what) {
  Handle copy = handle;
  void* comm = nullptr;
  double begin = seconds();
  ncclResult_t result = ncclSuccess;
  while (result == ncclSuccess) {
    double before = seconds();
    result = r.net.connect(r.dev, copy.bytes, &comm);
    require(seconds() - before < 2 * r.options->scale, "connect with a handle of %s took %.1f s", what,
            seconds() - before);
    require(comm == nullptr, "connect with a handle of %s gave a comm", what);
    require(seconds() - begin < r.bound(), "connect with a handle of %s gave no error in %.0f s", what, r.bound());
    if (result == ncclSuccess) usleep(1000);
  }
}

CASE("bad.handle_zero", 1, 90, [](Rank& r) {
  r.start();
  Handle h;
  memset(&h, 0, sizeof(h));
  garbageHandle(r, h, "zeros");
  r.stop();
});
CASE("bad.handle_ones", 1, 90, [](Rank& r) {
  r.start();
  Handle h;
  memset(&h, 0xff, sizeof(h));
  garbageHandle(r, h, "0xff");
  r.stop();
});
CASE("bad.handle_random", 1, 200, [](Rank& r) {
  r.start();
  for (int i = 0; i < 20; i++) {
    Handle h;
    for (char& c : h.bytes) c = char(r.random());
    garbageHandle(r, h, "random bytes");
  }
  r.stop();
});

CASE("bad.handle_bits", 2, 200, [](Rank& r) {
  // Every byte of a good handle damaged in turn: nothing crashes, and the undamaged one works afterwards.
  r.start();
  if (r.rank == 1) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    r.sendValue(0, handle);
    for (;;) {
      void* comm = nullptr;
      requireOk(r.net.accept(listenComm, &comm));
      if (comm != nullptr) requireOk(r.net.closeRecv(comm)); // damage in a byte that does not matter
      char byte;
      if (recv(r.channels[0], &byte, 1, MSG_DONTWAIT) == 1) break;
      usleep(200);
    }
    r.sendValue(0, 'a');
    void* comm = acceptLoop(r, listenComm);
    recvMessage(r, comm, 1000, 7);
    finish(r, 0, nullptr, comm);
    requireOk(r.net.closeListen(listenComm));
  } else {
    auto good = r.receiveValue<Handle>(1);
    for (size_t i = 0; i < sizeof(good); i += r.options->quick ? 4 : 1) {
      Handle h = good;
      h.bytes[i] = char(h.bytes[i] ^ (1 << r.random() % 8));
      void* comm = nullptr;
      for (int k = 0; k < 10 && comm == nullptr; k++) {
        if (r.net.connect(r.dev, h.bytes, &comm) != ncclSuccess) break;
        usleep(500);
      }
      if (comm != nullptr) r.net.closeSend(comm);
    }
    usleep(300000); // what was connected, the other side has taken
    r.sendValue(1, 'd');
    r.receiveValue<char>(1);
    void* comm = connectLoop(r, good.bytes);
    sendMessage(r, comm, 1000, 7);
    finish(r, 1, comm, nullptr);
  }
  r.stop();
});

// The TCP ports that this process listens on, v4 and v6.
std::vector<int> listeningPorts() {
  std::set<std::string> inodes;
  DIR* d = opendir("/proc/self/fd");
  while (dirent* e = d == nullptr ? nullptr : readdir(d)) {
    char target[64] = {};
    std::string link = std::string("/proc/self/fd/") + e->d_name;
    if (readlink(link.c_str(), target, sizeof(target) - 1) > 0 && strncmp(target, "socket:[", 8) == 0)
      inodes.insert(std::string(target + 8, strlen(target) - 9));
  }
  if (d != nullptr) closedir(d);
  std::vector<int> ports;
  for (const char* file : {"/proc/self/net/tcp", "/proc/self/net/tcp6"}) {
    FILE* f = fopen(file, "r");
    char line[512];
    while (f != nullptr && fgets(line, sizeof(line), f) != nullptr) {
      unsigned port = 0, state = 0;
      char inode[32] = {};
      if (sscanf(line, "%*s %*[^:]:%x %*s %x %*s %*s %*s %*s %*s %31s", &port, &state, inode) == 3 && state == 0x0a &&
          inodes.count(inode) != 0)
        ports.push_back(int(port));
    }
    if (f != nullptr) fclose(f);
  }
  return ports;
}

// The local addresses worth trying: a listener may be bound to one interface.
int knock(int port, const sockaddr_in& address) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a = address;
  a.sin_port = htons(uint16_t(port));
  if (connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof(a)) == 0) return fd;
  close(fd);
  return -1;
}

sockaddr_in boundAddress(int port) {
  sockaddr_in result = {};
  result.sin_family = AF_INET;
  result.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  FILE* f = fopen("/proc/self/net/tcp", "r");
  char line[512];
  while (f != nullptr && fgets(line, sizeof(line), f) != nullptr) {
    unsigned addr = 0, p = 0, state = 0;
    if (sscanf(line, "%*s %x:%x %*s %x", &addr, &p, &state) == 3 && state == 0x0a && int(p) == port && addr != 0)
      result.sin_addr.s_addr = addr;
  }
  if (f != nullptr) fclose(f);
  return result;
}

CASE("bad.port_scanner", 3, 150, [](Rank& r) {
  // Rank 2 knows nothing of the plugin and talks nonsense to every port that rank 1 listens on.
  if (r.rank == 2) {
    int n = r.receiveValue<int>(1);
    std::vector<int> held;
    int knocks = 0;
    for (int i = 0; i < n; i++) {
      int port = r.receiveValue<int>(1);
      sockaddr_in address = boundAddress(port);
      std::vector<std::string> greetings = {"",
                                            "x",
                                            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
                                            "SSH-2.0-OpenSSH_9.2\r\n",
                                            std::string(128, '\0'),
                                            std::string(4096, '\xff')};
      for (int k = 0; k < 12; k++) {
        std::string random(size_t(r.random() % 600), '\0');
        for (char& c : random) c = char(r.random());
        greetings.push_back(random);
      }
      for (const auto& greeting : greetings)
        for (bool hold : {false, true}) {
          int fd = knock(port, address);
          if (fd == -1) continue;
          knocks++;
          (void)!::send(fd, greeting.data(), greeting.size(), MSG_NOSIGNAL);
          if (hold)
            held.push_back(fd);
          else
            close(fd);
        }
    }
    r.sendValue(1, knocks);
    r.receiveValue<char>(1);
    for (int fd : held) close(fd);
    return;
  }
  r.start();
  if (r.rank == 1) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    std::vector<int> ports = listeningPorts();
    if (ports.empty()) skip("the plugin listens on no TCP port");
    r.sendValue(2, int(ports.size()));
    for (int p : ports) r.sendValue(2, p);
    int knocks = 0;
    for (bool scanned = false; !scanned; usleep(500)) {
      void* comm = nullptr;
      double before = seconds();
      requireOk(r.net.accept(listenComm, &comm));
      require(seconds() - before < 2 * r.options->scale, "accept took %.1f s", seconds() - before);
      require(comm == nullptr, "accept gave a comm for a port scanner");
      scanned = recv(r.channels[2], &knocks, sizeof(knocks), MSG_DONTWAIT) == ssize_t(sizeof(knocks));
    }
    if (knocks == 0) skip("no port could be reached from this machine");
    for (int i = 0; i < 100; i++) {
      void* comm = nullptr;
      requireOk(r.net.accept(listenComm, &comm));
      require(comm == nullptr, "accept gave a comm for a port scanner");
      usleep(1000);
    }
    r.sendValue(0, handle);
    double begin = seconds();
    void* comm = acceptLoop(r, listenComm);
    require(seconds() - begin < 20 * r.options->scale, "port scanners delayed a peer by %.0f s", seconds() - begin);
    recvMessage(r, comm, 1000, 7);
    finish(r, 0, nullptr, comm);
    requireOk(r.net.closeListen(listenComm));
    r.sendValue(2, 'e');
  } else {
    void* comm = connectTo(r, 1);
    sendMessage(r, comm, 1000, 7);
    finish(r, 1, comm, nullptr);
  }
  r.stop();
});

} // namespace
} // namespace conformance
