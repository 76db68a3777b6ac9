// The verbs transport: one device per active port.  The handshake goes over TCP: hello (the connector's queue pairs),
// reply (the listener's), and ready, after which the receiver may write into the sender's memory.
#include <algorithm>
#include <list>
#include <mutex>

#include "base/error.h"
#include "base/param.h"
#include "net/handshake.h"
#include "net/transport.h"
#include "net/verbs_connection.h"

namespace moe {
namespace net {
namespace {

IntParam queuesParam{"NCCL_MOE_NET_QPS", 2, 1, static_cast<int64_t>(maxQueues),
                     "queue pairs per RDMA connection and port that carry data"};
StringParam oobParam{
  "NCCL_MOE_NET_OOB_IFNAME", "",
  "interfaces for the handshake of RDMA connections, in the form of NCCL_MOE_NET_IFNAME; empty: that"};
Bytes bodyBytes(const VerbsBody& body) {
  Bytes bytes(sizeof(body));
  memcpy(bytes.data(), &body, sizeof(body));
  return bytes;
}

class VerbsListener : public Listener {
 public:
  VerbsListener(PortGroup* group, const CommConfig& config, Stats* stats)
    : group_(group), config_(config), stats_(stats) {}
  ncclResult_t open(const Address& address) {
    return acceptor_.open(address, TransportKind::verbs, jobToken(config_.commId));
  }
  const Handle& handle() const { return acceptor_.handle(); }

  ncclResult_t accept(std::unique_ptr<Connection>* connection) override {
    connection->reset();
    std::unique_ptr<Peer> peer;
    MOECHECK(acceptor_.poll(&peer));
    if (peer != nullptr) MOECHECK(answer(std::move(peer)));
    for (auto it = pending_.begin(); it != pending_.end();) {
      Pending& pending = *it;
      IoStatus status = pending.reply.poll(pending.socket.get());
      if (status == IoStatus::done) status = pending.ready.poll(pending.socket.get());
      if (status == IoStatus::more && nowSeconds() < pending.deadline) {
        ++it;
        continue;
      }
      const Hello& ready = pending.ready.hello();
      const bool good = status == IoStatus::done && ready.kind == HelloKind::ready &&
                        ready.connectionId == pending.connectionId &&
                        pending.ready.proven(handle().secret, acceptor_.token());
      if (good) {
        pending.connection->keepSocket(std::move(pending.socket));
        *connection = std::move(pending.connection);
        pending_.erase(it);
        return ncclSuccess;
      }
      MOE_INFO("dropped %s: it did not finish the handshake", pending.name.c_str());
      it = pending_.erase(it);
    }
    return ncclSuccess;
  }

 private:
  struct Pending {
    UniqueFd socket;
    std::string name;
    uint64_t connectionId = 0;
    double deadline = 0;
    HelloWriter reply;
    HelloReader ready;
    std::unique_ptr<VerbsConnection> connection;
  };

  ncclResult_t answer(std::unique_ptr<Peer> peer) {
    VerbsBody theirs;
    const ParseResult parsed = parseVerbsBody(peer->body.data(), peer->body.size(), &theirs);
    // The ports of a group are all of one kind.
    bool fits = parsed == ParseResult::ok;
    for (uint32_t i = 0; fits && i < theirs.nPaths; i++) {
      fits = (theirs.path[i].infiniband != 0) == group_->ports()[0].infiniband;
    }
    if (!fits) {
      MOE_INFO("turned %s away: %s", peer->name.c_str(),
               parsed != ParseResult::ok ? parseResultText(parsed) : "one side is InfiniBand and the other RoCE");
      acceptor_.reject(peer->sockets[0].get(), RejectStatus::parameters);
      return ncclSuccess;
    }
    Pending pending;
    ncclResult_t result =
      VerbsConnection::create(group_, config_, false, theirs.nPaths, theirs.nQueues, stats_, &pending.connection);
    if (result == ncclSuccess) result = pending.connection->establish(theirs, peer->name);
    if (result != ncclSuccess) {
      acceptor_.reject(peer->sockets[0].get(), RejectStatus::resources);
      return result;
    }
    Hello reply = peer->hello;
    reply.kind = HelloKind::reply;
    reply.headerBytes = sizeof(Hello);
    pending.reply.set(reply, bodyBytes(pending.connection->describe()), handle().secret, acceptor_.token());
    pending.connectionId = peer->hello.connectionId;
    pending.socket = std::move(peer->sockets[0]);
    pending.name = peer->name;
    pending.deadline = nowSeconds() + handshakeTimeout();
    pending_.push_back(std::move(pending));
    return ncclSuccess;
  }

