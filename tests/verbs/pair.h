// Both ends of verbs connections in this process, driven by one thread, on the fake verbs library.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "net/engine.h"
#include "net/socket.h"

namespace moe {
namespace net {

extern std::atomic<int> failovers;         // paths given up, by either side, in this test
void fakeFault(const std::string& script); // see tests/fakeverbs/faults.cc
int fakeFired();                           // how often rules have acted since the last clear
int queuesWith(int serviceLevel, int trafficClass);

// Memory between guards, registered on a connection.
class Block {
 public:
  Block(Connection* connection, size_t bytes, bool strictOrder = false);
  ~Block();
  Block(const Block&) = delete;
  char* data() { return bytes_.data() + guard; }
  size_t size() const { return bytes_.size() - 2 * guard; }
  void fill(uint64_t seed);
  void poison();
  bool guardsIntact() const;
  Region* region() const { return region_; }
  RemoteRegion remote() const;

 private:
  static constexpr size_t guard = 256;
  Connection* connection_;
  std::vector<char> bytes_;
  Region* region_ = nullptr;
};

class VerbsPair : public testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;
  int merged(const std::vector<int>& members);
  void connect(int senderDev, int receiverDev);
  static bool eventually(const std::function<bool()>& condition, double seconds = 20);
  // Polls both ends until the request is done; false, with lastError, if its own end fails.
  bool finish(Connection* connection, Request* request, size_t* bytes = nullptr);
  // So many messages of random sizes up to maxBytes, in groups of up to maxMembers, whose data and order are compared.
  // Before message `at` is posted, `then` is called.  The results are the first errors of each side.
  struct Outcome {
    ncclResult_t sender = ncclSuccess, receiver = ncclSuccess;
    std::string senderText, receiverText;
    int received = 0;
    bool hung = false;
    bool good(int count) const {
      return sender == ncclSuccess && receiver == ncclSuccess && received == count && !hung;
    }
  };
  Outcome stream(int count, size_t maxBytes, int maxMembers, int at = -1, const std::function<void()>& then = nullptr);

  std::unique_ptr<Engine> engine;
  std::unique_ptr<Connection> sender, receiver;
  CommConfig config;
  std::mt19937_64 random;
};

} // namespace net
} // namespace moe
