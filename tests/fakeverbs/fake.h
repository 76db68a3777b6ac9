// A stand-in for libibverbs.so.1 that moves data between processes without a NIC and fails on request.
//
// It has libibverbs' ABI (symbols, versions, the function table inside ibv_context that the header's inline verbs
// call), reliable-connected queue pairs, and the completion statuses that the kernel's rxe driver gives; tests/vm runs
// one probe program on both and compares.  Each process has one engine thread, its "NIC": it carries out the work
// requests of the local queue pairs and answers those of the peers, so that a peer needs no CPU of the application.
//
// Environment:
//   FAKEVERBS_DEVICES  number of devices fake0, fake1, ... (2)     FAKEVERBS_PORTS  ports of each (1)
//   FAKEVERBS_LINK     eth (RoCE v2: GID 0 link-local, GID 1 IPv4 10.99.<port-1>.<device+1>) or ib (LIDs)
//   FAKEVERBS_JOB      separates users of one machine (default: the user id)
//   FAKEVERBS_DELAY_US completions become visible up to that much later, in order for each queue pair only
//   FAKEVERBS_REORDER  1: queue pairs overtake one another at random      FAKEVERBS_SEED  for these two (1)
//   FAKEVERBS_ADAPTIVE 1: as on a network with adaptive routing, a later write may be in memory before the data of an
//                      earlier one of its queue pair; all else still comes after them
//   FAKEVERBS_DMABUF   1: registers dma-bufs, for which memfds do (read anew with each call).  What is written there
//                      stays in the device until something there is read through it, as may be with the memory of a GPU
//   FAKEVERBS_FAULTS   scripted faults: faults.cc                          FAKEVERBS_REPORT  file: see report()
#pragma once

#pragma GCC visibility push(default)
#include <infiniband/verbs.h>
extern "C" {
int fakeverbsInject(const char* script);
int fakeverbsFired();
void fakeverbsLive(int* contexts, int* pds, int* mrs, int* cqs, int* qps);
int fakeverbsTraffic(int level, int trafficClass);
}
#pragma GCC visibility pop
#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_reg_mr_iova

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unistd.h>
#include <unordered_map>
#include <vector>

namespace fake {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;

constexpr int maxPorts = 4;
constexpr int qpIndexBits = 15;
constexpr uint32_t maxSlots = (1u << (24 - qpIndexBits)) - 1;
constexpr uint32_t maxInline = 512, maxSge = 16, maxWr = 16384, maxCqe = 1 << 20, maxMsg = 1u << 30;

// Data of a write that has been acknowledged and is not in memory yet.
struct Held {
  char* to = nullptr;
  std::vector<char> data;
  Time ready;
};

struct Device : ibv_device {
  int index = 0;
  bool portDown[maxPorts + 1] = {};
  std::vector<Held> unflushed; // of dma-bufs
  uint64_t guid() const { return 0x0200fa4e00000000ull + uint64_t(index + 1); }
};

struct Context : ibv_context {
  int asyncPipe = -1; // the end that events are written to
  Device* dev() { return static_cast<Device*>(device); }
};

struct Pd : ibv_pd {};

struct Mr : ibv_mr {
  uint64_t iova = 0;
  unsigned access = 0;
  void* map = nullptr; // of a dma-buf
  size_t mapBytes = 0;
  Mr() : ibv_mr{} {}
  ~Mr();
};

struct Channel : ibv_comp_channel {
  int writeEnd = -1;
};

struct Cqe {
  ibv_wc wc;
  uint32_t qpn = 0;
  int retire = 0; // work requests whose queue slots are free again once this entry is polled
  bool recv = false;
  bool solicited = false;
  Time ready;
};

// What the pipe of a context carries.
struct Raised {
  ibv_async_event event = {};
  uint64_t serial = 0; // of the queue pair or completion queue that it is about
};

struct Cq : ibv_cq {
  uint64_t serial = 0;
  std::deque<Cqe> visible;
  std::deque<Cqe> delayed;
  std::atomic<int> count{0}; // of visible: lets pollers look without the lock
  int armed = 0;             // 1: next completion, 2: next solicited one
};

struct Wqe {
  uint64_t wrId = 0;
  ibv_wr_opcode op = IBV_WR_SEND;
  unsigned flags = 0;
  bool signaled = false;
  uint32_t imm = 0, rkey = 0;
  uint64_t raddr = 0, compareAdd = 0, swap = 0, length = 0;
  std::vector<ibv_sge> sges;
  std::vector<char> inlineData;
  bool reads() const {
    return op == IBV_WR_RDMA_READ || op == IBV_WR_ATOMIC_FETCH_AND_ADD || op == IBV_WR_ATOMIC_CMP_AND_SWP;
  }
};

struct RecvWqe {
  uint64_t wrId = 0;
  std::vector<ibv_sge> sges;
  uint64_t length = 0;
};

struct Qp : ibv_qp {
  uint64_t serial = 0;
  ibv_qp_cap cap = {};
  bool signalAll = false;
  ibv_qp_attr attr = {};
  uint32_t destSlot = 0;
  int destDev = -1, destPort = 0;

