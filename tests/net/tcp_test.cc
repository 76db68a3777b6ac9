// The TCP transport: both ends in this process, driven by one thread, as a strict test of "nothing blocks".
#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>

#include "base/error.h"
#include "net/engine.h"
#include "net/handshake.h"
#include "net/socket.h"

using namespace moe;
using namespace moe::net;

namespace {

struct Environment : testing::Environment {
  void SetUp() override {
    setenv("NCCL_MOE_NET_TRANSPORT", "tcp", 1);
    setenv("NCCL_MOE_NET_IFNAME", "lo", 1);
    setenv("NCCL_MOE_NET_TCP_SOCKETS", "3", 1);
    setenv("NCCL_MOE_NET_TCP_THREADS", "2", 1);
    setenv("NCCL_MOE_NET_HANDSHAKE_TIMEOUT_MS", "300", 1);
    setenv("NCCL_MOE_NET_CONNECT_TIMEOUT_MS", "3000", 1);
  }
};
const auto* const environment = testing::AddGlobalTestEnvironment(new Environment);

std::vector<char> randomData(size_t bytes, uint64_t seed) {
  std::vector<char> data(bytes + 8);
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t word = random();
    memcpy(&data[i], &word, 8);
  }
  data.resize(bytes);
  return data;
}

class Tcp : public testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(Engine::create(&engine), ncclSuccess); }

  void connectPair(std::unique_ptr<Connection>* sender, std::unique_ptr<Connection>* receiver) {
    std::unique_ptr<Listener> listener;
    char handle[handleBytes];
    ASSERT_EQ(engine->listen(0, config, handle, &listener), ncclSuccess);
    connectTo(handle, listener.get(), sender, receiver);
  }
  void connectTo(const char* handle, Listener* listener, std::unique_ptr<Connection>* sender,
                 std::unique_ptr<Connection>* receiver) {
    std::unique_ptr<Connector> connector;
    ASSERT_EQ(engine->connector(0, config, handle, &connector), ncclSuccess);
    const double end = nowSeconds() + 10;
    while ((*sender == nullptr || *receiver == nullptr) && nowSeconds() < end) {
      if (*sender == nullptr) {
        ASSERT_EQ(connector->connect(sender), ncclSuccess);
      }
      if (*receiver == nullptr) {
        ASSERT_EQ(listener->accept(receiver), ncclSuccess);
      }
    }
    ASSERT_NE(*sender, nullptr);
    ASSERT_NE(*receiver, nullptr);
  }
  static bool eventually(const std::function<bool()>& condition) {
    const double end = nowSeconds() + 20;
    while (nowSeconds() < end) {
      if (condition()) return true;
    }
    return false;
  }
  static Request* mustSend(Connection* connection, const void* data, size_t bytes, int tag, Connection* other) {
    Request* request = nullptr;
    EXPECT_TRUE(eventually([&] {
      EXPECT_EQ(connection->isend(data, bytes, tag, nullptr, &request), ncclSuccess);
      if (request == nullptr) {
        EXPECT_EQ(other->progress(), ncclSuccess);
      }
      return request != nullptr;
    }));
    return request;
  }
  static Request* mustReceive(Connection* connection, void* data, size_t bytes, int tag) {
    Request* request = nullptr;
    EXPECT_EQ(connection->irecv(1, &data, &bytes, &tag, nullptr, &request), ncclSuccess);
    EXPECT_NE(request, nullptr);
    return request;
  }
  static void finish(Connection* connection, Request* request, size_t* sizes, Connection* other) {
    bool done = false;
    EXPECT_TRUE(eventually([&] {
      EXPECT_EQ(connection->test(request, &done, sizes), ncclSuccess);
      if (!done) {
        EXPECT_EQ(other->progress(), ncclSuccess);
      }
      return done;
    }));
  }

  std::unique_ptr<Engine> engine;
  CommConfig config;
};

