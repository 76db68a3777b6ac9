// Scripted faults of the fake verbs library (tests/fakeverbs).  Skipped where the plugin has not loaded it.
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/socket.h>
#include <unistd.h>

#include "harness.h"

namespace conformance {
namespace {

struct Fake {
  int (*inject)(const char*) = nullptr;
  void (*live)(int*, int*, int*, int*, int*) = nullptr;
};

Fake fake() {
  Fake f;
  void* library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) skip("the plugin has not loaded a verbs library");
  f.inject = reinterpret_cast<int (*)(const char*)>(dlsym(library, "fakeverbsInject"));
  f.live = reinterpret_cast<void (*)(int*, int*, int*, int*, int*)>(dlsym(library, "fakeverbsLive"));
  if (f.inject == nullptr || f.live == nullptr) skip("the verbs library is not the fake one");
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

// A fault on one rank, then a clean attempt, which has to succeed.  Says whether either rank saw an error.
bool faulted(Rank& r, const Fake& f, int victim, const std::string& rule) {
  std::string what = rule + " on rank " + std::to_string(victim);
  require(f.inject("clear") == 0, "clear");
  if (r.rank == victim) require(f.inject(rule.c_str()) == 0, "the rule %s is wrong", rule.c_str());
  r.meet(1 - r.rank);
  ncclResult_t result = attempt(r, what.c_str());
  require(f.inject("clear") == 0, "clear");
  r.meet(1 - r.rank);
  int peer = 1 - r.rank;
  r.sendValue(peer, result);
  bool any = r.receiveValue<ncclResult_t>(peer) != ncclSuccess || result != ncclSuccess;
  result = attempt(r, "after a fault");
  require(result == ncclSuccess, "after %s a clean connection gives %d", what.c_str(), int(result));
  return any;
}

// Some of the faults have to come through, or the case tested nothing.
void failNth(Rank& r, const char* verb, const char* error, int most) {
  r.start();
  Fake f = fake();
  int seen = 0;
  for (int victim = 0; victim < 2; victim++)
    for (int n = 1; n <= most; n++)
      seen += faulted(r, f, victim, std::string(verb) + "#" + std::to_string(n) + "=" + error);
  r.stop();
  nothingLeft(f, verb);
  if (seen == 0) skip("connections do not call %s, or do without it", verb);
}

CASE("verbs.fail_create_cq", 2, 240, [](Rank& r) { failNth(r, "create_cq", "ENOMEM", 2); });
CASE("verbs.fail_create_qp", 2, 240, [](Rank& r) { failNth(r, "create_qp", "ENOMEM", 5); });
CASE("verbs.fail_modify_qp", 2, 300, [](Rank& r) { failNth(r, "modify_qp", "EINVAL", 8); });
CASE("verbs.fail_reg_mr", 2, 240, [](Rank& r) { failNth(r, "reg_mr", "ENOMEM", 4); });
CASE("verbs.fail_dereg_mr", 2, 240, [](Rank& r) {
  r.start();
  Fake f = fake();
  unsetenv("FAKEVERBS_REPORT"); // what could not be given back stays
  for (int victim = 0; victim < 2; victim++) faulted(r, f, victim, "dereg_mr#1=EBUSY");
  r.stop();
});
CASE("verbs.fail_alloc_pd", 2, 240, [](Rank& r) { failNth(r, "alloc_pd", "ENOMEM", 2); });
CASE("verbs.fail_post_send", 2, 240, [](Rank& r) { failNth(r, "post_send", "ENOMEM", 4); });
CASE("verbs.fail_post_recv", 2, 240, [](Rank& r) { failNth(r, "post_recv", "ENOMEM", 3); });
CASE("verbs.fail_poll_cq", 2, 240, [](Rank& r) {
  r.start();
  Fake f = fake();
  for (int victim = 0; victim < 2; victim++)
    for (int n : {1, 5, 20}) faulted(r, f, victim, "poll_cq#" + std::to_string(n) + "=EIO");
  r.stop();
  nothingLeft(f, "poll_cq");
});
CASE("verbs.fail_queries", 2, 240, [](Rank& r) {
  r.start();
  Fake f = fake();
  for (const char* verb : {"query_port", "query_gid", "query_qp"})
    for (int victim = 0; victim < 2; victim++) faulted(r, f, victim, std::string(verb) + "#1+=EIO");
  r.stop();
  nothingLeft(f, "queries");
});

CASE("verbs.fail_init", 1, 120, [](Rank& r) {
  // Each verb that init calls fails in turn: init gives an error or does without, leaves nothing, and works afterwards.
  r.start();
  Fake f = fake();
  if (!r.net.hasFinalize()) skip("version %d has no finalize", r.net.version());
  r.stop();
  nothingLeft(f, "finalize");
  for (const char* verb : {"get_device_list", "open_device", "query_device", "query_port", "query_gid", "alloc_pd",
                           "create_cq", "reg_mr", "create_qp"})
    for (int n = 1; n <= 3; n++) {
      std::string rule = std::string(verb) + "#" + std::to_string(n) + "=ENOMEM";
      require(f.inject("clear") == 0 && f.inject(rule.c_str()) == 0, "the rule %s is wrong", rule.c_str());
      if (r.net.init() == ncclSuccess) {
        int count = 0;
        requireOk(r.net.devices(&count));
        requireOk(r.net.finalize());
      } else {
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
        seen += faulted(r, f, n % 2, std::string(point) + "#" + std::to_string(n) + "=status:" + status);
  r.stop();
  nothingLeft(f, "statuses");
  require(seen >= 20, "of 40 failed completions only %d were an error to anybody", seen);
});

CASE("verbs.status_is_an_error", 2, 120, [](Rank& r) {
  // All of a side's sends fail from the first on: neither side may report five messages.
  r.start();
  Fake f = fake();
  require(faulted(r, f, 0, "wc#1+=status:REM_ACCESS_ERR"), "nobody saw an error");
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

CASE("verbs.device_fatal", 2, 150, [](Rank& r) {
  // A connection under way when the device dies ends with an error or, where others carry on for it, well.
  r.start();
  Fake f = fake();
  require(f.inject("clear") == 0, "clear");
  if (r.rank == 0) require(f.inject("post_send#4=event:DEVICE_FATAL") == 0, "rule");
  attempt(r, "DEVICE_FATAL");
  r.stop();
  nothingLeft(f, "DEVICE_FATAL");
});

CASE("verbs.port_down", 2, 150, [](Rank& r) {
  // The port goes away in the middle and comes back: an error within the bound, or all of it; afterwards it works.
  r.start();
  Fake f = fake();
  require(f.inject("clear") == 0, "clear");
  if (r.rank == 0) require(f.inject("post_send#3=portdown") == 0, "rule");
  attempt(r, "port down");
  require(f.inject("clear;now=portup") == 0, "rule");
  r.meet(1 - r.rank);
  require(attempt(r, "port up again") == ncclSuccess, "no connection after the port came back");
  r.stop();
  nothingLeft(f, "port down");
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
