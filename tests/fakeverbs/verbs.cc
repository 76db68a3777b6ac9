// libibverbs' entry points for devices, memory, completion queues and events.
#include <arpa/inet.h>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <endian.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fake.h"

namespace fake {
namespace {

int envInt(const char* name, int def, int min, int max) {
  const char* text = getenv(name);
  if (text == nullptr || *text == 0) return def;
  return std::min(max, std::max(min, atoi(text)));
}

void configure(State& s) {
  s.ports = envInt("FAKEVERBS_PORTS", 1, 1, maxPorts);
  const char* link = getenv("FAKEVERBS_LINK");
  s.ib = link != nullptr && strcmp(link, "ib") == 0;
  const char* job = getenv("FAKEVERBS_JOB");
  s.job = job != nullptr ? job : std::to_string(getuid());
  s.delayUs = envInt("FAKEVERBS_DELAY_US", 0, 0, 10000000);
  s.adaptive = envInt("FAKEVERBS_ADAPTIVE", 0, 0, 1) == 1;
  s.reorder = envInt("FAKEVERBS_REORDER", 0, 0, 1) == 1;
  s.random.seed(unsigned(envInt("FAKEVERBS_SEED", 1, 0, 1 << 30)));
  int n = envInt("FAKEVERBS_DEVICES", 2, 0, 64);
  for (int i = 0; i < n; i++) {
    auto dev = std::make_unique<Device>();
    static_cast<ibv_device&>(*dev) = ibv_device{};
    dev->index = i;
    dev->node_type = IBV_NODE_CA;
    dev->transport_type = IBV_TRANSPORT_IB;
    snprintf(dev->name, sizeof(dev->name), "fake%d", i);
    snprintf(dev->dev_name, sizeof(dev->dev_name), "uverbs%d", i);
    snprintf(dev->dev_path, sizeof(dev->dev_path), "/sys/class/infiniband_verbs/uverbs%d", i);
    snprintf(dev->ibdev_path, sizeof(dev->ibdev_path), "/sys/class/infiniband/fake%d", i);
    s.devices.push_back(std::move(dev));
  }
}

// One line for each process: what it left open, and how often it misused the interface.  Tests fail on any.
void report() {
  const char* path = getenv("FAKEVERBS_REPORT");
  State& s = state();
  char text[256];
  snprintf(text, sizeof(text), "pid %d contexts %zu pds %zu mrs %zu cqs %zu qps %zu channels %zu misuse %d\n", getpid(),
           s.contexts.size(), s.pds.size(), s.mrs.size(), s.cqs.size(), s.qps.size(), s.channels.size(), s.misuse);
  if (path == nullptr) return;
  int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd == -1) return;
  if (write(fd, text, strlen(text)) == -1) perror("fakeverbs report");
  close(fd);
}

__attribute__((constructor)) void atLoad() {
  std::string error;
  const char* script = getenv("FAKEVERBS_FAULTS");
  if (script == nullptr || faultsParse(script, &error)) return;
  // A typing error must not turn a fault test into a test of nothing.
  fprintf(stderr, "fakeverbs: %s\n", error.c_str());
  _exit(2);
}

__attribute__((destructor)) void atUnload() {
  Guard guard;
  report();
  engineStop();
}

bool portOk(int port) { return port >= 1 && port <= state().ports; }

template <class T> T* failWith(int e) {
  errno = e;
  return nullptr;
}

// Unmapped memory cannot be registered.
bool mapped(const void* addr, size_t length) {
  uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), from = uintptr_t(addr) & ~(page - 1);
  if (length == 0) return true;
  uintptr_t last = uintptr_t(addr) + length;
  if (last < uintptr_t(addr)) return false;
  return msync(reinterpret_cast<void*>(from), last - from, MS_ASYNC) == 0;
}

