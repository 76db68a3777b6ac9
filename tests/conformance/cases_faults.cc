// Peers that die, stop or leave at every stage: whoever talks to them gets an error in time, everybody else nothing.
#include <csignal>
#include <cstring>
#include <memory>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>

#include "harness.h"

namespace conformance {
namespace {

// Ranks 0 and 1 have a connection that has to keep working; rank 2 is the one that dies.
struct Bystander {
  Rank& r;
  void* comm;
  explicit Bystander(Rank& rank) : r(rank) { comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0); }
  void use(uint64_t seed) {
    if (r.rank == 0)
      sendMessage(r, comm, 100000, seed);
    else
      recvMessage(r, comm, 100000, seed);
  }
  void end() {
    r.meet(1 - r.rank);
    if (r.rank == 0)
      closeSend(r, comm);
    else
      closeRecv(r, comm);
  }
};

// Keeps a comm busy until it reports an error, within the bound; then sees that it keeps doing so and that it closes.
void untilError(Rank& r, void* comm, bool sender, const char* what) {
  Buffer b(1 << 20);
  void* m = nullptr;
  double begin = seconds();
  ncclResult_t result = r.net.regMr(comm, b.data(), b.size(), &m);
  bool registered = result == ncclSuccess;
  while (result == ncclSuccess) {
    result = sender ? trySend(r, comm, b.data(), b.size(), 0, m) : tryRecv(r, comm, b.data(), b.size(), 0, m);
    require(seconds() - begin < r.bound(), "%s: no error in %.0f s", what, r.bound());
  }
  for (int i = 0; i < 3 && registered; i++) {
    void *data = b.data(), *q = nullptr;
    size_t bytes = b.size();
    int tag = 0;
    result = sender ? r.net.isend(comm, data, bytes, tag, m, &q) : r.net.irecv(comm, 1, &data, &bytes, &tag, &m, &q);
    int done = 0, sizes[8];
    if (result == ncclSuccess && q != nullptr) result = r.net.test(q, &done, sizes);
    require(result != ncclSuccess || (q == nullptr && !done), "%s: after the error a call succeeds again", what);
  }
  if (registered) r.net.deregMr(comm, m);
  double before = seconds();
  sender ? r.net.closeSend(comm) : r.net.closeRecv(comm);
  require(seconds() - before < 10 * r.options->scale, "%s: closing took %.0f s", what, seconds() - before);
}

enum class Death { kill, close, exit };

// The victim and rank 0 have a connection; the victim ends in the middle of a stream of messages.
void midTransfer(Rank& r, bool victimSends, Death death) {
  r.start();
  if (r.rank == 2) {
    void* comm = victimSends ? connectTo(r, 0) : acceptFrom(r, 0);
    Buffer b(4 << 20);
    void* m = reg(r, comm, b);
    // A few are done, one is under way.
    for (int i = 0; i < 3; i++)
      waitDone(r,
               victimSends ? postSend(r, comm, b.data(), b.size(), 0, m) : postRecv(r, comm, b.data(), b.size(), 0, m));
    void* q = victimSends ? postSend(r, comm, b.data(), b.size(), 0, m) : postRecv(r, comm, b.data(), b.size(), 0, m);
    int done = 0, sizes[8];
    r.net.test(q, &done, sizes);
    if (death == Death::kill) r.killSelf();
    if (death == Death::exit) _exit(0);
    // Leaves with a request outstanding: first the registration, as a program that unwinds would.
    r.net.deregMr(comm, m);
    if (victimSends)
      r.net.closeSend(comm);
    else
      r.net.closeRecv(comm);
    r.receiveValue<char>(0); // stays, so that only the close tells the peer
    r.stop();
    return;
  }
  Bystander bystander(r);
  bystander.use(1);
  if (r.rank == 0) {
    void* comm = victimSends ? acceptFrom(r, 2) : connectTo(r, 2);
    Buffer b(4 << 20);
    b.fill(1);
    void* m = reg(r, comm, b);
    for (int i = 0; i < 3; i++)
      waitDone(r,
               victimSends ? postRecv(r, comm, b.data(), b.size(), 0, m) : postSend(r, comm, b.data(), b.size(), 0, m));
    // The neighbour has its say while the dead one is being found out.
    sendMessage(r, bystander.comm, 100000, 2);
    double begin = seconds();
    ncclResult_t result = ncclSuccess;
    while (result == ncclSuccess) {
      result = victimSends ? tryRecv(r, comm, b.data(), b.size(), 0, m) : trySend(r, comm, b.data(), b.size(), 0, m);
      require(seconds() - begin < r.bound(), "no error %.0f s after the peer had gone", r.bound());
    }
    r.net.deregMr(comm, m);
    double before = seconds();
    victimSends ? r.net.closeRecv(comm) : r.net.closeSend(comm);
    require(seconds() - before < 10 * r.options->scale, "closing a failed connection took %.0f s", seconds() - before);
    if (death == Death::close) r.sendValue(2, 'e');
  } else {
    recvMessage(r, bystander.comm, 100000, 2);
  }
  bystander.use(3);
  bystander.end();
  r.stop();
}

CASE("fault.kill_receiver", 3, 150, [](Rank& r) { midTransfer(r, false, Death::kill); }, {2});
CASE("fault.kill_sender", 3, 150, [](Rank& r) { midTransfer(r, true, Death::kill); }, {2});
CASE("fault.receiver_closes", 3, 150, [](Rank& r) { midTransfer(r, false, Death::close); });
CASE("fault.sender_closes", 3, 150, [](Rank& r) { midTransfer(r, true, Death::close); });

// kill -9 at a stage of the set-up, on the connecting side (rank 2 connects to rank 0).
void killConnector(Rank& r, int calls, bool connected) {
  r.start();
  if (r.rank == 2) {
    auto handle = r.receiveValue<Handle>(0);
    void* comm = nullptr;
    for (int i = 0; i < calls && comm == nullptr; i++) {
      r.net.connect(r.dev, handle.bytes, &comm);
      usleep(500);
    }
    if (connected && comm == nullptr) connectLoop(r, handle.bytes);
    r.killSelf();
  }
  Bystander bystander(r);
  bystander.use(1);
  if (r.rank == 0) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    r.sendValue(2, handle);
    // Accept may give a comm (it must then fail) or nothing; never an error of the listen comm.
    double end = seconds() + 1.5;
    while (seconds() < end) {
      void* comm = nullptr;
      ncclResult_t rc = r.net.accept(listenComm, &comm);
      require(rc == ncclSuccess, "a peer killed in connect makes accept return %d", int(rc));
      if (comm != nullptr) untilError(r, comm, false, "peer killed in connect");
      usleep(1000);
    }
    // The same listen comm serves the next peer.
    r.sendValue(1, handle);
    void* comm = acceptLoop(r, listenComm);
    recvMessage(r, comm, 5000, 9);
    r.meet(1);
    closeRecv(r, comm);
    requireOk(r.net.closeListen(listenComm));
  } else {
    void* comm = connectTo(r, 0);
    sendMessage(r, comm, 5000, 9);
    r.meet(0);
    closeSend(r, comm);
  }
  bystander.use(3);
  bystander.end();
  r.stop();
}

