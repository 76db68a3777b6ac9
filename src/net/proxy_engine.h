// The proxy's sink on the engine: descriptors become puts and signals on connections.  Whoever makes the connections
// says which kind of traffic the GPU will send on them (CommConfig::traffic), so that the network can keep it apart.
#pragma once

#include <vector>

#include "net/engine.h"
#include "net/proxy.h"

namespace moe {
namespace net {

// A peer as descriptors name it: its number is its place in the list.
struct ProxyPeer {
  Connection* connection = nullptr;  // to the peer; NULL: descriptors may not name it
  std::vector<Region*> localRegions; // the sink's local memory, registered with this connection, in the same order
  std::vector<RemoteRegion> remoteRegions;
};

// The connections belong to the proxy thread while the proxy runs.
class ConnectionSink : public ProxySink {
 public:
  // receivers: connections on which peers put into this process, for progress.
  ConnectionSink(std::vector<Memory> local, std::vector<ProxyPeer> peers, std::vector<Connection*> receivers);
  uint32_t nPeers() const override { return uint32_t(peers_.size()); }
  uint64_t localBytes(uint32_t peer, uint32_t region) const override;
  uint64_t remoteBytes(uint32_t peer, uint32_t region) const override;
  ncclResult_t post(const ProxyOp& op, void** request) override;
  ncclResult_t test(const ProxyOp& op, void* request, bool* done) override;
  ncclResult_t progress() override;

 private:
  std::vector<Memory> local_;
  std::vector<ProxyPeer> peers_;
  std::vector<Connection*> receivers_;
};

} // namespace net
} // namespace moe