  PortGroup* const group_;
  const CommConfig config_;
  Stats* stats_;
  Acceptor acceptor_;
  std::list<Pending> pending_;
};

class VerbsConnector : public Connector {
 public:
  VerbsConnector(PortGroup* group, const CommConfig& config, Stats* stats)
    : group_(group), config_(config), stats_(stats) {}
  ncclResult_t open(const Handle& handle) {
    const auto nPaths = static_cast<uint32_t>(group_->ports().size());
    const uint32_t each = std::min(static_cast<uint32_t>(queuesParam.get()), maxQueues / nPaths);
    MOECHECK(VerbsConnection::create(group_, config_, true, nPaths, nPaths * each, stats_, &connection_));
    token_ = jobToken(config_.commId);
    return dialer_.open(handle, 1, 0, bodyBytes(connection_->describe()), token_);
  }
  ncclResult_t connect(std::unique_ptr<Connection>* connection) override {
    connection->reset();
    if (!answered_) {
      MOECHECK(dialer_.poll(&answered_));
      if (!answered_) return ncclSuccess;
      VerbsBody theirs;
      const ParseResult parsed = parseVerbsBody(dialer_.replyBody().data(), dialer_.replyBody().size(), &theirs);
      if (parsed != ParseResult::ok) {
        return fail(ncclRemoteError, "handshake with peer %s failed: %s", dialer_.peer().c_str(),
                    parseResultText(parsed));
      }
      MOECHECK(connection_->establish(theirs, dialer_.peer()));
      Hello ready = dialer_.hello();
      ready.kind = HelloKind::ready;
      ready_.set(ready, {}, dialer_.secret(), token_);
    }
    const IoStatus status = ready_.poll(dialer_.sockets()[0].get());
    if (status == IoStatus::more) return ncclSuccess;
    if (status != IoStatus::done) {
      return fail(ncclRemoteError, "handshake with peer %s failed: it closed the connection", dialer_.peer().c_str());
    }
    connection_->keepSocket(std::move(dialer_.sockets()[0]));
    *connection = std::move(connection_);
    return ncclSuccess;
  }

