#include "net/verbs_device.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "base/error.h"
#include "base/param.h"
#include "net/topology.h"

namespace moe {
namespace net {
namespace {

StringParam nicParam{
  "NCCL_MOE_NET_NIC", "",
  "RDMA NICs: names, name:port, a prefix with *, or PCI addresses; ^ before the list: all but these"};
IntParam gidIndexParam{"NCCL_MOE_NET_GID_INDEX", -1, -1, 255, "GID index on RoCE; -1: the best RoCE v2 GID"};
IntParam relaxedParam{"NCCL_MOE_NET_RELAXED_ORDERING", 1, 0, 1, "register data memory with relaxed PCIe ordering"};
IntParam gpuDirectParam{"NCCL_MOE_NET_GPUDIRECT", 1, 0, 1, "offer GPU memory where the devices can reach it"};
IntParam maxRecvsParam{"NCCL_MOE_NET_VERBS_MAX_RECVS", 8, 1, maxGroup,
                       "members of a grouped receive that RDMA devices offer; above 1 NCCL shares connections"};

int portSpeed(const ibv_port_attr& port) {
  int lanes = 1;
  if (port.active_width == 2) lanes = 4;
  if (port.active_width == 4) lanes = 8;
  if (port.active_width == 8) lanes = 12;
  if (port.active_width == 16) lanes = 2;
  int lane = 2500;
  switch (port.active_speed) {
  case 2:
    lane = 5000;
    break;
  case 4:
  case 8:
    lane = 10000;
    break;
  case 16:
    lane = 14000;
    break;
  case 32:
    lane = 25000;
    break;
  case 64:
    lane = 50000;
    break;
  case 128:
    lane = 100000;
    break;
  default:
    break;
  }
  return lanes * lane;
}

std::string realPath(const std::string& path) {
  std::error_code missing;
  return std::filesystem::canonical(path, missing).string();
}

bool peerMemoryModule() {
  for (const char* path : {"/sys/kernel/mm/memory_peers/nv_mem/version",
                           "/sys/kernel/mm/memory_peers/nv_mem_nc/version", "/sys/module/nvidia_peermem/version"}) {
    if (access(path, F_OK) == 0) return true;
  }
  return false;
}

// A job registers more than this; many systems let a process lock 64 KiB or 8 MiB unless the administrator raises that.
constexpr size_t leastLocked = 16 << 20;

// 0, or the errno with which so much memory cannot be registered.
int tryRegistering(VerbsContext* context) {
  rlimit limit = {};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur == RLIM_INFINITY) return 0;
  Memory memory;
  memory.bytes = leastLocked;
  memory.data = mmap(nullptr, memory.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory.data == MAP_FAILED) return errno;
  DeviceMr mr;
  const int error = context->add(memory, context->access(memory), &mr); // the limit is not for the privileged
  if (error == 0) context->remove(mr);
  munmap(memory.data, memory.bytes);
  return error;
}

// A kernel and device that can do it complain about the descriptor, others about the call.
bool dmabufWorks(const VerbsContext& context) {
  if (context.lib().regDmabufMr == nullptr) return false;
  errno = 0;
  ibv_mr* mr = context.lib().regDmabufMr(context.pd(), 0, 0, 0, -1, 0);
  if (mr != nullptr) context.lib().deregMr(mr);
  return mr != nullptr || (errno != EOPNOTSUPP && errno != EPROTONOSUPPORT && errno != ENOSYS);
}

} // namespace

// ---- a device ----

int VerbsContext::open() {
  if (int error = lib_->queryDevice(context_, &attributes_)) return error;
  errno = ENOMEM;
  pd_ = lib_->allocPd(context_);
  return pd_ != nullptr ? 0 : errno;
}

VerbsContext::~VerbsContext() {
  if (cache_.entries() != 0) MOE_WARN("NET %s: %zu memory registrations were not given back", name(), cache_.entries());
  cache_.clear();
  const std::string device = name();
  if (pd_ != nullptr) {
    if (int error = lib_->deallocPd(pd_)) MOE_WARN("NET %s: ibv_dealloc_pd: %s", device.c_str(), strerror(error));
  }
  if (lib_->closeDevice(context_) != 0) MOE_WARN("NET %s: ibv_close_device: %s", device.c_str(), strerror(errno));
}

int VerbsContext::access(const Memory& memory) const {
  int flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  if (relaxedParam.get() != 0 && !memory.strictOrder && lib_->regMrIova2 != nullptr) {
    flags |= IBV_ACCESS_RELAXED_ORDERING;
  }
  return flags;
}

int VerbsContext::add(const Memory& memory, int access, DeviceMr* out) {
  errno = ENOMEM;
  ibv_mr* mr = nullptr;
  const uint64_t address = reinterpret_cast<uint64_t>(memory.data);
  if (memory.kind == ptrDmabuf) {
    if (lib_->regDmabufMr == nullptr) return EOPNOTSUPP;
    mr = lib_->regDmabufMr(pd_, memory.dmabufOffset, memory.bytes, address, memory.dmabufFd, access);
  } else if ((access & IBV_ACCESS_RELAXED_ORDERING) != 0) {
    // This one drops the optional flags where the kernel does not know them.
    mr = lib_->regMrIova2(pd_, memory.data, memory.bytes, address, static_cast<unsigned>(access));
  } else {
    mr = lib_->regMr(pd_, memory.data, memory.bytes, access);
  }
  if (mr == nullptr) return errno != 0 ? errno : ENOMEM;
  *out = {mr, mr->lkey, mr->rkey};
  return 0;
}

int VerbsContext::remove(const DeviceMr& mr) { return lib_->deregMr(static_cast<ibv_mr*>(mr.mr)); }

// ---- addresses ----

int gidPreference(const uint8_t* gid, bool rocev2) {
  bool zero = true, mapped = true;
  for (int i = 0; i < 16; i++) zero = zero && gid[i] == 0;
  for (int i = 0; i < 10; i++) mapped = mapped && gid[i] == 0;
  mapped = mapped && gid[10] == 0xff && gid[11] == 0xff;
  if (zero) return -1;
  const bool linkLocal = gid[0] == 0xfe && (gid[1] & 0xc0) == 0x80;
  const int kind = mapped ? 2 : linkLocal ? 0 : 1;
  return (rocev2 ? 3 : 0) + kind;
}

std::string findAddress(const VerbsPort& port, VerbsAddress* address) {
  const VerbsLib& lib = port.context->lib();
  ibv_context* context = port.context->get();
  ibv_port_attr attr = {};
  if (int error = lib.queryPort(context, port.port, &attr)) return std::string("ibv_query_port: ") + strerror(error);
  if (attr.state != IBV_PORT_ACTIVE) return "the port is not active";
  address->lid = attr.lid;
  address->mtu = attr.active_mtu;
  address->global = !port.infiniband || attr.lid == 0;
  int index = port.infiniband ? 0 : static_cast<int>(gidIndexParam.get());
  int best = -1;
  for (int i = 0; index < 0 && i < attr.gid_tbl_len; i++) {
    ibv_gid_entry entry = {};
    bool rocev2 = true;
    if (lib.queryGidEx != nullptr) {
      if (lib.queryGidEx(context, port.port, static_cast<uint32_t>(i), &entry, 0, sizeof(entry)) != 0) continue;
      rocev2 = entry.gid_type == IBV_GID_TYPE_ROCE_V2;
    } else if (lib.queryGid(context, port.port, i, &entry.gid) != 0) {
      continue;
    }
    const int preference = gidPreference(entry.gid.raw, rocev2);
    if (preference > best) {
      best = preference;
      address->gidIndex = i;
    }
  }
  if (index < 0 && best < 0) {
    return "the port has no usable GID (has its network interface an address, and does this container see it?)";
  }
  if (index >= 0) address->gidIndex = index;
  const std::string gid = "GID " + std::to_string(address->gidIndex);
  if (lib.queryGid(context, port.port, address->gidIndex, &address->gid) != 0) {
    return gid + ": ibv_query_gid: " + strerror(errno);
  }
  if (address->global && gidPreference(address->gid.raw, true) < 0) {
    return gid + " is empty" + (index > 0 ? " (NCCL_MOE_NET_GID_INDEX)" : "");
  }
  return "";
}

ncclResult_t portAddress(const VerbsPort& port, VerbsAddress* address) {
  const std::string problem = findAddress(port, address);
  if (problem.empty()) return ncclSuccess;
  return fail(ncclSystemError, "device %s: %s", port.info.name.c_str(), problem.c_str());
}

// ---- events ----

ncclResult_t VerbsEvents::start(std::vector<std::shared_ptr<VerbsContext>> contexts) {
  contexts_ = std::move(contexts);
  for (auto& context : contexts_) {
    const int fd = context->get()->async_fd;
    SYSCHECK(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK), "fcntl of an event descriptor");
  }
  stop_.reset(eventfd(0, EFD_CLOEXEC));
  SYSCHECK(stop_.get(), "eventfd");
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  ncclResult_t result = ncclSuccess;
  try {
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "moe-net-events");
  } catch (const std::system_error& error) {
    result = fail(ncclSystemError, "starting the RDMA event thread failed: %s", error.what());
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return result;
}

