// Non-blocking TCP sockets and the interfaces they use.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/handle.h"
#include "nccl_moe.h"
#include "net/wire.h"

namespace moe {
namespace net {

class Address {
 public:
  Address() = default;
  explicit Address(const sockaddr* address);
  explicit Address(const Handle& handle);
  void toHandle(Handle* handle) const;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage_); }
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage_); }
  socklen_t size() const { return storage_.ss_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in); }
  int family() const { return storage_.ss_family; }
  std::string text() const; // 10.0.0.1:4242

 private:
  sockaddr_storage storage_ = {};
};

struct Interface {
  std::string name;
  Address address;
  bool loopback = false;
  int speedMbps = 10000;
  std::string pciPath;
};

// filter: a list of prefixes (eth,ib), of exact names after '=' (=eth0), or of prefixes to leave out after '^'.  Empty:
// all but bridges of containers and virtual machines; loopback only if there is nothing else.
const std::string& interfaceFilter(); // NCCL_MOE_NET_IFNAME
bool interfaceMatches(const std::string& name, const std::string& filter);
ncclResult_t findInterfaces(const std::string& filter, std::vector<Interface>* interfaces);

ncclResult_t openListener(const Address& local, UniqueFd* fd, Address* bound);
// Begins to connect.
ncclResult_t openConnection(const Address& remote, UniqueFd* fd);
// 0: under way; 1: connected; otherwise -errno.
int connectionState(int fd);
void tuneSocket(int fd);
// Has the peer's machine answered nothing for NCCL_MOE_NET_TCP_TIMEOUT_MS, though there was something to answer?
bool peerSilent(int fd);

// What a non-blocking transfer came to.
enum class IoStatus { more, done, closed, error };

// Moves bytes from or to the socket until *moved reaches bytes.
IoStatus readSome(int fd, void* data, size_t bytes, size_t* moved);
IoStatus writeSome(int fd, const void* data, size_t bytes, size_t* moved);

double nowSeconds(); // monotonic

} // namespace net
} // namespace moe