// Null with errno set on failure.  The caller holds the lock.
Mr* registerLocked(ibv_pd* pd, void* addr, size_t length, uint64_t iova, unsigned access) {
  State& s = state();
  unsigned basic = access & ~unsigned(IBV_ACCESS_OPTIONAL_RANGE);
  if ((basic & (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC)) && !(basic & IBV_ACCESS_LOCAL_WRITE))
    return failWith<Mr>(EINVAL);
  if (basic &
      ~unsigned(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC))
    return failWith<Mr>(EOPNOTSUPP);
  if (!mapped(addr, length)) return failWith<Mr>(EFAULT);
  uint32_t index;
  do index = s.random() & 0xffffff;
  while (index == 0 || s.mrs.count(index) != 0);
  auto mr = std::make_unique<Mr>();
  mr->context = pd->context;
  mr->pd = pd;
  mr->addr = addr;
  mr->length = length;
  mr->handle = index;
  // Different on purpose: hardware often has them equal, and programs mix them up.
  mr->lkey = index << 8 | 0x11;
  mr->rkey = index << 8 | 0x22;
  mr->iova = iova;
  mr->access = basic;
  s.pdUsers[pd]++;
  return s.mrs[index] = mr.release();
}

ibv_mr* registerMr(ibv_pd* pd, void* addr, size_t length, uint64_t iova, unsigned access) {
  Guard guard;
  if (int e = faultAt("reg_mr", pd->context)) return failWith<ibv_mr>(e);
  return registerLocked(pd, addr, length, iova, access);
}

} // namespace

State& state() {
  // Never destroyed: exit handlers of the program may still come here.
  static State* s = [] {
    auto* instance = std::make_unique<State>().release();
    configure(*instance);
    pthread_atfork(nullptr, nullptr, engineForget);
    return instance;
  }();
  return *s;
}

Mr::~Mr() {
  if (map != nullptr) munmap(map, mapBytes);
}

Mr* findMr(uint32_t key, bool remote) {
  auto it = state().mrs.find(key >> 8);
  if (it == state().mrs.end()) return nullptr;
  return (remote ? it->second->rkey : it->second->lkey) == key ? it->second : nullptr;
}

bool inMr(const Mr* mr, const ibv_pd* pd, uint64_t addr, uint64_t length, unsigned access) {
  return mr != nullptr && mr->pd == pd && (mr->access & access) == access && addr >= mr->iova && length <= mr->length &&
         addr - mr->iova <= mr->length - length;
}

bool deviceGid(const Device& dev, int port, int index, ibv_gid* gid) {
  memset(gid, 0, sizeof(*gid));
  if (index == 0) {
    gid->global.subnet_prefix = htobe64(0xfe80000000000000ull);
    gid->global.interface_id = htobe64(dev.guid() + (uint64_t(port) << 32));
    return true;
  }
  if (index != 1 || state().ib) return false;
  const uint8_t v4[] = {0xff, 0xff, 10, 99, uint8_t(port - 1), uint8_t(dev.index + 1)};
  memcpy(gid->raw + 10, v4, sizeof(v4));
  return true;
}

uint16_t deviceLid(const Device& dev, int port) {
  return state().ib ? uint16_t(0x10 + dev.index * maxPorts + port) : 0;
}

namespace {

uint64_t serialOf(const void* element) {
  for (const auto& entry : state().qps)
    if (entry.second == element) return entry.second->serial;
  for (const Cq* cq : state().cqs)
    if (cq == element) return cq->serial;
  return 0;
}

} // namespace

void raiseEvent(Device& dev, ibv_event_type type, void* element, int port) {
  Raised raised;
  raised.event.event_type = type;
  if (element != nullptr)
    raised.event.element.qp = static_cast<ibv_qp*>(element);
  else
    raised.event.element.port_num = port;
  if (element != nullptr) raised.serial = serialOf(element);
  for (Context* context : state().contexts)
    if (context->device == &dev && write(context->asyncPipe, &raised, sizeof(raised)) == -1) state().misuse++;
}

void setPort(Device& dev, bool down) {
  for (int port = 1; port <= state().ports; port++) {
    if (dev.portDown[port] == down) continue;
    dev.portDown[port] = down;
    raiseEvent(dev, down ? IBV_EVENT_PORT_ERR : IBV_EVENT_PORT_ACTIVE, nullptr, port);
  }
}

} // namespace fake

using namespace fake;

