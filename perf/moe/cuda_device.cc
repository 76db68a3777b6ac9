// The CUDA backend: a communicator from libnccl, CUDA events as the clock, and stores to peers as the roofline.
// libnccl is opened at run time, so that a build with CUDA also runs where there is none.
#include "perf/moe/device.h"
#include "perf/moe/perf_error.h"

#ifndef NCCL_MOE_NO_CUDA

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "perf/moe/numeric.h"
#include "perf/moe/row_copy.h"

#define CUDAPERF(call)                                                                                                 \
  do {                                                                                                                 \
    const cudaError_t cudaResult_ = (call);                                                                            \
    if (cudaResult_ != cudaSuccess)                                                                                    \
      return perfFail(ncclUnhandledCudaError, "%s: %s", #call, cudaGetErrorString(cudaResult_));                       \
  } while (0)

namespace moe::perf {

namespace {

struct NcclFunctions {
  decltype(&ncclGetUniqueId) getUniqueId = nullptr;
  decltype(&ncclCommInitRank) commInitRank = nullptr;
  decltype(&ncclCommDestroy) commDestroy = nullptr;
  decltype(&ncclGetErrorString) getErrorString = nullptr;
  decltype(&ncclGroupStart) groupStart = nullptr;
  decltype(&ncclGroupEnd) groupEnd = nullptr;
  decltype(&ncclSend) send = nullptr;
  decltype(&ncclRecv) recv = nullptr;
};

template <typename F> bool find(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  return *function != nullptr;
}

ncclResult_t openNccl(NcclFunctions* f) {
  // Global, as a program that links libnccl would have it: libmoenccl finds it there.  Never closed.
  void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) return perfFail(ncclSystemError, "%s", dlerror());
  if (!find(library, "ncclGetUniqueId", &f->getUniqueId) || !find(library, "ncclCommInitRank", &f->commInitRank) ||
      !find(library, "ncclCommDestroy", &f->commDestroy) || !find(library, "ncclGetErrorString", &f->getErrorString) ||
      !find(library, "ncclGroupStart", &f->groupStart) || !find(library, "ncclGroupEnd", &f->groupEnd) ||
      !find(library, "ncclSend", &f->send) || !find(library, "ncclRecv", &f->recv))
    return perfFail(ncclSystemError, "libnccl.so.2 lacks a function: %s", dlerror());
  return ncclSuccess;
}

// What a rank tells the others of its receive buffer for the roofline.
struct PeerBuffer {
  char host[64];
  int pid;
  int device;
  void* address;
  cudaIpcMemHandle_t handle;
};

class CudaDevice : public Device {
 public:
  explicit CudaDevice(Group& group) : group_(group) {}
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;
  ~CudaDevice() override {
    cudaDeviceSynchronize();
    if (begin_ != nullptr) cudaEventDestroy(begin_);
    if (end_ != nullptr) cudaEventDestroy(end_);
    for (void* p : opened_) cudaIpcCloseMemHandle(p);
    for (void* p : blocks_) cudaFree(p);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    if (comm_ != nullptr) nccl_.commDestroy(comm_);
  }

  ncclResult_t open(int localIndex) {
    int n = 0;
    CUDAPERF(cudaGetDeviceCount(&n));
    if (n == 0) return perfFail(ncclInvalidUsage, "there is no GPU");
    device_ = localIndex % n;
    CUDAPERF(cudaSetDevice(device_));
    CUDAPERF(cudaGetDeviceProperties(&properties_, device_));
    CUDAPERF(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CUDAPERF(cudaEventCreate(&begin_));
    CUDAPERF(cudaEventCreate(&end_));
    // Twice the cache is enough to push out everything that a call could find there.
    flushBytes_ = std::max(size_t{2} * properties_.l2CacheSize, size_t{64} << 20);
    return alloc(&flush_, flushBytes_);
  }

  std::string describe() const override {
    char bus[32] = "";
    cudaDeviceGetPCIBusId(bus, sizeof(bus), device_);
    return "device " + std::to_string(device_) + " [" + bus + "] " + properties_.name;
  }

  ncclResult_t commInit(ncclMoeComm_t* comm, const ncclMoeConfig_t& config) override {
    PERFCHECK(openNccl(&nccl_));
    ncclUniqueId mine{};
    if (group_.rank() == 0) PERFCHECK(checkNccl(nccl_.getUniqueId(&mine), "ncclGetUniqueId"));
    std::vector<ncclUniqueId> ids(group_.nRanks());
    PERFCHECK(group_.allGather(&mine, ids.data(), sizeof(mine)));
    PERFCHECK(checkNccl(nccl_.commInitRank(&comm_, group_.nRanks(), ids[0], group_.rank()), "ncclCommInitRank"));
    const ncclResult_t result = ncclMoeCommInit(comm, comm_, &config);
    if (result != ncclSuccess) return perfFail(result, "%s", ncclMoeGetLastError(nullptr));
    return ncclSuccess;
  }

  cudaStream_t stream() const override { return stream_; }

  ncclResult_t alloc(void** ptr, size_t bytes) override {
    CUDAPERF(cudaMalloc(ptr, bytes));
    blocks_.push_back(*ptr);
    return ncclSuccess;
  }
  void free(void* ptr) override {
    const auto at = std::find(blocks_.begin(), blocks_.end(), ptr);
    if (at == blocks_.end()) return;
    cudaFree(ptr);
    blocks_.erase(at);
  }
  size_t freeMemory() const override {
    size_t have = 0;
    size_t total = 0;
    return cudaMemGetInfo(&have, &total) == cudaSuccess ? have / 10 * 9 : 0;
  }

  ncclResult_t copyIn(void* to, const void* fromHost, size_t bytes) override {
    if (bytes == 0) return ncclSuccess;
    CUDAPERF(cudaMemcpyAsync(to, fromHost, bytes, cudaMemcpyHostToDevice, stream_));
    return synchronize();
  }
  ncclResult_t copyOut(void* toHost, const void* from, size_t bytes) override {
    if (bytes == 0) return ncclSuccess;
    CUDAPERF(cudaMemcpyAsync(toHost, from, bytes, cudaMemcpyDeviceToHost, stream_));
    return synchronize();
  }
  ncclResult_t fill(void* to, int byte, size_t bytes) override {
    if (bytes > 0) CUDAPERF(cudaMemsetAsync(to, byte, bytes, stream_));
    return ncclSuccess;
  }
  ncclResult_t synchronize() override {
    CUDAPERF(cudaStreamSynchronize(stream_));
    return ncclSuccess;
  }

  ncclResult_t run(const Call& call, int graphCalls) override {
    if (graphCalls == 0) {
      PERFCHECK(call(stream_));
      return synchronize();
    }
    GraphPtr graph;
    PERFCHECK(capture(call, graphCalls, &graph));
    PERFCHECK(group_.barrier()); // preparing a graph may wait for kernels, which may wait for this rank's
    CUDAPERF(cudaGraphLaunch(graph.get(), stream_));
    return synchronize();
  }

  ncclResult_t time(const Call& call, const Series& series, double* us) override {
    if (series.graphCalls > 0) return timeGraph(call, series, us);
    PERFCHECK(prepareMeeting());
    for (int i = -series.warmup; i < series.n; i++) {
      PERFCHECK(synchronize());
      PERFCHECK(group_.barrier());
      // The host has enqueued the call by the time the caches are flushed and the ranks have met, so that neither its
      // work nor the ranks' distance is measured.
      CUDAPERF(cudaMemsetAsync(flush_, i & 0xff, flushBytes_, stream_));
      CUDAPERF(cudaMemsetAsync(flush_, ~i & 0xff, flushBytes_, stream_));
      if (meetingSlots_ != nullptr) {
        CUDAPERF(launchMeet(static_cast<unsigned* const*>(meetingSlots_), group_.rank(), group_.nRanks(), ++meetings_,
                            stream_));
      }
      CUDAPERF(cudaEventRecord(begin_, stream_));
      PERFCHECK(call(stream_));
      CUDAPERF(cudaEventRecord(end_, stream_));
      PERFCHECK(elapsed(i >= 0 ? &us[i] : nullptr, 1));
    }
    return ncclSuccess;
  }

  ncclResult_t roofline(size_t rowBytes, double* gbPerSecond) override {
    *gbPerSecond = 0;
    if (rowBytes % 16 != 0) return ncclSuccess;
    const int nPeers = std::max(1, group_.nRanks() - 1); // with one rank it is a copy within the GPU
    const size_t budget = std::min(size_t{512} << 20, freeMemory() / 8);
    const int perPeer = static_cast<int>(std::max<size_t>(1, budget / rowBytes / nPeers));
    const int nRows = perPeer * nPeers;
    void* source = nullptr;
    void* receive = nullptr;
    void* targets = nullptr;
    PERFCHECK(alloc(&source, nRows * rowBytes));
    PERFCHECK(alloc(&receive, static_cast<size_t>(group_.nRanks()) * perPeer * rowBytes));
    PERFCHECK(alloc(&targets, nRows * sizeof(void*)));
    std::vector<void*> bases;
    std::vector<void*> opened;
    bool reached = false;
    PERFCHECK(reachPeers(receive, &bases, &opened, &reached));
    if (reached) {
      const std::vector<void*> order = randomTargets(bases, perPeer, rowBytes);
      PERFCHECK(copyIn(targets, order.data(), order.size() * sizeof(void*)));
      PERFCHECK(timeRows(source, static_cast<void* const*>(targets), nRows, rowBytes, gbPerSecond));
    }
    for (void* p : opened) CUDAPERF(cudaIpcCloseMemHandle(p));
    PERFCHECK(group_.barrier()); // a buffer is freed when no peer has it open
    free(source);
    free(receive);
    free(targets);
    return ncclSuccess;
  }

  ncclResult_t exchange(const void* send, const std::vector<size_t>& sendBytes, void* recv,
                        const std::vector<size_t>& recvBytes, cudaStream_t stream) override {
    const char* from = static_cast<const char*>(send);
    char* to = static_cast<char*>(recv);
    PERFCHECK(checkNccl(nccl_.groupStart(), "ncclGroupStart"));
    ncclResult_t result = ncclSuccess;
    for (int r = 0; r < group_.nRanks(); r++) {
      if (sendBytes[r] > 0 && result == ncclSuccess)
        result = nccl_.send(from, sendBytes[r], ncclInt8, r, comm_, stream);
      if (recvBytes[r] > 0 && result == ncclSuccess) result = nccl_.recv(to, recvBytes[r], ncclInt8, r, comm_, stream);
      from += sendBytes[r];
      to += recvBytes[r];
    }
    const ncclResult_t ended = nccl_.groupEnd();
    PERFCHECK(checkNccl(result, "ncclSend or ncclRecv"));
    return checkNccl(ended, "ncclGroupEnd");
  }

 private:
  ncclResult_t checkNccl(ncclResult_t result, const char* function) const {
    if (result == ncclSuccess) return ncclSuccess;
    return perfFail(result, "%s: %s", function, nccl_.getErrorString(result));
  }

  // Waits for the end event; *us takes the time of one of nCalls.
  ncclResult_t elapsed(double* us, int nCalls) {
    float ms = 0;
    CUDAPERF(cudaEventSynchronize(end_));
    CUDAPERF(cudaEventElapsedTime(&ms, begin_, end_));
    if (us != nullptr) *us = static_cast<double>(ms) * 1e3 / nCalls;
    return ncclSuccess;
  }

  struct GraphDeleter {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  using GraphPtr = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, GraphDeleter>;
  ncclResult_t capture(const Call& call, int nCalls, GraphPtr* executable) {
    cudaGraph_t graph = nullptr;
    CUDAPERF(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    ncclResult_t result = ncclSuccess;
    for (int i = 0; i < nCalls && result == ncclSuccess; i++) result = call(stream_);
    CUDAPERF(cudaStreamEndCapture(stream_, &graph));
    cudaGraphExec_t instance = nullptr;
    const cudaError_t made = result == ncclSuccess ? cudaGraphInstantiate(&instance, graph, 0) : cudaSuccess;
    executable->reset(instance);
    cudaGraphDestroy(graph);
    PERFCHECK(result);
    CUDAPERF(made);
    return ncclSuccess;
  }

  ncclResult_t timeGraph(const Call& call, const Series& series, double* us) {
    GraphPtr graph;
    PERFCHECK(capture(call, series.graphCalls, &graph));
    for (int i = -series.warmup; i < series.n; i++) {
      PERFCHECK(group_.barrier());
      beLate(group_, series.lateUs);
      CUDAPERF(cudaEventRecord(begin_, stream_));
      CUDAPERF(cudaGraphLaunch(graph.get(), stream_));
      CUDAPERF(cudaEventRecord(end_, stream_));
      PERFCHECK(elapsed(i >= 0 ? &us[i] : nullptr, series.graphCalls));
    }
    return ncclSuccess;
  }

  // bases[r]: rank r's receive buffer as this rank sees it.  *reached is false on all ranks if one cannot see another.
  ncclResult_t reachPeers(void* receive, std::vector<void*>* bases, std::vector<void*>* opened, bool* reached) {
    PeerBuffer mine{};
    gethostname(mine.host, sizeof(mine.host) - 1);
    mine.pid = getpid();
    mine.device = device_;
    mine.address = receive;
    int fine = cudaIpcGetMemHandle(&mine.handle, receive) == cudaSuccess ? 1 : 0;
    std::vector<PeerBuffer> all(group_.nRanks());
    PERFCHECK(group_.allGather(&mine, all.data(), sizeof(mine)));
    for (const PeerBuffer& peer : all) {
      void* base = peer.address;
      if (strcmp(peer.host, mine.host) != 0) {
        fine = 0;
      } else if (peer.pid != mine.pid) {
        if (cudaIpcOpenMemHandle(&base, peer.handle, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess)
          opened->push_back(base);
        else
          fine = 0;
      } else if (peer.device != device_) {
        const cudaError_t enabled = cudaDeviceEnablePeerAccess(peer.device, 0);
        if (enabled != cudaSuccess && enabled != cudaErrorPeerAccessAlreadyEnabled) fine = 0;
      }
      bases->push_back(base);
    }
    cudaGetLastError(); // what was tried in vain is no error of the calls that follow
    std::vector<int> everyone(group_.nRanks());
    PERFCHECK(group_.allGather(&fine, everyone.data(), sizeof(fine)));
    *reached = std::all_of(everyone.begin(), everyone.end(), [](int f) { return f == 1; });
    return ncclSuccess;
  }

  // Ranks that cannot see each other are aligned by the host alone.
  ncclResult_t prepareMeeting() {
    if (meetingSlots_ != nullptr || meetings_ > 0) return ncclSuccess;
    void* mine = nullptr;
    const size_t bytes = sizeof(unsigned) * group_.nRanks();
    PERFCHECK(alloc(&mine, bytes));
    CUDAPERF(cudaMemset(mine, 0, bytes));
    CUDAPERF(cudaDeviceSynchronize());
    std::vector<void*> bases;
    bool reached = false;
    PERFCHECK(reachPeers(mine, &bases, &opened_, &reached));
    if (!reached) return ncclSuccess;
    PERFCHECK(alloc(&meetingSlots_, bases.size() * sizeof(void*)));
    return copyIn(meetingSlots_, bases.data(), bases.size() * sizeof(void*));
  }

  // Every row's place at a peer, in random order.
  std::vector<void*> randomTargets(const std::vector<void*>& bases, int perPeer, size_t rowBytes) const {
    std::vector<void*> targets;
    for (int r = 0; r < group_.nRanks(); r++) {
      if (r == group_.rank() && group_.nRanks() > 1) continue;
      char* base = static_cast<char*>(bases[r]) + static_cast<size_t>(group_.rank()) * perPeer * rowBytes;
      for (int i = 0; i < perPeer; i++) targets.push_back(base + i * rowBytes);
    }
    for (size_t i = targets.size(); i > 1; i--) std::swap(targets[i - 1], targets[mix64(i) % i]);
    return targets;
  }

  ncclResult_t timeRows(const void* source, void* const* targets, int nRows, size_t rowBytes, double* gbPerSecond) {
    const Call copyRows = [&](cudaStream_t stream) {
      CUDAPERF(launchRowCopy(source, targets, nRows, rowBytes, properties_.multiProcessorCount, stream));
      return ncclSuccess;
    };
    constexpr int nPasses = 21;
    double us[nPasses];
    PERFCHECK(time(copyRows, {3, nPasses}, us));
    std::vector<double> all(static_cast<size_t>(group_.nRanks()) * nPasses);
    PERFCHECK(group_.allGather(us, all.data(), sizeof(us)));
    std::vector<double> slowest(nPasses, 0.0);
    for (size_t i = 0; i < all.size(); i++) slowest[i % nPasses] = std::max(slowest[i % nPasses], all[i]);
    std::sort(slowest.begin(), slowest.end());
    *gbPerSecond = static_cast<double>(nRows) * static_cast<double>(rowBytes) / slowest[nPasses / 2] * 1e-3;
    return ncclSuccess;
  }

  Group& group_;
  NcclFunctions nccl_;
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  cudaDeviceProp properties_{};
  int device_ = 0;
  void* flush_ = nullptr;
  void* meetingSlots_ = nullptr;
  unsigned meetings_ = 0;
  std::vector<void*> opened_; // peers' memory, until the end
  size_t flushBytes_ = 0;
  std::vector<void*> blocks_;
};

} // namespace

int countGpus() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

ncclResult_t makeCudaDevice(Group& group, int gpu, std::unique_ptr<Device>* device) {
  auto made = std::make_unique<CudaDevice>(group);
  PERFCHECK(made->open(gpu));
  *device = std::move(made);
  return ncclSuccess;
}

} // namespace moe::perf

#else

namespace moe::perf {

int countGpus() { return 0; }

ncclResult_t makeCudaDevice(Group& group, int gpu, std::unique_ptr<Device>* device) {
  static_cast<void>(group);
  static_cast<void>(gpu);
  device->reset();
  return perfFail(ncclInvalidUsage, "this build has no CUDA part");
}

} // namespace moe::perf

#endif
