#include "device/bootstrap.h"

#include <chrono>
#include <cstring>
#include <thread>

#include "device/backend.h"
#include "device/cuda_handle.h"
#include "device/nccl_symbols.h"

namespace moe {
namespace {

#define NCCLCHECK(nccl, call, name)                                                                                    \
  do {                                                                                                                 \
    const ncclResult_t ncclResult_ = (call);                                                                           \
    if (ncclResult_ != ncclSuccess)                                                                                    \
      return fail(ncclResult_, "%s failed: %s", (name), (nccl).getErrorString(ncclResult_));                           \
  } while (0)

class NcclBootstrap : public DeviceBootstrap {
 public:
  NcclBootstrap(const NcclSymbols& nccl, ncclComm_t comm, int nRanks, int timeoutMs)
    : nccl_(nccl), comm_(comm), nRanks_(nRanks), timeoutMs_(timeoutMs) {}

  ncclResult_t init() {
    MOECHECK(streamCreate(&stream_));
    return buffer_.alloc(kMostBytes * (nRanks_ + 1));
  }

  ~NcclBootstrap() override {
    if (!stuck()) return;
    buffer_.abandon();
    (void)stream_.release();
  }

  ncclResult_t allGather(const void* mine, size_t bytes, void* all) override {
    if (timedOut_) {
      return fail(ncclRemoteError, "an earlier ncclAllGather on the NCCL communicator did not finish in time");
    }
    if (bytes > kMostBytes) return fail(ncclInternalError, "an exchange of %zu bytes a rank", bytes);
    char* gathered = buffer_.get() + bytes;
    cudaStream_t stream = stream_.get();
    CUDACHECK(cudaMemcpyAsync(buffer_.get(), mine, bytes, cudaMemcpyHostToDevice, stream));
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeoutMs_);
    const auto late = [&] { return timedOut_ = std::chrono::steady_clock::now() > deadline; };
    const auto rest = [] { std::this_thread::sleep_for(std::chrono::microseconds(20)); };
    enqueued_ = false;
    ncclResult_t started = nccl_.allGather(buffer_.get(), gathered, bytes, ncclInt8, comm_, stream);
    while (started == ncclInProgress) { // the communicator is a non-blocking one
      if (late()) return tooLate();
      rest();
      NCCLCHECK(nccl_, nccl_.commGetAsyncError(comm_, &started), "ncclCommGetAsyncError");
    }
    NCCLCHECK(nccl_, started, "ncclAllGather");
    enqueued_ = true;
    for (;;) {
      const cudaError_t state = cudaStreamQuery(stream);
      if (state == cudaSuccess) break;
      if (state != cudaErrorNotReady) CUDACHECK(state);
      (void)cudaGetLastError(); // where the runtime notes even this
      if (late()) return tooLate();
      rest();
    }
    CUDACHECK(cudaMemcpyAsync(all, gathered, bytes * nRanks_, cudaMemcpyDeviceToHost, stream));
    CUDACHECK(cudaStreamSynchronize(stream));
    return ncclSuccess;
  }

  bool stuck() const override {
    if (!timedOut_) return false;
    const bool stuck = !enqueued_ || cudaStreamQuery(stream_.get()) == cudaErrorNotReady;
    (void)cudaGetLastError();
    return stuck;
  }

 private:
  // Of a rank in an exchange.  One buffer for all: to replace it might wait for a kernel of NCCL that waits for this
  // rank.
  static constexpr size_t kMostBytes = 512;

  ncclResult_t tooLate() const {
    return fail(ncclRemoteError, "ncclAllGather on the NCCL communicator did not finish within %d ms", timeoutMs_);
  }

  const NcclSymbols& nccl_;
  ncclComm_t comm_;
  int nRanks_, timeoutMs_;
  UniqueStream stream_;
  DeviceMemory buffer_;
  bool timedOut_ = false;
  bool enqueued_ = false; // NCCL has put the exchange onto the stream
};

} // namespace

ncclResult_t deviceQueryComm(ncclComm_t comm, int* nRanks, int* rank) {
  const NcclSymbols* nccl = nullptr;
  MOECHECK(ncclSymbols(&nccl));
  NCCLCHECK(*nccl, nccl->commCount(comm, nRanks), "ncclCommCount");
  NCCLCHECK(*nccl, nccl->commUserRank(comm, rank), "ncclCommUserRank");
  int device = 0, current = 0;
  NCCLCHECK(*nccl, nccl->commCuDevice(comm, &device), "ncclCommCuDevice");
  CUDACHECK(cudaGetDevice(&current));
  if (device != current) {
    return fail(ncclInvalidUsage, "ncclMoeCommInit: the current CUDA device is %d, but comm's is %d", current, device);
  }
  return ncclSuccess;
}

ncclResult_t ncclBootstrapCreate(std::unique_ptr<DeviceBootstrap>* bootstrap, ncclComm_t comm, int nRanks,
                                 int timeoutMs) {
  const NcclSymbols* nccl = nullptr;
  MOECHECK(ncclSymbols(&nccl));
  auto made = std::make_unique<NcclBootstrap>(*nccl, comm, nRanks, timeoutMs);
  MOECHECK(made->init());
  *bootstrap = std::move(made);
  return ncclSuccess;
}

ncclResult_t deviceBackendCreate(ncclMoeComm& moe, ncclComm_t comm) {
  std::unique_ptr<DeviceBootstrap> bootstrap;
  MOECHECK(ncclBootstrapCreate(&bootstrap, comm, moe.nRanks, moe.config.timeoutMs));
  return deviceBackendCreate(moe, std::move(bootstrap));
}

} // namespace moe
