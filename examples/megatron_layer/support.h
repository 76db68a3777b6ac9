// What any CUDA program has: error checks and arrays.
#pragma once

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nccl_moe.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

// Ends the program where a call fails; a framework would throw.
#define CHECK(call, good, sentence)                                                                                    \
  do {                                                                                                                 \
    const auto result_ = (call);                                                                                       \
    if (result_ != (good)) {                                                                                           \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, sentence);                                         \
      exit(2);                                                                                                         \
    }                                                                                                                  \
  } while (0)
#define CUDA_OK(call) CHECK(call, cudaSuccess, cudaGetErrorString(result_))
#define CUBLAS_OK(call) CHECK(call, CUBLAS_STATUS_SUCCESS, cublasGetStatusString(result_))
#define NCCL_OK(call) CHECK(call, ncclSuccess, ncclGetErrorString(result_))
#define MOE_OK(call) CHECK(call, ncclSuccess, ncclMoeGetLastError(nullptr))

using bf16 = __nv_bfloat16;

// Zeroed memory of the current device.
template <typename T> class DeviceArray {
 public:
  explicit DeviceArray(size_t n) : n_(n) {
    CUDA_OK(cudaMalloc(&data_, n * sizeof(T)));
    CUDA_OK(cudaMemset(data_, 0, n * sizeof(T)));
    CUDA_OK(cudaStreamSynchronize(nullptr)); // other streams do not wait for it
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { copyFrom(values.data()); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  operator T*() { return data_; } // NOLINT: a pointer is what every function here takes
  size_t size() const { return n_; }
  void copyFrom(const T* values) {
    CUDA_OK(cudaMemcpy(data_, values, n_ * sizeof(T), cudaMemcpyHostToDevice));
    CUDA_OK(cudaStreamSynchronize(nullptr));
  }
  std::vector<T> toHost() const {
    std::vector<T> values(n_);
    CUDA_OK(cudaMemcpy(values.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t n_;
  T* data_ = nullptr;
};
