// RDMA devices: which ports are usable, how they are addressed, their memory, and their asynchronous events.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/handle.h"
#include "net/engine.h"
#include "net/regcache.h"
#include "net/verbs_lib.h"

namespace moe {
namespace net {

// Set by the event thread, read by the threads of the connections.
struct VerbsHealth {
  std::atomic<int> event{-1}; // the ibv_event_type that ended it
};

// An opened device with its protection domain.
class VerbsContext : public Registrar {
 public:
  VerbsContext(const VerbsLib* lib, ibv_context* context) : lib_(lib), context_(context), cache_(this) {}
  ~VerbsContext() override;
  int open(); // 0 or an errno
  int add(const Memory& memory, int access, DeviceMr* out) override;
  int remove(const DeviceMr& mr) override;
  int access(const Memory& memory) const;
  const VerbsLib& lib() const { return *lib_; }
  ibv_context* get() const { return context_; }
  ibv_pd* pd() const { return pd_; }
  const ibv_device_attr& attributes() const { return attributes_; }
  RegistrationCache& cache() { return cache_; }
  VerbsHealth& health() { return health_; }
  const char* name() const { return lib_->getDeviceName(context_->device); }

 private:
  const VerbsLib* lib_;
  ibv_context* context_;
  ibv_pd* pd_ = nullptr;
  ibv_device_attr attributes_ = {};
  VerbsHealth health_;
  RegistrationCache cache_;
};

// A port: what NCCL sees as a device.
struct VerbsPort {
  std::shared_ptr<VerbsContext> context;
  DeviceInfo info;
  uint8_t port = 1;
  bool infiniband = false;
  uint64_t maxMessage = 0;
};

// How the port is addressed now.
struct VerbsAddress {
  ibv_gid gid = {};
  uint16_t lid = 0;
  int gidIndex = 0;
  ibv_mtu mtu = IBV_MTU_1024;
  bool global = false; // needs a global routing header
};
ncclResult_t portAddress(const VerbsPort& port, VerbsAddress* address);

// The order in which GIDs of a RoCE port are preferred; the highest wins, -1: not usable.
int gidPreference(const uint8_t* gid, bool rocev2);

// Watches the events of all devices in one thread.
class VerbsEvents {
 public:
  ncclResult_t start(std::vector<std::shared_ptr<VerbsContext>> contexts);
  ~VerbsEvents();

 private:
  void run();
  void handle(VerbsContext& context);
  std::vector<std::shared_ptr<VerbsContext>> contexts_;
  UniqueFd stop_;
  std::thread thread_;
};

// Where there is no usable port, *why says so and the list stays empty.
ncclResult_t findVerbsPorts(std::vector<VerbsPort>* ports, std::string* why);

} // namespace net
} // namespace moe
