// The host-memory backend.
#pragma once

#include "comm/comm.h"

namespace moe {

// Meets the other ranks at the rendezvous and sets comm.backend.  comm's rank, nRanks and config are filled in.
ncclResult_t hostBackendCreate(ncclMoeComm& comm, const char* rendezvous);

} // namespace moe
