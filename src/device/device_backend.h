// The backend over CUDA memory.  Its functions lie in files by subject; backend.cc has its beginning and its end.
#pragma once

#include <array>
#include <bitset>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "device/bootstrap.h"
#include "device/cuda_handle.h"
#include "device/kernels.h"
#include "device/latency_routing.h"
#include "device/window.h"

namespace moe {

// What kernels tell the host and the host tells kernels, in host memory.  One allocation of the communicator's, for
// CUDA would free it only when no kernel runs.  The outcomes of its routings follow, each at the number of its window.
struct HostState {
  Failure failure;
  int abortFlag;
};

struct DeviceRouting : RoutingState {
  int id = 0;
  int window = -1;
  RoutingLayout layout;
  std::unique_ptr<LatencyRouting> latency; // where latency mode serves it; layout is then unused
  RoutingOutcome* outcome = nullptr;       // in the communicator's host memory
  UniqueEvent counted;                     // behind the last dispatch; with hostCounts behind its route kernel
  bool countedInCapture = false;

  const char* mode() const { return latency != nullptr ? "latency" : "throughput"; } // for logs and traces
};

class DeviceBackend final : public Backend {
 public:
  DeviceBackend(ncclMoeComm& moe, std::unique_ptr<DeviceBootstrap> bootstrap)
    : moe_(moe), config_(moe.config), bootstrap_(std::move(bootstrap)) {}
  // Collective.  Frees nothing after an error where that would wait for ever.
  ncclResult_t start();

  ncclResult_t routingMemoryNeeded(const ncclMoeRoutingConfig_t& config, size_t* bytes) override;
  ncclResult_t routingCreate(ncclMoeRouting& routing) override;
  ncclResult_t routingDestroy(ncclMoeRouting& routing) override;
  ncclResult_t routingGetCounts(ncclMoeRouting& routing, int64_t* nRows, int* expertCounts) override;
  ncclResult_t dispatch(const ncclMoeDispatchArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) override;
  ncclResult_t combine(const ncclMoeCombineArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) override;
  ncclResult_t complete(ncclMoeRouting& routing, cudaStream_t stream) override;
  ncclResult_t memAlloc(void** ptr, size_t bytes) override;
  ncclResult_t memFree(void* ptr) override;
  size_t memoryBytes() override;
  ncclResult_t maskRanks(const int* masked, uint64_t generation) override;
  ncclResult_t stats(ncclMoeCommStats_t* stats) override;
  int nScaleUpRanks() override { return moe_.nRanks; }
  bool onHost() override { return false; }
  void abort() override { *static_cast<volatile int*>(&host_->abortFlag) = 1; }
  ncclResult_t asyncError(std::string* sentence) override;
  ncclResult_t shutdown() override;

 private:
  // The last call that was enqueued: of those of a capture, or of those outside captures.
  struct LastCall {
    UniqueEvent event;
    unsigned long long capture = 0; // 0: outside
    unsigned long long stream = 0;  // outside captures, its id: a handle may come to stand for another stream
    bool any = false;
  };

  static DeviceRouting& stateOf(ncclMoeRouting& routing) { return static_cast<DeviceRouting&>(*routing.state); }

  // backend.cc
  ncclResult_t init();
  // All ranks must have the same shape and reach each other.
  ncclResult_t agree();
  // Waits for this rank's kernels, which end within the communicator's timeout.
  ncclResult_t drain();
  // Lets go of all memory without freeing it.
  void abandon();

  // tables.cc
  ncclResult_t makeTables();
  // That of the window's next routing: zeroes.
  RoutingOutcome* clearedOutcome(int window);
  CommView view() const;
  RoutingView view(ncclMoeRouting& routing) const;

  // memory.cc
  // Collective; the same number on every rank.
  ncclResult_t addWindow(size_t bytes, bool zeroed, int* number);
  void releaseWindow(int number);
  // The ncclMoeMemAlloc memory that ptr lies in, or -1; an error where so many rows do not end within it.
  ncclResult_t findWindow(const void* ptr, long long rows, long long rowBytes, int* window, long long* offset) const;

  // routings.cc
  size_t windowBytes(const ncclMoeRoutingConfig_t& config) const;
  // An error where this rank would get more rows than an int counts.
  ncclResult_t rowsRefusal(const ncclMoeRoutingConfig_t& config, const char* function) const;
  ncclResult_t routingMake(const ncclMoeRoutingConfig_t& config, DeviceRouting& state);

  // calls.cc
  // Before and after what a call enqueues.
  ncclResult_t follow(cudaStream_t stream);
  ncclResult_t followed(cudaStream_t stream);
  // The call's wish, or the communicator's, or the library's choice.
  int sms(int wanted, int otherwise) const;

  // masks.cc
  ncclResult_t meetRanks(const MeetArgs& meet, const char* function);
  // What all ranks must take part in, and throughput mode, need everybody.
  ncclResult_t nobodyMasked(const char* function) const;

  // errors.cc
  // What has ended the communicator's waits.
  ncclResult_t failureOf(std::string* sentence) const;
  // How the routing's last dispatch ended.
  static ncclResult_t outcomeOf(const DeviceRouting& state, std::string* sentence);
  ncclResult_t usable(const char* function) const;

  ncclMoeComm& moe_;
  const CommConfig& config_;
  std::unique_ptr<DeviceBootstrap> bootstrap_;
  int device_ = 0, smCount_ = 0, sharedBytes_ = 0;
  bool overlaps_ = false; // the device can begin a kernel before the one that it follows has ended
  CommLayout layout_;
  CombineShapes combineShapes_;
  HostMapped<HostState> host_;
  DeviceMemory tables_;
  char** dWindows_ = nullptr;
  int *dRankOf_ = nullptr, *dRankStart_ = nullptr;
  uint32_t* dHomes_ = nullptr;
  CommShared* shared_ = nullptr;
  UniqueStream own_; // for copies and meetings, beside the caller's streams
  unsigned long long masked_ = 0;
  uint64_t generation_ = 0; // of the last ncclMoeCommMaskRanks
  bool exactUsed_ = false;  // in latency mode
  std::array<std::unique_ptr<Window>, kMaxWindows> windows_;
  std::vector<int> userWindows_;
  std::bitset<kMaxWindows> released_; // of windows_: no longer in use, but kept
  int nextRouting_ = 0;
  LastCall eager_, captured_;
  bool launched_ = false;                  // kernels of this communicator may run
  std::mutex liveMutex_;                   // guards live_
  std::vector<const DeviceRouting*> live_; // routings that asyncError looks at, which any thread may call
};

// What the communicator's own window holds.
CommLayout commLayout(const CommConfig& config, int nRanks);
// Tables of the placement and of the windows, and what all calls share, beside the communicator window.
size_t tableBytes(const CommConfig& config, int nRanks);

} // namespace moe
