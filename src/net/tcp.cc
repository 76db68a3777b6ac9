// The TCP transport: one device per interface.
#include <algorithm>
#include <atomic>
#include <thread>

#include "base/error.h"
#include "base/param.h"
#include "net/handshake.h"
#include "net/tcp_connection.h"
#include "net/transport.h"

namespace moe {
namespace net {
namespace {

IntParam nSocketsParam{"NCCL_MOE_NET_TCP_SOCKETS", 0, 0, 32,
                       "sockets per TCP connection that carry big messages; 0: one per helper thread, at most 4"};
IntParam nThreadsParam{"NCCL_MOE_NET_TCP_THREADS", 0, 0, 64,
                       "threads per process that move big TCP messages; 0: a quarter of the cores, at most 8"};
IntParam inlineParam{"NCCL_MOE_NET_TCP_INLINE", 65536, 0, 1 << 20,
                     "bytes up to which a TCP message is sent at once by the calling thread, without asking whether "
                     "its receive is posted"};
IntParam windowParam{"NCCL_MOE_NET_TCP_WINDOW", 256, 8, 65536,
                     "small TCP messages that may be under way before their receives take them"};
IntParam maxRecvsParam{"NCCL_MOE_NET_TCP_MAX_RECVS", 1, 1, maxGroup,
                       "members of a grouped receive that TCP devices offer; above 1 NCCL shares connections"};
Bytes makeBody(const std::string& device) {
  TcpBody body;
  body.inlineMax = static_cast<uint64_t>(inlineParam.get());
  body.window = static_cast<uint64_t>(windowParam.get());
  device.copy(body.device, sizeof(body.device) - 1);
  Bytes bytes(sizeof(body));
  memcpy(bytes.data(), &body, sizeof(body));
  return bytes;
}

bool parseBody(const Bytes& bytes, TcpBody* body) {
  return parseTcpBody(bytes.data(), bytes.size(), body) == ParseResult::ok;
}

class Pollers {
 public:
  // Starts the threads at the first call.
  ncclResult_t get(std::vector<Poller*>* pollers) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (threads_.empty()) {
      for (int i = 0; i < count(); i++) {
        auto poller = std::make_unique<Poller>();
        const ncclResult_t result = poller->start();
        if (result != ncclSuccess) {
          threads_.clear();
          return result;
        }
        threads_.push_back(std::move(poller));
      }
    }
    // Each connection begins at another thread.
    pollers->clear();
    for (size_t i = 0; i < threads_.size(); i++) pollers->push_back(threads_[(next_ + i) % threads_.size()].get());
    next_ += static_cast<size_t>(nSockets());
    return ncclSuccess;
  }
  static int count() {
    const int64_t given = nThreadsParam.get();
    if (given > 0) return static_cast<int>(given);
    return std::max(1, std::min(8, static_cast<int>(std::thread::hardware_concurrency() / 4)));
  }
  static int nSockets() {
    const int64_t given = nSocketsParam.get();
    return given > 0 ? static_cast<int>(given) : std::min(4, count());
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Poller>> threads_;
  size_t next_ = 0;
};

struct TcpContext {
  Stats* stats = nullptr;
  Pollers pollers;
};

class TcpListener : public Listener {
 public:
  TcpListener(TcpContext* context, const std::string& device) : context_(context), device_(device) {}
  ncclResult_t open(const Address& address, const std::string& token) {
    return acceptor_.open(address, TransportKind::tcp, token);
  }
  const Handle& handle() const { return acceptor_.handle(); }

  ncclResult_t accept(std::unique_ptr<Connection>* connection) override {
    connection->reset();
    std::unique_ptr<Peer> peer;
    MOECHECK(acceptor_.poll(&peer));
    if (peer == nullptr) return ncclSuccess;
    TcpBody theirs;
    if (!parseBody(peer->body, &theirs)) {
      MOE_INFO("turned %s away: its parameters do not parse", peer->name.c_str());
      acceptor_.reject(peer->sockets[0].get(), RejectStatus::parameters);
      return ncclSuccess;
    }
    std::vector<Poller*> pollers;
    MOECHECK(context_->pollers.get(&pollers));
    Hello reply = peer->hello;
    reply.kind = HelloKind::reply;
    reply.headerBytes = sizeof(Hello);
    HelloWriter writer;
    writer.set(reply, makeBody(device_), acceptor_.handle().secret, acceptor_.token());
    if (writer.poll(peer->sockets[0].get()) != IoStatus::done) {
      MOE_INFO("dropped %s: it went away during the handshake", peer->name.c_str());
      return ncclSuccess;
    }
    TcpOptions options;
    options.sender = false;
    options.inlineMax = static_cast<uint64_t>(inlineParam.get());
    options.window = static_cast<uint64_t>(windowParam.get());
    options.device = device_;
    options.peer = peer->name + " (" + theirs.device + ")";
    options.stats = context_->stats;
    *connection = std::make_unique<TcpConnection>(options, std::move(peer->sockets), pollers);
    return ncclSuccess;
  }

