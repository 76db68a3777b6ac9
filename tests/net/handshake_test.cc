// What was changed on the way to the other side is refused, the body of a handshake message included: it says into
// whose memory RDMA writes go.
#include "net/handshake.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <functional>
#include <thread>

#include "base/error.h"

namespace moe {
namespace net {
namespace {

const std::string token = "token";

bool eventually(const std::function<bool()>& condition) {
  const double end = nowSeconds() + 20;
  while (nowSeconds() < end) {
    if (condition()) return true;
    std::this_thread::yield();
  }
  return false;
}

Bytes message(const Hello& hello, const Bytes& body, const Secret& secret) {
  int raw[2];
  EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, raw), 0);
  const UniqueFd from(raw[0]), to(raw[1]);
  HelloWriter writer;
  writer.set(hello, body, secret, token);
  EXPECT_EQ(writer.poll(from.get()), IoStatus::done);
  Bytes bytes(sizeof(Hello) + body.size());
  EXPECT_EQ(recv(to.get(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  return bytes;
}

Address loopback() {
  Handle handle;
  handle.address[0] = 127;
  handle.address[3] = 1;
  return Address(handle);
}

constexpr size_t untouched = SIZE_MAX;
const size_t changes[] = {untouched, 40, sizeof(Hello), sizeof(Hello) + 150, sizeof(Hello) + 303};
const Bytes body(304, 0x21);

TEST(Handshake, aHelloThatWasChangedIsTurnedAway) {
  Acceptor acceptor;
  ASSERT_EQ(acceptor.open(loopback(), TransportKind::verbs, token), ncclSuccess) << lastError();
  for (const size_t at : changes) {
    SCOPED_TRACE(at);
    Hello hello;
    hello.transport = TransportKind::verbs;
    hello.connectionId = 77;
    Bytes bytes = message(hello, body, acceptor.handle().secret);
    if (at != untouched) bytes[at] ^= 4;
    UniqueFd fd;
    ASSERT_EQ(openConnection(Address(acceptor.handle()), &fd), ncclSuccess) << lastError();
    ASSERT_TRUE(eventually([&] { return connectionState(fd.get()) != 0; }));
    ASSERT_EQ(send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
    std::unique_ptr<Peer> peer;
    HelloReader answer;
    IoStatus status = IoStatus::more;
    ASSERT_TRUE(eventually([&] {
      EXPECT_EQ(acceptor.poll(&peer), ncclSuccess) << lastError();
      if (peer == nullptr) status = answer.poll(fd.get());
      return peer != nullptr || status != IoStatus::more;
    }));
    EXPECT_EQ(peer != nullptr, at == untouched);
    if (peer != nullptr) {
      EXPECT_EQ(peer->body, body);
      continue;
    }
    ASSERT_EQ(status, IoStatus::done);
    EXPECT_EQ(answer.hello().kind, HelloKind::reject);
    EXPECT_EQ(answer.hello().status, RejectStatus::proof);
  }
}

TEST(Handshake, aReplyThatWasChangedEndsTheConnector) {
  for (const size_t at : changes) {
    SCOPED_TRACE(at);
    UniqueFd listener;
    Address bound;
    ASSERT_EQ(openListener(loopback(), &listener, &bound), ncclSuccess) << lastError();
    Handle handle;
    handle.transport = TransportKind::verbs;
    bound.toHandle(&handle);
    handle.secret = {{5, 6}};
    Dialer dialer;
    ASSERT_EQ(dialer.open(handle, 1, 0, body, token), ncclSuccess) << lastError();
    UniqueFd fd;
    HelloReader reader;
    bool done = false;
    ASSERT_TRUE(eventually([&] {
      EXPECT_EQ(dialer.poll(&done), ncclSuccess) << lastError();
      if (!fd) fd.reset(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK));
      return fd && reader.poll(fd.get()) == IoStatus::done;
    }));
    EXPECT_TRUE(reader.proven(handle.secret, token));
    Hello reply = reader.hello();
    reply.kind = HelloKind::reply;
    Bytes bytes = message(reply, body, handle.secret);
    if (at != untouched) bytes[at] ^= 4;
    ASSERT_EQ(send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
    ncclResult_t result = ncclSuccess;
    ASSERT_TRUE(eventually([&] {
      result = dialer.poll(&done);
      return done || result != ncclSuccess;
    }));
    EXPECT_EQ(result, at == untouched ? ncclSuccess : ncclRemoteError);
    EXPECT_EQ(done, at == untouched);
  }
}

} // namespace
} // namespace net
} // namespace moe
