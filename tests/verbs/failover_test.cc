// Connections over several ports, and what happens when ports fail.
#include <cstring>

#include "pair.h"

namespace moe {
namespace net {
namespace {

using Failover = VerbsPair;

TEST_F(Failover, mergeTakesWhatFitsTogether) {
  int dev = -1;
  EXPECT_EQ(engine->merge({0, 1}, &dev), ncclSuccess);
  EXPECT_EQ(dev, 6);
  EXPECT_EQ(engine->nDevices(), 7);
  EXPECT_EQ(engine->device(6).name, "fake0:1+fake1:1");
  EXPECT_EQ(engine->device(6).speedMbps, engine->device(0).speedMbps + engine->device(1).speedMbps);
  EXPECT_EQ(engine->device(6).members, (std::vector<int>{0, 1}));
  EXPECT_EQ(engine->merge({1, 0}, &dev), ncclSuccess);
  EXPECT_EQ(dev, 7); // another order prefers another port
  EXPECT_EQ(engine->merge({0, 1}, &dev), ncclSuccess);
  EXPECT_EQ(dev, 6); // no third one
  EXPECT_EQ(engine->merge({3}, &dev), ncclSuccess);
  EXPECT_EQ(dev, 3);
  EXPECT_EQ(engine->merge({}, &dev), ncclInvalidArgument);
  EXPECT_EQ(engine->merge({0, 0}, &dev), ncclInvalidArgument);
  EXPECT_EQ(engine->merge({0, 99}, &dev), ncclInvalidArgument);
  EXPECT_EQ(engine->merge({-1, 0}, &dev), ncclInvalidArgument);
  EXPECT_EQ(engine->merge({6, 2}, &dev), ncclInvalidArgument);
  EXPECT_NE(strstr(lastError(), "merged"), nullptr) << lastError();
  EXPECT_EQ(engine->merge({0, 1, 2, 3, 4}, &dev), ncclInvalidArgument);
}

TEST_F(Failover, messagesAreStripedOverAllPorts) {
  const int pairs[][2] = {
    {merged({0, 1}), merged({2, 3})}, {merged({0, 1}), 2}, {0, merged({2, 3})}, {merged({0, 1, 2}), merged({3, 4})}};
  for (const auto& pair : pairs) {
    SCOPED_TRACE(engine->device(pair[0]).name + " to " + engine->device(pair[1]).name);
    connect(pair[0], pair[1]);
    ASSERT_FALSE(HasFatalFailure());
    const Outcome out = stream(150, 100000, 8);
    EXPECT_TRUE(out.good(150)) << out.senderText << out.receiverText;
  }
}

TEST_F(Failover, eachPortOfAMergedDeviceCarriesData) {
  // A connection that did not use a port would not notice that nothing can be posted there.
  for (const char* device : {"fake0", "fake1"}) {
    connect(merged({0, 1}), merged({2, 3}));
    fakeFault("clear");
    fakeFault(std::string("post_send@") + device + "#1+=EIO");
    Block from(sender.get(), 100000), into(receiver.get(), 100000);
    from.fill(1);
    void* data = into.data();
    const size_t room = into.size();
    const int tag = 0;
    Region* region = into.region();
    Request *receive = nullptr, *send = nullptr;
    ASSERT_EQ(receiver->irecv(1, &data, &room, &tag, &region, &receive), ncclSuccess);
    ASSERT_TRUE(eventually([&] {
      EXPECT_EQ(sender->isend(from.data(), from.size(), 0, from.region(), &send), ncclSuccess) << lastError();
      return send != nullptr || HasFailure();
    }));
    ASSERT_TRUE(finish(sender.get(), send)) << lastError();
    ASSERT_TRUE(finish(receiver.get(), receive)) << lastError();
    EXPECT_EQ(memcmp(from.data(), into.data(), from.size()), 0);
    // The port is given up now: whoever posts there fails no more.
    fakeFault("clear");
    fakeFault(std::string("post_send@") + device + "#1+=kill");
    const Outcome out = stream(50, 50000, 4);
    fakeFault("clear");
    EXPECT_TRUE(out.good(50)) << out.senderText << out.receiverText;
  }
}

TEST_F(Failover, aPortThatGoesDownIsSurvived) {
  for (const char* device : {"fake0", "fake1", "fake2", "fake3"}) {
    SCOPED_TRACE(device);
    fakeFault("now@fake0=portup;now@fake1=portup;now@fake2=portup;now@fake3=portup");
    connect(merged({0, 1}), merged({2, 3}));
    ASSERT_FALSE(HasFatalFailure());
    const Outcome out = stream(120, 100000, 4, 40, [&] { fakeFault(std::string("now@") + device + "=portdown"); });
    EXPECT_TRUE(out.good(120)) << out.senderText << out.receiverText << out.received;
    EXPECT_EQ(failovers.exchange(0), 2); // on both sides
  }
}

// Completions that lie: the data has come, the sender reads that it has not; and receives that fail.
TEST_F(Failover, failedCompletionsLeaveEveryMessageOnce) {
  int failures = 0; // that were noticed
  for (const char* point : {"wc.send@fake0", "wc.send@fake1", "wc.recv@fake2", "wc.recv@fake3", "wc.send@fake2"}) {
    for (int nth : {1, 2, 3, 5, 8, 13, 21, 34}) {
      const std::string rule = std::string(point) + "#" + std::to_string(nth) + "=status:RETRY_EXC_ERR";
      SCOPED_TRACE(rule);
      connect(merged({0, 1}), merged({2, 3}));
      ASSERT_FALSE(HasFatalFailure());
      fakeFault("clear;" + rule);
      const Outcome out = stream(60, 60000, 3);
      fakeFault("clear");
      ASSERT_TRUE(out.good(60)) << out.senderText << out.receiverText << out.received;
      failures += failovers.exchange(0) > 0;
    }
  }
  EXPECT_GT(failures, 30); // a rare point may not come up so often
}

TEST_F(Failover, aSecondFailureIsSurvivedWhileAThirdPortWorks) {
  for (int round = 0; round < 12; round++) {
    connect(merged({0, 1, 2}), merged({3, 4, 5}));
    ASSERT_FALSE(HasFatalFailure());
    // Two of three paths, on one side or on both, at moments that may overlap, also in what is sent again.
    const std::string first = round % 2 == 0 ? "wc.send@fake0" : "wc.recv@fake4";
    const std::string second = round % 3 == 0 ? "wc.send@fake2" : round % 3 == 1 ? "post_send@fake2" : "wc.recv@fake5";
    const std::string what = second[0] == 'p' ? "EIO" : "status:RETRY_EXC_ERR";
    const std::string rules = first + "#" + std::to_string(5 + round) + "=status:GENERAL_ERR;" + second + "#" +
                              std::to_string(6 + round) + "+=" + what;
    SCOPED_TRACE(rules);
    fakeFault("clear;" + rules);
    const Outcome out = stream(100, 60000, 4);
    fakeFault("clear");
    ASSERT_TRUE(out.good(100)) << out.senderText << out.receiverText << out.received;
    ASSERT_GE(failovers.exchange(0), 3);
  }
}

// A CTS entry that is stuck on a port that works must not come behind that of its slot's next group.  Group 3 has its
// entry stuck on queue pair 3, of the first port, and group 2 its own on the third port, which then fails.
TEST_F(Failover, aLateEntryOfAWorkingPortOverwritesNoNewerOne) {
  constexpr size_t total = 80;
  connect(merged({0, 1, 2}), merged({3, 4, 5}));
  ASSERT_FALSE(HasFatalFailure());
  Block from(sender.get(), total * 64), into(receiver.get(), total * 64);
  from.fill(random());
  into.poison();
  std::vector<Request*> sends, receives;
  size_t sent = 0, received = 0; // completed
  const auto post = [&] {
    void* data = into.data() + receives.size() * 64;
    const size_t room = 64;
    const int tag = 0;
    Region* region = into.region();
    Request* request = nullptr;
    EXPECT_EQ(receiver->irecv(1, &data, &room, &tag, &region, &request), ncclSuccess) << lastError();
    if (request != nullptr) receives.push_back(request);
    return request != nullptr;
  };
  const auto poll = [&] {
    bool done = false;
    Request* request = nullptr;
    EXPECT_EQ(receiver->progress(), ncclSuccess) << lastError();
    if (sends.size() < receives.size()) {
      const char* data = from.data() + sends.size() * 64;
      EXPECT_EQ(sender->isend(data, 64, 0, from.region(), &request), ncclSuccess) << lastError();
      if (request != nullptr) sends.push_back(request);
    }
    if (sent < sends.size()) {
      EXPECT_EQ(sender->test(sends[sent], &done, nullptr), ncclSuccess) << lastError();
      if (done) sent++;
    } else {
      EXPECT_EQ(sender->progress(), ncclSuccess) << lastError();
    }
    done = false;
    if (received < receives.size()) {
      EXPECT_EQ(receiver->test(receives[received], &done, nullptr), ncclSuccess) << lastError();
      if (done) received++;
    }
  };
  ASSERT_TRUE(post() && post());
  ASSERT_TRUE(eventually([&] {
    poll();
    return received == 2 || HasFailure();
  }));
  fakeFault("post_send@fake5#1=stall;post_send@fake3#1=stall");
  ASSERT_TRUE(post() && post());
  fakeFault("now@fake5=event:QP_FATAL");
  ASSERT_TRUE(eventually([&] {
    poll();
    return received > 2 || HasFailure();
  }));
  EXPECT_EQ(failovers, 2);
  // Time enough for the stuck entry to be written again over another queue pair, for its slot to be taken by group 35,
  // and for that one's entry to arrive.
  for (int i = 0; i < 20000 && !HasFailure(); i++) {
    if (receives.size() < total) post();
    poll();
  }
  fakeFault("now@fake3=go");
  EXPECT_TRUE(eventually([&] {
    if (receives.size() < total) post();
    poll();
    return (received == total && sent == total) || HasFailure();
  }))
    << received << " groups came";
  EXPECT_EQ(memcmp(into.data(), from.data(), total * 64), 0);
}

TEST_F(Failover, theLastPortsFailureIsAnErrorOnBothSides) {
  connect(merged({0, 1}), merged({2, 3}));
  const double begin = nowSeconds();
  const Outcome out = stream(200, 60000, 2, 60, [&] {
    fakeFault("now@fake0=portdown;now@fake3=portdown"); // each of the two paths at one of its ends
  });
  EXPECT_FALSE(out.hung);
  EXPECT_NE(out.sender, ncclSuccess);
  EXPECT_NE(out.receiver, ncclSuccess);
  EXPECT_LT(nowSeconds() - begin, 15);
  // One of the two saw both ports fail; the other may only know that its peer has gone.
  const std::string all = out.senderText + out.receiverText;
  EXPECT_NE(all.find("had failed before"), std::string::npos) << all;
}

TEST_F(Failover, onePortAloneFailsAsEver) {
  connect(0, 2);
  const Outcome out = stream(100, 60000, 2, 30, [&] { fakeFault("now@fake0=portdown"); });
  EXPECT_FALSE(out.hung);
  EXPECT_NE(out.sender, ncclSuccess);
  EXPECT_NE(out.receiver, ncclSuccess);
  EXPECT_NE(out.senderText.find("fake0:1"), std::string::npos) << out.senderText;              // where
  EXPECT_NE(out.senderText.find("127.0.0.1"), std::string::npos) << out.senderText;            // who
  EXPECT_NE(out.senderText.find("retry"), std::string::npos) << out.senderText;                // what
  EXPECT_NE(out.senderText.find("NCCL_MOE_NET_TIMEOUT"), std::string::npos) << out.senderText; // what to do
}

TEST_F(Failover, aPeerThatDoesNotConfirmEndsItInTime) {
  connect(merged({0, 1}), merged({2, 3}));
  ASSERT_TRUE(stream(20, 60000, 2).good(20));
  Block from(sender.get(), 100000), into(receiver.get(), 100000);
  void* data = into.data();
  const size_t room = into.size();
  const int tag = 0;
  Region* region = into.region();
  Request *receive = nullptr, *send = nullptr;
  ASSERT_EQ(receiver->irecv(1, &data, &room, &tag, &region, &receive), ncclSuccess);
  fakeFault("wc.send@fake1#1=status:RETRY_EXC_ERR");
  ASSERT_TRUE(eventually([&] {
    EXPECT_EQ(sender->isend(from.data(), from.size(), 0, from.region(), &send), ncclSuccess) << lastError();
    return send != nullptr || HasFailure();
  }));
  // The receiver is not polled any more.
  const double begin = nowSeconds();
  bool done = false;
  ASSERT_TRUE(eventually([&] { return sender->test(send, &done, nullptr) != ncclSuccess || done; }));
  EXPECT_FALSE(done);
  EXPECT_NE(strstr(lastError(), "NCCL_MOE_NET_FAILOVER_TIMEOUT_MS"), nullptr) << lastError();
  EXPECT_LT(nowSeconds() - begin, 6);
}

TEST_F(Failover, whatARequestIsToBlameForIsNotTriedElsewhere) {
  connect(merged({0, 1}), merged({2, 3}));
  Block from(sender.get(), 1000);
  Request* send = nullptr;
  {
    Block into(receiver.get(), 1000);
    void* data = into.data();
    const size_t room = into.size();
    const int tag = 0;
    Region* region = into.region();
    Request* receive = nullptr;
    ASSERT_EQ(receiver->irecv(1, &data, &room, &tag, &region, &receive), ncclSuccess);
  } // the memory is not registered any more
  ASSERT_TRUE(eventually([&] {
    EXPECT_EQ(sender->isend(from.data(), from.size(), 0, from.region(), &send), ncclSuccess) << lastError();
    return send != nullptr || HasFailure();
  }));
  bool done = false;
  ASSERT_TRUE(eventually([&] { return sender->test(send, &done, nullptr) != ncclSuccess || done; }));
  EXPECT_FALSE(done);
  EXPECT_NE(strstr(lastError(), "not registered any more"), nullptr) << lastError();
}

TEST_F(Failover, randomFaultsEndWellOrInAnError) {
  int survived = 0, ended = 0;
  for (int round = 0; round < 40; round++) {
    connect(merged({0, 1, 2}), merged({3, 4}));
    ASSERT_FALSE(HasFatalFailure());
    static const char* const points[] = {"wc.send", "wc.recv", "post_send", "post_recv", "modify_qp", "poll_cq"};
    static const char* const actions[] = {
      "status:RETRY_EXC_ERR", "status:RETRY_EXC_ERR", "EIO", "ENOMEM", "EINVAL", "EIO"};
    std::string rules = "clear";
    for (uint64_t i = random() % 3 + 1; i > 0; i--) {
      const size_t what = random() % 16 == 0 ? 4 + random() % 2 : random() % 4;
      rules += std::string(";") + points[what] + "@fake" + std::to_string(random() % 5) + "#" +
               std::to_string(1 + random() % 60) + (random() % 2 == 0 ? "+=" : "=") + actions[what];
    }
    SCOPED_TRACE(rules);
    fakeFault(rules);
    const Outcome out = stream(60, 60000, 4);
    fakeFault("clear");
    ASSERT_FALSE(out.hung) << out.senderText << " | " << out.receiverText << " | " << out.received;
    ASSERT_FALSE(HasFailure());
    (out.good(60) ? survived : ended)++;
  }
  EXPECT_GT(survived, 5) << ended;
}

} // namespace
} // namespace net
} // namespace moe
