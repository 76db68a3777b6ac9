// How two processes meet: the listener's and the connector's halves of the handshake, common to all transports.
//
// The connector opens its sockets and sends a hello on each.  The listener reads hellos from whoever comes, drops what
// is not one (or is late), and hands out a peer once all sockets of one connectionId have greeted.  The transport then
// answers on socket 0.  A message counts only if its proof shows that the sender knows the handle and the job token,
// and wrote the body too.
// Every socket has its own state and deadline, so that nobody can hold up anybody else; nothing blocks.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/handle.h"
#include "nccl_moe.h"
#include "net/socket.h"
#include "net/wire.h"

namespace moe {
namespace net {

using Bytes = std::vector<uint8_t>;

// The token that both sides prove to know; commId is used where NCCL_MOE_JOB_TOKEN is not set.
std::string jobToken(uint64_t commId);

// Takes in one handshake message.
class HelloReader {
 public:
  IoStatus poll(int fd); // error: see problem()
  const char* problem() const { return problem_; }
  ParseResult parseResult() const { return parsed_; }
  const Hello& hello() const { return hello_; }
  const Bytes& body() const { return body_; }
  bool proven(const Secret& secret, const std::string& token) const {
    return hello_.proof == helloProof(secret, token, hello_, body_.data());
  }

 private:
  uint8_t header_[sizeof(Hello)];
  size_t headerMoved_ = 0, skipMoved_ = 0, bodyMoved_ = 0;
  bool parsedHeader_ = false;
  ParseResult parsed_ = ParseResult::ok;
  const char* problem_ = "";
  Hello hello_;
  Bytes skip_, body_;
};

// Sends one.
class HelloWriter {
 public:
  void set(const Hello& hello, const Bytes& body, const Secret& secret, const std::string& token);
  IoStatus poll(int fd) { return writeSome(fd, bytes_.data(), bytes_.size(), &moved_); }

 private:
  Bytes bytes_;
  size_t moved_ = 0;
};

struct Peer {
  std::vector<UniqueFd> sockets;
  Hello hello; // of socket 0
  Bytes body;
  std::string name; // its address
  double deadline = 0;
};

class Acceptor {
 public:
  ncclResult_t open(const Address& local, TransportKind kind, const std::string& token);
  const Handle& handle() const { return handle_; }
  const std::string& token() const { return token_; }
  // *peer is set when one has all its sockets here.
  ncclResult_t poll(std::unique_ptr<Peer>* peer);
  // Tells the peer why, as far as that is possible at once.
  void reject(int fd, RejectStatus status) const;

 private:
  struct Guest {
    UniqueFd fd;
    std::string name;
    double deadline;
    HelloReader reader;
  };
  void admit();
  bool greet(Guest* guest, std::unique_ptr<Peer>* ready);

  UniqueFd listener_;
  Handle handle_;
  TransportKind kind_ = TransportKind::tcp;
  std::string token_;
  std::vector<std::unique_ptr<Guest>> guests_;
  std::map<uint64_t, std::unique_ptr<Peer>> partial_;
};

class Dialer {
 public:
  ncclResult_t open(const Handle& handle, int nSockets, uint32_t capabilities, const Bytes& body,
                    const std::string& token);
  // *done: the reply has come.
  ncclResult_t poll(bool* done);
  const std::string& peer() const { return peer_; }
  const Hello& reply() const { return reader_.hello(); }
  const Bytes& replyBody() const { return reader_.body(); }
  const Hello& hello() const { return hello_; }
  const Secret& secret() const { return handle_.secret; }
  std::vector<UniqueFd>& sockets() { return sockets_; }

 private:
  enum class State { connecting, greeting, greeted };
  Handle handle_;
  Hello hello_;
  std::string token_, peer_;
  std::vector<UniqueFd> sockets_;
  std::vector<State> states_;
  std::vector<HelloWriter> writers_;
  HelloReader reader_;
  double deadline_ = 0;
};

double connectTimeout();   // seconds until a connector gives up
double handshakeTimeout(); // seconds until the listener drops a socket that has not greeted

ncclResult_t randomBytes(void* data, size_t bytes);

} // namespace net
} // namespace moe
