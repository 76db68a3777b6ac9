// Scripted faults of the fake verbs library (tests/fakeverbs).  Skipped where the plugin has not loaded it.
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "harness.h"

namespace conformance {
namespace {

struct Fake {
  int (*inject)(const char*) = nullptr;
  void (*live)(int*, int*, int*, int*, int*) = nullptr;
  int (*fired)() = nullptr;
};

Fake fake() {
  Fake f;
  void* library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) skip("the plugin has not loaded a verbs library");
  f.inject = reinterpret_cast<int (*)(const char*)>(dlsym(library, "fakeverbsInject"));
  f.live = reinterpret_cast<void (*)(int*, int*, int*, int*, int*)>(dlsym(library, "fakeverbsLive"));
  f.fired = reinterpret_cast<int (*)()>(dlsym(library, "fakeverbsFired"));
  if (f.inject == nullptr || f.live == nullptr || f.fired == nullptr) skip("the verbs library is not the fake one");
  int contexts = 0;
  f.live(&contexts, nullptr, nullptr, nullptr, nullptr);
  if (contexts == 0) skip("the plugin does not use verbs");
  return f;
}

void nothingLeft(const Fake& f, const std::string& what) {
  int contexts, pds, mrs, cqs, qps;
  f.live(&contexts, &pds, &mrs, &cqs, &qps);
  require(contexts == 0 && pds == 0 && mrs == 0 && cqs == 0 && qps == 0,
          "%s: after finalize %d contexts, %d PDs, %d MRs, %d CQs, %d QPs are left", what.c_str(), contexts, pds, mrs,
          cqs, qps);
}

bool told(Rank& r) {
  char byte;
  return recv(r.channels[size_t(1 - r.rank)], &byte, 1, MSG_DONTWAIT | MSG_PEEK) == 1;
}

// Connect, register, five messages, close: rank 0 to rank 1, either of which may see errors.  Returns the first error;
// the message data have to be right as long as both say success.  No step may take longer than the bound.
ncclResult_t attempt(Rank& r, const char* what) {
  struct Start {
    bool ok;
    Handle handle;
  } start = {false, {}};
  ncclResult_t result = ncclSuccess;
  void *comm = nullptr, *listenComm = nullptr;
  if (r.rank == 1) {
    result = r.net.listen(r.dev, start.handle.bytes, &listenComm);
    start.ok = result == ncclSuccess;
    r.sendValue(0, start);
  } else {
    start = r.receiveValue<Start>(1);
  }
  double begin = seconds(), toldAt = 0;
  while (start.ok && result == ncclSuccess && comm == nullptr) {
    result = r.rank == 0 ? r.net.connect(r.dev, start.handle.bytes, &comm) : r.net.accept(listenComm, &comm);
    // A listener cannot know that its peer has given up; it is told.
    if (r.rank == 1 && comm == nullptr && told(r)) {
      if (toldAt == 0) toldAt = seconds();
      if (seconds() - toldAt > 0.3) break;
    }
    require(seconds() - begin < r.bound(), "%s: %s hangs", what, r.rank == 0 ? "connect" : "accept");
    usleep(50);
  }
  if (listenComm != nullptr) r.net.closeListen(listenComm);
  for (uint64_t i = 0; i < 5 && comm != nullptr && result == ncclSuccess; i++) {
    Buffer b(i == 3 ? 600000 : 3000);
    if (r.rank == 0) b.fill(i);
    void* m = nullptr;
    result = r.net.regMr(comm, b.data(), b.size(), &m);
    if (result != ncclSuccess) break;
    result = r.rank == 0 ? trySend(r, comm, b.data(), b.size(), 0, m) : tryRecv(r, comm, b.data(), b.size(), 0, m);
    if (r.rank == 1 && result == ncclSuccess) b.check(i, b.size(), what);
    ncclResult_t dereg = r.net.deregMr(comm, m);
    if (result == ncclSuccess) result = dereg;
  }
  double before = seconds();
  if (comm != nullptr && r.rank == 0) r.net.closeSend(comm);
  if (comm != nullptr && r.rank == 1) r.net.closeRecv(comm);
  require(seconds() - before < 10 * r.options->scale, "%s: closing takes %.0f s", what, seconds() - before);
  r.meet(1 - r.rank);
  return result;
}

struct Outcome {
  bool fired = false;
  ncclResult_t victim = ncclSuccess, other = ncclSuccess;
  bool any() const { return victim != ncclSuccess || other != ncclSuccess; }
};

// A fault on one rank, then a clean attempt, which has to succeed.  Both ranks learn what came of it.
Outcome faulted(Rank& r, const Fake& f, int victim, const std::string& rule) {
  std::string what = rule + " on rank " + std::to_string(victim);
  require(f.inject("clear") == 0, "clear");
  if (r.rank == victim) require(f.inject(rule.c_str()) == 0, "the rule %s is wrong", rule.c_str());
  r.meet(1 - r.rank);
  ncclResult_t result = attempt(r, what.c_str());
  bool fired = f.fired() > 0;
  require(f.inject("clear") == 0, "clear");
  r.meet(1 - r.rank);
  int peer = 1 - r.rank;
  r.sendValue(peer, result);
  r.sendValue(peer, fired);
  auto theirs = r.receiveValue<ncclResult_t>(peer);
  bool firedThere = r.receiveValue<bool>(peer);
  Outcome out;
  out.fired = fired || firedThere;
  out.victim = r.rank == victim ? result : theirs;
  out.other = r.rank == victim ? theirs : result;
  result = attempt(r, "after a fault");
  require(result == ncclSuccess, "after %s a clean connection gives %d", what.c_str(), int(result));
  return out;
}

// What a fault has to come to.  Nothing without it; where a verb fails that a rank calls, that rank gets a system
// error, and the other one nothing or an error that blames the peer.  Where ports are merged, a connection outlives the
// failure of one.
void expectOutcome(Rank& r, const Outcome& out, const std::string& what, bool survivable) {
  bool merged = !r.options->merge.empty();
  if (!out.fired || (survivable && merged && !out.any())) {
    require(!out.any(), "%s: %s, but results are %d and %d", what.c_str(), out.fired ? "came" : "did not come",
            int(out.victim), int(out.other));
    return;
  }
  require(out.victim == ncclSystemError, "%s: the rank with the fault gets %d", what.c_str(), int(out.victim));
  require(out.other == ncclSuccess || out.other == ncclRemoteError, "%s: the other rank gets %d", what.c_str(),
          int(out.other));
}

void failEach(Rank& r, const std::vector<const char*>& verbs, const char* error, const std::vector<std::string>& when,
              bool survivable = false) {
  r.start();
  Fake f = fake();
  bool any = false;
  for (const char* verb : verbs)
    for (int victim = 0; victim < 2; victim++)
      for (const auto& nth : when) {
        std::string rule = std::string(verb) + "#" + nth + "=" + error;
        Outcome out = faulted(r, f, victim, rule);
        expectOutcome(r, out, rule + " on rank " + std::to_string(victim), survivable);
        any = any || out.fired;
      }
  r.stop();
  nothingLeft(f, verbs[0]);
  if (!any) skip("connections do not call %s", verbs[0]);
}

CASE("verbs.fail_create_cq", 2, 240, [](Rank& r) { failEach(r, {"create_cq"}, "ENOMEM", {"1", "2"}); });
CASE("verbs.fail_create_qp", 2, 240, [](Rank& r) { failEach(r, {"create_qp"}, "ENOMEM", {"1", "2", "3", "4", "5"}); });
CASE("verbs.fail_modify_qp", 2, 300, [](Rank& r) {
  failEach(r, {"modify_qp"}, "EINVAL", {"1", "2", "3", "4", "5", "6", "7", "8"});
});
CASE("verbs.fail_reg_mr", 2, 240, [](Rank& r) { failEach(r, {"reg_mr"}, "ENOMEM", {"1", "2", "3", "4"}); });
CASE("verbs.fail_dereg_mr", 2, 240, [](Rank& r) {
  r.start();
  Fake f = fake();
  unsetenv("FAKEVERBS_REPORT"); // what could not be given back stays
  for (int victim = 0; victim < 2; victim++) {
    Outcome out = faulted(r, f, victim, "dereg_mr#1=EBUSY");
    require(out.fired, "nothing was given back");
    expectOutcome(r, out, "dereg_mr", false);
  }
  r.stop();
});
CASE("verbs.fail_alloc_pd", 2, 240, [](Rank& r) { failEach(r, {"alloc_pd"}, "ENOMEM", {"1", "2"}); });
CASE("verbs.fail_post_send", 2, 240, [](Rank& r) { failEach(r, {"post_send"}, "ENOMEM", {"1", "2", "3", "4"}, true); });
CASE("verbs.fail_post_recv", 2, 240, [](Rank& r) { failEach(r, {"post_recv"}, "ENOMEM", {"1", "2", "3"}, true); });
CASE("verbs.fail_poll_cq", 2, 240, [](Rank& r) { failEach(r, {"poll_cq"}, "EIO", {"1", "5", "20"}); });
CASE("verbs.fail_queries", 2, 240, [](Rank& r) {
  failEach(r, {"query_port", "query_gid", "query_qp"}, "EIO", {"1+"});
});

CASE("verbs.fail_init", 1, 120, [](Rank& r) {
  // Each verb that init calls fails in turn: init gives an error or does without that device, leaves nothing, and works
  // afterwards.
  r.start();
  Fake f = fake();
  if (!r.net.hasFinalize()) skip("version %d has no finalize", r.net.version());
  r.stop();
  int all = 0;
  requireOk(r.net.init());
  requireOk(r.net.devices(&all));
  r.stop();
  nothingLeft(f, "finalize");
  for (const char* verb : {"get_device_list", "open_device", "query_device", "query_port", "query_gid", "alloc_pd",
                           "create_cq", "reg_mr", "create_qp"})
    for (int n = 1; n <= 3; n++) {
      std::string rule = std::string(verb) + "#" + std::to_string(n) + "=ENOMEM";
      require(f.inject("clear") == 0 && f.inject(rule.c_str()) == 0, "the rule %s is wrong", rule.c_str());
      ncclResult_t result = r.net.init();
      if (result == ncclSuccess) {
        int count = 0;
        requireOk(r.net.devices(&count));
        require(count == all || (f.fired() > 0 && count == all - 1), "%s: %d of %d devices", rule.c_str(), count, all);
        requireOk(r.net.finalize());
      } else {
        require(f.fired() > 0 && result == ncclSystemError, "%s: init gives %d", rule.c_str(), int(result));
        r.net.finalizeNull();
      }
      nothingLeft(f, rule);
    }
  f.inject("clear");
  requireOk(r.net.init());
  requireOk(r.net.finalize());
});

CASE("verbs.status", 2, 300, [](Rank& r) {
  // Every completion status a queue pair may give, on sends and receives, early and late: always an error.
  r.start();
  Fake f = fake();
  int seen = 0;
  for (const char* status : {"LOC_LEN_ERR", "LOC_QP_OP_ERR", "LOC_PROT_ERR", "WR_FLUSH_ERR", "REM_ACCESS_ERR",
                             "REM_OP_ERR", "RETRY_EXC_ERR", "RNR_RETRY_EXC_ERR", "FATAL_ERR", "GENERAL_ERR"})
    for (const char* point : {"wc.send", "wc.recv"})
      for (int n : {1, 3})
        seen += faulted(r, f, n % 2, std::string(point) + "#" + std::to_string(n) + "=status:" + status).any();
  r.stop();
  nothingLeft(f, "statuses");
  require(seen >= 20, "of 40 failed completions only %d were an error to anybody", seen);
});

CASE("verbs.status_is_an_error", 2, 120, [](Rank& r) {
  // All of a side's sends fail from the first on: neither side may report five messages.
  r.start();
  Fake f = fake();
  require(faulted(r, f, 0, "wc#1+=status:REM_ACCESS_ERR").any(), "nobody saw an error");
  r.stop();
  nothingLeft(f, "statuses");
});

CASE("verbs.events", 2, 120, [](Rank& r) {
  // Events that call for nothing, and some that nobody knows, change nothing.
  r.start();
  Fake f = fake();
  for (const char* event : {"COMM_EST", "SQ_DRAINED", "PATH_MIG", "LID_CHANGE", "PKEY_CHANGE", "SM_CHANGE",
                            "CLIENT_REREGISTER", "GID_CHANGE", "PORT_ACTIVE"}) {
    require(f.inject((std::string("now=event:") + event).c_str()) == 0, "the event %s is unknown", event);
    require(attempt(r, event) == ncclSuccess, "event %s breaks a connection", event);
  }
  r.stop();
  nothingLeft(f, "events");
});

// Messages until a side fails, or 20 have passed.
ncclResult_t stream(Rank& r, void* comm, const std::function<void(int)>& before) {
  ncclResult_t result = ncclSuccess;
  Buffer b(300000);
  void* m = reg(r, comm, b);
  for (int i = 0; i < 20 && result == ncclSuccess; i++) {
    before(i);
    if (r.rank == 0) b.fill(uint64_t(i));
    result = r.rank == 0 ? trySend(r, comm, b.data(), b.size(), 0, m) : tryRecv(r, comm, b.data(), b.size(), 0, m);
    if (r.rank == 1 && result == ncclSuccess) b.checkRange(uint64_t(i), 0, b.size(), "message");
  }
  dereg(r, comm, m);
  return result;
}

// On one of the devices of rank 0 something happens before its fourth message.  With that device alone both sides get
// an error; ports that are merged carry on with all messages, if one of them can make up for it.
void deviceFails(Rank& r, const Fake& f, const char* what, ncclResult_t there, bool survivable = true) {
  require(f.inject("clear") == 0, "clear");
  void* comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0);
  bool survives = survivable && !r.options->merge.empty();
  ncclResult_t result = stream(r, comm, [&](int i) {
    if (r.rank == 0 && i == 3) require(f.inject((std::string("now@fake0=") + what).c_str()) == 0, "rule");
    // The event goes through a thread; on two ports messages may pass all the same.
    if (r.rank == 0 && i > 3 && !survives) usleep(20000);
  });
  ncclResult_t expected = survives ? ncclSuccess : r.rank == 0 ? there : ncclRemoteError;
  require(result == expected, "%s: the messages end with %d, not %d", what, int(result), int(expected));
  r.rank == 0 ? closeSend(r, comm) : closeRecv(r, comm);
  r.meet(1 - r.rank);
}