CASE("fault.kill_in_connect_1", 3, 120, [](Rank& r) { killConnector(r, 1, false); }, {2});
CASE("fault.kill_in_connect_2", 3, 120, [](Rank& r) { killConnector(r, 2, false); }, {2});
CASE("fault.kill_in_connect_4", 3, 120, [](Rank& r) { killConnector(r, 4, false); }, {2});
CASE("fault.kill_when_connected", 3, 120, [](Rank& r) { killConnector(r, 4, true); }, {2});

// kill -9 at a stage on the accepting side (rank 0 connects to rank 2).
void killAcceptor(Rank& r, int calls, bool accepted, bool posted) {
  r.start();
  if (r.rank == 2) {
    Handle handle = {};
    void* listenComm = listenOn(r, &handle);
    r.sendValue(0, handle);
    void* comm = nullptr;
    for (int i = 0; i < calls && comm == nullptr; i++) {
      r.net.accept(listenComm, &comm);
      usleep(500);
    }
    if (accepted && comm == nullptr) comm = acceptLoop(r, listenComm);
    if (posted) {
      Buffer b(1 << 20);
      void* m = reg(r, comm, b);
      postRecv(r, comm, b.data(), b.size(), 0, m);
      usleep(20000);
      r.killSelf();
    }
    r.killSelf();
  }
  Bystander bystander(r);
  bystander.use(1);
  if (r.rank == 0) {
    auto handle = r.receiveValue<Handle>(2);
    void* comm = nullptr;
    ncclResult_t result = ncclSuccess;
    double begin = seconds();
    while (result == ncclSuccess && comm == nullptr) {
      double before = seconds();
      result = r.net.connect(r.dev, handle.bytes, &comm);
      require(seconds() - before < 2 * r.options->scale, "a call of connect took %.1f s", seconds() - before);
      require(seconds() - begin < r.bound(), "connect to a killed peer gave no error in %.0f s", r.bound());
      usleep(200);
    }
    if (comm != nullptr) untilError(r, comm, true, "peer killed in accept");
  }
  bystander.use(3);
  bystander.end();
  r.stop();
}

CASE("fault.kill_after_listen", 3, 150, [](Rank& r) { killAcceptor(r, 0, false, false); }, {2});
CASE("fault.kill_in_accept_1", 3, 150, [](Rank& r) { killAcceptor(r, 1, false, false); }, {2});
CASE("fault.kill_in_accept_5", 3, 150, [](Rank& r) { killAcceptor(r, 5, false, false); }, {2});
CASE("fault.kill_when_accepted", 3, 150, [](Rank& r) { killAcceptor(r, 5, true, false); }, {2});
CASE("fault.kill_with_receive_posted", 3, 150, [](Rank& r) { killAcceptor(r, 5, true, true); }, {2});