  // Requester: sq holds the requests that are not acknowledged; next of them have been sent in this attempt.
  std::deque<Wqe> sq;
  size_t next = 0;
  uint64_t sentBytes = 0; // of sq[next]
  uint32_t headSeq = 0;   // sequence number of sq.front()
  uint32_t attempt = 0;   // changes with every retransmission: answers to older ones are void
  int sqUsed = 0, unretired = 0, retries = 0, rnrRetries = 0;
  bool stalled = false; // by FAKEVERBS_REORDER, decided once a request
  Time holdUntil;

  // Responder.
  std::deque<RecvWqe> rq;
  int rqUsed = 0;
  uint32_t expectSeq = 0, refusedAttempt = 0;
  uint64_t receivedBytes = 0;
  std::deque<Held> held; // by FAKEVERBS_ADAPTIVE

  Time lastReady[2]; // of the delayed completions: send, receive
  Device* dev() { return static_cast<Context*>(context)->dev(); }
};

enum Kind : uint8_t { kindRequest, kindAck, kindResponse, kindNak };
enum Flag : uint8_t { flagFirst = 1, flagLast = 2, flagSolicited = 4 };
// A request that a queue pair could not take is answered by dropped: a real requester finds out by its timer, which
// here starts with that answer, so that a slow peer is never mistaken for a dead one.
enum Syndrome : uint8_t { nakDropped, nakNotReady, nakAccess, nakInvalid, nakOperation };

struct Header {
  uint32_t magic;
  uint8_t kind, op, flags, syndrome;
  uint32_t dstQpn, srcQpn, seq, attempt, imm, rkey;
  uint64_t raddr, offset, total, compareAdd, swap;
  uint32_t length;
  uint8_t dstDev, dstPort, rnrTimer, pad;
};
static_assert(sizeof(Header) == 80, "wire format");

struct Conn {
  int fd = -1;
  uint32_t slot = 0; // of an outgoing one
  std::vector<char> out;
  size_t outPos = 0;
  Header header = {};
  size_t got = 0; // of header, then payload
  std::vector<char> payload;
  ~Conn() {
    if (fd != -1) close(fd);
  }
};

struct State {
  std::mutex mutex; // guards everything
  std::atomic<int> waiting{0};
  int users = 0; // open contexts: the engine runs while there are any
  std::thread engine;
  bool stop = false, sleeping = false;
  uint32_t slot = 0;
  int epollFd = -1, listenFd = -1, wakeFd = -1, timerFd = -1;
  std::map<int, std::unique_ptr<Conn>> conns; // by fd
  std::map<uint32_t, int> outgoing;           // slot -> fd
  std::set<uint32_t> active;                  // queue pairs with requests to send
  std::set<Cq*> delaying;
  uint32_t lastAttempt = 0, cursor = 0;
  std::mt19937 random;
  int delayUs = 0;
  bool reorder = false, adaptive = false, ib = false;
  int ports = 1;
  std::string job;

