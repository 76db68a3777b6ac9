// The few functions of the CUDA driver that net_perf needs, opened at run time: it also runs where there is no CUDA.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"

namespace moe {
namespace netperf {

struct GpuInfo {
  std::string name, pciAddress;
  bool gpuDirect = false; // CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED
  bool dmaBuf = false;    // CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED
};

class CudaDriver {
 public:
  // An error, with the reason, where there is no driver or no GPU.
  static ncclResult_t open(std::unique_ptr<CudaDriver>* driver);
  virtual ~CudaDriver() = default;
  virtual int version() const = 0;
  virtual const std::vector<GpuInfo>& gpus() const = 0;
  virtual ncclResult_t use(int gpu) = 0; // for the calling thread
  virtual ncclResult_t allocate(size_t bytes, void** data) = 0;
  virtual void release(void* data) = 0;
  virtual ncclResult_t write(void* device, const void* host, size_t bytes) = 0;
  virtual ncclResult_t read(void* host, const void* device, size_t bytes) = 0;
  virtual ncclResult_t dmaBufFd(void* data, size_t bytes, int* fd) = 0;
};

} // namespace netperf
} // namespace moe
