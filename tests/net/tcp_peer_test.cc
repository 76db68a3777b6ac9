// A peer that passed the handshake but does not keep to the protocol: whatever it sends, only the receive's own buffer
// is written, and only until the receive is done.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <thread>
#include <vector>

#include "net/tcp_connection.h"

namespace moe::net {
namespace {

constexpr size_t kBytes = 4096;

// A receiving connection whose peer is the test, with a receive of kBytes that has been granted.
class TcpPeer : public testing::Test {
 protected:
  void SetUp() override {
    int stream[2], chunks[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, stream), 0);
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, chunks), 0);
    stream_.reset(stream[1]);
    chunks_.reset(chunks[1]);
    std::vector<UniqueFd> sockets;
    sockets.emplace_back(stream[0]);
    sockets.emplace_back(chunks[0]);
    ASSERT_EQ(poller_.start(), ncclSuccess);
    TcpOptions options;
    options.sender = false;
    options.inlineMax = 256;
    options.window = 8;
    options.device = "test";
    options.peer = "test";
    connection_ = std::make_unique<TcpConnection>(options, std::move(sockets), std::vector<Poller*>{&poller_});
    Memory memory;
    memory.data = buffer_.data();
    memory.bytes = kBytes;
    Region* region = nullptr;
    ASSERT_EQ(connection_->registerMemory(memory, &region), ncclSuccess);
    void* data = buffer_.data();
    const size_t room = kBytes;
    const int tag = 1;
    ASSERT_EQ(connection_->irecv(1, &data, &room, &tag, &region, &request_), ncclSuccess);
    ASSERT_NE(request_, nullptr);
    size_t got = 0;
    for (int i = 0; i < 2000 && got < sizeof(grant_); i++) {
      ASSERT_EQ(connection_->progress(), ncclSuccess);
      const ssize_t n = recv(stream_.get(), reinterpret_cast<char*>(&grant_) + got, sizeof(grant_) - got, 0);
      if (n > 0) got += static_cast<size_t>(n);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_EQ(got, sizeof(grant_));
    ASSERT_EQ(grant_.kind, MessageKind::grant);
  }

  void sendChunk(uint64_t offset, uint64_t bytes, uint64_t total, size_t payload) {
    ChunkHeader header;
    header.slot = static_cast<uint32_t>(grant_.key);
    header.generation = grant_.value;
    header.offset = offset;
    header.bytes = bytes;
    header.total = total;
    std::string all(reinterpret_cast<const char*>(&header), sizeof(header));
    all.append(payload, 'x');
    ASSERT_EQ(send(chunks_.get(), all.data(), all.size(), MSG_NOSIGNAL), static_cast<ssize_t>(all.size()));
    std::this_thread::sleep_for(std::chrono::milliseconds(50)); // until the poller has it: the sockets are not ordered
  }
  void sendWhole(size_t bytes) {
    MessageHeader header;
    header.kind = MessageKind::data;
    header.tag = grant_.tag;
    header.index = grant_.index;
    header.bytes = bytes;
    std::string all(reinterpret_cast<const char*>(&header), sizeof(header));
    all.append(bytes, 'y');
    ASSERT_EQ(send(stream_.get(), all.data(), all.size(), MSG_NOSIGNAL), static_cast<ssize_t>(all.size()));
  }
  // ncclSuccess once the receive is done, or what ended it.
  ncclResult_t outcome(size_t* bytes) {
    for (int i = 0; i < 2000; i++) {
      const ncclResult_t progressed = connection_->progress();
      if (progressed != ncclSuccess) return progressed;
      bool done = false;
      const ncclResult_t tested = connection_->test(request_, &done, bytes);
      if (tested != ncclSuccess || done) return tested;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return ncclInProgress;
  }

  UniqueFd stream_, chunks_;
  std::vector<char> buffer_ = std::vector<char>(kBytes, 'p');
  Poller poller_;
  std::unique_ptr<TcpConnection> connection_;
  Request* request_ = nullptr;
  MessageHeader grant_;
};

TEST_F(TcpPeer, ChunksThatAddUpAreAMessage) {
  sendChunk(0, 1000, kBytes, 1000);
  sendChunk(1000, kBytes - 1000, kBytes, kBytes - 1000);
  size_t bytes = 0;
  EXPECT_EQ(outcome(&bytes), ncclSuccess);
  EXPECT_EQ(bytes, kBytes);
  EXPECT_EQ(buffer_, std::vector<char>(kBytes, 'x'));
}

TEST_F(TcpPeer, ChunksThatOverlapAreRefused) {
  sendChunk(0, 3000, kBytes, 3000);
  sendChunk(1000, 3000, kBytes, 3000);
  size_t bytes = 0;
  EXPECT_EQ(outcome(&bytes), ncclRemoteError);
}

TEST_F(TcpPeer, ChunksOfAnotherTotalAreRefused) {
  sendChunk(0, 1000, kBytes, 1000);
  sendChunk(1000, 1000, 2000, 1000);
  size_t bytes = 0;
  EXPECT_EQ(outcome(&bytes), ncclRemoteError);
}

TEST_F(TcpPeer, AMessageThatCameInChunksDoesNotComeWhole) {
  sendChunk(0, 2000, kBytes, 0); // its payload could come when the buffer is no longer the receive's
  sendWhole(64);
  size_t bytes = 0;
  EXPECT_EQ(outcome(&bytes), ncclRemoteError);
}

TEST_F(TcpPeer, AMessageThatCameWholeDoesNotComeInChunks) {
  sendWhole(64);
  size_t bytes = 0;
  EXPECT_EQ(outcome(&bytes), ncclSuccess);
  EXPECT_EQ(bytes, 64u);
  sendChunk(0, kBytes, kBytes, kBytes);
  EXPECT_EQ(buffer_[64], 'p');
}

} // namespace
} // namespace moe::net