TEST_F(Tcp, SizesRoundEveryBoundary) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  uint64_t seed = 1;
  for (size_t bytes : {0,     1,     7,     8,     127,    128,    129,    4095,    16327,   16328,  16329,
                       16384, 65535, 65536, 65537, 131071, 131072, 262147, 1048575, 1048577, 5000001}) {
    for (bool postFirst : {true, false}) {
      const std::vector<char> data = randomData(bytes, seed++);
      std::vector<char> into(bytes + 64, 0x5a);
      Request* receive = postFirst ? mustReceive(receiver.get(), into.data(), bytes, 3) : nullptr;
      Request* send = nullptr;
      if (!postFirst) { // big messages find no room before the receive is there
        ASSERT_EQ(sender->isend(data.data(), bytes, 3, nullptr, &send), ncclSuccess);
        EXPECT_EQ(send == nullptr, bytes > 65536);
        receive = mustReceive(receiver.get(), into.data(), bytes, 3);
      }
      if (send == nullptr) send = mustSend(sender.get(), data.data(), bytes, 3, receiver.get());
      size_t sent = 99, received = 99;
      finish(sender.get(), send, &sent, receiver.get());
      finish(receiver.get(), receive, &received, sender.get());
      EXPECT_EQ(sent, bytes);
      EXPECT_EQ(received, bytes);
      EXPECT_EQ(memcmp(into.data(), data.data(), bytes), 0) << bytes;
      for (size_t i = bytes; i < into.size(); i++) ASSERT_EQ(into[i], 0x5a) << "written past the message";
    }
  }
}

TEST_F(Tcp, ALargerReceiveTellsTheTrueSizeAndASmallerOneClamps) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  const size_t cases[][2] = {{10, 100},  {100, 1000000},   {70000, 1000000}, {100, 10},
                             {60000, 0}, {200000, 100000}, {200000, 10},     {200000, 0}};
  for (const auto& c : cases) {
    const std::vector<char> data = randomData(c[0], c[0] + c[1]);
    std::vector<char> into(c[1] + 64, 0x33);
    Request* receive = mustReceive(receiver.get(), into.data(), c[1], 1);
    Request* send = mustSend(sender.get(), data.data(), c[0], 1, receiver.get());
    size_t received = 0;
    finish(sender.get(), send, nullptr, receiver.get());
    finish(receiver.get(), receive, &received, sender.get());
    const size_t expected = std::min(c[0], c[1]);
    EXPECT_EQ(received, expected);
    EXPECT_EQ(memcmp(into.data(), data.data(), expected), 0);
    for (size_t i = expected; i < into.size(); i++) ASSERT_EQ(into[i], 0x33);
  }
}

TEST_F(Tcp, GroupsMatchByTagInAnyOrder) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  std::mt19937_64 random(11);
  for (int round = 0; round < 60; round++) {
    const int n = 1 + static_cast<int>(random() % maxGroup);
    std::vector<std::vector<char>> data, into;
    std::vector<int> tags, order;
    std::vector<size_t> sizes;
    std::vector<void*> pointers;
    for (int i = 0; i < n; i++) {
      const size_t bytes = random() % 4 == 0 ? 0 : random() % (random() % 2 == 0 ? 1000 : 300000);
      data.push_back(randomData(bytes, random()));
      into.emplace_back(bytes + 16, 0x11);
      tags.push_back(100 + i);
      order.push_back(i);
    }
    for (int i = 0; i < n; i++) {
      pointers.push_back(into[i].data());
      sizes.push_back(into[i].size());
    }
    std::shuffle(order.begin(), order.end(), random);
    Request* receive = nullptr;
    const bool late = round % 3 == 0;
    std::vector<Request*> sends;
    if (!late) {
      ASSERT_EQ(receiver->irecv(n, pointers.data(), sizes.data(), tags.data(), nullptr, &receive), ncclSuccess);
      ASSERT_NE(receive, nullptr);
    }
    std::vector<int> left;
    for (int i : order) {
      Request* send = nullptr;
      ASSERT_EQ(sender->isend(data[i].data(), data[i].size(), tags[i], nullptr, &send), ncclSuccess);
      if (send != nullptr) {
        sends.push_back(send);
      } else {
        left.push_back(i);
      }
    }
    if (late) {
      ASSERT_EQ(receiver->irecv(n, pointers.data(), sizes.data(), tags.data(), nullptr, &receive), ncclSuccess);
    }
    for (int i : left) sends.push_back(mustSend(sender.get(), data[i].data(), data[i].size(), tags[i], receiver.get()));
    for (Request* send : sends) finish(sender.get(), send, nullptr, receiver.get());
    size_t received[maxGroup];
    finish(receiver.get(), receive, received, sender.get());
    for (int i = 0; i < n; i++) {
      ASSERT_EQ(received[i], data[i].size());
      ASSERT_EQ(memcmp(into[i].data(), data[i].data(), received[i]), 0);
    }
  }
}

