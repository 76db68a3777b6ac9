#include "net/verbs_group.h"

#include <algorithm>

#include "base/error.h"

namespace moe {
namespace net {

PortGroup::PortGroup(std::vector<VerbsPort> ports) : ports_(std::move(ports)), info_(ports_[0].info) {
  for (size_t i = 1; i < ports_.size(); i++) {
    const DeviceInfo& other = ports_[i].info;
    info_.name += "+" + other.name;
    info_.speedMbps += other.speedMbps;
    info_.ptrKinds &= other.ptrKinds;
    info_.maxConnections = std::min(info_.maxConnections, other.maxConnections);
  }
}

PortGroup::~PortGroup() {
  if (!regions_.empty()) {
    MOE_WARN("NET %s: %zu memory registrations were not given back", info_.name.c_str(), regions_.size());
  }
  for (Region* region : regions_) {
    auto* own = static_cast<GroupRegion*>(region);
    (void)removeHeld(own);
    delete own;
  }
}

int PortGroup::removeHeld(GroupRegion* region) {
  int last = 0;
  for (size_t i = 0; i < ports_.size(); i++) {
    if (region->held[i] == nullptr) continue;
    if (int error = ports_[i].context->cache().remove(region->held[i])) last = error;
    region->held[i] = nullptr;
  }
  return last;
}

ncclResult_t PortGroup::add(const Memory& memory, GroupRegion** region) {
  *region = nullptr;
  if (memory.data == nullptr && memory.kind != ptrDmabuf) return fail(ncclInvalidArgument, "memory.data is NULL");
  if ((info_.ptrKinds & memory.kind) == 0) {
    return fail(ncclInvalidArgument, "memory kind %d: device %s cannot reach it (is nvidia-peermem loaded?)",
                memory.kind, info_.name.c_str());
  }
  auto fresh = std::make_unique<GroupRegion>();
  fresh->data = static_cast<char*>(memory.data);
  fresh->bytes = memory.bytes;
  fresh->kind = memory.kind;
  for (size_t i = 0; i < ports_.size(); i++) {
    VerbsContext& context = *ports_[i].context;
    if (int error = context.cache().add(memory, context.access(memory), &fresh->held[i])) {
      (void)removeHeld(fresh.get());
      return fail(ncclSystemError, "device %s: registering %zu bytes at %p: %s%s", ports_[i].info.name.c_str(),
                  memory.bytes, memory.data, strerror(error),
                  error == ENOMEM ? " (is the limit of locked memory, ulimit -l, too low?)" : "");
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  regions_.insert(fresh.get());
  *region = fresh.release();
  return ncclSuccess;
}

ncclResult_t PortGroup::remove(Region* region) {
  if (region == nullptr) return ncclSuccess;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (regions_.erase(region) == 0) {
      return fail(ncclInvalidArgument, "region %p is not registered on device %s", static_cast<void*>(region),
                  info_.name.c_str());
    }
  }
  const std::unique_ptr<GroupRegion> own(static_cast<GroupRegion*>(region));
  if (int error = removeHeld(own.get())) {
    return fail(ncclSystemError, "device %s: ibv_dereg_mr: %s", info_.name.c_str(), strerror(error));
  }
  return ncclSuccess;
}

} // namespace net
} // namespace moe
