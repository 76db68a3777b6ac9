#include "device/backend.h"

#include <unistd.h>

#include <fstream>

#include "device/device_backend.h"
#include "device/hash.h"
#include "device/nvtx.h"

namespace moe {
namespace {

// Ranks with the same identity may reach each other's memory.  NCCL_HOSTID stands in for it, as in NCCL.
uint64_t hostIdentity() {
  std::string identity;
  if (const char* id = getenv("NCCL_HOSTID")) {
    identity = id;
  } else {
    char name[256] = "";
    gethostname(name, sizeof(name) - 1);
    std::string boot;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
    identity = name + boot;
  }
  return hashBytes(identity.data(), identity.size());
}

} // namespace

ncclResult_t DeviceBackend::agree() {
  struct Shape {
    uint64_t host;
    long long values[5];
    uint64_t placement;
  };
  static const char* const names[] = {"nExperts", "maxTokens", "maxTopK", "maxRowBytes", "mode"};
  Shape mine{
    hostIdentity(),
    {config_.nExperts, config_.maxTokens, config_.maxTopK, static_cast<long long>(config_.maxRowBytes), config_.mode},
    hashBytes(config_.home.data(), sizeof(ExpertHome) * config_.home.size())};
  std::vector<Shape> all(moe_.nRanks);
  MOECHECK(bootstrap_->allGather(&mine, sizeof(mine), all.data()));
  MOECHECK(deviceRefusal(config_, moe_.nRanks, "ncclMoeCommInit")); // not before, for the others' config may be another
  for (int r = 0; r < moe_.nRanks; r++) {
    for (int f = 0; f < 5; f++) {
      if (all[r].values[f] != mine.values[f]) {
        return fail(ncclInvalidArgument, "ncclMoeCommInit: config.%s is %lld on rank %d but %lld on rank %d", names[f],
                    mine.values[f], moe_.rank, all[r].values[f], r);
      }
    }
    if (all[r].placement != mine.placement) {
      return fail(ncclInvalidArgument, "ncclMoeCommInit: config.expertToRank differs between rank %d and rank %d",
                  moe_.rank, r);
    }
    if (all[r].host != mine.host) {
      return fail(ncclInvalidUsage,
                  "ncclMoeCommInit: rank %d is on another host than rank %d; communicators of CUDA memory "
                  "that span hosts are not there yet",
                  r, moe_.rank);
    }
  }
  const size_t shared = routeSharedNeeded(moe_.nRanks, config_.nExperts);
  if (shared > static_cast<size_t>(sharedBytes_)) {
    return fail(ncclInvalidUsage,
                "ncclMoeCommInit: config.nExperts %d needs %zu bytes of shared memory in a block, device %d has %d",
                config_.nExperts, shared, device_, sharedBytes_);
  }
  return ncclSuccess;
}

ncclResult_t DeviceBackend::init() {
  NvtxRange range("ncclMoeCommInit");
  CUDACHECK(cudaGetDevice(&device_));
  CUDACHECK(cudaDeviceGetAttribute(&smCount_, cudaDevAttrMultiProcessorCount, device_));
  CUDACHECK(cudaDeviceGetAttribute(&sharedBytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
  MOECHECK(agree());
  layout_ = commLayout(config_, moe_.nRanks);
  size_t needed = 0;
  MOECHECK(deviceMemoryNeeded(config_, moe_.nRanks, &needed));
  if (config_.maxMemory != 0 && needed > config_.maxMemory) {
    return fail(ncclInvalidArgument, "ncclMoeCommInit: needs %zu bytes, more than config.maxMemory %zu", needed,
                config_.maxMemory);
  }
  CUDACHECK(prepareRoute(sharedBytes_));
  CUDACHECK(preparePush(&overlaps_));
  CUDACHECK(prepareCombine(sharedBytes_, &combineShapes_));
  CUDACHECK(prepareLatencyDispatch());
  CUDACHECK(prepareLatencyCombine());
  CUDACHECK(prepareMeet());
  MOECHECK(streamCreate(&own_));
  MOECHECK(eventCreate(&eager_.event));
  MOECHECK(eventCreate(&captured_.event));
  MOECHECK(makeTables());
  int window = -1;
  MOECHECK(addWindow(layout_.bytes, true, &window));
  MOE_INFO("MoE communicator: rank %d has %zu MiB on device %d", moe_.rank, layout_.bytes >> 20, device_);
  return ncclSuccess;
}

ncclResult_t DeviceBackend::start() {
  const ncclResult_t result = init();
  if (result != ncclSuccess && bootstrap_->stuck()) abandon();
  return result;
}

ncclResult_t DeviceBackend::drain() {
  if (bootstrap_->stuck()) {
    return fail(ncclRemoteError, "an exchange of the ranks that timed out still occupies the device; "
                                 "memory is not freed, for that would wait");
  }
  if (!launched_) return ncclSuccess;
  // Graphs may have been launched on any stream.
  CUDACHECK(cudaDeviceSynchronize());
  return ncclSuccess;
}

void DeviceBackend::abandon() {
  for (auto& window : windows_) (void)window.release();
  (void)host_.release();
  tables_.abandon();
}

ncclResult_t DeviceBackend::shutdown() {
  DeviceScope scope(device_);
  const ncclResult_t result = drain();
  if (bootstrap_->stuck()) abandon();
  for (auto& window : windows_) window.reset();
  return result;
}

ncclResult_t deviceMemoryNeeded(const CommConfig& config, int nRanks, size_t* bytes) {
  *bytes = Window::memoryOf(commLayout(config, nRanks).bytes) + tableBytes(config, nRanks);
  return ncclSuccess;
}

ncclResult_t deviceBackendCreate(ncclMoeComm& moe, std::unique_ptr<DeviceBootstrap> bootstrap) {
  auto backend = std::make_unique<DeviceBackend>(moe, std::move(bootstrap));
  MOECHECK(backend->start());
  moe.backend = std::move(backend);
  return ncclSuccess;
}

} // namespace moe