TEST_F(Tcp, AMissingTagLeavesTheGroupPending) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  char a[8], b[8];
  void* pointers[2] = {a, b};
  size_t sizes[2] = {8, 8};
  int tags[2] = {1, 2};
  Request* receive = nullptr;
  ASSERT_EQ(receiver->irecv(2, pointers, sizes, tags, nullptr, &receive), ncclSuccess);
  Request* first = mustSend(sender.get(), "11111111", 8, 1, receiver.get());
  Request* wrong = mustSend(sender.get(), "33333333", 8, 3, receiver.get());
  finish(sender.get(), first, nullptr, receiver.get());
  finish(sender.get(), wrong, nullptr, receiver.get());
  for (int i = 0; i < 1000; i++) {
    bool done = true;
    ASSERT_EQ(receiver->test(receive, &done, nullptr), ncclSuccess);
    ASSERT_FALSE(done);
  }
  Request* second = mustSend(sender.get(), "22222222", 8, 2, receiver.get());
  finish(sender.get(), second, nullptr, receiver.get());
  finish(receiver.get(), receive, nullptr, sender.get());
  EXPECT_EQ(memcmp(b, "22222222", 8), 0);
}

TEST_F(Tcp, GroupsOfNineAndOfNoneAreRefused) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  void* pointers[9] = {};
  size_t sizes[9] = {};
  int tags[9] = {};
  Request* request = nullptr;
  EXPECT_EQ(receiver->irecv(9, pointers, sizes, tags, nullptr, &request), ncclInvalidArgument);
  EXPECT_EQ(receiver->irecv(0, pointers, sizes, tags, nullptr, &request), ncclInvalidArgument);
  EXPECT_EQ(sender->irecv(1, pointers, sizes, tags, nullptr, &request), ncclInvalidUsage);
  EXPECT_EQ(receiver->isend(nullptr, 0, 0, nullptr, &request), ncclInvalidUsage);
}

TEST_F(Tcp, AFastSenderMeetsNoRoomAndGoesOnLater) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  constexpr uint64_t total = 3000;
  uint64_t sent = 0, received = 0, refused = 0;
  std::vector<uint64_t> values(total);
  std::vector<std::pair<Request*, size_t>> sends;
  auto push = [&] {
    Request* request = nullptr;
    values[sent] = sent * 0x9e3779b97f4a7c15ull;
    ASSERT_EQ(sender->isend(&values[sent], 8, 5, nullptr, &request), ncclSuccess);
    if (request == nullptr) {
      refused++;
    } else {
      sends.emplace_back(request, sent++);
    }
    for (size_t i = 0; i < sends.size();) {
      bool done = false;
      ASSERT_EQ(sender->test(sends[i].first, &done, nullptr), ncclSuccess);
      if (done) {
        sends.erase(sends.begin() + static_cast<ptrdiff_t>(i));
      } else {
        i++;
      }
    }
  };
  for (int i = 0; i < 1000; i++) push();
  EXPECT_EQ(sent, 256u); // the window
  EXPECT_GT(refused, 0u);
  ASSERT_TRUE(eventually([&] {
    if (sent < total) push();
    uint64_t value = 0;
    Request* request = mustReceive(receiver.get(), &value, 8, 5);
    finish(receiver.get(), request, nullptr, sender.get());
    EXPECT_EQ(value, received * 0x9e3779b97f4a7c15ull);
    received++;
    return received == total || HasFailure();
  }));
}

