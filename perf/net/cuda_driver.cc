#include "perf/net/cuda_driver.h"

#include <dlfcn.h>

namespace moe {
namespace netperf {
namespace {

// From the documented driver API; cuda.h may not be there when this is compiled.
using Result = int;
using Device = int;
using DevicePtr = unsigned long long;
constexpr int attributeGpuDirect = 116;
constexpr int attributeDmaBuf = 124;
constexpr int rangeDmaBufFd = 1;
constexpr int pointerSyncMemops = 6;

class Driver : public CudaDriver {
 public:
  ncclResult_t load() {
    library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) return fail(ncclSystemError, "no CUDA driver: %s", dlerror());
    if (!resolve("cuInit", &init_) || !resolve("cuDriverGetVersion", &driverGetVersion_) ||
        !resolve("cuDeviceGetCount", &deviceGetCount_) || !resolve("cuDeviceGetName", &deviceGetName_) ||
        !resolve("cuDeviceGetPCIBusId", &deviceGetPciBusId_) ||
        !resolve("cuDeviceGetAttribute", &deviceGetAttribute_) ||
        !resolve("cuDevicePrimaryCtxRetain", &primaryRetain_) || !resolve("cuCtxSetCurrent", &setCurrent_) ||
        !resolve("cuCtxSynchronize", &synchronize_) || !resolve("cuMemAlloc_v2", &memAlloc_) ||
        !resolve("cuMemFree_v2", &memFree_) || !resolve("cuMemcpyHtoD_v2", &copyToDevice_) ||
        !resolve("cuMemcpyDtoH_v2", &copyToHost_) || !resolve("cuGetErrorName", &errorName_) ||
        !resolve("cuPointerSetAttribute", &setAttribute_))
      return fail(ncclSystemError, "the CUDA driver is too old");
    resolve("cuMemGetHandleForAddressRange", &getHandle_);
    MOECHECK(check(init_(0), "cuInit"));
    MOECHECK(check(driverGetVersion_(&version_), "cuDriverGetVersion"));
    int n = 0;
    MOECHECK(check(deviceGetCount_(&n), "cuDeviceGetCount"));
    for (Device device = 0; device < n; device++) {
      char name[128] = "", address[32] = "";
      int gpuDirect = 0, dmaBuf = 0;
      MOECHECK(check(deviceGetName_(name, sizeof(name), device), "cuDeviceGetName"));
      MOECHECK(check(deviceGetPciBusId_(address, sizeof(address), device), "cuDeviceGetPCIBusId"));
      deviceGetAttribute_(&gpuDirect, attributeGpuDirect, device); // unknown to an old driver: 0
      deviceGetAttribute_(&dmaBuf, attributeDmaBuf, device);
      gpus_.push_back({name, address, gpuDirect != 0, dmaBuf != 0});
    }
    if (n == 0) return fail(ncclSystemError, "the CUDA driver shows no GPU");
    return ncclSuccess;
  }
  int version() const override { return version_; }
  const std::vector<GpuInfo>& gpus() const override { return gpus_; }
  ncclResult_t use(int gpu) override {
    if (gpu < 0 || size_t(gpu) >= gpus_.size())
      return fail(ncclInvalidArgument, "there is no GPU %d, only %zu", gpu, gpus_.size());
    void* context = nullptr;
    MOECHECK(check(primaryRetain_(&context, gpu), "cuDevicePrimaryCtxRetain"));
    return check(setCurrent_(context), "cuCtxSetCurrent");
  }
  ncclResult_t allocate(size_t bytes, void** data) override {
    DevicePtr p = 0;
    MOECHECK(check(memAlloc_(&p, bytes), "cuMemAlloc"));
    const unsigned on = 1; // GPUDirect needs it: copies must not be in flight when the NIC reads
    if (setAttribute_(&on, pointerSyncMemops, p) != 0) {
      memFree_(p);
      return fail(ncclUnhandledCudaError, "cuPointerSetAttribute(SYNC_MEMOPS) failed");
    }
    *data = reinterpret_cast<void*>(p);
    return ncclSuccess;
  }
  void release(void* data) override { memFree_(reinterpret_cast<DevicePtr>(data)); }
  ncclResult_t write(void* device, const void* host, size_t bytes) override {
    if (bytes == 0) return ncclSuccess;
    MOECHECK(check(copyToDevice_(reinterpret_cast<DevicePtr>(device), host, bytes), "cuMemcpyHtoD"));
    return check(synchronize_(), "cuCtxSynchronize");
  }
  ncclResult_t read(void* host, const void* device, size_t bytes) override {
    if (bytes == 0) return ncclSuccess;
    return check(copyToHost_(host, reinterpret_cast<DevicePtr>(device), bytes), "cuMemcpyDtoH");
  }
  ncclResult_t dmaBufFd(void* data, size_t bytes, int* fd) override {
    if (getHandle_ == nullptr) return fail(ncclInvalidUsage, "the CUDA driver has no dma-buf export (needs 11.7)");
    return check(getHandle_(fd, reinterpret_cast<DevicePtr>(data), bytes, rangeDmaBufFd, 0),
                 "cuMemGetHandleForAddressRange");
  }

 private:
  template <typename F> bool resolve(const char* name, F* function) {
    *function = reinterpret_cast<F>(dlsym(library_, name));
    return *function != nullptr;
  }
  ncclResult_t check(Result result, const char* what) const {
    if (result == 0) return ncclSuccess;
    const char* name = nullptr;
    errorName_(result, &name);
    return fail(ncclUnhandledCudaError, "%s failed: %s", what, name != nullptr ? name : "unknown error");
  }

  void* library_ = nullptr; // stays: the driver does not unload
  int version_ = 0;
  std::vector<GpuInfo> gpus_;
  Result (*init_)(unsigned) = nullptr;
  Result (*driverGetVersion_)(int*) = nullptr;
  Result (*deviceGetCount_)(int*) = nullptr;
  Result (*deviceGetName_)(char*, int, Device) = nullptr;
  Result (*deviceGetPciBusId_)(char*, int, Device) = nullptr;
  Result (*deviceGetAttribute_)(int*, int, Device) = nullptr;
  Result (*primaryRetain_)(void**, Device) = nullptr;
  Result (*setCurrent_)(void*) = nullptr;
  Result (*synchronize_)() = nullptr;
  Result (*memAlloc_)(DevicePtr*, size_t) = nullptr;
  Result (*memFree_)(DevicePtr) = nullptr;
  Result (*copyToDevice_)(DevicePtr, const void*, size_t) = nullptr;
  Result (*copyToHost_)(void*, DevicePtr, size_t) = nullptr;
  Result (*errorName_)(Result, const char**) = nullptr;
  Result (*setAttribute_)(const void*, int, DevicePtr) = nullptr;
  Result (*getHandle_)(void*, DevicePtr, size_t, int, unsigned long long) = nullptr;
};

} // namespace

ncclResult_t CudaDriver::open(std::unique_ptr<CudaDriver>* driver) {
  auto opened = std::make_unique<Driver>();
  MOECHECK(opened->load());
  *driver = std::move(opened);
  return ncclSuccess;
}

} // namespace netperf
} // namespace moe
