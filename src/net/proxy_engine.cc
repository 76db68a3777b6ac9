#include "net/proxy_engine.h"

#include <utility>

#include "base/error.h"

namespace moe {
namespace net {

ConnectionSink::ConnectionSink(std::vector<Memory> local, std::vector<ProxyPeer> peers,
                               std::vector<Connection*> receivers)
  : local_(std::move(local)), peers_(std::move(peers)), receivers_(std::move(receivers)) {}

uint64_t ConnectionSink::localBytes(uint32_t peer, uint32_t region) const {
  const ProxyPeer& p = peers_[peer];
  const bool known = p.connection != nullptr && region < local_.size() && region < p.localRegions.size() &&
                     p.localRegions[region] != nullptr;
  return known ? local_[region].bytes : 0;
}

uint64_t ConnectionSink::remoteBytes(uint32_t peer, uint32_t region) const {
  const ProxyPeer& p = peers_[peer];
  return p.connection != nullptr && region < p.remoteRegions.size() ? p.remoteRegions[region].bytes : 0;
}

ncclResult_t ConnectionSink::post(const ProxyOp& op, void** request) {
  const ProxyPeer& peer = peers_[op.peer];
  if (peer.connection == nullptr) return fail(ncclInvalidArgument, "proxy: there is no connection to peer %u", op.peer);
  // The proxy has checked the ranges, but an empty put names no regions.
  static const RemoteRegion nowhere;
  const char* data = nullptr;
  Region* region = nullptr;
  const RemoteRegion* remote = &nowhere;
  uint64_t offset = 0;
  if (op.bytes != 0) {
    data = static_cast<const char*>(local_[op.localRegion].data) + op.localOffset;
    region = peer.localRegions[op.localRegion];
  }
  if (op.remoteRegion < peer.remoteRegions.size()) {
    remote = &peer.remoteRegions[op.remoteRegion];
    if (op.bytes != 0) offset = op.remoteOffset;
  }
  Request* posted = nullptr;
  if (op.code == proxyPutSignal) {
    MOECHECK(peer.connection->putSignal(data, op.bytes, region, *remote, offset, peer.remoteRegions[op.signalRegion],
                                        op.signalOffset, op.signalValue, &posted));
  } else {
    MOECHECK(peer.connection->put(data, op.bytes, region, *remote, offset, &posted));
  }
  *request = posted;
  return ncclSuccess;
}

ncclResult_t ConnectionSink::test(const ProxyOp& op, void* request, bool* done) {
  return peers_[op.peer].connection->test(static_cast<Request*>(request), done, nullptr);
}

ncclResult_t ConnectionSink::progress() {
  for (Connection* receiver : receivers_) MOECHECK(receiver->progress());
  return ncclSuccess;
}

} // namespace net
} // namespace moe
