// The verbs transport: one device per active port.  The handshake goes over TCP: hello (the connector's queue pairs),
// reply (the listener's), and ready, after which the receiver may write into the sender's memory.
#include <algorithm>
#include <list>

#include "base/error.h"
#include "base/param.h"
#include "net/handshake.h"
#include "net/transport.h"
#include "net/verbs_connection.h"

namespace moe {
namespace net {
namespace {

IntParam queuesParam{"NCCL_MOE_NET_QPS", 2, 1, static_cast<int64_t>(maxQueues),
                     "queue pairs per RDMA connection that carry data"};
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
  VerbsListener(const VerbsPort& port, const CommConfig& config, Stats* stats)
    : port_(port), config_(config), stats_(stats) {}
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
                        ready.proof == helloProof(handle().secret, acceptor_.token(), ready);
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
    if (parsed != ParseResult::ok || (theirs.infiniband != 0) != port_.infiniband) {
      MOE_INFO("turned %s away: %s", peer->name.c_str(),
               parsed != ParseResult::ok ? parseResultText(parsed) : "one side is InfiniBand and the other RoCE");
      acceptor_.reject(peer->sockets[0].get(), RejectStatus::parameters);
      return ncclSuccess;
    }
    Pending pending;
    ncclResult_t result = VerbsConnection::create(port_, config_, false, theirs.nQueues, stats_, &pending.connection);
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

  const VerbsPort port_;
  const CommConfig config_;
  Stats* stats_;
  Acceptor acceptor_;
  std::list<Pending> pending_;
};

class VerbsConnector : public Connector {
 public:
  VerbsConnector(const VerbsPort& port, const CommConfig& config, Stats* stats)
    : port_(port), config_(config), stats_(stats) {}
  ncclResult_t open(const Handle& handle) {
    const auto nQueues = static_cast<uint32_t>(queuesParam.get());
    MOECHECK(VerbsConnection::create(port_, config_, true, nQueues, stats_, &connection_));
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
  const VerbsPort port_;
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
    MOECHECK(findVerbsPorts(&ports_, why));
    if (ports_.empty()) return ncclSuccess;
    std::vector<Interface> interfaces;
    MOECHECK(findInterfaces(oobParam.get().empty() ? interfaceFilter() : oobParam.get(), &interfaces));
    if (interfaces.empty()) {
      *why = "there is no network interface for the handshake of RDMA connections";
      ports_.clear();
      return ncclSuccess;
    }
    oob_ = interfaces[0].address;
    std::vector<std::shared_ptr<VerbsContext>> contexts;
    for (const VerbsPort& port : ports_) {
      devices_.push_back(port.info);
      if (std::find(contexts.begin(), contexts.end(), port.context) == contexts.end()) {
        contexts.push_back(port.context);
      }
    }
    return events_.start(std::move(contexts));
  }
  const std::vector<DeviceInfo>& devices() const override { return devices_; }
  ncclResult_t listen(int dev, const CommConfig& config, void* handle, std::unique_ptr<Listener>* listener) override {
    auto fresh = std::make_unique<VerbsListener>(ports_[dev], config, stats_);
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
    auto fresh = std::make_unique<VerbsConnector>(ports_[dev], config, stats_);
    MOECHECK(fresh->open(parsed));
    *connector = std::move(fresh);
    return ncclSuccess;
  }

 private:
  Stats* stats_;
  std::vector<VerbsPort> ports_;
  std::vector<DeviceInfo> devices_;
  Address oob_;
  VerbsEvents events_; // ends before the devices do
};

} // namespace

ncclResult_t makeVerbsTransport(Stats* stats, std::unique_ptr<Transport>* transport, std::string* why) {
  transport->reset();
  auto fresh = std::make_unique<VerbsTransport>(stats);
  MOECHECK(fresh->open(why));
  if (!fresh->devices().empty()) *transport = std::move(fresh);
  return ncclSuccess;
}

} // namespace net
} // namespace moe
