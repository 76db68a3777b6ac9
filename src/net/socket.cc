#include "net/socket.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "base/error.h"
#include "base/param.h"

namespace moe {
namespace net {
namespace {

IntParam bufferBytes{"NCCL_MOE_NET_TCP_BUFFER", 0, 0, 1 << 30,
                     "bytes of kernel buffer per TCP socket and direction, 65536 at least; 0: the kernel adapts it"};
IntParam timeoutParam{"NCCL_MOE_NET_TCP_TIMEOUT_MS", 60000, 2000, 86400000,
                      "milliseconds within which a connection ends whose peer's machine has vanished without a word"};
// A window below a segment of the loopback interface makes TCP itself crawl.
constexpr int64_t kLeastBufferBytes = 65536;

StringParam interfaceParam{"NCCL_MOE_NET_IFNAME", "",
                           "interfaces: prefixes (eth,ib), exact names (=eth0), or prefixes to leave out (^docker)"};

bool startsWith(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

int linkSpeed(const std::string& name) {
  FILE* file = fopen(("/sys/class/net/" + name + "/speed").c_str(), "r");
  if (file == nullptr) return 10000;
  int speed = -1;
  if (fscanf(file, "%d", &speed) != 1) speed = -1;
  fclose(file);
  return speed > 0 ? speed : 10000;
}

std::string realPath(const std::string& path) {
  std::error_code missing;
  return std::filesystem::canonical(path, missing).string();
}

// The order in which addresses of one interface are preferred; -1: not usable.
int addressRank(const sockaddr* address) {
  if (address->sa_family == AF_INET) return 0;
  if (address->sa_family != AF_INET6) return -1;
  const auto* v6 = reinterpret_cast<const sockaddr_in6*>(address);
  return IN6_IS_ADDR_LINKLOCAL(&v6->sin6_addr) ? 2 : 1;
}

} // namespace

Address::Address(const sockaddr* address) {
  memcpy(&storage_, address, address->sa_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in));
}

Address::Address(const Handle& handle) {
  if (handle.family == 6) {
    auto* v6 = reinterpret_cast<sockaddr_in6*>(&storage_);
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(handle.port);
    v6->sin6_scope_id = handle.scope;
    memcpy(&v6->sin6_addr, handle.address, 16);
  } else {
    auto* v4 = reinterpret_cast<sockaddr_in*>(&storage_);
    v4->sin_family = AF_INET;
    v4->sin_port = htons(handle.port);
    memcpy(&v4->sin_addr, handle.address, 4);
  }
}

void Address::toHandle(Handle* handle) const {
  if (family() == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&storage_);
    handle->family = 6;
    handle->port = ntohs(v6->sin6_port);
    handle->scope = v6->sin6_scope_id;
    memcpy(handle->address, &v6->sin6_addr, 16);
  } else {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(&storage_);
    handle->family = 4;
    handle->port = ntohs(v4->sin_port);
    memcpy(handle->address, &v4->sin_addr, 4);
  }
}

std::string Address::text() const {
  char host[INET6_ADDRSTRLEN] = "?";
  if (family() == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&storage_);
    inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof(host));
    return "[" + std::string(host) + "]:" + std::to_string(ntohs(v6->sin6_port));
  }
  const auto* v4 = reinterpret_cast<const sockaddr_in*>(&storage_);
  inet_ntop(AF_INET, &v4->sin_addr, host, sizeof(host));
  return std::string(host) + ":" + std::to_string(ntohs(v4->sin_port));
}

const std::string& interfaceFilter() { return interfaceParam.get(); }

bool interfaceMatches(const std::string& name, const std::string& filter) {
  std::string list = filter.empty() ? "^docker,virbr,cni,veth" : filter;
  const bool exclude = list[0] == '^';
  if (exclude) list.erase(0, 1);
  const bool exact = !list.empty() && list[0] == '=';
  if (exact) list.erase(0, 1);
  std::istringstream items(list);
  for (std::string item; std::getline(items, item, ',');) {
    if (item.empty()) continue;
    if (exact ? name == item : startsWith(name, item)) return !exclude;
  }
  return exclude;
}

