#include "base/socket.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>

#include <algorithm>
#include <memory>

namespace moe {
namespace {

constexpr int kBacklog = 1024; // a job's ranks all connect at once

void setTcpOptions(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)); // fails only for sockets that need none of it
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on)); // notices a host that vanished without a word
}

UniqueFd tcpSocket(int family) { return UniqueFd(socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)); }

UniqueFd startListening(UniqueFd fd, const SocketAddress& address) {
  const int on = 1;
  setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)); // or else bind below says what is wrong
  if (bind(fd.get(), address.get(), address.size()) != 0 || listen(fd.get(), kBacklog) != 0) {
    const int error = errno;
    fd.reset();
    errno = error;
  }
  return fd;
}

} // namespace

int millisUntil(Clock::time_point deadline, int atMost) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count() + 1;
  return static_cast<int>(std::clamp<long long>(left, 0, atMost));
}

int SocketAddress::port() const {
  return ntohs(storage.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port
                                             : reinterpret_cast<const sockaddr_in*>(&storage)->sin_port);
}

void SocketAddress::setPort(int port) {
  const auto value = htons(static_cast<uint16_t>(port));
  if (storage.ss_family == AF_INET6) {
    reinterpret_cast<sockaddr_in6*>(&storage)->sin6_port = value;
  } else {
    reinterpret_cast<sockaddr_in*>(&storage)->sin_port = value;
  }
}

bool SocketAddress::isLoopback() const {
  uint8_t bytes[16];
  toBytes(bytes);
  in6_addr address;
  memcpy(&address, bytes, sizeof(address));
  return IN6_IS_ADDR_LOOPBACK(&address) || (IN6_IS_ADDR_V4MAPPED(&address) && bytes[12] == 127);
}

std::string SocketAddress::text() const {
  uint8_t bytes[16];
  toBytes(bytes);
  in6_addr address;
  memcpy(&address, bytes, sizeof(address));
  char host[INET6_ADDRSTRLEN] = "?";
  if (IN6_IS_ADDR_V4MAPPED(&address)) {
    inet_ntop(AF_INET, bytes + 12, host, sizeof(host));
    return std::string(host) + ":" + std::to_string(port());
  }
  inet_ntop(AF_INET6, bytes, host, sizeof(host));
  return "[" + std::string(host) + "]:" + std::to_string(port());
}

void SocketAddress::toBytes(uint8_t bytes[16]) const {
  if (storage.ss_family == AF_INET6) {
    memcpy(bytes, &reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_addr, 16);
  } else {
    memset(bytes, 0, 10);
    bytes[10] = bytes[11] = 0xff;
    memcpy(bytes + 12, &reinterpret_cast<const sockaddr_in*>(&storage)->sin_addr, 4);
  }
}

SocketAddress SocketAddress::fromBytes(const uint8_t bytes[16], int port) {
  SocketAddress out;
  in6_addr address;
  memcpy(&address, bytes, sizeof(address));
  if (IN6_IS_ADDR_V4MAPPED(&address)) {
    auto* in = reinterpret_cast<sockaddr_in*>(&out.storage);
    in->sin_family = AF_INET;
    memcpy(&in->sin_addr, bytes + 12, 4);
  } else {
    auto* in = reinterpret_cast<sockaddr_in6*>(&out.storage);
    in->sin6_family = AF_INET6;
    in->sin6_addr = address;
  }
  out.setPort(port);
  return out;
}

bool SocketAddress::fromLiteral(const std::string& host, int port, SocketAddress* address) {
  uint8_t bytes[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  if (inet_pton(AF_INET, host.c_str(), bytes + 12) != 1 && inet_pton(AF_INET6, host.c_str(), bytes) != 1) return false;
  *address = fromBytes(bytes, port);
  return true;
}

bool splitHostPort(const std::string& text, std::string* host, int* port) {
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) return false;
  std::string name = text.substr(0, colon);
  if (name.front() == '[') {
    if (name.size() < 3 || name.back() != ']') return false;
    name = name.substr(1, name.size() - 2);
  } else if (name.find(':') != std::string::npos) {
    return false; // an IPv6 literal needs its brackets
  }
  const std::string digits = text.substr(colon + 1);
  if (digits.empty() || digits.size() > 5 || digits.find_first_not_of("0123456789") != std::string::npos) return false;
  const int value = std::stoi(digits);
  if (value < 1 || value > 65535) return false;
  *host = name;
  *port = value;
  return true;
}

