// How the ranks of a device communicator exchange a few bytes while they set up.
#pragma once

#include <memory>

#include "comm/comm.h"

namespace moe {

class DeviceBootstrap {
 public:
  virtual ~DeviceBootstrap() = default;
  // Gathers bytes from every rank into all, in the order of the ranks.  Collective; waits, but not for ever.
  virtual ncclResult_t allGather(const void* mine, size_t bytes, void* all) = 0;
  // An exchange that timed out still occupies the device: what frees device memory would wait for it.
  virtual bool stuck() const { return false; }
};

// On the user's NCCL communicator, which is borrowed.
ncclResult_t ncclBootstrapCreate(std::unique_ptr<DeviceBootstrap>* bootstrap, ncclComm_t comm, int nRanks,
                                 int timeoutMs);

// Makes the device backend of moe over any bootstrap: ranks need no NCCL and may share a GPU, where all of them then
// have to fit beside each other (numSms).
ncclResult_t deviceBackendCreate(ncclMoeComm& moe, std::unique_ptr<DeviceBootstrap> bootstrap);

} // namespace moe