ncclResult_t findInterfaces(const std::string& filter, std::vector<Interface>* interfaces) {
  interfaces->clear();
  ifaddrs* list = nullptr;
  SYSCHECK(getifaddrs(&list), "getifaddrs");
  std::vector<int> ranks;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0 || (entry->ifa_flags & IFF_RUNNING) == 0) {
      continue;
    }
    const int rank = addressRank(entry->ifa_addr);
    if (rank < 0 || !interfaceMatches(entry->ifa_name, filter)) continue;
    auto known = std::find_if(interfaces->begin(), interfaces->end(),
                              [entry](const Interface& seen) { return seen.name == entry->ifa_name; });
    if (known == interfaces->end()) {
      Interface fresh;
      fresh.name = entry->ifa_name;
      fresh.loopback = (entry->ifa_flags & IFF_LOOPBACK) != 0;
      fresh.speedMbps = linkSpeed(fresh.name);
      fresh.pciPath = realPath("/sys/class/net/" + fresh.name + "/device");
      fresh.address = Address(entry->ifa_addr);
      interfaces->push_back(fresh);
      ranks.push_back(rank);
    } else if (rank < ranks[known - interfaces->begin()]) {
      ranks[known - interfaces->begin()] = rank;
      known->address = Address(entry->ifa_addr);
    }
  }
  freeifaddrs(list);
  const bool others =
    std::any_of(interfaces->begin(), interfaces->end(), [](const Interface& i) { return !i.loopback; });
  const bool named = !filter.empty() && filter[0] != '^';
  if (others && !named) {
    interfaces->erase(
      std::remove_if(interfaces->begin(), interfaces->end(), [](const Interface& i) { return i.loopback; }),
      interfaces->end());
  }
  return ncclSuccess;
}

void tuneSocket(int fd) {
  // A peer whose machine is gone sends no FIN: probes find that out while the connection idles, peerSilent otherwise.
  const int seconds = static_cast<int>(timeoutParam.get() / 1000);
  const int on = 1, idle = seconds / 2, interval = std::max(1, seconds / 8), count = (seconds - idle) / interval;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
  static const int bytes = [] {
    const int64_t wanted = bufferBytes.get();
    if (wanted == 0 || wanted >= kLeastBufferBytes) return static_cast<int>(wanted);
    MOE_WARN("NCCL_MOE_NET_TCP_BUFFER=%lld is too little; using %lld", static_cast<long long>(wanted),
             static_cast<long long>(kLeastBufferBytes));
    return static_cast<int>(kLeastBufferBytes);
  }();
  if (bytes > 0) {
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
  }
}

bool peerSilent(int fd) {
  // TCP_USER_TIMEOUT would also end connections to a peer that is alive and does not read for so long.  That one
  // answers the probes of its closed window; and since idle sockets are probed too, its last answer is never old.
  tcp_info info = {};
  socklen_t size = sizeof(info);
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return false;
  return (info.tcpi_retransmits > 1 || info.tcpi_probes > 1) && info.tcpi_last_ack_recv > timeoutParam.get();
}

ncclResult_t openListener(const Address& local, UniqueFd* fd, Address* bound) {
  UniqueFd listener(socket(local.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  SYSCHECK(listener.get(), "socket");
  Address any = local;
  if (any.family() == AF_INET6) {
    reinterpret_cast<sockaddr_in6*>(any.get())->sin6_port = 0;
  } else {
    reinterpret_cast<sockaddr_in*>(any.get())->sin_port = 0;
  }
  if (bind(listener.get(), any.get(), any.size()) == -1) {
    return fail(ncclSystemError, "bind to %s failed: %s", any.text().c_str(), strerror(errno));
  }
  SYSCHECK(::listen(listener.get(), 16384), "listen");
  socklen_t size = sizeof(sockaddr_storage);
  *bound = any;
  SYSCHECK(getsockname(listener.get(), bound->get(), &size), "getsockname");
  *fd = std::move(listener);
  return ncclSuccess;
}

ncclResult_t openConnection(const Address& remote, UniqueFd* fd) {
  UniqueFd sock(socket(remote.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  SYSCHECK(sock.get(), "socket");
  tuneSocket(sock.get());
  if (::connect(sock.get(), remote.get(), remote.size()) == -1 && errno != EINPROGRESS && errno != EINTR) {
    return fail(ncclRemoteError, "connect to %s failed: %s", remote.text().c_str(), strerror(errno));
  }
  *fd = std::move(sock);
  return ncclSuccess;
}

int connectionState(int fd) {
  pollfd entry = {fd, POLLOUT, 0};
  if (poll(&entry, 1, 0) <= 0) return 0;
  int error = 0;
  socklen_t size = sizeof(error);
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == -1) return -errno;
  return error == 0 ? 1 : -error;
}

IoStatus readSome(int fd, void* data, size_t bytes, size_t* moved) {
  while (*moved < bytes) {
    const ssize_t n = recv(fd, static_cast<char*>(data) + *moved, bytes - *moved, MSG_DONTWAIT);
    if (n > 0) {
      *moved += static_cast<size_t>(n);
    } else if (n == 0) {
      return IoStatus::closed;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return IoStatus::more;
    } else if (errno != EINTR) {
      return IoStatus::error;
    }
  }
  return IoStatus::done;
}

IoStatus writeSome(int fd, const void* data, size_t bytes, size_t* moved) {
  while (*moved < bytes) {
    const ssize_t n = send(fd, static_cast<const char*>(data) + *moved, bytes - *moved, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) {
      *moved += static_cast<size_t>(n);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return IoStatus::more;
    } else if (errno == EPIPE || errno == ECONNRESET) {
      return IoStatus::closed;
    } else if (errno != EINTR) {
      return IoStatus::error;
    }
  }
  return IoStatus::done;
}

double nowSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

} // namespace net
} // namespace moe