TEST_F(Tcp, RequestsRunOutAndComeBack) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  std::vector<uint32_t> into(maxRequests, 0);
  std::vector<Request*> receives;
  for (int i = 0; i < maxRequests; i++) receives.push_back(mustReceive(receiver.get(), &into[i], 4, 0));
  void* extra = into.data();
  size_t bytes = 4;
  int tag = 0;
  Request* request = nullptr;
  ASSERT_EQ(receiver->irecv(1, &extra, &bytes, &tag, nullptr, &request), ncclSuccess);
  EXPECT_EQ(request, nullptr);
  for (uint32_t i = 0; i < maxRequests; i++) {
    const uint32_t value = i + 1000;
    finish(sender.get(), mustSend(sender.get(), &value, 4, 0, receiver.get()), nullptr, receiver.get());
  }
  for (uint32_t i = 0; i < maxRequests; i++) {
    finish(receiver.get(), receives[i], nullptr, sender.get());
    EXPECT_EQ(into[i], i + 1000);
  }
  EXPECT_NE(mustReceive(receiver.get(), into.data(), 4, 0), nullptr);
}

TEST_F(Tcp, ManyBigMessagesAtOnce) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  constexpr size_t bytes = 400000;
  std::vector<std::vector<char>> data, into;
  std::vector<Request*> sends, receives;
  for (int i = 0; i < maxRequests; i++) {
    data.push_back(randomData(bytes, 500 + i));
    into.emplace_back(bytes);
    receives.push_back(mustReceive(receiver.get(), into[i].data(), bytes, i % 3));
  }
  for (int i = 0; i < maxRequests; i++) {
    sends.push_back(mustSend(sender.get(), data[i].data(), bytes, i % 3, receiver.get()));
  }
  for (Request* send : sends) finish(sender.get(), send, nullptr, receiver.get());
  for (int i = 0; i < maxRequests; i++) {
    finish(receiver.get(), receives[i], nullptr, sender.get());
    ASSERT_EQ(memcmp(into[i].data(), data[i].data(), bytes), 0) << i;
  }
}

// As NCCL does it: every receive offers a whole slot, whatever comes.
TEST_F(Tcp, SmallAndBigMessagesIntoBigReceivesStayInOrder) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  constexpr size_t room = 300000;
  constexpr int total = 400, ahead = 5;
  std::mt19937_64 random(23);
  std::vector<std::vector<char>> data;
  // Runs of one kind, longer and shorter than what makes the receiver keep its grants back or give them again.
  for (bool big = false; data.size() < total; big = !big) {
    for (size_t i = random() % 25; i > 0; i--) {
      data.push_back(randomData(big ? 65537 + random() % (room - 65537) : random() % 65537, random()));
    }
  }
  std::vector<std::vector<char>> into(ahead, std::vector<char>(room));
  std::deque<Request*> receives, sends;
  size_t posted = 0, sent = 0, received = 0;
  ASSERT_TRUE(eventually([&] {
    // Now and then the sender is ahead of the receiver, now and then behind.
    const bool receiverFirst = posted / 40 % 2 == 0;
    if ((receiverFirst || sent > received + 2) && posted < data.size() && receives.size() < ahead) {
      std::fill(into[posted % ahead].begin(), into[posted % ahead].end(), '\x7e');
      receives.push_back(mustReceive(receiver.get(), into[posted % ahead].data(), room, 9));
      posted++;
    }
    if ((!receiverFirst || posted > sent) && sent < data.size()) {
      Request* request = nullptr;
      EXPECT_EQ(sender->isend(data[sent].data(), data[sent].size(), 9, nullptr, &request), ncclSuccess);
      if (request != nullptr) {
        sends.push_back(request);
        sent++;
      } else if (!receiverFirst && receives.empty()) { // a big one, for which a receive has to be there
        receives.push_back(mustReceive(receiver.get(), into[posted % ahead].data(), room, 9));
        posted++;
      }
    }
    bool done = false;
    if (!sends.empty()) {
      EXPECT_EQ(sender->test(sends.front(), &done, nullptr), ncclSuccess);
      if (done) sends.pop_front();
    }
    done = false;
    size_t bytes = 0;
    if (!receives.empty()) {
      EXPECT_EQ(receiver->test(receives.front(), &done, &bytes), ncclSuccess);
      if (done) {
        receives.pop_front();
        EXPECT_EQ(bytes, data[received].size()) << "message " << received;
        EXPECT_EQ(memcmp(into[received % ahead].data(), data[received].data(), bytes), 0) << "message " << received;
        received++;
      }
    }
    return received == data.size() || HasFailure();
  }));
}

