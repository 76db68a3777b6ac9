// The proxy with a kernel as producer: src/device/proxy.cuh against src/net/proxy.cc.
#include "device/proxy.cuh"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <vector>

#include "base/error.h"
#include "net/proxy.h"

namespace moe {
namespace net {
namespace {

#define CUDA_OK(call) ASSERT_EQ(call, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

constexpr uint64_t regionBytes = 1 << 20;

// Notes what is put, and reads each put's 8 source bytes at the moment it is posted.
class NotingSink : public ProxySink {
 public:
  uint32_t nPeers() const override { return 4; }
  uint64_t localBytes(uint32_t, uint32_t region) const override { return region == 0 ? regionBytes : 0; }
  uint64_t remoteBytes(uint32_t, uint32_t region) const override { return region == 0 ? regionBytes : 0; }
  ncclResult_t post(const ProxyOp& op, void** request) override {
    *request = nullptr;
    if (full.load()) return ncclSuccess;
    ops.push_back(op);
    if (source != nullptr)
      seen.push_back(__atomic_load_n(reinterpret_cast<const uint64_t*>(source + op.localOffset), __ATOMIC_RELAXED));
    *request = this;
    return ncclSuccess;
  }
  ncclResult_t test(const ProxyOp&, void*, bool* done) override {
    *done = true;
    return ncclSuccess;
  }
  ncclResult_t progress() override { return ncclSuccess; }
  const char* source = nullptr;
  std::atomic<bool> full{false};
  std::deque<ProxyOp> ops;
  std::deque<uint64_t> seen;
};

class ProxyKernel : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  }
  void TearDown() override {
    proxy.reset();
    if (host != nullptr) cudaFreeHost(host);
    if (tail != nullptr) cudaFree(tail);
    if (source != nullptr) cudaFreeHost(source);
  }
  void start(uint32_t bits, uint32_t nCounters, int timeoutMs = 20000) {
    ProxyRing ring;
    ring.capacityBits = bits;
    ring.nCounters = nCounters;
    CUDA_OK(cudaHostAlloc(&host, proxyRingBytes(bits, nCounters), cudaHostAllocMapped | cudaHostAllocPortable));
    CUDA_OK(cudaMalloc(&tail, 16));
    CUDA_OK(cudaMemset(tail, 0, 16));
    CUDA_OK(cudaHostAlloc(&source, regionBytes, cudaHostAllocMapped | cudaHostAllocPortable));
    ring.base = static_cast<char*>(host);
    sink.source = static_cast<const char*>(source);
    ProxyConfig config;
    config.timeoutMs = timeoutMs;
    ASSERT_EQ(Proxy::start({ring}, &sink, config, &proxy), ncclSuccess) << lastError();
    void* device = nullptr;
    CUDA_OK(cudaHostGetDevicePointer(&device, host, 0));
    view = ring;
    view.base = static_cast<char*>(device);
    view.tail = static_cast<uint64_t*>(tail);
    view.headCopy = view.tail + 1;
    view.timeoutNs = uint64_t(timeoutMs) * 1000000;
    CUDA_OK(cudaHostGetDevicePointer(&device, source, 0));
    deviceSource = static_cast<uint64_t*>(device);
  }

