// What the engine asks of a transport.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "net/engine.h"
#include "net/stats.h"

namespace moe {
namespace net {

class Transport {
 public:
  virtual ~Transport() = default;
  virtual int nDevices() const = 0;
  virtual const DeviceInfo& device(int dev) const = 0;
  virtual ncclResult_t merge(const std::vector<int>& members, int* dev) = 0;
  virtual ncclResult_t listen(int dev, const CommConfig& config, void* handle, std::unique_ptr<Listener>* listener) = 0;
  virtual ncclResult_t connector(int dev, const CommConfig& config, const void* handle,
                                 std::unique_ptr<Connector>* connector) = 0;
};

ncclResult_t makeTcpTransport(Stats* stats, std::unique_ptr<Transport>* transport);
// Leaves *transport empty, and says why, where there is no usable RDMA device.
ncclResult_t makeVerbsTransport(Stats* stats, std::unique_ptr<Transport>* transport, std::string* why);

} // namespace net
} // namespace moe