 private:
  TcpContext* context_;
  std::string device_;
  Acceptor acceptor_;
};

class TcpConnector : public Connector {
 public:
  TcpConnector(TcpContext* context, const std::string& device) : context_(context), device_(device) {}
  ncclResult_t open(const Handle& handle, const std::string& token) {
    return dialer_.open(handle, 1 + Pollers::nSockets(), 0, makeBody(device_), token);
  }
  ncclResult_t connect(std::unique_ptr<Connection>* connection) override {
    connection->reset();
    bool done = false;
    MOECHECK(dialer_.poll(&done));
    if (!done) return ncclSuccess;
    TcpBody theirs;
    if (!parseBody(dialer_.replyBody(), &theirs)) {
      return fail(ncclRemoteError, "handshake with peer %s failed: its parameters do not parse",
                  dialer_.peer().c_str());
    }
    std::vector<Poller*> pollers;
    MOECHECK(context_->pollers.get(&pollers));
    TcpOptions options;
    options.sender = true;
    options.inlineMax = std::min(static_cast<uint64_t>(inlineParam.get()), theirs.inlineMax);
    options.window = theirs.window;
    options.device = device_;
    options.peer = dialer_.peer() + " (" + theirs.device + ")";
    options.stats = context_->stats;
    *connection = std::make_unique<TcpConnection>(options, std::move(dialer_.sockets()), pollers);
    return ncclSuccess;
  }

 private:
  TcpContext* context_;
  std::string device_;
  Dialer dialer_;
};

class TcpTransport : public Transport {
 public:
  explicit TcpTransport(Stats* stats) { context_.stats = stats; }
  ncclResult_t open() {
    MOECHECK(findInterfaces(interfaceFilter(), &interfaces_));
    if (interfaces_.empty()) {
      return fail(ncclSystemError, "no network interface is up and matches NCCL_MOE_NET_IFNAME=\"%s\"",
                  interfaceFilter().c_str());
    }
    for (const Interface& interface : interfaces_) {
      DeviceInfo info;
      info.name = interface.name;
      info.pciPath = interface.pciPath;
      info.guid = devices_.size() + 1;
      info.speedMbps = interface.speedMbps;
      info.maxConnections = 65536;
      info.maxRecvs = static_cast<int>(maxRecvsParam.get());
      devices_.push_back(info);
      MOE_INFO("NET tcp device %zu: %s %s, %d Mbit/s", devices_.size() - 1, info.name.c_str(),
               interface.address.text().c_str(), info.speedMbps);
    }
    return ncclSuccess;
  }
  int nDevices() const override { return static_cast<int>(devices_.size()); }
  const DeviceInfo& device(int dev) const override { return devices_[dev]; }
  ncclResult_t merge(const std::vector<int>&, int*) override {
    return fail(ncclInvalidUsage, "the tcp transport does not merge devices");
  }
  ncclResult_t listen(int dev, const CommConfig& config, void* handle, std::unique_ptr<Listener>* listener) override {
    auto fresh = std::make_unique<TcpListener>(&context_, devices_[dev].name);
    MOECHECK(fresh->open(interfaces_[dev].address, jobToken(config.commId)));
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
    if (parsed.transport != TransportKind::tcp) {
      return fail(ncclInvalidUsage, "handle: the peer uses verbs and this process tcp; set NCCL_MOE_NET_TRANSPORT "
                                    "alike on all ranks");
    }
    auto fresh = std::make_unique<TcpConnector>(&context_, devices_[dev].name);
    MOECHECK(fresh->open(parsed, jobToken(config.commId)));
    *connector = std::move(fresh);
    return ncclSuccess;
  }

 private:
  TcpContext context_;
  std::vector<Interface> interfaces_;
  std::vector<DeviceInfo> devices_;
};

} // namespace

ncclResult_t makeTcpTransport(Stats* stats, std::unique_ptr<Transport>* transport) {
  auto fresh = std::make_unique<TcpTransport>(stats);
  MOECHECK(fresh->open());
  *transport = std::move(fresh);
  return ncclSuccess;
}

} // namespace net
} // namespace moe
