// GPUDirect without a GPU: memory that is registered as a dma-buf, for which a memfd does, and flushes.  What the fake
// verbs library writes there cannot be seen before a READ through the same device.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "base/handle.h"
#include "pair.h"

namespace moe {
namespace net {
namespace {

class GpuBlock {
 public:
  GpuBlock(Connection* connection, size_t bytes) : connection_(connection), bytes_(bytes) {
    fd_.reset(memfd_create("gpu", MFD_CLOEXEC));
    const size_t all = offset + bytes;
    EXPECT_EQ(ftruncate(fd_.get(), static_cast<off_t>(all)), 0);
    map_ = UniqueMap(mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0), all);
    EXPECT_EQ(registerIt(), ncclSuccess) << lastError();
  }
  ~GpuBlock() { EXPECT_EQ(connection_->deregisterMemory(region), ncclSuccess) << lastError(); }
  GpuBlock(const GpuBlock&) = delete;
  ncclResult_t registerIt() {
    Memory memory;
    memory.data = data();
    memory.bytes = bytes_;
    memory.kind = ptrDmabuf;
    memory.dmabufFd = fd_.get();
    memory.dmabufOffset = offset;
    return connection_->registerMemory(memory, &region);
  }
  char* data() const { return static_cast<char*>(map_.get()) + offset; }
  size_t size() const { return bytes_; }

  Region* region = nullptr;

 private:
  static constexpr size_t offset = (64 << 10) + 24;
  Connection* connection_;
  size_t bytes_;
  UniqueFd fd_;
  UniqueMap map_;
};

class Flush : public VerbsPair {
 protected:
  void SetUp() override {
    setenv("FAKEVERBS_DMABUF", "1", 1);
    VerbsPair::SetUp();
  }
  void TearDown() override {
    disconnect();
    VerbsPair::TearDown();
    unsetenv("FAKEVERBS_DMABUF");
  }
  void connectGpus(int senderDev, int receiverDev) {
    disconnect();
    connect(senderDev, receiverDev);
    ASSERT_FALSE(HasFatalFailure());
    from = std::make_unique<GpuBlock>(sender.get(), total);
    into = std::make_unique<GpuBlock>(receiver.get(), total);
    for (size_t i = 0; i < total; i++) from->data()[i] = static_cast<char>(random() | 1);
  }
  void disconnect() {
    from.reset();
    into.reset();
    sender.reset();
    receiver.reset();
  }
  // A group whose members come one after the other from offset on; without the flush.
  void transfer(int n, size_t bytes, size_t offset) {
    ASSERT_NE(into, nullptr);
    void* data[maxGroup];
    size_t rooms[maxGroup];
    int tags[maxGroup];
    Region* regions[maxGroup];
    for (int i = 0; i < n; i++) {
      data[i] = into->data() + offset + static_cast<size_t>(i) * bytes;
      rooms[i] = bytes;
      tags[i] = i;
      regions[i] = into->region;
    }
    Request* receive = nullptr;
    ASSERT_TRUE(eventually([&] {
      EXPECT_EQ(receiver->irecv(n, data, rooms, tags, regions, &receive), ncclSuccess) << lastError();
      return receive != nullptr || HasFailure();
    }));
    for (int i = 0; i < n; i++) {
      Request* send = nullptr;
      const char* at = from->data() + offset + static_cast<size_t>(i) * bytes;
      ASSERT_TRUE(eventually([&] {
        EXPECT_EQ(sender->isend(at, bytes, i, from->region, &send), ncclSuccess) << lastError();
        return send != nullptr || HasFailure();
      }));
      ASSERT_TRUE(finish(sender.get(), send)) << lastError();
    }
    ASSERT_TRUE(finish(receiver.get(), receive)) << lastError();
  }
  Request* flush(int n, size_t bytes, size_t offset) {
    void* data[maxGroup];
    int sizes[maxGroup];
    Region* regions[maxGroup];
    for (int i = 0; i < n; i++) {
      data[i] = into->data() + offset + static_cast<size_t>(i) * bytes;
      sizes[i] = static_cast<int>(bytes);
      regions[i] = into->region;
    }
    Request* request = nullptr;
    EXPECT_EQ(receiver->iflush(n, data, sizes, regions, &request), ncclSuccess) << lastError();
    EXPECT_NE(request, nullptr);
    return request;
  }
  bool there(size_t offset, size_t bytes) const {
    return memcmp(from->data() + offset, into->data() + offset, bytes) == 0;
  }
  // The first error of the request's side.
  ncclResult_t errorOf(Request* request) {
    ncclResult_t result = ncclSuccess;
    bool done = false;
    EXPECT_TRUE(eventually([&] {
      (void)sender->progress();
      result = receiver->test(request, &done, nullptr);
      return done || result != ncclSuccess;
    }));
    return result;
  }

