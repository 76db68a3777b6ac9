// A peer that passed the handshake of a verbs connection and then writes what it likes: clear-to-send entries into the
// sender's memory; immediate values and sizes of messages to the receiver; messages about failed paths over the socket.
// Whatever comes, work requests name registered memory only, a message is not longer than what was sent or than its
// room, and an error is the worst that happens.
#include <arpa/inet.h>
#include <fuzzer/FuzzedDataProvider.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "net/verbs_connection.h"

using namespace moe;
using namespace moe::net;

namespace {

constexpr size_t most = 40000;
constexpr uint64_t maxMessage = 10000;

// A device that carries nothing out: what is posted completes when the input says so.
struct Cq : ibv_cq {
  std::deque<ibv_wc> entries;
};
struct Posted {
  uint64_t id;
  bool signaled;
};
struct Qp : ibv_qp {
  std::deque<uint64_t> receives;
  std::deque<Posted> sends;
};
struct Device {
  ibv_device device = {};
  ibv_context context = {};
  ibv_pd pd = {};
  VerbsLib lib;
  std::vector<ibv_mr*> mrs;
  std::vector<Qp*> qps;
  uint32_t numbers = 0, keys = 0;
};
Device* device = nullptr; // one connection at a time

void push(Qp* qp, uint64_t id, ibv_wc_status status, ibv_wc_opcode opcode = IBV_WC_RDMA_WRITE, uint32_t immediate = 0) {
  ibv_wc entry = {};
  entry.wr_id = id;
  entry.status = status;
  entry.opcode = opcode;
  entry.imm_data = htonl(immediate);
  static_cast<Cq*>(qp->send_cq)->entries.push_back(entry);
}

bool registered(const ibv_sge& piece) {
  for (const ibv_mr* mr : device->mrs) {
    const auto begin = reinterpret_cast<uint64_t>(mr->addr);
    if (mr->lkey == piece.lkey && piece.addr >= begin && piece.addr + piece.length <= begin + mr->length) return true;
  }
  return false;
}

int postSend(ibv_qp* to, ibv_send_wr* work, ibv_send_wr**) {
  auto* qp = static_cast<Qp*>(to);
  for (; work != nullptr; work = work->next) {
    uint64_t bytes = 0;
    for (int i = 0; i < work->num_sge; i++) {
      if (work->sg_list[i].length != 0 && !registered(work->sg_list[i])) abort();
      bytes += work->sg_list[i].length;
    }
    if (bytes > maxMessage) abort();
    qp->sends.push_back({work->wr_id, (work->send_flags & IBV_SEND_SIGNALED) != 0});
  }
  if (qp->sends.size() > 512) abort(); // more than the queue has room for
  return 0;
}

int postRecv(ibv_qp* to, ibv_recv_wr* work, ibv_recv_wr**) {
  for (; work != nullptr; work = work->next) static_cast<Qp*>(to)->receives.push_back(work->wr_id);
  return 0;
}

int pollCq(ibv_cq* from, int n, ibv_wc* out) {
  auto& entries = static_cast<Cq*>(from)->entries;
  int got = 0;
  for (; got < n && !entries.empty(); got++, entries.pop_front()) out[got] = entries.front();
  return got;
}

void completeSend(Qp* qp, ibv_wc_status status) {
  while (!qp->sends.empty()) {
    const Posted posted = qp->sends.front();
    qp->sends.pop_front();
    if (!posted.signaled && status == IBV_WC_SUCCESS) continue;
    return push(qp, posted.id, status);
  }
}

void open(Device* d) {
  device = d;
  snprintf(d->device.name, sizeof(d->device.name), "fuzz0");
  d->context.device = &d->device;
  d->context.ops.post_send = postSend;
  d->context.ops.post_recv = postRecv;
  d->context.ops.poll_cq = pollCq;
  d->pd.context = &d->context;
  VerbsLib& l = d->lib;
  l.getDeviceName = [](ibv_device* one) -> const char* { return one->name; };
  l.closeDevice = [](ibv_context*) { return 0; };
  l.queryDevice = [](ibv_context*, ibv_device_attr*) { return 0; };
  l.queryPort = [](ibv_context*, uint8_t, ibv_port_attr* attr) {
    *attr = ibv_port_attr();
    attr->state = IBV_PORT_ACTIVE;
    attr->active_mtu = IBV_MTU_1024;
    attr->gid_tbl_len = 1;
    return 0;
  };
  l.queryGid = [](ibv_context*, uint8_t, int, ibv_gid* gid) {
    memset(gid->raw, 1, sizeof(gid->raw));
    return 0;
  };
  l.allocPd = [](ibv_context*) { return &device->pd; };
  l.deallocPd = [](ibv_pd*) { return 0; };
  l.regMr = [](ibv_pd*, void* data, size_t bytes, int) {
    auto* mr = new ibv_mr();
    mr->addr = data;
    mr->length = bytes;
    mr->lkey = mr->rkey = ++device->keys;
    device->mrs.push_back(mr);
    return mr;
  };
  l.deregMr = [](ibv_mr* mr) {
    for (auto it = device->mrs.begin(); it != device->mrs.end(); ++it) {
      if (*it != mr) continue;
      device->mrs.erase(it);
      delete mr;
      return 0;
    }
    return EINVAL;
  };
  l.createCq = [](ibv_context* context, int, void*, ibv_comp_channel*, int) -> ibv_cq* {
    auto* cq = new Cq();
    cq->context = context;
    return cq;
  };
  l.destroyCq = [](ibv_cq* cq) {
    delete static_cast<Cq*>(cq);
    return 0;
  };
  l.createQp = [](ibv_pd*, ibv_qp_init_attr* attr) -> ibv_qp* {
    auto* qp = new Qp();
    qp->context = &device->context;
    qp->send_cq = attr->send_cq;
    qp->qp_num = ++device->numbers;
    device->qps.push_back(qp);
    return qp;
  };
  l.destroyQp = [](ibv_qp* qp) {
    delete static_cast<Qp*>(qp);
    return 0;
  };
  l.modifyQp = [](ibv_qp* one, ibv_qp_attr* attr, int) {
    auto* qp = static_cast<Qp*>(one);
    if (attr->qp_state != IBV_QPS_ERR) return 0;
    while (!qp->sends.empty()) completeSend(qp, IBV_WC_WR_FLUSH_ERR);
    for (; !qp->receives.empty(); qp->receives.pop_front()) push(qp, qp->receives.front(), IBV_WC_WR_FLUSH_ERR);
    return 0;
  };
  l.eventTypeStr = [](ibv_event_type) { return "event"; };
  l.wcStatusStr = [](ibv_wc_status) { return "status"; };
}

// Where the peer may write in this side's control memory: the beginning of VerbsConnection::Control.
struct Control {
  CtsEntry cts[maxRequests][maxGroup];
  uint64_t records[maxRequests][maxGroup];
};

uint64_t number(FuzzedDataProvider* in) {
  switch (in->ConsumeIntegral<uint8_t>() % 3) {
  case 0:
    return in->ConsumeIntegralInRange<uint64_t>(0, 40);
  case 1:
    return in->ConsumeIntegralInRange<uint64_t>(0, 2 * most);
  default:
    return in->ConsumeIntegral<uint64_t>();
  }
}

void writeCts(FuzzedDataProvider* in, Control* control, uint64_t room) {
  const uint32_t slot = in->ConsumeIntegralInRange<uint32_t>(0, 3),
                 members = in->ConsumeIntegralInRange<uint32_t>(0, 9);
  for (uint32_t i = 0; i < std::min<uint32_t>(std::max<uint32_t>(members, 1), maxGroup); i++) {
    CtsEntry& entry = control->cts[slot][i];
    entry.address = number(in);
    entry.room = room;
    entry.keys[0] = in->ConsumeIntegral<uint32_t>();
    entry.tag = in->ConsumeIntegralInRange<int32_t>(0, 2);
    entry.members = in->ConsumeIntegralInRange<int>(0, 9) == 0 ? in->ConsumeIntegral<uint32_t>() : members;
    entry.sequence = in->ConsumeIntegralInRange<int>(0, 9) == 0 ? in->ConsumeIntegral<uint32_t>() : slot + 1;
  }
}

void writeSocket(FuzzedDataProvider* in, int socket, uint32_t nPaths) {
  PathDown message;
  message.path = in->ConsumeIntegralInRange<uint32_t>(0, nPaths);
  for (uint32_t slot = 0; slot < 4; slot++) {
    message.sequence[slot] = in->ConsumeBool() ? slot + 1 : static_cast<uint32_t>(number(in));
    for (auto& arrived : message.arrived[slot])
      arrived = in->ConsumeBool() ? UINT32_MAX : in->ConsumeIntegral<uint8_t>();
  }
  std::string bytes(reinterpret_cast<const char*>(&message), sizeof(message));
  if (in->ConsumeIntegralInRange<int>(0, 9) == 0) bytes = in->ConsumeRandomLengthString(100);
  if (send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) return; // it is full, or closed
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 4096) return 0;
  FuzzedDataProvider in(data, size);
  Device d;
  open(&d);
  const bool sender = in.ConsumeBool();
  const uint32_t nPaths = in.ConsumeIntegralInRange<uint32_t>(1, 2), nQueues = nPaths * 2;
  VerbsPort port;
  port.context = std::make_shared<VerbsContext>(&d.lib, &d.context);
  port.infiniband = in.ConsumeBool(); // the same with adaptive routing
  port.maxMessage = maxMessage;
  port.info.name = "fuzz0:1";
  if (port.context->open() != 0) abort();
  PortGroup group(std::vector<VerbsPort>(nPaths, port));
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, sockets) != 0) return 0;
  const UniqueFd peerSocket(sockets[1]);
  std::unique_ptr<VerbsConnection> connection;
  if (VerbsConnection::create(&group, CommConfig(), sender, nPaths, nQueues, nullptr, &connection) != ncclSuccess)
    abort();
  connection->keepSocket(UniqueFd(sockets[0]));
  if (connection->establish(connection->describe(), "fuzz") != ncclSuccess) abort(); // a peer just like this side
  auto* control = static_cast<Control*>(d.mrs[0]->addr);

  std::vector<char> buffer(most);
  Memory memory;
  memory.data = buffer.data();
  memory.bytes = most;
  Region* region = nullptr;
  if (connection->registerMemory(memory, &region) != ncclSuccess) abort();
  struct Open {
    Request* request;
    std::vector<size_t> most; // bytes, by member
    uint32_t slot = 0;
  };
  std::vector<Open> requests;
  const uint64_t room = number(&in); // of all that the peer receives
  uint32_t slot = 0;
  bool came[maxRequests][maxGroup] = {}; // something for this member since the slot was used last
  bool failed = false;
  for (int i = 0; i < 100 && in.remaining_bytes() > 0; i++) {
    Request* request = nullptr;
    switch (in.ConsumeIntegralInRange<int>(0, 7)) {
    case 0:
    case 1:
      if (sender) {
        const size_t bytes = std::min<uint64_t>(number(&in), most);
        failed |= connection->isend(buffer.data(), bytes, in.ConsumeIntegralInRange<int>(0, 2), region, &request) !=
                  ncclSuccess;
        if (request != nullptr) requests.push_back({request, {std::min<size_t>(bytes, room)}});
      } else {
        const int n = in.ConsumeIntegralInRange<int>(1, 3);
        void* to[3] = {buffer.data(), buffer.data() + 100, buffer.data() + 200};
        const int tags[3] = {0, 1, 2};
        Region* regions[3] = {region, region, region};
        std::vector<size_t> rooms;
        for (int k = 0; k < n; k++) rooms.push_back(std::min<uint64_t>(number(&in), most - 200));
        failed |= connection->irecv(n, to, rooms.data(), tags, regions, &request) != ncclSuccess;
        if (request == nullptr) break;
        requests.push_back({request, rooms, slot});
        slot = (slot + 1) % maxRequests;
      }
      break;
    case 2:
    case 3:
      if (sender) {
        writeCts(&in, control, room);
      } else {
        Immediate immediate;
        immediate.slot = in.ConsumeIntegralInRange<uint32_t>(0, 3);
        immediate.member = in.ConsumeIntegralInRange<uint32_t>(0, 3);
        immediate.pieces = in.ConsumeIntegralInRange<uint32_t>(1, 4);
        immediate.piece = in.ConsumeIntegralInRange<uint32_t>(0, 4);
        immediate.size = static_cast<uint32_t>(number(&in)) & Immediate::sizeInRecord;
        control->records[immediate.slot][immediate.member] = number(&in);
        const uint32_t word =
          in.ConsumeIntegralInRange<int>(0, 4) == 0 ? in.ConsumeIntegral<uint32_t>() : immediate.pack();
        Qp* qp = d.qps[in.ConsumeIntegralInRange<size_t>(0, nQueues - 1)];
        if (qp->receives.empty()) break;
        const Immediate pushed = Immediate::unpack(word);
        came[pushed.slot][pushed.member] = true;
        push(qp, qp->receives.front(), IBV_WC_SUCCESS, IBV_WC_RECV_RDMA_WITH_IMM, word);
        qp->receives.pop_front();
      }
      break;
    case 4:
      completeSend(d.qps[in.ConsumeIntegralInRange<size_t>(0, nQueues - 1)],
                   in.ConsumeIntegralInRange<int>(0, 9) == 0 ? IBV_WC_RETRY_EXC_ERR : IBV_WC_SUCCESS);
      break;
    case 5:
      writeSocket(&in, peerSocket.get(), nPaths);
      for (int k = 0; k < 257; k++) failed |= connection->progress() != ncclSuccess; // it is looked at now and then
      break;
    default:
      failed |= connection->progress() != ncclSuccess;
      for (size_t k = 0; k < requests.size(); k++) {
        bool done = false;
        size_t bytes[maxGroup] = {};
        failed |= connection->test(requests[k].request, &done, bytes) != ncclSuccess;
        if (!done) continue;
        for (size_t m = 0; m < requests[k].most.size(); m++) {
          if (bytes[m] > requests[k].most[m] || (!sender && !came[requests[k].slot][m])) abort();
        }
        std::fill_n(came[requests[k].slot], maxGroup, false);
        requests.erase(requests.begin() + static_cast<ptrdiff_t>(k--));
      }
    }
    if (failed && connection->progress() == ncclSuccess) abort(); // an error stays
  }
  if (connection->deregisterMemory(region) != ncclSuccess) abort();
  connection.reset();
  return 0;
}