  std::vector<std::unique_ptr<Device>> devices;
  std::set<Context*> contexts;
  std::set<Pd*> pds;
  std::set<Channel*> channels;
  std::set<Cq*> cqs;
  std::unordered_map<uint32_t, Mr*> mrs;        // by key >> 8
  std::unordered_map<uint32_t, Qp*> qps;        // by number
  std::unordered_map<const void*, int> pdUsers; // objects in a protection domain
  std::unordered_map<const void*, int> cqUsers;
  uint64_t lastSerial = 0;
  std::unordered_map<const void*, int> unacked; // events that the program has got, by what they are about
  std::condition_variable acked;
  int misuse = 0; // calls that a correct program never makes
};

State& state();

// Takes the lock for a verb; the engine lets waiting callers through between two fragments.
class Guard {
 public:
  Guard() : lock_(state().mutex, std::defer_lock) {
    state().waiting++;
    lock_.lock();
    state().waiting--;
  }

  // A queue pair or completion queue that is gone for all others goes when its events have been acknowledged.
  void awaitAcks(const void* element) {
    state().acked.wait(lock_, [&] { return state().unacked.count(element) == 0; });
  }

 private:
  std::unique_lock<std::mutex> lock_;
};

// All of these are called with the lock held.
int engineStart();
void engineStop(); // drops and retakes the lock
void engineWake();
void engineForget(); // in the child of a fork

Mr* findMr(uint32_t key, bool remote);
bool inMr(const Mr* mr, const ibv_pd* pd, uint64_t addr, uint64_t length, unsigned access);
// Copies as a device does: upwards in aligned 8-byte words, so that whoever watches a word at the end of what is
// written finds the rest there too; and behind the back of the thread sanitizer, which knows nothing of devices.
void dmaCopy(char* to, const char* from, uint64_t length);

// Copies between contiguous data and a scatter list from an offset in it; false if a key or range is bad.
bool gather(const Qp& qp, const Wqe& wqe, uint64_t offset, char* out, uint64_t length);
bool scatter(const Qp& qp, const std::vector<ibv_sge>& sges, uint64_t offset, const char* data, uint64_t length);
bool listOk(const Qp& qp, const std::vector<ibv_sge>& sges, unsigned access);

void placeHeld(Qp& qp, Time now); // of the writes held back those that are due
void flushDevice(Device& dev);    // what was written to dma-bufs
void qpToError(Qp& qp);
void completeSend(Qp& qp, ibv_wc_status status);
// Returns the status after scripted faults; on an error the queue pair is in the error state afterwards.
ibv_wc_status completeRecv(Qp& qp, ibv_wc_status status, ibv_wc_opcode opcode, uint64_t bytes, bool withImm,
                           uint32_t imm, bool solicited);
void promoteDelayed(Cq& cq, Time now);
bool deviceGid(const Device& dev, int port, int index, ibv_gid* gid);
uint16_t deviceLid(const Device& dev, int port);
void raiseEvent(Device& dev, ibv_event_type type, void* element, int port);
void setPort(Device& dev, bool down);

int pollCq(ibv_cq* cq, int n, ibv_wc* wc);
int armCq(ibv_cq* cq, int solicitedOnly);
int postSend(ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad);
int postRecv(ibv_qp* qp, ibv_recv_wr* wr, ibv_recv_wr** bad);

// Faults.  faultAt returns the errno that this call of the named verb shall fail with, 0, or, at post_send, that the
// queue pair stalls.
constexpr int faultStall = -1;
bool faultsParse(const char* script, std::string* error);
bool faultsAny(); // without the lock
int faultAt(const char* point, const ibv_context* context);
ibv_wc_status faultStatus(ibv_wc_status status, const char* point, const ibv_context* context);

} // namespace fake