extern "C" {

// What is alive now, for tests that compare two moments; any pointer may be null.
void fakeverbsLive(int* contexts, int* pds, int* mrs, int* cqs, int* qps) {
  Guard guard;
  State& s = state();
  if (contexts != nullptr) *contexts = int(s.contexts.size());
  if (pds != nullptr) *pds = int(s.pds.size());
  if (mrs != nullptr) *mrs = int(s.mrs.size());
  if (cqs != nullptr) *cqs = int(s.cqs.size());
  if (qps != nullptr) *qps = int(s.qps.size());
}

// How many connected queue pairs have this service level and traffic class.
int fakeverbsTraffic(int level, int trafficClass) {
  Guard guard;
  int n = 0;
  for (const auto& entry : state().qps) {
    const Qp& qp = *entry.second;
    if (qp.state != IBV_QPS_RTR && qp.state != IBV_QPS_RTS) continue;
    n += qp.attr.ah_attr.sl == level && qp.attr.ah_attr.grh.traffic_class == trafficClass ? 1 : 0;
  }
  return n;
}

ibv_device** ibv_get_device_list(int* n) {
  Guard guard;
  State& s = state();
  if (int e = faultAt("get_device_list", nullptr)) return failWith<ibv_device*>(e);
  auto** list = static_cast<ibv_device**>(calloc(s.devices.size() + 1, sizeof(void*)));
  for (size_t i = 0; i < s.devices.size(); i++) list[i] = s.devices[i].get();
  if (n != nullptr) *n = int(s.devices.size());
  return list;
}

void ibv_free_device_list(ibv_device** list) { free(list); }
const char* ibv_get_device_name(ibv_device* device) { return device->name; }
__be64 ibv_get_device_guid(ibv_device* device) { return htobe64(static_cast<Device*>(device)->guid()); }
int ibv_get_device_index(ibv_device* device) { return static_cast<Device*>(device)->index; }

ibv_context* ibv_open_device(ibv_device* device) {
  Guard guard;
  State& s = state();
  auto context = std::make_unique<Context>();
  static_cast<ibv_context&>(*context) = ibv_context{};
  context->device = device;
  if (int e = faultAt("open_device", context.get())) return failWith<ibv_context>(e);
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) == -1) return nullptr;
  if (int e = engineStart()) {
    close(fds[0]);
    close(fds[1]);
    return failWith<ibv_context>(e);
  }
  // Full only if nobody reads thousands of events; the engine must not wait for that.
  fcntl(fds[1], F_SETFL, O_NONBLOCK);
  context->async_fd = fds[0];
  context->asyncPipe = fds[1];
  context->cmd_fd = -1;
  context->num_comp_vectors = 2;
  pthread_mutex_init(&context->mutex, nullptr);
  context->ops.poll_cq = pollCq;
  context->ops.req_notify_cq = armCq;
  context->ops.post_send = postSend;
  context->ops.post_recv = postRecv;
  s.contexts.insert(context.get());
  return context.release();
}

int ibv_close_device(ibv_context* c) {
  Guard guard;
  State& s = state();
  auto* context = static_cast<Context*>(c);
  if (s.contexts.erase(context) == 0) return s.misuse++, EINVAL;
  for (Pd* pd : s.pds)
    if (pd->context == context) s.misuse++;
  for (Cq* cq : s.cqs)
    if (cq->context == context) s.misuse++;
  close(context->async_fd);
  close(context->asyncPipe);
  pthread_mutex_destroy(&context->mutex);
  std::unique_ptr<Context> owned(context);
  if (s.contexts.empty()) engineStop();
  return 0;
}

int ibv_query_device(ibv_context* context, ibv_device_attr* attr) {
  Guard guard;
  if (int e = faultAt("query_device", context)) return e;
  auto* dev = static_cast<Device*>(context->device);
  *attr = ibv_device_attr{};
  strcpy(attr->fw_ver, "1.0.0");
  attr->node_guid = attr->sys_image_guid = htobe64(dev->guid());
  attr->max_mr_size = ~0ull;
  attr->page_size_cap = 0xfffff000;
  attr->vendor_id = 0xfa4e;
  attr->vendor_part_id = 1;
  attr->max_qp = (1 << qpIndexBits) - 1;
  attr->max_qp_wr = maxWr;
  attr->max_sge = attr->max_sge_rd = maxSge;
  attr->max_cq = 1 << 16;
  attr->max_cqe = maxCqe;
  attr->max_mr = 1 << 24;
  attr->max_pd = 1 << 15;
  attr->max_qp_rd_atom = attr->max_qp_init_rd_atom = 128;
  attr->max_res_rd_atom = 1 << 20;
  attr->atomic_cap = IBV_ATOMIC_HCA;
  attr->max_pkeys = 1;
  attr->phys_port_cnt = uint8_t(state().ports);
  return 0;
}

