#include "device/window.h"

#include <unistd.h>

#include <cstring>
#include <random>

namespace moe {
namespace {

constexpr size_t kGranularity = size_t{2} << 20; // whole pages of the driver: an IPC handle exposes nothing else

struct Export {
  uint64_t process; // random number of the process
  int device;       // as that process counts
  int ok;
  const std::shared_ptr<DeviceMemory>* memory;
  cudaIpcMemHandle_t handle;
};

// Drawn once; a forked child shares the draw but not the pid.
uint64_t processNumber() {
  static const uint64_t drawn = [] {
    std::random_device random;
    return static_cast<uint64_t>(random()) << 32 | random();
  }();
  return drawn + static_cast<uint64_t>(getpid()) * 0x9e3779b97f4a7c15ull;
}

ncclResult_t makeOwn(DeviceMemory* memory, size_t bytes, bool zeroed, cudaIpcMemHandle_t* handle) {
  MOECHECK(memory->alloc(Window::memoryOf(bytes)));
  if (zeroed) {
    CUDACHECK(cudaMemset(memory->get(), 0, bytes));
    CUDACHECK(cudaDeviceSynchronize());
  }
  CUDACHECK(cudaIpcGetMemHandle(handle, memory->get()));
  return ncclSuccess;
}

ncclResult_t enablePeer(int device, int rank) {
  int current = 0;
  CUDACHECK(cudaGetDevice(&current));
  if (device == current) return ncclSuccess;
  int can = 0;
  CUDACHECK(cudaDeviceCanAccessPeer(&can, current, device));
  if (can == 0) {
    return fail(ncclInvalidUsage, "CUDA device %d cannot reach device %d of rank %d (no NVLink or PCIe peer access)",
                current, device, rank);
  }
  const cudaError_t result = cudaDeviceEnablePeerAccess(device, 0);
  if (result == cudaErrorPeerAccessAlreadyEnabled) {
    (void)cudaGetLastError();
    return ncclSuccess;
  }
  CUDACHECK(result);
  return ncclSuccess;
}

} // namespace

size_t Window::memoryOf(size_t bytes) { return (bytes + kGranularity - 1) / kGranularity * kGranularity; }

ncclResult_t Window::create(DeviceBootstrap& bootstrap, int rank, int nRanks, size_t bytes, bool zeroed) {
  own_ = std::make_shared<DeviceMemory>();
  Export mine{};
  mine.process = processNumber();
  ncclResult_t result = makeOwn(own_.get(), bytes, zeroed, &mine.handle);
  mine.ok = result == ncclSuccess ? 1 : 0;
  mine.device = own_->device();
  mine.memory = &own_;
  std::vector<Export> all(nRanks);
  MOECHECK(bootstrap.allGather(&mine, sizeof(mine), all.data()));
  bases_.assign(nRanks, nullptr);
  for (int r = 0; r < nRanks; r++) {
    for (int s = 0; s < r; s++) ranksShareProcess_ = ranksShareProcess_ || all[s].process == all[r].process;
  }
  for (int r = 0; r < nRanks && result == ncclSuccess; r++) {
    if (all[r].ok == 0) {
      result = fail(ncclRemoteError, "rank %d could not allocate %zu bytes that peers can reach", r, bytes);
    } else if (r == rank) {
      bases_[r] = own_->get();
    } else if (all[r].process == mine.process) {
      result = enablePeer(all[r].device, r);
      if (result == ncclSuccess) {
        shared_.push_back(*all[r].memory);
        bases_[r] = shared_.back()->get();
      }
    } else {
      void* base = nullptr;
      const cudaError_t opened = cudaIpcOpenMemHandle(&base, all[r].handle, cudaIpcMemLazyEnablePeerAccess);
      if (opened == cudaSuccess) {
        imported_.emplace_back(base);
        bases_[r] = static_cast<char*>(base);
      } else {
        (void)cudaGetLastError();
        result = fail(ncclUnhandledCudaError, "cudaIpcOpenMemHandle of rank %d's memory failed: %s", r,
                      cudaGetErrorString(opened));
      }
    }
  }
  // Nobody goes on before everybody has mapped everything; then all or none succeed.
  const int ok = result == ncclSuccess ? 1 : 0;
  std::vector<int> oks(nRanks);
  MOECHECK(bootstrap.allGather(&ok, sizeof(ok), oks.data()));
  MOECHECK(result);
  for (int r = 0; r < nRanks; r++) {
    if (oks[r] == 0) return fail(ncclRemoteError, "rank %d could not map its peers' memory", r);
  }
  bytes_ = bytes;
  return ncclSuccess;
}

} // namespace moe