 private:
  PortGroup* const group_;
  const CommConfig config_;
  Stats* stats_;
  std::string token_;
  Dialer dialer_;
  HelloWriter ready_;
  bool answered_ = false;
  std::unique_ptr<VerbsConnection> connection_;
};

class VerbsTransport : public Transport {
 public:
  explicit VerbsTransport(Stats* stats) : stats_(stats) {}
  ncclResult_t open(std::string* why) {
    std::vector<VerbsPort> ports;
    MOECHECK(findVerbsPorts(&ports, why));
    if (ports.empty()) return ncclSuccess;
    std::vector<Interface> interfaces;
    MOECHECK(findInterfaces(oobParam.get().empty() ? interfaceFilter() : oobParam.get(), &interfaces));
    if (interfaces.empty()) {
      *why = "there is no network interface for the handshake of RDMA connections";
      return ncclSuccess;
    }
    oob_ = interfaces[0].address;
    std::vector<std::shared_ptr<VerbsContext>> contexts;
    for (const VerbsPort& port : ports) {
      groups_.push_back(std::make_unique<PortGroup>(std::vector<VerbsPort>{port}));
      if (std::find(contexts.begin(), contexts.end(), port.context) == contexts.end()) {
        contexts.push_back(port.context);
      }
    }
    return events_.start(std::move(contexts));
  }
  int nDevices() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int>(groups_.size());
  }
  const DeviceInfo& device(int dev) const override { return group(dev)->info(); }
  ncclResult_t merge(const std::vector<int>& members, int* dev) override {
    if (members.size() > maxPaths) {
      return fail(ncclInvalidArgument, "%zu members are more than the %u that a merged device can have", members.size(),
                  maxPaths);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<VerbsPort> ports;
    for (int member : members) {
      const PortGroup& one = *groups_[static_cast<size_t>(member)];
      if (one.ports().size() != 1) {
        return fail(ncclInvalidArgument, "device %d (%s) is a merged one itself", member, one.info().name.c_str());
      }
      ports.push_back(one.ports()[0]);
      if (ports.back().infiniband != ports[0].infiniband) {
        return fail(ncclInvalidArgument, "device %d (%s) is %s, device %d (%s) is not", member, one.info().name.c_str(),
                    ports.back().infiniband ? "InfiniBand" : "RoCE", members[0], ports[0].info.name.c_str());
      }
    }
    *dev = members[0];
    if (members.size() == 1) return ncclSuccess;
    for (*dev = 0; static_cast<size_t>(*dev) < groups_.size(); ++*dev) {
      if (groups_[static_cast<size_t>(*dev)]->info().members == members) return ncclSuccess;
    }
    auto fresh = std::make_unique<PortGroup>(std::move(ports));
    fresh->info().members = members;
    MOE_INFO("NET verbs device %d: %s, %d Mbit/s", *dev, fresh->info().name.c_str(), fresh->info().speedMbps);
    groups_.push_back(std::move(fresh));
    return ncclSuccess;
  }
  ncclResult_t listen(int dev, const CommConfig& config, void* handle, std::unique_ptr<Listener>* listener) override {
    auto fresh = std::make_unique<VerbsListener>(group(dev), config, stats_);
    MOECHECK(fresh->open(oob_));
    memcpy(handle, &fresh->handle(), sizeof(Handle));
    *listener = std::move(fresh);
    return ncclSuccess;
  }
  ncclResult_t connector(int dev, const CommConfig& config, const void* handle,
                         std::unique_ptr<Connector>* connector) override {
    Handle parsed;
    const ParseResult result = parseHandle(handle, sizeof(Handle), &parsed);
    if (result != ParseResult::ok) {
      return fail(ncclInvalidArgument, "handle: not one of this plugin's: %s", parseResultText(result));
    }
    if (parsed.transport != TransportKind::verbs) {
      return fail(ncclInvalidUsage, "handle: the peer uses tcp and this process verbs; set NCCL_MOE_NET_TRANSPORT "
                                    "alike on all ranks");
    }
    auto fresh = std::make_unique<VerbsConnector>(group(dev), config, stats_);
    MOECHECK(fresh->open(parsed));
    *connector = std::move(fresh);
    return ncclSuccess;
  }

 private:
  PortGroup* group(int dev) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return groups_[static_cast<size_t>(dev)].get();
  }

  Stats* stats_;
  mutable std::mutex mutex_;                       // of groups_, which grows
  std::vector<std::unique_ptr<PortGroup>> groups_; // they stay where they are
  Address oob_;
  VerbsEvents events_; // ends before the devices do
};

} // namespace

ncclResult_t makeVerbsTransport(Stats* stats, std::unique_ptr<Transport>* transport, std::string* why) {
  transport->reset();
  auto fresh = std::make_unique<VerbsTransport>(stats);
  MOECHECK(fresh->open(why));
  if (fresh->nDevices() > 0) *transport = std::move(fresh);
  return ncclSuccess;
}

} // namespace net
} // namespace moe
