// TCP sockets, non-blocking throughout: addresses, listening, connecting with a deadline.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/handle.h"

namespace moe {

using Clock = std::chrono::steady_clock;

// Milliseconds until a deadline, at least 0 and at most `atMost`: what poll() takes.
int millisUntil(Clock::time_point deadline, int atMost = 1000);

// An IPv4 or IPv6 address with its port.
struct SocketAddress {
  sockaddr_storage storage{};

  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  socklen_t size() const { return storage.ss_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in); }
  int port() const;
  void setPort(int port);
  bool isLoopback() const;
  std::string text() const; // "10.0.0.1:1234", "[::1]:1234"

  // 16 address bytes (IPv4 as ::ffff:a.b.c.d), for messages.
  void toBytes(uint8_t bytes[16]) const;
  static SocketAddress fromBytes(const uint8_t bytes[16], int port);
  static bool fromLiteral(const std::string& host, int port, SocketAddress* address);
};

// Splits "HOST:PORT", "[IPV6]:PORT"; the port is 1 to 65535.  False if text is anything else.
bool splitHostPort(const std::string& text, std::string* host, int* port);

// All addresses of a host name or literal.  what: begins the sentence of an error.
ncclResult_t resolveHost(const std::string& host, int port, std::vector<SocketAddress>* addresses, const char* what);

// Addresses of this machine's interfaces that are up, loopback last.
std::vector<SocketAddress> localAddresses();

// A listening socket, on one address or on every address of the machine (IPv6 and IPv4 where it has both) with a port
// that the system picks.  Empty, with errno set, if that fails.
UniqueFd listenOn(const SocketAddress& address);
UniqueFd listenAnywhere();

// The next pending connection, with its options set; empty if there is none.
UniqueFd acceptOne(int listener, SocketAddress* peer);

// Connects by the deadline; empty, with errno set, if that fails.
UniqueFd connectTo(const SocketAddress& address, Clock::time_point deadline);

SocketAddress localAddress(int fd);

} // namespace moe
