#include "net/handshake.h"

#include <sys/random.h>

#include <algorithm>

#include "base/error.h"
#include "base/log.h"
#include "base/param.h"

namespace moe {
namespace net {
namespace {

constexpr size_t maxGuests = 8192;

IntParam connectTimeoutMs{"NCCL_MOE_NET_CONNECT_TIMEOUT_MS", 300000, 1, INT32_MAX,
                          "milliseconds until a connection that the peer does not answer fails"};
IntParam handshakeTimeoutMs{"NCCL_MOE_NET_HANDSHAKE_TIMEOUT_MS", 30000, 1, INT32_MAX,
                            "milliseconds that a listener gives a socket to say who it is"};
StringParam jobTokenParam{"NCCL_MOE_JOB_TOKEN", "",
                          "secret that all ranks of a job share; peers that do not know it are turned away",
                          StringParam::nameAlone};

} // namespace

double connectTimeout() { return static_cast<double>(connectTimeoutMs.get()) * 1e-3; }
double handshakeTimeout() { return static_cast<double>(handshakeTimeoutMs.get()) * 1e-3; }

std::string jobToken(uint64_t commId) {
  const std::string& token = jobTokenParam.get();
  if (!token.empty()) return token;
  return commId != 0 ? "comm " + std::to_string(commId) : "";
}

ncclResult_t randomBytes(void* data, size_t bytes) {
  SYSCHECK(getrandom(data, bytes, 0), "getrandom");
  return ncclSuccess;
}

// ---- one message ----

IoStatus HelloReader::poll(int fd) {
  IoStatus status = readSome(fd, header_, sizeof(header_), &headerMoved_);
  if (status == IoStatus::done && !parsedHeader_) {
    parsed_ = parseHello(header_, sizeof(header_), &hello_);
    if (parsed_ != ParseResult::ok) {
      problem_ = parseResultText(parsed_);
      return IoStatus::error;
    }
    parsedHeader_ = true;
    skip_.resize(hello_.headerBytes - sizeof(Hello));
    body_.resize(hello_.bodyBytes);
  }
  if (status == IoStatus::done) status = readSome(fd, skip_.data(), skip_.size(), &skipMoved_);
  if (status == IoStatus::done) status = readSome(fd, body_.data(), body_.size(), &bodyMoved_);
  if (status == IoStatus::error) problem_ = strerror(errno);
  if (status == IoStatus::closed) problem_ = "it closed the connection";
  return status;
}

void HelloWriter::set(const Hello& hello, const Bytes& body, const Secret& secret, const std::string& token) {
  Hello out = hello;
  out.bodyBytes = static_cast<uint32_t>(body.size());
  out.proof = helloProof(secret, token, out, body.data());
  bytes_.resize(sizeof(out) + body.size());
  memcpy(bytes_.data(), &out, sizeof(out));
  if (!body.empty()) memcpy(bytes_.data() + sizeof(out), body.data(), body.size());
  moved_ = 0;
}

// ---- the listener's half ----

ncclResult_t Acceptor::open(const Address& local, TransportKind kind, const std::string& token) {
  Address bound;
  MOECHECK(openListener(local, &listener_, &bound));
  kind_ = kind;
  token_ = token;
  handle_ = Handle();
  handle_.transport = kind;
  bound.toHandle(&handle_);
  return randomBytes(&handle_.secret, sizeof(handle_.secret));
}

void Acceptor::reject(int fd, RejectStatus status) const {
  Hello hello;
  hello.transport = kind_;
  hello.kind = HelloKind::reject;
  hello.status = status;
  HelloWriter writer;
  writer.set(hello, {}, handle_.secret, token_);
  (void)writer.poll(fd);
}

void Acceptor::admit() {
  while (guests_.size() < maxGuests) {
    Address address;
    socklen_t size = sizeof(sockaddr_storage);
    const int fd = accept4(listener_.get(), address.get(), &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE) MOE_WARN("accept: %s; further peers wait", strerror(errno));
      return; // nobody there, or a peer that went away again
    }
    auto guest = std::make_unique<Guest>();
    guest->fd.reset(fd);
    guest->name = address.text();
    guest->deadline = nowSeconds() + handshakeTimeout();
    tuneSocket(fd);
    guests_.push_back(std::move(guest));
  }
}

// True when the listener is done with this guest.
bool Acceptor::greet(Guest* guest, std::unique_ptr<Peer>* ready) {
  const IoStatus status = guest->reader.poll(guest->fd.get());
  if (status == IoStatus::more) {
    if (nowSeconds() < guest->deadline) return false;
    MOE_INFO("dropped %s: it did not say who it is within %.1f s", guest->name.c_str(), handshakeTimeout());
    return true;
  }
  if (status != IoStatus::done) {
    MOE_INFO("dropped %s: %s", guest->name.c_str(), guest->reader.problem());
    if (guest->reader.parseResult() == ParseResult::badVersion) reject(guest->fd.get(), RejectStatus::version);
    return true;
  }
  const Hello& hello = guest->reader.hello();
  RejectStatus why = RejectStatus::none;
  if (!guest->reader.proven(handle_.secret, token_)) {
    why = RejectStatus::proof;
  } else if (hello.transport != kind_) {
    why = RejectStatus::transport;
  } else if (hello.kind != HelloKind::hello) {
    why = RejectStatus::parameters;
  }
  if (why != RejectStatus::none) {
    MOE_INFO("turned %s away: %s", guest->name.c_str(), rejectStatusText(why));
    reject(guest->fd.get(), why);
    return true;
  }
  auto& peer = partial_[hello.connectionId];
  if (peer == nullptr) {
    peer = std::make_unique<Peer>();
    peer->sockets.resize(hello.nSockets);
    peer->hello.nSockets = hello.nSockets;
    peer->deadline = guest->deadline;
  }
  if (hello.nSockets != peer->sockets.size() || peer->sockets[hello.socketIndex]) {
    MOE_INFO("turned %s away: its socket %d does not fit its others", guest->name.c_str(), hello.socketIndex);
    reject(guest->fd.get(), RejectStatus::parameters);
    return true;
  }
  peer->sockets[hello.socketIndex] = std::move(guest->fd);
  if (hello.socketIndex == 0) {
    peer->hello = hello;
    peer->body = guest->reader.body();
    peer->name = guest->name;
  }
  if (std::all_of(peer->sockets.begin(), peer->sockets.end(), [](const UniqueFd& fd) { return bool(fd); })) {
    *ready = std::move(peer);
    partial_.erase(hello.connectionId);
  }
  return true;
}

ncclResult_t Acceptor::poll(std::unique_ptr<Peer>* peer) {
  peer->reset();
  admit();
  for (size_t i = 0; i < guests_.size() && *peer == nullptr;) {
    if (greet(guests_[i].get(), peer)) {
      guests_.erase(guests_.begin() + static_cast<ptrdiff_t>(i));
    } else {
      i++;
    }
  }
  const double now = nowSeconds();
  for (auto it = partial_.begin(); it != partial_.end();) {
    if (now > it->second->deadline) {
      MOE_INFO("dropped a peer: only some of its %zu sockets came", it->second->sockets.size());
      it = partial_.erase(it);
    } else {
      ++it;
    }
  }
  return ncclSuccess;
}

// ---- the connector's half ----

ncclResult_t Dialer::open(const Handle& handle, int nSockets, uint32_t capabilities, const Bytes& body,
                          const std::string& token) {
  handle_ = handle;
  token_ = token;
  const Address remote(handle);
  peer_ = remote.text();
  deadline_ = nowSeconds() + connectTimeout();
  hello_.capabilities = capabilities;
  hello_.transport = handle.transport;
  hello_.nSockets = static_cast<uint16_t>(nSockets);
  MOECHECK(randomBytes(&hello_.connectionId, sizeof(hello_.connectionId)));
  sockets_.resize(nSockets);
  writers_.resize(nSockets);
  states_.assign(nSockets, State::connecting);
  for (int i = 0; i < nSockets; i++) {
    MOECHECK(openConnection(remote, &sockets_[i]));
    hello_.socketIndex = static_cast<uint16_t>(i);
    writers_[i].set(hello_, i == 0 ? body : Bytes(), handle_.secret, token_);
  }
  hello_.socketIndex = 0;
  return ncclSuccess;
}

ncclResult_t Dialer::poll(bool* done) {
  *done = false;
  bool greeted = true;
  for (size_t i = 0; i < sockets_.size(); i++) {
    const int fd = sockets_[i].get();
    if (states_[i] == State::connecting) {
      const int state = connectionState(fd);
      if (state < 0) {
        return fail(ncclRemoteError, "connect to peer %s failed: %s", peer_.c_str(), strerror(-state));
      }
      if (state > 0) states_[i] = State::greeting;
    }
    if (states_[i] == State::greeting) {
      const IoStatus status = writers_[i].poll(fd);
      if (status == IoStatus::done) states_[i] = State::greeted;
      if (status == IoStatus::closed || status == IoStatus::error) {
        return fail(ncclRemoteError, "handshake with peer %s failed: %s", peer_.c_str(), strerror(errno));
      }
    }
    greeted = greeted && states_[i] == State::greeted;
  }
  if (greeted) {
    const IoStatus status = reader_.poll(sockets_[0].get());
    if (status == IoStatus::closed || status == IoStatus::error) {
      return fail(ncclRemoteError, "handshake with peer %s failed: %s", peer_.c_str(), reader_.problem());
    }
    if (status == IoStatus::done) {
      const Hello& reply = reader_.hello();
      if (reply.kind == HelloKind::reject) {
        return fail(ncclRemoteError, "peer %s turned this connection away: %s", peer_.c_str(),
                    rejectStatusText(reply.status));
      }
      if (reply.kind != HelloKind::reply || reply.transport != hello_.transport ||
          reply.connectionId != hello_.connectionId || !reader_.proven(handle_.secret, token_)) {
        return fail(ncclRemoteError, "handshake with peer %s failed: its reply does not belong to this connection",
                    peer_.c_str());
      }
      *done = true;
      return ncclSuccess;
    }
  }
  if (nowSeconds() > deadline_) {
    return fail(ncclRemoteError, "peer %s did not answer within %.1f s (NCCL_MOE_NET_CONNECT_TIMEOUT_MS)",
                peer_.c_str(), connectTimeout());
  }
  return ncclSuccess;
}

} // namespace net
} // namespace moe
