#include "perf/net/control.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <memory>

namespace moe {
namespace netperf {
namespace {

ncclResult_t listenOn(int family, const sockaddr* address, socklen_t length, UniqueFd* fd) {
  UniqueFd listener(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  SYSCHECK(listener.get(), "socket");
  const int yes = 1;
  SYSCHECK(setsockopt(listener.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)), "setsockopt");
  SYSCHECK(bind(listener.get(), address, length), "bind");
  SYSCHECK(::listen(listener.get(), 8), "listen");
  *fd = std::move(listener);
  return ncclSuccess;
}

ncclResult_t takeOne(const UniqueFd& listener, int timeoutSeconds, UniqueFd* fd) {
  pollfd ready{listener.get(), POLLIN, 0};
  const int n = poll(&ready, 1, timeoutSeconds * 1000);
  SYSCHECK(n, "poll");
  if (n == 0) return fail(ncclRemoteError, "no client came within %d s", timeoutSeconds);
  fd->reset(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  SYSCHECK(fd->get(), "accept");
  return ncclSuccess;
}

} // namespace

ncclResult_t Control::pair(Control* first, Control* second) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  UniqueFd listener;
  MOECHECK(listenOn(AF_INET, reinterpret_cast<sockaddr*>(&address), sizeof(address), &listener));
  socklen_t length = sizeof(address);
  SYSCHECK(getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length), "getsockname");
  second->fd_.reset(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  SYSCHECK(second->fd_.get(), "socket");
  SYSCHECK(connect(second->fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), "connect");
  MOECHECK(takeOne(listener, 10, &first->fd_));
  MOECHECK(first->setTimeout(10));
  return second->setTimeout(10);
}

ncclResult_t Control::listen(int port, UniqueFd* listener) {
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6; // and IPv4, by mapping
  address.sin6_port = htons(uint16_t(port));
  return listenOn(AF_INET6, reinterpret_cast<sockaddr*>(&address), sizeof(address), listener);
}

ncclResult_t Control::accept(const UniqueFd& listener, int timeoutSeconds, Control* control) {
  MOECHECK(takeOne(listener, timeoutSeconds, &control->fd_));
  return control->setTimeout(timeoutSeconds);
}

ncclResult_t Control::dial(const std::string& host, int port, int timeoutSeconds, Control* control) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* raw = nullptr;
  const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &raw);
  if (error != 0) return fail(ncclInvalidArgument, "-c %s: %s", host.c_str(), gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(raw, freeaddrinfo);
  for (const addrinfo* a = raw; a != nullptr; a = a->ai_next) {
    UniqueFd fd(socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!fd || connect(fd.get(), a->ai_addr, a->ai_addrlen) != 0) continue;
    control->fd_ = std::move(fd);
    return control->setTimeout(timeoutSeconds);
  }
  return fail(ncclRemoteError, "no net_perf -s answers at %s port %d: %s", host.c_str(), port, strerror(errno));
}

ncclResult_t Control::setTimeout(int seconds) {
  const timeval limit{seconds, 0};
  const int yes = 1;
  SYSCHECK(setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)), "setsockopt");
  SYSCHECK(setsockopt(fd_.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)), "setsockopt");
  SYSCHECK(setsockopt(fd_.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes)), "setsockopt");
  return ncclSuccess;
}

ncclResult_t Control::send(const void* data, size_t bytes) {
  for (size_t sent = 0; sent < bytes;) {
    const ssize_t n = ::send(fd_.get(), static_cast<const char*>(data) + sent, bytes - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail(ncclRemoteError, "the peer process does not take part any more: %s", strerror(errno));
    sent += size_t(n);
  }
  return ncclSuccess;
}

ncclResult_t Control::receive(void* data, size_t bytes) {
  for (size_t got = 0; got < bytes;) {
    const ssize_t n = ::recv(fd_.get(), static_cast<char*>(data) + got, bytes - got, MSG_WAITALL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail(ncclRemoteError, "the peer process does not answer: %s", strerror(errno));
    if (n == 0) return fail(ncclRemoteError, "the peer process has ended");
    got += size_t(n);
  }
  return ncclSuccess;
}

} // namespace netperf
} // namespace moe