int ibv_query_port(ibv_context* context, uint8_t port, _compat_ibv_port_attr* out) {
  Guard guard;
  if (int e = faultAt("query_port", context)) return e;
  if (!portOk(port)) return EINVAL;
  auto* dev = static_cast<Device*>(context->device);
  auto* attr = reinterpret_cast<ibv_port_attr*>(out);
  ibv_port_attr a = {};
  bool down = dev->portDown[port];
  a.state = down ? IBV_PORT_DOWN : IBV_PORT_ACTIVE;
  a.phys_state = down ? 3 : 5;
  a.max_mtu = a.active_mtu = IBV_MTU_4096;
  a.gid_tbl_len = state().ib ? 1 : 2;
  a.max_msg_sz = maxMsg;
  a.pkey_tbl_len = 1;
  a.lid = deviceLid(*dev, port);
  a.sm_lid = state().ib ? 1 : 0;
  a.max_vl_num = 1;
  a.active_width = 2;  // 4 lanes
  a.active_speed = 32; // of 25 Gb/s
  a.link_layer = state().ib ? IBV_LINK_LAYER_INFINIBAND : IBV_LINK_LAYER_ETHERNET;
  // The caller's struct may be the old one, which ends after link_layer.
  memcpy(attr, &a, offsetof(ibv_port_attr, flags));
  return 0;
}

int ibv_query_gid(ibv_context* context, uint8_t port, int index, ibv_gid* gid) {
  Guard guard;
  if (faultAt("query_gid", context) != 0 || !portOk(port)) return -1;
  return deviceGid(*static_cast<Device*>(context->device), port, index, gid) ? 0 : -1;
}

int _ibv_query_gid_ex(ibv_context* context, uint32_t port, uint32_t index, ibv_gid_entry* entry, uint32_t flags,
                      size_t size) {
  Guard guard;
  if (int e = faultAt("query_gid", context)) return e;
  if (flags != 0 || size < sizeof(*entry) || !portOk(int(port))) return EINVAL;
  *entry = ibv_gid_entry{};
  entry->gid_index = index;
  entry->port_num = port;
  entry->gid_type = state().ib ? IBV_GID_TYPE_IB : IBV_GID_TYPE_ROCE_V2;
  return deviceGid(*static_cast<Device*>(context->device), int(port), int(index), &entry->gid) ? 0 : ENODATA;
}

ssize_t _ibv_query_gid_table(ibv_context* context, ibv_gid_entry* entries, size_t max, uint32_t flags, size_t size) {
  size_t n = 0;
  for (int port = 1; port <= state().ports; port++)
    for (uint32_t index = 0; index < (state().ib ? 1u : 2u) && n < max; index++)
      if (_ibv_query_gid_ex(context, uint32_t(port), index, entries + n, flags, size) == 0) n++;
  return ssize_t(n);
}

int ibv_query_pkey(ibv_context*, uint8_t port, int index, __be16* pkey) {
  if (!portOk(port) || index != 0) return -1;
  *pkey = 0xffff;
  return 0;
}

int ibv_get_pkey_index(ibv_context*, uint8_t port, __be16 pkey) { return portOk(port) && pkey == 0xffff ? 0 : -1; }

ibv_pd* ibv_alloc_pd(ibv_context* context) {
  Guard guard;
  if (int e = faultAt("alloc_pd", context)) return failWith<ibv_pd>(e);
  auto pd = std::make_unique<Pd>();
  pd->context = context;
  pd->handle = 0;
  state().pds.insert(pd.get());
  return pd.release();
}

int ibv_dealloc_pd(ibv_pd* pd) {
  Guard guard;
  State& s = state();
  auto* p = static_cast<Pd*>(pd);
  if (s.pds.count(p) == 0) return s.misuse++, EINVAL;
  if (s.pdUsers[pd] > 0) return s.misuse++, EBUSY;
  s.pdUsers.erase(pd);
  s.pds.erase(p);
  std::unique_ptr<Pd> owned(p);
  return 0;
}

