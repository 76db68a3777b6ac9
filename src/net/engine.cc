#include "net/engine.h"

#include <strings.h>
#include <sys/resource.h>

#include <algorithm>

#include "base/error.h"
#include "base/param.h"
#include "net/transport.h"

namespace moe {
namespace net {
namespace {

StringParam transportParam{"NCCL_MOE_NET_TRANSPORT", "auto",
                           "verbs, tcp, or auto: verbs where there is a usable RDMA device, otherwise tcp"};

// Connections take several descriptors each; the usual soft limit of 1024 is for programs that use select.
void raiseFileLimit() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

class EngineImpl : public Engine {
 public:
  ~EngineImpl() override {
    transport_.reset(); // connections were counted when they closed; threads end here
    stats_.write();
  }
  ncclResult_t open() {
    const char* choice = transportParam.get().c_str();
    const bool verbs = strcasecmp(choice, "verbs") == 0, tcp = strcasecmp(choice, "tcp") == 0;
    if (!verbs && !tcp && strcasecmp(choice, "auto") != 0) {
      return fail(ncclInvalidUsage, "NCCL_MOE_NET_TRANSPORT=%s: choose among auto, verbs and tcp", choice);
    }
    raiseFileLimit();
    if (!tcp) {
      std::string why;
      MOECHECK(makeVerbsTransport(&stats_, &transport_, &why));
      if (transport_ == nullptr && verbs) {
        return fail(ncclSystemError, "NCCL_MOE_NET_TRANSPORT=%s, but %s", choice, why.c_str());
      }
      if (transport_ == nullptr) MOE_INFO("NET verbs is not used: %s; tcp serves", why.c_str());
    }
    if (transport_ == nullptr) MOECHECK(makeTcpTransport(&stats_, &transport_));
    return ncclSuccess;
  }
  int nDevices() const override { return transport_->nDevices(); }
  const DeviceInfo& device(int dev) const override { return transport_->device(dev); }
  ncclResult_t merge(const std::vector<int>& members, int* dev) override {
    if (members.empty()) return fail(ncclInvalidArgument, "a merged device needs members");
    for (size_t i = 0; i < members.size(); i++) {
      MOECHECK(check(members[i]));
      if (std::count(members.begin(), members.end(), members[i]) != 1) {
        return fail(ncclInvalidArgument, "device %d is a member of a merged device twice", members[i]);
      }
    }
    return transport_->merge(members, dev);
  }
  void writeStats() const override { stats_.write(); }
  ncclResult_t listen(int dev, const CommConfig& config, void* handle, std::unique_ptr<Listener>* listener) override {
    MOECHECK(check(dev));
    return transport_->listen(dev, config, handle, listener);
  }
  ncclResult_t connector(int dev, const CommConfig& config, const void* handle,
                         std::unique_ptr<Connector>* connector) override {
    MOECHECK(check(dev));
    return transport_->connector(dev, config, handle, connector);
  }

 private:
  ncclResult_t check(int dev) const {
    if (dev >= 0 && dev < nDevices()) return ncclSuccess;
    return fail(ncclInvalidArgument, "dev is %d, but there are devices 0 to %d", dev, nDevices() - 1);
  }
  Stats& stats_ = Stats::process();
  std::unique_ptr<Transport> transport_;
};

} // namespace

ncclResult_t Engine::create(std::unique_ptr<Engine>* engine) {
  auto fresh = std::make_unique<EngineImpl>();
  MOECHECK(fresh->open());
  *engine = std::move(fresh);
  return ncclSuccess;
}

} // namespace net
} // namespace moe
