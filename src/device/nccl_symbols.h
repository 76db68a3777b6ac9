// NCCL's functions, found in the process: the library has no link-time dependence on libnccl, for a second copy of NCCL
// would come into the process with it.
#pragma once

#include <cuda_runtime.h>

#include "nccl_moe.h"

namespace moe {

struct NcclSymbols {
  ncclResult_t (*getVersion)(int*);
  const char* (*getErrorString)(ncclResult_t);
  ncclResult_t (*commCount)(ncclComm_t, int*);
  ncclResult_t (*commUserRank)(ncclComm_t, int*);
  ncclResult_t (*commCuDevice)(ncclComm_t, int*);
  ncclResult_t (*commGetAsyncError)(ncclComm_t, ncclResult_t*);
  ncclResult_t (*allGather)(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
};

// Sets *symbols, or says why not.  The process's NCCL is looked for at the first call: among the global symbols, then
// among the libraries that are loaded.
ncclResult_t ncclSymbols(const NcclSymbols** symbols);

} // namespace moe