  void* host = nullptr;
  void* tail = nullptr;
  void* source = nullptr;
  uint64_t* deviceSource = nullptr;
  ProxyRing view;
  NotingSink sink;
  std::unique_ptr<Proxy> proxy;
};

// Every thread is a producer.  It writes its data, pushes, and goes on; then it waits for all its completions.
__global__ void pushMany(ProxyRing ring, uint64_t* source, int each, int* failures) {
  const uint32_t me = blockIdx.x * blockDim.x + threadIdx.x;
  for (int i = 0; i < each; i++) {
    const uint64_t slot = uint64_t(me) * each + i;
    const uint64_t value = slot * 0x9E3779B97F4A7C15ull + 1;
    source[slot % (regionBytes / 8)] = value;
    ProxyOp op;
    op.code = proxyPutSignal;
    op.peer = me % 4;
    op.counter = me % ring.nCounters;
    op.localOffset = slot % (regionBytes / 8) * 8;
    op.bytes = 8;
    op.signalValue = uint64_t(me) << 32 | uint32_t(i);
    if (!proxyPush(ring, op)) {
      atomicAdd(failures, 1);
      return;
    }
  }
  __syncthreads();
  if (!proxyAwaitCounter(ring, me % ring.nCounters, uint64_t(each) * blockDim.x * gridDim.x / ring.nCounters))
    atomicAdd(failures, 1);
}

TEST_F(ProxyKernel, deliversEverythingOnceInOrderAndAfterItsData) {
  constexpr int blocks = 16, threads = 64, each = 100; // 102400 descriptors; the region holds 131072 values
  start(10, 8);
  int* failures = nullptr;
  CUDA_OK(cudaMallocHost(&failures, sizeof(int)));
  *failures = 0;
  const auto begin = std::chrono::steady_clock::now();
  pushMany<<<blocks, threads>>>(view, deviceSource, each, failures);
  CUDA_OK(cudaGetLastError());
  CUDA_OK(cudaDeviceSynchronize());
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_EQ(*failures, 0);
  cudaFreeHost(failures);
  EXPECT_EQ(proxy->stop(), ncclSuccess) << lastError();
  const size_t total = size_t(blocks) * threads * each;
  ASSERT_EQ(sink.ops.size(), total);
  std::vector<uint32_t> next(blocks * threads, 0);
  for (size_t i = 0; i < total; i++) {
    const uint64_t me = sink.ops[i].signalValue >> 32, number = sink.ops[i].signalValue & 0xffffffff;
    ASSERT_LT(me, next.size());
    ASSERT_EQ(number, next[me]++) << "producer " << me;
    ASSERT_EQ(sink.seen[i], (me * each + number) * 0x9E3779B97F4A7C15ull + 1) << "descriptor before its data";
  }
  printf("%zu descriptors in %.3f ms: %.2f million/s\n", total, seconds * 1e3, double(total) / seconds / 1e6);
}

// Push, wait for the completion, again: what a put costs beyond the network.
__global__ void pingPong(ProxyRing ring, int rounds, uint64_t* ns, int* failures) {
  ProxyOp op;
  op.bytes = 8;
  const uint64_t begin = proxyGlobalTimeNs();
  for (int i = 0; i < rounds; i++) {
    if (!proxyPush(ring, op) || !proxyAwaitCounter(ring, 0, uint64_t(i) + 1)) {
      atomicAdd(failures, 1);
      return;
    }
  }
  *ns = proxyGlobalTimeNs() - begin;
}

TEST_F(ProxyKernel, completesEachPut) {
  constexpr int rounds = 2000;
  start(4, 1);
  uint64_t* result = nullptr;
  CUDA_OK(cudaMallocHost(&result, 16));
  result[0] = result[1] = 0;
  pingPong<<<1, 1>>>(view, rounds, result, reinterpret_cast<int*>(result + 1));
  CUDA_OK(cudaDeviceSynchronize());
  EXPECT_EQ(result[1], 0u);
  printf("push to completion: %.2f us\n", double(result[0]) / rounds / 1000);
  cudaFreeHost(result);
  EXPECT_EQ(proxy->stop(), ncclSuccess) << lastError();
  EXPECT_EQ(sink.ops.size(), size_t(rounds));
}

__global__ void pushUntilFalse(ProxyRing ring, int most, int* pushed) {
  for (int i = 0; i < most; i++) {
    if (!proxyPush(ring, ProxyOp())) return;
    atomicAdd(pushed, 1);
  }
}

TEST_F(ProxyKernel, endsAtTheDeadline) {
  sink.full = true;
  start(4, 1, 200);
  int* pushed = nullptr;
  CUDA_OK(cudaMallocHost(&pushed, sizeof(int)));
  *pushed = 0;
  pushUntilFalse<<<4, 1>>>(view, 100, pushed);
  CUDA_OK(cudaDeviceSynchronize()); // no trap: the context lives
  EXPECT_EQ(*pushed, 16);
  cudaFreeHost(pushed);
  EXPECT_EQ(proxy->stop(), ncclRemoteError);
  EXPECT_NE(std::string(lastError()).find("aborted"), std::string::npos) << lastError();
}

__global__ void awaitForever(ProxyRing ring, int* result) { *result = proxyAwaitCounter(ring, 0, 1) ? 1 : 2; }

TEST_F(ProxyKernel, endsWhenTheProxyStops) {
  start(4, 1);
  int* result = nullptr;
  CUDA_OK(cudaMallocHost(&result, sizeof(int)));
  *result = 0;
  awaitForever<<<1, 1>>>(view, result);
  CUDA_OK(cudaGetLastError());
  EXPECT_EQ(proxy->stop(), ncclSuccess) << lastError();
  CUDA_OK(cudaDeviceSynchronize());
  EXPECT_EQ(*result, 2);
  cudaFreeHost(result);
}

} // namespace
} // namespace net
} // namespace moe