TEST_F(Tcp, BigMessagesAfterManySmallOnesAskForTheirPlaceAtOnce) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  std::vector<char> into(200000);
  for (int i = 0; i < 50; i++) {
    Request* receive = mustReceive(receiver.get(), into.data(), into.size(), 0);
    finish(sender.get(), mustSend(sender.get(), &i, sizeof(i), 0, receiver.get()), nullptr, receiver.get());
    finish(receiver.get(), receive, nullptr, sender.get());
    ASSERT_EQ(memcmp(into.data(), &i, sizeof(i)), 0);
  }
  const std::vector<char> data = randomData(into.size(), 8);
  Request* receive = mustReceive(receiver.get(), into.data(), into.size(), 0);
  Request* send = nullptr;
  ASSERT_EQ(sender->isend(data.data(), data.size(), 0, nullptr, &send), ncclSuccess);
  ASSERT_EQ(send, nullptr); // no grant went ahead, and this call asked
  ASSERT_EQ(receiver->progress(), ncclSuccess);
  ASSERT_EQ(sender->isend(data.data(), data.size(), 0, nullptr, &send), ncclSuccess);
  ASSERT_NE(send, nullptr);
  finish(sender.get(), send, nullptr, receiver.get());
  finish(receiver.get(), receive, nullptr, sender.get());
  EXPECT_EQ(into, data);
  // From now on they go ahead again.
  receive = mustReceive(receiver.get(), into.data(), into.size(), 0);
  ASSERT_EQ(sender->isend(data.data(), data.size(), 0, nullptr, &send), ncclSuccess);
  ASSERT_NE(send, nullptr);
  finish(sender.get(), send, nullptr, receiver.get());
  finish(receiver.get(), receive, nullptr, sender.get());
}

TEST_F(Tcp, SendsWithSeveralTagsWaitForReceivesThatAreTooSmallForThem) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  const std::vector<char> data = randomData(200000, 8);
  std::vector<char> into[3] = {std::vector<char>(64, 1), std::vector<char>(64, 1), std::vector<char>(64, 1)};
  Request* receives[3];
  for (int i = 0; i < 3; i++) receives[i] = mustReceive(receiver.get(), into[i].data(), 50, i);
  Request* sends[3] = {};
  ASSERT_TRUE(eventually([&] { // in turns: none of them may start the wait of the others anew
    int under = 0;
    for (int i = 0; i < 3; i++) {
      if (sends[i] == nullptr) {
        EXPECT_EQ(sender->isend(data.data(), data.size() - size_t(i), i, nullptr, &sends[i]), ncclSuccess);
      }
      under += sends[i] != nullptr;
    }
    EXPECT_EQ(receiver->progress(), ncclSuccess);
    return under == 3;
  }));
  for (int i = 0; i < 3; i++) {
    size_t bytes = 0;
    finish(sender.get(), sends[i], nullptr, receiver.get());
    finish(receiver.get(), receives[i], &bytes, sender.get());
    EXPECT_EQ(bytes, 50u);
    EXPECT_EQ(memcmp(into[i].data(), data.data(), 50), 0);
    EXPECT_EQ(into[i][50], 1);
  }
}

TEST_F(Tcp, SmallMessagesThatCameBeforeTheirReceivesOutliveTheirSender) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  uint64_t values[20];
  for (uint64_t i = 0; i < 20; i++) {
    values[i] = i * 77;
    finish(sender.get(), mustSend(sender.get(), &values[i], 8, 4, receiver.get()), nullptr, receiver.get());
  }
  sender.reset();
  for (uint64_t i = 0; i < 20; i++) {
    uint64_t value = 0;
    Request* receive = mustReceive(receiver.get(), &value, 8, 4);
    bool done = false;
    ASSERT_TRUE(eventually([&] { return receiver->test(receive, &done, nullptr) != ncclSuccess || done; }));
    ASSERT_TRUE(done) << lastError();
    EXPECT_EQ(value, i * 77);
  }
  char byte;
  Request* more = mustReceive(receiver.get(), &byte, 1, 4);
  bool done = false;
  EXPECT_TRUE(eventually([&] { return receiver->test(more, &done, nullptr) == ncclRemoteError; }));
}