ncclResult_t resolveHost(const std::string& host, int port, std::vector<SocketAddress>* addresses, const char* what) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  const int error = getaddrinfo(host.c_str(), nullptr, &hints, &list);
  if (error != 0) {
    return fail(ncclSystemError, "%s: host %s cannot be resolved: %s", what, host.c_str(), gai_strerror(error));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owned(list, freeaddrinfo);
  for (const addrinfo* at = list; at != nullptr; at = at->ai_next) {
    if (at->ai_family != AF_INET && at->ai_family != AF_INET6) continue;
    SocketAddress address;
    memcpy(&address.storage, at->ai_addr, at->ai_addrlen);
    address.setPort(port);
    addresses->push_back(address);
  }
  if (addresses->empty()) return fail(ncclSystemError, "%s: host %s has no IP address", what, host.c_str());
  return ncclSuccess;
}

std::vector<SocketAddress> localAddresses() {
  std::vector<SocketAddress> found;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return found;
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owned(list, freeifaddrs);
  for (const ifaddrs* at = list; at != nullptr; at = at->ifa_next) {
    if (at->ifa_addr == nullptr || (at->ifa_flags & IFF_UP) == 0) continue;
    const int family = at->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    SocketAddress address;
    memcpy(&address.storage, at->ifa_addr, family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6));
    // A link-local address means nothing without the reader's own interface.
    if (family == AF_INET6 &&
        IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<const sockaddr_in6*>(&address.storage)->sin6_addr)) {
      continue;
    }
    found.push_back(address);
  }
  std::stable_sort(found.begin(), found.end(), [](const SocketAddress& a, const SocketAddress& b) {
    const auto order = [](const SocketAddress& s) {
      return (s.isLoopback() ? 2 : 0) + (s.storage.ss_family == AF_INET6);
    };
    return order(a) < order(b);
  });
  return found;
}

UniqueFd listenOn(const SocketAddress& address) {
  UniqueFd fd = tcpSocket(address.storage.ss_family);
  return fd ? startListening(std::move(fd), address) : std::move(fd);
}

UniqueFd listenAnywhere() {
  SocketAddress any;
  UniqueFd fd = tcpSocket(AF_INET6);
  if (fd) {
    const int off = 0;
    setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)); // if not, IPv6 alone has to do
    any.storage.ss_family = AF_INET6;                                   // in6addr_any is all zeros
    fd = startListening(std::move(fd), any);
    if (fd) return fd;
  }
  any.storage.ss_family = AF_INET; // a machine without IPv6
  return listenOn(any);
}

UniqueFd acceptOne(int listener, SocketAddress* peer) {
  socklen_t size = sizeof(peer->storage);
  UniqueFd fd(accept4(listener, peer->get(), &size, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (fd) setTcpOptions(fd.get());
  return fd;
}

UniqueFd connectTo(const SocketAddress& address, Clock::time_point deadline) {
  UniqueFd fd = tcpSocket(address.storage.ss_family);
  if (!fd) return fd;
  setTcpOptions(fd.get());
  int error = 0;
  if (connect(fd.get(), address.get(), address.size()) != 0) {
    if (errno != EINPROGRESS) return {};
    pollfd wait{fd.get(), POLLOUT, 0};
    int ready = 0;
    do {
      ready = poll(&wait, 1, millisUntil(deadline));
    } while ((ready == 0 && Clock::now() < deadline) || (ready < 0 && errno == EINTR));
    socklen_t size = sizeof(error);
    if (ready == 0) error = ETIMEDOUT;
    if (ready < 0) error = errno;
    if (ready > 0) getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  }
  if (error == 0) {
    // Where nobody listens on an ephemeral port of this machine, TCP may connect a socket to itself.
    SocketAddress self = localAddress(fd.get());
    SocketAddress peer;
    socklen_t size = sizeof(peer.storage);
    if (getpeername(fd.get(), peer.get(), &size) != 0) {
      error = errno;
    } else if (self.text() == peer.text()) {
      const linger reset{1, 0};
      setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
      error = ECONNREFUSED;
    }
  }
  if (error != 0) {
    fd.reset();
    errno = error;
  }
  return fd;
}

SocketAddress localAddress(int fd) {
  SocketAddress address;
  socklen_t size = sizeof(address.storage);
  if (getsockname(fd, address.get(), &size) != 0) address.storage.ss_family = AF_INET;
  return address;
}

} // namespace moe
