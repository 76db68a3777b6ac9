// The CUDA backend.  In a build without CUDA these functions return ncclInvalidUsage (src/api/no_cuda.cc).
#pragma once

#include "comm/comm.h"

namespace moe {

// Size and rank of an NCCL communicator; finds NCCL's symbols in the process at first use.
ncclResult_t deviceQueryComm(ncclComm_t comm, int* nRanks, int* rank);

// Bytes of device memory that a communicator takes on one rank.
ncclResult_t deviceMemoryNeeded(const CommConfig& config, int nRanks, size_t* bytes);

// Sets moe.backend.  moe's rank, nRanks and config are filled in.
// Collective; waits for the peers.
ncclResult_t deviceBackendCreate(ncclMoeComm& moe, ncclComm_t comm);

} // namespace moe