TEST_F(Tcp, ASenderWithoutCreditsLearnsThatTheReceiverIsGone) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  uint64_t value = 1;
  Request* request = nullptr;
  int sent = 0;
  for (; sent < 1000; sent++) {
    ASSERT_EQ(sender->isend(&value, 8, 0, nullptr, &request), ncclSuccess);
    if (request == nullptr) break;
    finish(sender.get(), request, nullptr, receiver.get());
  }
  ASSERT_EQ(sent, 256); // the window: nothing is posted there
  receiver.reset();
  EXPECT_TRUE(eventually([&] { return sender->isend(&value, 8, 0, nullptr, &request) == ncclRemoteError; }));
  EXPECT_EQ(sender->isend(&value, 8, 0, nullptr, &request), ncclRemoteError);
}

TEST_F(Tcp, ASignalComesAfterAllEarlierPuts) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  constexpr size_t bytes = 3 << 20;
  std::vector<char> window(bytes, 0);
  alignas(8) volatile uint64_t flags[4] = {};
  Memory memory;
  memory.data = window.data();
  memory.bytes = bytes;
  Memory flagMemory;
  flagMemory.data = const_cast<uint64_t*>(&flags[0]);
  flagMemory.bytes = sizeof(flags);
  Region *region = nullptr, *flagRegion = nullptr;
  ASSERT_EQ(receiver->registerMemory(memory, &region), ncclSuccess);
  ASSERT_EQ(receiver->registerMemory(flagMemory, &flagRegion), ncclSuccess);
  RemoteRegion remote, flag;
  ASSERT_EQ(receiver->remoteRegion(region, &remote), ncclSuccess);
  ASSERT_EQ(receiver->remoteRegion(flagRegion, &flag), ncclSuccess);
  const std::vector<char> data = randomData(bytes, 77);
  std::vector<Request*> requests;
  for (size_t at = 0; at < bytes; at += bytes / 3) {
    Request* request = nullptr;
    ASSERT_EQ(sender->put(data.data() + at, bytes / 3, nullptr, remote, at, &request), ncclSuccess);
    requests.push_back(request);
  }
  Request* request = nullptr;
  ASSERT_EQ(sender->putSignal(nullptr, 0, nullptr, remote, 0, flag, 16, 4711, &request), ncclSuccess);
  requests.push_back(request);
  ASSERT_TRUE(eventually([&] {
    EXPECT_EQ(receiver->progress(), ncclSuccess);
    EXPECT_EQ(sender->progress(), ncclSuccess);
    return flags[2] == 4711;
  }));
  EXPECT_EQ(memcmp(window.data(), data.data(), bytes), 0);
  EXPECT_EQ(flags[1], 0u);
  EXPECT_EQ(flags[3], 0u);
  for (Request* r : requests) finish(sender.get(), r, nullptr, receiver.get());
  // What must not work.
  EXPECT_EQ(sender->put(data.data(), 16, nullptr, remote, bytes - 8, &request), ncclInvalidArgument);
  EXPECT_EQ(sender->putSignal(nullptr, 0, nullptr, remote, 0, flag, 12, 1, &request), ncclInvalidArgument);
  EXPECT_EQ(sender->putSignal(nullptr, 0, nullptr, remote, 0, flag, 32, 1, &request), ncclInvalidArgument);
  RemoteRegion forged = remote;
  forged.bytes = UINT64_MAX;
  ASSERT_EQ(sender->put(data.data(), 16, nullptr, forged, bytes, &request), ncclSuccess);
  EXPECT_TRUE(eventually([&] { return receiver->progress() == ncclRemoteError; }));
  EXPECT_NE(strstr(lastError(), "not registered"), nullptr) << lastError();
}

TEST_F(Tcp, RegistrationRefusesWhatItCannotDo) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  char byte;
  Memory memory;
  memory.data = &byte;
  memory.bytes = 1;
  memory.kind = ptrCuda;
  Region* region = nullptr;
  EXPECT_EQ(sender->registerMemory(memory, &region), ncclInvalidArgument);
  memory.kind = ptrHost;
  memory.data = nullptr;
  EXPECT_EQ(sender->registerMemory(memory, &region), ncclInvalidArgument);
  EXPECT_EQ(sender->deregisterMemory(nullptr), ncclSuccess);
  memory.data = &byte;
  ASSERT_EQ(sender->registerMemory(memory, &region), ncclSuccess);
  EXPECT_EQ(sender->deregisterMemory(region), ncclSuccess);
  EXPECT_EQ(sender->deregisterMemory(region), ncclInvalidArgument);
}