ibv_mr* ibv_reg_mr(ibv_pd* pd, void* addr, size_t length, int access) {
  return registerMr(pd, addr, length, uint64_t(uintptr_t(addr)), unsigned(access));
}
ibv_mr* ibv_reg_mr_iova(ibv_pd* pd, void* addr, size_t length, uint64_t iova, int access) {
  return registerMr(pd, addr, length, iova, unsigned(access));
}
ibv_mr* ibv_reg_mr_iova2(ibv_pd* pd, void* addr, size_t length, uint64_t iova, unsigned access) {
  return registerMr(pd, addr, length, iova, access);
}
ibv_mr* ibv_reg_dmabuf_mr(ibv_pd* pd, uint64_t offset, size_t length, uint64_t iova, int fd, int access) {
  if (envInt("FAKEVERBS_DMABUF", 0, 0, 1) == 0) return failWith<ibv_mr>(EOPNOTSUPP);
  Guard guard;
  if (int e = faultAt("reg_dmabuf_mr", pd->context)) return failWith<ibv_mr>(e);
  struct stat file;
  if (fstat(fd, &file) == -1) return nullptr;
  // The kernel asks for the same place in a page on both sides.
  uint64_t lead = offset % uint64_t(sysconf(_SC_PAGESIZE));
  if (length == 0 || length > uint64_t(file.st_size) || offset > uint64_t(file.st_size) - length ||
      lead != iova % uint64_t(sysconf(_SC_PAGESIZE)))
    return failWith<ibv_mr>(EINVAL);
  void* map = mmap(nullptr, lead + length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, off_t(offset - lead));
  if (map == MAP_FAILED) return nullptr;
  Mr* mr = registerLocked(pd, static_cast<char*>(map) + lead, length, iova, unsigned(access));
  if (mr == nullptr) {
    int e = errno;
    munmap(map, lead + length);
    return failWith<ibv_mr>(e);
  }
  mr->map = map;
  mr->mapBytes = lead + length;
  return mr;
}

int ibv_dereg_mr(ibv_mr* mr) {
  Guard guard;
  State& s = state();
  for (auto it = s.mrs.begin(); it != s.mrs.end(); ++it) {
    if (it->second != mr) continue;
    if (int e = faultAt("dereg_mr", mr->context)) return e;
    for (auto& entry : s.qps) placeHeld(*entry.second, Time::max()); // the memory may go now
    flushDevice(*static_cast<Device*>(mr->context->device));
    s.pdUsers[mr->pd]--;
    std::unique_ptr<Mr> owned(it->second);
    s.mrs.erase(it);
    return 0;
  }
  return s.misuse++, EINVAL;
}

ibv_comp_channel* ibv_create_comp_channel(ibv_context* context) {
  Guard guard;
  if (int e = faultAt("create_comp_channel", context)) return failWith<ibv_comp_channel>(e);
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) == -1) return nullptr;
  fcntl(fds[1], F_SETFL, O_NONBLOCK);
  auto channel = std::make_unique<Channel>();
  channel->context = context;
  channel->fd = fds[0];
  channel->refcnt = 0;
  channel->writeEnd = fds[1];
  state().channels.insert(channel.get());
  return channel.release();
}

int ibv_destroy_comp_channel(ibv_comp_channel* c) {
  Guard guard;
  auto* channel = static_cast<Channel*>(c);
  if (channel->refcnt > 0) return state().misuse++, EBUSY;
  if (state().channels.erase(channel) == 0) return state().misuse++, EINVAL;
  close(channel->fd);
  close(channel->writeEnd);
  std::unique_ptr<Channel> owned(channel);
  return 0;
}

