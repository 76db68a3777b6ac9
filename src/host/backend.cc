#include "host/backend.h"

#include "base/error.h"

namespace moe {

ncclResult_t hostBackendCreate(ncclMoeComm&, const char*) {
  return fail(ncclInvalidUsage, "ncclMoeCommInitHost: this build has no host backend yet");
}

} // namespace moe