TEST_F(Tcp, APeerThatClosesIsReportedAndSentDataStillArrives) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  const std::vector<char> data = randomData(300000, 5);
  std::vector<char> small(8), big(300000);
  Request* first = mustReceive(receiver.get(), small.data(), 8, 0);
  Request* second = mustReceive(receiver.get(), big.data(), big.size(), 0);
  Request* third = mustReceive(receiver.get(), small.data(), 8, 0);
  finish(sender.get(), mustSend(sender.get(), "12345678", 8, 0, receiver.get()), nullptr, receiver.get());
  finish(sender.get(), mustSend(sender.get(), data.data(), data.size(), 0, receiver.get()), nullptr, receiver.get());
  sender.reset();
  bool done = false;
  ASSERT_TRUE(eventually([&] { return receiver->test(first, &done, nullptr) != ncclSuccess || done; }));
  EXPECT_TRUE(done);
  done = false;
  ASSERT_TRUE(eventually([&] { return receiver->test(second, &done, nullptr) != ncclSuccess || done; }));
  EXPECT_TRUE(done);
  EXPECT_EQ(big, data);
  EXPECT_TRUE(eventually([&] { return receiver->test(third, &done, nullptr) == ncclRemoteError; }));
  EXPECT_EQ(receiver->test(third, &done, nullptr), ncclRemoteError);
  EXPECT_NE(strstr(lastError(), "closed"), nullptr) << lastError();
}

TEST_F(Tcp, AReceiverThatClosesEndsWaitingSends) {
  std::unique_ptr<Connection> sender, receiver;
  connectPair(&sender, &receiver);
  const std::vector<char> data = randomData(300000, 5);
  Request* request = nullptr;
  ASSERT_EQ(sender->isend(data.data(), data.size(), 0, nullptr, &request), ncclSuccess);
  EXPECT_EQ(request, nullptr);
  receiver.reset();
  EXPECT_TRUE(eventually([&] {
    const ncclResult_t result = sender->isend(data.data(), data.size(), 0, nullptr, &request);
    return result == ncclRemoteError;
  }));
}

TEST_F(Tcp, StrangersDoNotDisturbTheListener) {
  std::unique_ptr<Listener> listener;
  char handle[handleBytes];
  ASSERT_EQ(engine->listen(0, config, handle, &listener), ncclSuccess);
  Handle parsed;
  ASSERT_EQ(parseHandle(handle, handleBytes, &parsed), ParseResult::ok);
  const Address address(parsed);
  std::vector<UniqueFd> strangers;
  auto stranger = [&](const void* bytes, size_t n) {
    UniqueFd fd(socket(AF_INET, SOCK_STREAM, 0));
    ASSERT_EQ(connect(fd.get(), address.get(), address.size()), 0);
    if (n != 0) {
      ASSERT_EQ(send(fd.get(), bytes, n, 0), static_cast<ssize_t>(n));
    }
    strangers.push_back(std::move(fd));
  };
  stranger(nullptr, 0); // says nothing, stays
  const std::vector<char> noise = randomData(500, 3);
  stranger(noise.data(), noise.size());
  stranger("GET / HTTP/1.1\r\nHost: x\r\n\r\nsomething to fill the header with, and more", 70);
  Hello hello; // knows the protocol, but not the secret
  stranger(&hello, sizeof(hello));
  stranger(&hello, 20); // stops in the middle
  Hello newer = hello;
  newer.version = wireVersion + 1;
  stranger(&newer, sizeof(newer));
  std::unique_ptr<Connection> sender, receiver;
  const double begin = nowSeconds();
  connectTo(handle, listener.get(), &sender, &receiver);
  EXPECT_LT(nowSeconds() - begin, 0.25); // before the silent ones are dropped
  // Whom the listener turned away: all but the silent and the slow one, which go when their time is up.
  std::unique_ptr<Connection> none;
  ASSERT_TRUE(eventually([&] {
    EXPECT_EQ(listener->accept(&none), ncclSuccess);
    EXPECT_EQ(none, nullptr);
    return nowSeconds() - begin > 0.5;
  }));
  for (UniqueFd& fd : strangers) {
    char scratch[256];
    ssize_t n;
    while ((n = recv(fd.get(), scratch, sizeof(scratch), 0)) > 0) {
    }
    EXPECT_TRUE(n == 0 || errno == ECONNRESET);
  }
  char value = 0;
  Request* receive = mustReceive(receiver.get(), &value, 1, 0);
  finish(sender.get(), mustSend(sender.get(), "x", 1, 0, receiver.get()), nullptr, receiver.get());
  finish(receiver.get(), receive, nullptr, sender.get());
  EXPECT_EQ(value, 'x');
}