VerbsEvents::~VerbsEvents() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  (void)!write(stop_.get(), &one, sizeof(one));
  thread_.join();
}

void VerbsEvents::run() {
  std::vector<pollfd> descriptors;
  descriptors.push_back({stop_.get(), POLLIN, 0});
  for (auto& context : contexts_) descriptors.push_back({context->get()->async_fd, POLLIN, 0});
  for (;;) {
    if (poll(descriptors.data(), descriptors.size(), -1) < 0 && errno != EINTR) return;
    if ((descriptors[0].revents & POLLIN) != 0) return;
    for (size_t i = 1; i < descriptors.size(); i++) {
      if ((descriptors[i].revents & POLLIN) != 0) handle(*contexts_[i - 1]);
      if ((descriptors[i].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0) descriptors[i].fd = -1;
    }
  }
}

void VerbsEvents::handle(VerbsContext& context) {
  ibv_async_event event = {};
  if (context.lib().getAsyncEvent(context.get(), &event) != 0) return;
  const char* text = context.lib().eventTypeStr(event.event_type);
  VerbsHealth* victim = nullptr;
  switch (event.event_type) {
  case IBV_EVENT_CQ_ERR:
    victim = static_cast<VerbsHealth*>(event.element.cq->cq_context);
    break;
  case IBV_EVENT_QP_FATAL:
  case IBV_EVENT_QP_REQ_ERR:
  case IBV_EVENT_QP_ACCESS_ERR:
  case IBV_EVENT_PATH_MIG_ERR:
    victim = static_cast<VerbsHealth*>(event.element.qp->qp_context);
    break;
  case IBV_EVENT_DEVICE_FATAL:
    victim = &context.health();
    break;
  default:
    break;
  }
  if (victim != nullptr) {
    MOE_WARN("NET %s: asynchronous event: %s", context.name(), text);
    int none = -1;
    victim->event.compare_exchange_strong(none, event.event_type);
  } else {
    // The retries of the queue pairs decide whether an outage of the port was short enough.
    MOE_INFO("NET %s: asynchronous event: %s", context.name(), text);
  }
  context.lib().ackAsyncEvent(&event); // destroying the queue pair or completion queue waits for this
}

// ---- which ports there are ----

ncclResult_t findVerbsPorts(std::vector<VerbsPort>* ports, std::string* why) {
  ports->clear();
  const VerbsLib* lib = verbsLib(why);
  if (lib == nullptr) return ncclSuccess;
  int count = 0;
  ibv_device** list = lib->getDeviceList(&count);
  if (list == nullptr || count == 0) {
    *why = "there is no RDMA device";
    if (list != nullptr) lib->freeDeviceList(list);
    return ncclSuccess;
  }
  std::vector<NicInfo> nics;
  why->clear();
  const auto notUsed = [why](const std::string& name, const std::string& reason, LogLevel level = LogLevel::info) {
    *why += (why->empty() ? "" : "; ") + name + ": " + reason;
    MOE_LOG(level, "NET verbs device %s is not used: %s", name.c_str(), reason.c_str());
  };
  for (int i = 0; i < count; i++) {
    const std::string name = lib->getDeviceName(list[i]);
    ibv_context* opened = lib->openDevice(list[i]);
    if (opened == nullptr) {
      notUsed(name, std::string("it cannot be opened: ") + strerror(errno));
      continue;
    }
    auto context = std::make_shared<VerbsContext>(lib, opened);
    if (int error = context->open()) {
      notUsed(name, strerror(error));
      continue;
    }
    const std::string sysfs = "/sys/class/infiniband/" + name + "/device";
    int kinds = ptrHost;
    if (gpuDirectParam.get() != 0 && peerMemoryModule()) kinds |= ptrCuda;
    if (gpuDirectParam.get() != 0 && dmabufWorks(*context)) kinds |= ptrDmabuf;
    for (int number = 1; number <= context->attributes().phys_port_cnt; number++) {
      const std::string full = name + ":" + std::to_string(number);
      ibv_port_attr attr = {};
      if (lib->queryPort(opened, static_cast<uint8_t>(number), &attr) != 0 || attr.state != IBV_PORT_ACTIVE) {
        notUsed(full, "the port is not active");
        continue;
      }
      if (attr.link_layer != IBV_LINK_LAYER_INFINIBAND && attr.link_layer != IBV_LINK_LAYER_ETHERNET) {
        notUsed(full, "it is neither InfiniBand nor RoCE");
        continue;
      }
      VerbsPort port;
      port.context = context;
      port.port = static_cast<uint8_t>(number);
      port.infiniband = attr.link_layer == IBV_LINK_LAYER_INFINIBAND;
      port.maxMessage = std::min<uint64_t>(attr.max_msg_sz, 1 << 30);
      port.info.name = full;
      port.info.pciPath = realPath(sysfs);
      port.info.guid = context->attributes().sys_image_guid;
      port.info.ptrKinds = kinds;
      port.info.regIsGlobal = true;
      port.info.speedMbps = portSpeed(attr);
      port.info.port = number;
      port.info.maxConnections = context->attributes().max_qp;
      port.info.maxRecvs = static_cast<int>(maxRecvsParam.get());
      NicInfo nic;
      nic.name = name;
      nic.port = number;
      PciAddress::fromPath(port.info.pciPath, &nic.address);
      nics.push_back(nic);
      ports->push_back(port);
    }
  }
  lib->freeDeviceList(list);
  if (ports->empty()) return ncclSuccess;
  std::vector<bool> wanted;
  bool maps = false;
  MOECHECK(usableNics(nics, nicParam.get(), &wanted, &maps));
  if (maps) {
    MOE_WARN(
      "NCCL_MOE_NET_NIC=%s has no effect here: NCCL itself decides which GPU uses which of a plugin's NICs; a list "
      "without GPUs says which NICs there are",
      nicParam.get().c_str());
  }
  std::vector<VerbsPort> found;
  std::swap(found, *ports);
  for (size_t i = 0; i < found.size(); i++) {
    const VerbsPort& port = found[i];
    const std::string& name = port.info.name;
    if (!wanted[i]) {
      notUsed(name, "NCCL_MOE_NET_NIC leaves it out");
      continue;
    }
    VerbsAddress address;
    std::string problem = findAddress(port, &address);
    if (problem.empty()) {
      const int error = tryRegistering(port.context.get());
      if (error != 0) problem = "registering " + std::to_string(leastLocked >> 20) + " MiB: " + strerror(error);
      if (error == ENOMEM) problem += " (the limit of locked memory, ulimit -l, is too low)";
    }
    if (!problem.empty()) {
      notUsed(name, problem, LogLevel::warn); // somebody has to set it right
      continue;
    }
    MOE_INFO("NET verbs port %s (%s), %d Mbit/s%s%s", name.c_str(), port.infiniband ? "InfiniBand" : "RoCE",
             port.info.speedMbps, (port.info.ptrKinds & ptrCuda) != 0 ? ", GPUDirect by peer memory" : "",
             (port.info.ptrKinds & ptrDmabuf) != 0 ? ", GPUDirect by dma-buf" : "");
    ports->push_back(port);
  }
  return ncclSuccess;
}

} // namespace net
} // namespace moe