ibv_cq* ibv_create_cq(ibv_context* context, int cqe, void* cqContext, ibv_comp_channel* channel, int vector) {
  Guard guard;
  if (int e = faultAt("create_cq", context)) return failWith<ibv_cq>(e);
  if (cqe < 1 || cqe > int(maxCqe) || vector < 0 || vector >= context->num_comp_vectors)
    return failWith<ibv_cq>(EINVAL);
  auto cq = std::make_unique<Cq>();
  static_cast<ibv_cq&>(*cq) = ibv_cq{};
  cq->context = context;
  cq->channel = channel;
  cq->cq_context = cqContext;
  int size = 1;
  while (size < cqe + 1) size *= 2;
  cq->cqe = size - 1; // as rxe rounds
  pthread_mutex_init(&cq->mutex, nullptr);
  pthread_cond_init(&cq->cond, nullptr);
  if (channel != nullptr) channel->refcnt++;
  cq->serial = ++state().lastSerial;
  state().cqs.insert(cq.get());
  return cq.release();
}

int ibv_destroy_cq(ibv_cq* c) {
  Guard guard;
  State& s = state();
  auto* cq = static_cast<Cq*>(c);
  if (s.cqs.count(cq) == 0) return s.misuse++, EINVAL;
  if (s.cqUsers[cq] > 0) return s.misuse++, EBUSY;
  s.cqUsers.erase(cq);
  s.cqs.erase(cq);
  s.delaying.erase(cq);
  guard.awaitAcks(cq);
  if (cq->channel != nullptr) cq->channel->refcnt--;
  pthread_mutex_destroy(&cq->mutex);
  pthread_cond_destroy(&cq->cond);
  std::unique_ptr<Cq> owned(cq);
  return 0;
}

int ibv_get_cq_event(ibv_comp_channel* channel, ibv_cq** cq, void** cqContext) {
  ibv_cq* which = nullptr;
  if (read(channel->fd, &which, sizeof(void*)) != ssize_t(sizeof(void*))) return -1;
  *cq = which;
  *cqContext = which->cq_context;
  return 0;
}

void ibv_ack_cq_events(ibv_cq* cq, unsigned n) {
  Guard guard;
  cq->comp_events_completed += n;
}

int ibv_get_async_event(ibv_context* context, ibv_async_event* event) {
  Raised raised;
  for (;;) {
    if (read(context->async_fd, &raised, sizeof(raised)) != ssize_t(sizeof(raised))) return -1;
    if (raised.serial == 0) break; // of a port or a device
    Guard guard;
    if (serialOf(raised.event.element.qp) != raised.serial) continue; // it is gone, and its events with it
    state().unacked[raised.event.element.qp]++;
    break;
  }
  *event = raised.event;
  return 0;
}
void ibv_ack_async_event(ibv_async_event* event) {
  Guard guard;
  auto it = state().unacked.find(event->element.qp);
  if (it == state().unacked.end()) return; // of a port or a device
  if (--it->second == 0) state().unacked.erase(it);
  state().acked.notify_all();
}

int ibv_fork_init(void) { return 0; }
enum ibv_fork_status ibv_is_fork_initialized(void) { return IBV_FORK_UNNEEDED; }

const char* ibv_wc_status_str(ibv_wc_status status) {
  static const char* const words[] = {"success",
                                      "local length error",
                                      "local QP operation error",
                                      "local EE context operation error",
                                      "local protection error",
                                      "Work Request Flushed Error",
                                      "memory management operation error",
                                      "bad response error",
                                      "local access error",
                                      "remote invalid request error",
                                      "remote access error",
                                      "remote operation error",
                                      "transport retry counter exceeded",
                                      "RNR retry counter exceeded"};
  return size_t(status) < sizeof(words) / sizeof(words[0]) ? words[status] : "other error";
}
const char* ibv_event_type_str(ibv_event_type type) {
  switch (type) {
  case IBV_EVENT_CQ_ERR:
    return "CQ error";
  case IBV_EVENT_QP_FATAL:
    return "local work queue catastrophic error";
  case IBV_EVENT_QP_ACCESS_ERR:
    return "local access violation work queue error";
  case IBV_EVENT_DEVICE_FATAL:
    return "local catastrophic error";
  case IBV_EVENT_PORT_ACTIVE:
    return "port active";
  case IBV_EVENT_PORT_ERR:
    return "port error";
  case IBV_EVENT_GID_CHANGE:
    return "GID table change";
  default:
    return "other event";
  }
}
const char* ibv_node_type_str(ibv_node_type) { return "InfiniBand channel adapter"; }
const char* ibv_port_state_str(ibv_port_state s) { return s == IBV_PORT_ACTIVE ? "active" : "down"; }
}