TEST_F(Tcp, AnotherJobIsTurnedAwayWithAReason) {
  std::unique_ptr<Listener> listener;
  char handle[handleBytes];
  config.commId = 1;
  ASSERT_EQ(engine->listen(0, config, handle, &listener), ncclSuccess);
  config.commId = 2;
  std::unique_ptr<Connector> connector;
  ASSERT_EQ(engine->connector(0, config, handle, &connector), ncclSuccess);
  std::unique_ptr<Connection> sender, receiver;
  ncclResult_t result = ncclSuccess;
  ASSERT_TRUE(eventually([&] {
    EXPECT_EQ(listener->accept(&receiver), ncclSuccess);
    EXPECT_EQ(receiver, nullptr);
    result = connector->connect(&sender);
    return result != ncclSuccess;
  }));
  EXPECT_EQ(result, ncclRemoteError);
  EXPECT_NE(strstr(lastError(), "job token"), nullptr) << lastError();
}

TEST_F(Tcp, BadHandlesAreRefused) {
  std::unique_ptr<Connector> connector;
  std::vector<char> handle(handleBytes, 0);
  EXPECT_EQ(engine->connector(0, config, handle.data(), &connector), ncclInvalidArgument);
  handle.assign(handleBytes, '\xff');
  EXPECT_EQ(engine->connector(0, config, handle.data(), &connector), ncclInvalidArgument);
  std::unique_ptr<Listener> listener;
  EXPECT_EQ(engine->listen(99, config, handle.data(), &listener), ncclInvalidArgument);
  EXPECT_EQ(engine->listen(-1, config, handle.data(), &listener), ncclInvalidArgument);
}

TEST_F(Tcp, AListenerWithoutPollingEndsConnectInTime) {
  std::unique_ptr<Listener> listener;
  char handle[handleBytes];
  ASSERT_EQ(engine->listen(0, config, handle, &listener), ncclSuccess);
  std::unique_ptr<Connector> connector;
  ASSERT_EQ(engine->connector(0, config, handle, &connector), ncclSuccess);
  std::unique_ptr<Connection> sender;
  const double begin = nowSeconds();
  ncclResult_t result = ncclSuccess;
  ASSERT_TRUE(eventually([&] { return (result = connector->connect(&sender)) != ncclSuccess; }));
  EXPECT_EQ(result, ncclRemoteError);
  EXPECT_LT(nowSeconds() - begin, 6);
}

TEST_F(Tcp, ConnectionsComeAndGo) {
  auto openDescriptors = [] {
    int count = 0;
    for (int fd = 0; fd < 1024; fd++) count += fcntl(fd, F_GETFD) != -1 ? 1 : 0;
    return count;
  };
  int before = 0;
  for (int i = 0; i < 120; i++) {
    std::unique_ptr<Connection> sender, receiver;
    connectPair(&sender, &receiver);
    if (HasFatalFailure()) return;
    if (i % 2 == 0) {
      int value = 0;
      Request* receive = mustReceive(receiver.get(), &value, sizeof(value), 0);
      finish(sender.get(), mustSend(sender.get(), &i, sizeof(i), 0, receiver.get()), nullptr, receiver.get());
      finish(receiver.get(), receive, nullptr, sender.get());
      EXPECT_EQ(value, i);
    }
    if (i % 3 == 0) receiver.reset();
    sender.reset();
    receiver.reset();
    if (i == 10) before = openDescriptors();
  }
  EXPECT_TRUE(eventually([&] { return openDescriptors() <= before; })) << openDescriptors() << " against " << before;
}

} // namespace
