// The CUDA backend's entry points in a build that has none.
#ifdef NCCL_MOE_NO_CUDA

#include "base/error.h"
#include "device/backend.h"

namespace moe {
namespace {
ncclResult_t noCuda(const char* function) {
  return fail(ncclInvalidUsage, "%s: this build of the library serves host memory only (ncclMoeCommInitHost)",
              function);
}
} // namespace

ncclResult_t deviceQueryComm(ncclComm_t, int*, int*) { return noCuda("ncclMoeCommInit"); }
ncclResult_t deviceMemoryNeeded(const CommConfig&, int, size_t*) { return noCuda("ncclMoeCommMemoryNeeded"); }
ncclResult_t deviceBackendCreate(ncclMoeComm&, ncclComm_t) { return noCuda("ncclMoeCommInit"); }

} // namespace moe

#endif
