// A peer whose machine vanishes says nothing: neither FIN nor RST comes.  The connection ends in bounded time all the
// same; but one whose peer is alive and does not read goes on, however long that takes.
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <sys/socket.h>

#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

#include "base/error.h"
#include "net/socket.h"
#include "net/tcp_connection.h"

namespace moe::net {
namespace {

struct Environment : testing::Environment {
  void SetUp() override { setenv("NCCL_MOE_NET_TCP_TIMEOUT_MS", "2000", 1); }
};
const auto* const environment = testing::AddGlobalTestEnvironment(new Environment);

class TcpVanish : public testing::Test {
 protected:
  void open(bool sender) {
    sockaddr_in loopback = {};
    loopback.sin_family = AF_INET;
    loopback.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    UniqueFd listener, near;
    Address bound;
    ASSERT_EQ(openListener(Address(reinterpret_cast<sockaddr*>(&loopback)), &listener, &bound), ncclSuccess);
    ASSERT_EQ(openConnection(bound, &near), ncclSuccess);
    for (int i = 0; i < 1000 && peer_.get() < 0; i++) {
      peer_.reset(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_GE(peer_.get(), 0);
    ASSERT_EQ(poller_.start(), ncclSuccess);
    TcpOptions options;
    options.sender = sender;
    options.inlineMax = 65536;
    options.window = 256;
    options.device = options.peer = "test";
    std::vector<UniqueFd> sockets;
    sockets.push_back(std::move(near));
    connection_ = std::make_unique<TcpConnection>(options, std::move(sockets), std::vector<Poller*>{&poller_});
  }
  // From now on the peer's side drops every segment that comes, and so answers none.
  void vanish() {
    sock_filter drop = {BPF_RET | BPF_K, 0, 0, 0};
    const sock_fprog program = {1, &drop};
    ASSERT_EQ(setsockopt(peer_.get(), SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)), 0);
  }
  // Seconds until a call on the connection gives an error, at most 30.
  double untilError() {
    const double begin = nowSeconds();
    while (connection_->progress() == ncclSuccess && nowSeconds() < begin + 30) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return nowSeconds() - begin;
  }
  void send(size_t bytes) {
    Request* request = nullptr;
    ASSERT_EQ(connection_->isend(data_.data(), bytes, 1, nullptr, &request), ncclSuccess) << lastError();
    if (request != nullptr) requests_.push_back(request);
  }

  std::vector<char> data_ = std::vector<char>(65536, 'v');
  std::vector<Request*> requests_;
  UniqueFd peer_;
  Poller poller_;
  std::unique_ptr<TcpConnection> connection_;
};

TEST_F(TcpVanish, WithDataUnderWay) {
  open(true);
  vanish();
  send(64);
  EXPECT_LT(untilError(), 10);
  EXPECT_NE(std::string(lastError()).find("NCCL_MOE_NET_TCP_TIMEOUT_MS"), std::string::npos) << lastError();
}

TEST_F(TcpVanish, WhileIdle) {
  open(false);
  vanish();
  EXPECT_LT(untilError(), 10);
  EXPECT_NE(std::string(lastError()).find("timed out"), std::string::npos) << lastError();
}

TEST_F(TcpVanish, APeerThatDoesNotReadIsNoneThatVanished) {
  open(true);
  while (requests_.size() < 200) send(65536); // more than the kernel buffers
  const double begin = nowSeconds();
  while (nowSeconds() < begin + 6) {
    ASSERT_EQ(connection_->progress(), ncclSuccess) << lastError();
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  size_t left = requests_.size() * (sizeof(MessageHeader) + 65536);
  std::vector<char> into(1 << 20);
  while (left > 0 && nowSeconds() < begin + 60) {
    ASSERT_EQ(connection_->progress(), ncclSuccess) << lastError();
    const ssize_t n = recv(peer_.get(), into.data(), into.size(), 0);
    if (n > 0) left -= static_cast<size_t>(n);
  }
  EXPECT_EQ(left, 0u);
}

} // namespace
} // namespace moe::net