CASE("verbs.device_fatal", 2, 150, [](Rank& r) {
  r.start();
  Fake f = fake();
  deviceFails(r, f, "event:DEVICE_FATAL", ncclSystemError);
  r.stop();
  nothingLeft(f, "DEVICE_FATAL");
  r.start(); // opens the device anew
  require(attempt(r, "opened again") == ncclSuccess, "no connection after the device was opened again");
  r.stop();
});

// One event about one object: the other connections of the device are not affected, so a clean one follows.
void objectFails(Rank& r, const char* event, bool survivable) {
  r.start();
  Fake f = fake();
  deviceFails(r, f, (std::string("event:") + event).c_str(), ncclSystemError, survivable);
  require(attempt(r, event) == ncclSuccess, "no connection after %s of another one", event);
  r.stop();
  nothingLeft(f, event);
}

CASE("verbs.qp_fatal", 2, 150, [](Rank& r) { objectFails(r, "QP_FATAL", true); });
CASE("verbs.qp_access_error", 2, 150, [](Rank& r) { objectFails(r, "QP_ACCESS_ERR", true); });
// Completions are lost, also those that say what has come: no other port can make up for that.
CASE("verbs.cq_error", 2, 150, [](Rank& r) { objectFails(r, "CQ_ERR", false); });

