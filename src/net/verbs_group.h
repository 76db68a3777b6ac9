// What NCCL sees as a device: a port, or several whose queue pairs a connection uses together.
//
// Memory is registered with all of them; the registrations are the group's and not a connection's, so that one may use
// what another has registered.
#pragma once

#include <mutex>
#include <unordered_set>
#include <vector>

#include "net/engine.h"
#include "net/verbs_device.h"
#include "net/wire.h"

namespace moe {
namespace net {

struct GroupRegion : Region {
  char* data = nullptr;
  size_t bytes = 0;
  PtrKind kind = ptrHost;
  RegistrationCache::Held* held[maxPaths] = {}; // by port
};

class PortGroup {
 public:
  explicit PortGroup(std::vector<VerbsPort> ports);
  ~PortGroup();
  const std::vector<VerbsPort>& ports() const { return ports_; }
  const DeviceInfo& info() const { return info_; }
  DeviceInfo& info() { return info_; }
  // Nothing stays registered after an error.
  ncclResult_t add(const Memory& memory, GroupRegion** region);
  ncclResult_t remove(Region* region);

 private:
  int removeHeld(GroupRegion* region); // 0 or the last errno
  const std::vector<VerbsPort> ports_;
  DeviceInfo info_;
  std::mutex mutex_;
  std::unordered_set<Region*> regions_;
};

} // namespace net
} // namespace moe
