// The objects behind ncclMoeComm_t and ncclMoeRouting_t, and the interface that a backend implements.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nccl_moe.h"
#include "routing/placement.h"

namespace moe {

// The config with every default filled in and every pointer replaced by a copy.
struct CommConfig {
  int nExperts = 0;
  int maxTokens = 0;
  int maxTopK = 0;
  size_t maxRowBytes = 0;
  ncclMoeMode_t mode = ncclMoeModeAuto;
  int numSms = 0;
  int timeoutMs = 0;
  size_t maxMemory = 0;
  std::string jobToken;
  std::vector<ExpertHome> home; // [nExperts]
  std::vector<int> nLocal;      // [nRanks] experts of each rank
};

// What a backend keeps for a routing.
class RoutingState {
 public:
  virtual ~RoutingState() = default;
};

// Serves the collectives of one communicator.  Arguments have been checked by src/api for whatever one rank can see;
// structs are of the current version and defaults are filled in (topK, maxTokens, expertAlignment >= 1, ...).
class Backend {
 public:
  virtual ~Backend() = default;
  virtual ncclResult_t routingMemoryNeeded(const ncclMoeRoutingConfig_t& config, size_t* bytes) = 0;
  virtual ncclResult_t routingCreate(ncclMoeRouting& routing) = 0; // sets routing.state
  virtual ncclResult_t routingDestroy(ncclMoeRouting& routing) = 0;
  virtual ncclResult_t routingGetCounts(ncclMoeRouting& routing, int64_t* nRows, int* expertCounts) = 0;
  virtual ncclResult_t dispatch(const ncclMoeDispatchArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) = 0;
  virtual ncclResult_t combine(const ncclMoeCombineArgs_t& args, ncclMoeRouting& routing, cudaStream_t stream) = 0;
  virtual ncclResult_t complete(ncclMoeRouting& routing, cudaStream_t stream) = 0;
  virtual ncclResult_t memAlloc(void** ptr, size_t bytes) = 0;
  virtual ncclResult_t memFree(void* ptr) = 0;
  virtual size_t memoryBytes() = 0;
  virtual ncclResult_t maskRanks(const int* masked, uint64_t generation) = 0;
  virtual ncclResult_t stats(ncclMoeCommStats_t* stats) = 0;
  virtual int nScaleUpRanks() = 0;
  virtual bool onHost() = 0;
  // Any thread, at any time.
  virtual void abort() = 0;
  virtual ncclResult_t asyncError(std::string* sentence) = 0;
  // Waits for enqueued work and frees; errors are reported but everything is freed.
  virtual ncclResult_t shutdown() = 0;
};

} // namespace moe

struct ncclMoeRouting {
  enum class Phase { empty, dispatchSent, dispatched, combineSent };
  ncclMoeComm* comm = nullptr;
  ncclMoeRoutingConfig_t config{};
  Phase phase = Phase::empty; // what has been enqueued; dispatched also after a combine
  bool keeps = false;         // the last dispatch kept the routing, which then outlives its failure
  int nTokens = 0;            // T of the last dispatch
  std::unique_ptr<moe::RoutingState> state;
};

struct ncclMoeComm {
  uint64_t magic = 0;
  int forks =
    0; // that lie behind the process that made it: a child has its memory and its sockets, but is not its rank
  int rank = 0;
  int nRanks = 0;
  moe::CommConfig config;
  std::unique_ptr<moe::Backend> backend;
  std::vector<std::unique_ptr<ncclMoeRouting>> routings;
  std::mutex errorMutex; // guards lastError
  std::string lastError;
};