CASE("fault.stopped_peer_goes_on", 2, 90, [](Rank& r) {
  // A peer that is stopped for a while is not dead.
  r.start();
  void* comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0);
  if (r.rank == 1) {
    r.sendValue(0, getpid());
    pid_t child = fork(); // wakes us again
    if (child == 0) {
      usleep(1500000);
      kill(getppid(), SIGCONT);
      _exit(0);
    }
    r.meet(0);
    kill(getpid(), SIGSTOP);
    for (uint64_t i = 0; i < 5; i++) recvMessage(r, comm, 300000, i);
  } else {
    r.receiveValue<pid_t>(1);
    r.meet(1);
    for (uint64_t i = 0; i < 5; i++) sendMessage(r, comm, 300000, i);
  }
  r.meet(1 - r.rank);
  if (r.rank == 0)
    closeSend(r, comm);
  else
    closeRecv(r, comm);
  r.stop();
});

CASE("fault.close_with_requests", 2, 90, [](Rank& r) {
  // Both sides close with requests outstanding, 20 times; nothing hangs and a new connection works.
  r.start();
  for (int i = 0; i < r.count(20); i++) {
    void* comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0);
    Buffer b(200000);
    void* m = reg(r, comm, b);
    for (int k = 0; k < 4; k++) {
      void *data = b.data(), *q = nullptr;
      size_t bytes = b.size();
      int tag = 0;
      // The peer may have closed already: an error is as good.
      if (r.rank == 0)
        r.net.isend(comm, data, bytes, tag, m, &q);
      else if (i % 2 == 0)
        r.net.irecv(comm, 1, &data, &bytes, &tag, &m, &q);
    }
    if (i % 3 == 0) r.meet(1 - r.rank);
    r.net.deregMr(comm, m);
    double before = seconds();
    r.rank == 0 ? r.net.closeSend(comm) : r.net.closeRecv(comm);
    require(seconds() - before < 10 * r.options->scale, "closing took %.1f s", seconds() - before);
    r.meet(1 - r.rank);
  }
  void* comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0);
  if (r.rank == 0)
    sendMessage(r, comm, 5000, 1);
  else
    recvMessage(r, comm, 5000, 1);
  r.meet(1 - r.rank);
  r.rank == 0 ? closeSend(r, comm) : closeRecv(r, comm);
  r.stop();
});

CASE("leak.cycles", 2, 120, [](Rank& r) {
  // init to finalize again and again: descriptors and threads are back where they were.
  std::string error = r.net.load(r.options->plugin, r.options->version);
  require(error.empty(), "loading the plugin: %s", error.c_str());
  if (!r.net.hasFinalize()) skip("version %d has no finalize", r.net.version());
  r.net.unload();
  std::thread([] {}).join(); // a sanitizer starts a thread of its own with the first one
  const int before = threads();
  int fds = 0, tasks = 0;
  for (int i = 0; i < 8; i++) {
    r.start();
    void* comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0);
    if (r.rank == 0)
      sendMessage(r, comm, 50000, 1);
    else
      recvMessage(r, comm, 50000, 1);
    r.meet(1 - r.rank);
    r.rank == 0 ? closeSend(r, comm) : closeRecv(r, comm);
    r.stop();
    r.net.unload();
    usleep(20000);
    if (i == 1) {
      fds = openFds();
      tasks = threads();
    }
  }
  require(openFds() <= fds, "%d descriptors are open after 8 cycles, %d after 2", openFds(), fds);
  require(threads() <= tasks, "%d threads run after 8 cycles, %d after 2", threads(), tasks);
  require(threads() <= before, "%d threads run after finalize, %d did before init", threads(), before);
});

CASE("leak.failed_connections", 2, 120, [](Rank& r) {
  // Connections that never came about leave nothing behind.
  r.start();
  int fds = 0;
  for (int i = 0; i < 60; i++) {
    if (r.rank == 1) {
      Handle handle = {};
      void* listenComm = listenOn(r, &handle);
      r.sendValue(0, handle);
      for (int k = 0; k < i % 7; k++) {
        void* comm = nullptr;
        r.net.accept(listenComm, &comm);
        if (comm != nullptr) r.net.closeRecv(comm);
        usleep(200);
      }
      requireOk(r.net.closeListen(listenComm));
      r.meet(0);
    } else {
      auto handle = r.receiveValue<Handle>(1);
      void* comm = nullptr;
      ncclResult_t result = ncclSuccess;
      r.sendValue(1, 'm');
      // To the end: either an error, or a comm.
      double begin = seconds();
      while (result == ncclSuccess && comm == nullptr) {
        result = r.net.connect(r.dev, handle.bytes, &comm);
        require(seconds() - begin < r.bound(), "connect to a closed listener gave no error in %.0f s", r.bound());
        usleep(200);
      }
      if (comm != nullptr) r.net.closeSend(comm);
      require(r.receiveValue<char>(1) == 'm', "out of step");
    }
    if (i == 10) fds = openFds();
  }
  usleep(100000);
  require(openFds() <= fds + 3, "%d descriptors are open after 60 failed connections, %d after 10", openFds(), fds);
  r.stop();
});

} // namespace
} // namespace conformance
