// Owners of CUDA objects, and the check of CUDA calls.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <utility>

#include "base/error.h"

#define CUDACHECK(call)                                                                                                \
  do {                                                                                                                 \
    const cudaError_t cudaResult_ = (call);                                                                            \
    if (cudaResult_ != cudaSuccess) {                                                                                  \
      (void)cudaGetLastError();                                                                                        \
      return moe::fail(ncclUnhandledCudaError, "%s failed: %s", #call, cudaGetErrorString(cudaResult_));               \
    }                                                                                                                  \
  } while (0)

namespace moe {

// Makes a device current until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Device memory, freed on the device that it was taken on.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept : ptr_(std::exchange(other.ptr_, nullptr)), device_(other.device_) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(ptr_, other.ptr_);
    std::swap(device_, other.device_);
    return *this;
  }
  ~DeviceMemory() {
    if (ptr_ == nullptr) return;
    DeviceScope scope(device_);
    cudaFree(ptr_);
  }
  // On the current device; bytes > 0.
  ncclResult_t alloc(size_t bytes) {
    CUDACHECK(cudaGetDevice(&device_));
    CUDACHECK(cudaMalloc(&ptr_, bytes));
    return ncclSuccess;
  }
  // Never freed then: cudaFree waits for the device, which may be waiting for ever.
  void abandon() { ptr_ = nullptr; }
  char* get() const { return static_cast<char*>(ptr_); }
  int device() const { return device_; }

 private:
  void* ptr_ = nullptr;
  int device_ = 0;
};

struct HostFree {
  void operator()(void* ptr) const { cudaFreeHost(ptr); }
};
// Host memory that kernels read and write.
template <class T> using HostMapped = std::unique_ptr<T, HostFree>;

template <class T> ncclResult_t hostMappedAlloc(HostMapped<T>* out, size_t bytes) {
  void* ptr = nullptr;
  CUDACHECK(cudaHostAlloc(&ptr, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
  memset(ptr, 0, bytes);
  out->reset(static_cast<T*>(ptr));
  return ncclSuccess;
}

struct EventDestroy {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using UniqueEvent = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, EventDestroy>;

inline ncclResult_t eventCreate(UniqueEvent* out) {
  cudaEvent_t event = nullptr;
  CUDACHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  out->reset(event);
  return ncclSuccess;
}

struct StreamDestroy {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
using UniqueStream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, StreamDestroy>;

inline ncclResult_t streamCreate(UniqueStream* out) {
  cudaStream_t stream = nullptr;
  CUDACHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  out->reset(stream);
  return ncclSuccess;
}

} // namespace moe