  static constexpr size_t total = 1 << 20;
  std::unique_ptr<GpuBlock> from, into;
};

TEST_F(Flush, makesGroupsOfEverySizeVisible) {
  EXPECT_EQ(engine->device(0).ptrKinds, ptrHost | ptrDmabuf);
  const int pairs[][2] = {{0, 2}, {merged({0, 1}), merged({2, 3})}, {merged({0, 1}), 2}, {0, merged({2, 3})}};
  for (const auto& pair : pairs) {
    SCOPED_TRACE(engine->device(pair[0]).name + " to " + engine->device(pair[1]).name);
    connectGpus(pair[0], pair[1]);
    size_t offset = 0;
    for (int n = 1; n <= maxGroup; n++) {
      for (size_t bytes : {100u, 20000u}) { // on one queue pair, and on all
        const size_t all = static_cast<size_t>(n) * bytes;
        transfer(n, bytes, offset);
        ASSERT_FALSE(HasFatalFailure());
        ASSERT_FALSE(there(offset, all)); // or the flush would be tested with nothing
        Request* request = flush(n, bytes, offset);
        ASSERT_TRUE(request != nullptr && finish(receiver.get(), request)) << lastError();
        ASSERT_TRUE(there(offset, all)) << n << " members";
        offset += all;
      }
      ASSERT_LE(offset, total);
    }
  }
}

TEST_F(Flush, ofHostMemoryOrNothingIsNoRequest) {
  connectGpus(0, 2);
  Block host(receiver.get(), 100);
  void* data[2] = {host.data(), into->data()};
  int sizes[2] = {100, 0};
  Region* regions[2] = {host.region(), into->region};
  Request* request = nullptr;
  EXPECT_EQ(receiver->iflush(2, data, sizes, regions, &request), ncclSuccess);
  EXPECT_EQ(request, nullptr);
  sizes[1] = 1; // one of two is a GPU's
  EXPECT_EQ(receiver->iflush(2, data, sizes, regions, &request), ncclSuccess);
  ASSERT_NE(request, nullptr);
  EXPECT_TRUE(finish(receiver.get(), request)) << lastError();
  EXPECT_EQ(sender->iflush(2, data, sizes, regions, &request), ncclInvalidUsage);
}

// More than a queue pair takes at once: those beyond share a READ, which has to be posted after what they wait for.
TEST_F(Flush, manyUnderWayShareReads) {
  for (const int receiverDev : {2, merged({2, 3})}) {
    SCOPED_TRACE(engine->device(receiverDev).name);
    connectGpus(0, receiverDev);
    constexpr int n = 40;
    constexpr size_t bytes = 10000;
    // From now on fake2 posts flushes only, of which the first one stalls: 16, and one for all others.
    std::vector<Request*> requests;
    for (int i = 0; i < n; i++) {
      transfer(1, bytes, static_cast<size_t>(i) * bytes);
      ASSERT_FALSE(HasFatalFailure());
    }
    fakeFault("clear;post_send@fake2#1=stall;post_send@fake2#17=event:PORT_ACTIVE;post_send@fake2#18+=EIO");
    for (int i = 0; i < n; i++) requests.push_back(flush(1, bytes, static_cast<size_t>(i) * bytes));
    for (Request* request : requests) {
      bool done = true;
      ASSERT_EQ(receiver->test(request, &done, nullptr), ncclSuccess) << lastError();
      EXPECT_FALSE(done);
    }
    EXPECT_EQ(fakeFired(), 1);
    fakeFault("now@fake2=go");
    for (int i = n; i-- > 0;) { // the last ones, which share, first
      ASSERT_TRUE(finish(receiver.get(), requests[static_cast<size_t>(i)])) << lastError();
      ASSERT_TRUE(there(static_cast<size_t>(i) * bytes, bytes)) << i;
    }
    ASSERT_EQ(fakeFired(), 2); // the stall and the 17th READ, which was posted after all of them
    fakeFault("clear");
  }
}

TEST_F(Flush, thatFailsEndsTheConnection) {
  // On several ports too: what the device wrote may never be seen.
  for (const int receiverDev : {2, merged({2, 3})}) {
    SCOPED_TRACE(engine->device(receiverDev).name);
    connectGpus(0, receiverDev);
    transfer(1, 20000, 0);
    ASSERT_FALSE(HasFatalFailure());
    fakeFault("wc.send@fake2#1=status:RETRY_EXC_ERR");
    Request* request = flush(1, 20000, 0);
    ASSERT_NE(request, nullptr);
    EXPECT_EQ(errorOf(request), ncclRemoteError);
    EXPECT_NE(strstr(lastError(), "flush failed"), nullptr) << lastError();
    fakeFault("clear");
    // One that cannot even be posted.
    connectGpus(0, receiverDev);
    transfer(1, 20000, 0);
    ASSERT_FALSE(HasFatalFailure());
    fakeFault("post_send@fake2#1=ENOMEM");
    void* data = into->data();
    const int size = 20000;
    request = nullptr;
    EXPECT_EQ(receiver->iflush(1, &data, &size, &into->region, &request), ncclSystemError);
    EXPECT_EQ(request, nullptr);
    fakeFault("clear");
  }
}

// What a port wrote before its queue pairs failed has to be flushed through it all the same.
TEST_F(Flush, coversAPortThatHasFailed) {
  for (const char* device : {"fake2", "fake3"}) {
    SCOPED_TRACE(device);
    connectGpus(merged({0, 1}), merged({2, 3}));
    transfer(1, 200000, 0); // over both
    ASSERT_FALSE(HasFatalFailure());
    fakeFault(std::string("now@") + device + "=event:QP_FATAL");
    ASSERT_TRUE(eventually([&] {
      EXPECT_EQ(receiver->progress(), ncclSuccess) << lastError();
      EXPECT_EQ(sender->progress(), ncclSuccess) << lastError();
      return failovers == 2 || HasFailure();
    }));
    failovers = 0;
    ASSERT_FALSE(there(0, 200000));
    Request* request = flush(1, 200000, 0);
    ASSERT_TRUE(request != nullptr && finish(receiver.get(), request)) << lastError();
    ASSERT_TRUE(there(0, 200000));
    // And what comes over the other one from now on.
    for (size_t i = 1; i < 5; i++) {
      transfer(1, 200000, i * 200000);
      ASSERT_FALSE(HasFatalFailure());
      request = flush(1, 200000, i * 200000);
      ASSERT_TRUE(request != nullptr && finish(receiver.get(), request)) << lastError();
      ASSERT_TRUE(there(i * 200000, 200000));
    }
  }
}

// Where not even the device's own READ comes back, nobody knows what can be seen: an error, and no hang.
TEST_F(Flush, throughADeadDeviceIsAnError) {
  connectGpus(merged({0, 1}), merged({2, 3}));
  transfer(1, 200000, 0);
  ASSERT_FALSE(HasFatalFailure());
  fakeFault("now@fake3=portdown"); // the fake device loops nothing back either then
  Request* request = flush(1, 200000, 0);
  ASSERT_NE(request, nullptr);
  EXPECT_EQ(errorOf(request), ncclRemoteError);
  EXPECT_NE(strstr(lastError(), "flush failed"), nullptr) << lastError();
}

TEST_F(Flush, registrationsFailWhole) {
  connectGpus(merged({0, 1}), merged({2, 3}));
  Region* const first = into->region;
  fakeFault("reg_dmabuf_mr@fake3#1=ENOMEM");
  EXPECT_EQ(into->registerIt(), ncclSystemError);
  EXPECT_NE(strstr(lastError(), "fake3:1: registering"), nullptr) << lastError();
  EXPECT_EQ(into->region, nullptr);
  fakeFault("clear");
  ASSERT_EQ(into->registerIt(), ncclSuccess) << lastError(); // as often as one likes
  EXPECT_EQ(receiver->deregisterMemory(first), ncclSuccess);
  transfer(1, 200000, 0);
  Request* request = flush(1, 200000, 0);
  ASSERT_TRUE(request != nullptr && finish(receiver.get(), request)) << lastError();
  ASSERT_TRUE(there(0, 200000));
}

} // namespace
} // namespace net
} // namespace moe