CASE("verbs.port_down", 2, 150, [](Rank& r) {
  r.start();
  Fake f = fake();
  deviceFails(r, f, "portdown", ncclRemoteError);
  require(f.inject("now=portup") == 0, "rule");
  r.meet(1 - r.rank);
  require(attempt(r, "port up again") == ncclSuccess, "no connection after the port came back");
  r.stop();
  nothingLeft(f, "port down");
});

CASE("verbs.dmabuf", 2, 90, [](Rank& r) {
  // GPU memory, whose part a memfd plays, in groups of every size; what the fake device wrote there can be seen after a
  // flush, and not before.
  setenv("FAKEVERBS_DMABUF", "1", 1);
  r.start();
  Fake f = fake();
  Properties props;
  requireOk(r.net.properties(r.dev, &props));
  require((props.ptrSupport & NCCL_PTR_DMABUF) != 0, "ptrSupport is %#x, without dma-bufs", props.ptrSupport);
  require(r.net.hasDmaBuf(), "dma-bufs are offered, but there is no regMrDmaBuf");
  void* comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0);
  constexpr size_t each = 200000, offset = 4096 + 64;
  const auto most = size_t(r.maxRecvs);
  int fd = memfd_create("gpu", MFD_CLOEXEC);
  require(fd != -1 && ftruncate(fd, off_t(offset + most * each)) == 0, "no memfd");
  void* map = mmap(nullptr, offset + most * each, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  require(map != MAP_FAILED, "cannot map a memfd");
  auto* memory = static_cast<uint8_t*>(map) + offset;
  void* m = nullptr;
  requireOk(r.net.regMrDmaBuf(comm, memory, most * each, offset, fd, &m));
  close(fd);
  for (size_t n = 1; n <= most; n++) {
    Buffer want(n * each);
    want.fill(n);
    if (r.rank == 0) {
      memcpy(memory, want.data(), want.size());
      for (size_t i = 0; i < n; i++) waitDone(r, postSend(r, comm, memory + i * each, each, int(i), m));
      continue;
    }
    std::vector<void*> data, mhandles(n, m);
    std::vector<size_t> rooms(n, each);
    std::vector<int> tags, sizes(n, int(each));
    for (size_t i = 0; i < n; i++) {
      data.push_back(memory + i * each);
      tags.push_back(int(i));
    }
    double begin = seconds();
    void* q = nullptr;
    while (q == nullptr) {
      requireOk(r.net.irecv(comm, int(n), data.data(), rooms.data(), tags.data(), mhandles.data(), &q));
      require(seconds() - begin < r.bound(), "irecv is never taken");
    }
    waitDone(r, q);
    require(memcmp(memory, want.data(), want.size()) != 0, "the data can be seen before the flush");
    requireOk(r.net.iflush(comm, int(n), data.data(), sizes.data(), mhandles.data(), &q));
    require(q != nullptr, "a flush of GPU memory is nothing to wait for");
    waitDone(r, q);
    require(memcmp(memory, want.data(), want.size()) == 0, "wrong data after the flush of %zu members", n);
  }
  r.meet(1 - r.rank);
  requireOk(r.net.deregMr(comm, m));
  r.rank == 0 ? closeSend(r, comm) : closeRecv(r, comm);
  munmap(map, offset + most * each);
  r.stop();
  nothingLeft(f, "finalize");
});

CASE("verbs.registrations_given_back", 2, 90, [](Rank& r) {
  // The registrations of a connection go with deregMr: their number after 50 messages is that after 5.
  r.start();
  Fake f = fake();
  void* comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0);
  int early = 0, late = 0;
  for (uint64_t i = 0; i < 50; i++) {
    if (r.rank == 0)
      sendMessage(r, comm, 10000 + i * 4096, i);
    else
      recvMessage(r, comm, 10000 + i * 4096, i);
    if (i == 4) f.live(nullptr, nullptr, &early, nullptr, nullptr);
  }
  f.live(nullptr, nullptr, &late, nullptr, nullptr);
  require(late <= early, "%d registrations live after 5 messages, %d after 50", early, late);
  r.meet(1 - r.rank);
  r.rank == 0 ? closeSend(r, comm) : closeRecv(r, comm);
  r.stop();
  nothingLeft(f, "finalize");
});

} // namespace
} // namespace conformance
