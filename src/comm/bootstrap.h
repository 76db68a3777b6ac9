// How the ranks of a host communicator find each other.
//
// Protocol.  Rank 0 listens at the rendezvous; every other rank first listens on a port of its own, then connects to
// rank 0, sends a hello and is answered at once (answer: you are known, or refuse: a sentence why you cannot join).
// When all ranks have joined, rank 0 compares their configs, stops listening, removes the rendezvous file, and sends
// everyone the table of addresses (or everyone the same refusal).  Each rank then connects to every lower rank but 0
// and exchanges hellos with it; the connections to rank 0 stay.  The result is one connection per pair of ranks.
//
// Who is trusted: only connections whose hello carries the job token (and, after the table, its nonce).  All others are
// dropped with a warning, each has a deadline of its own, and none delays another.  The token crosses the network as it
// is: it keeps strangers and stale processes out, not an eavesdropper.
//
// Waiting: rank 0 waits timeoutMs for the others and then tells those that came which did not; the others wait
// timeoutMs for rank 0 to appear, and as long again, and a second, for its table.
#pragma once

#include <string>
#include <vector>

#include "comm/comm.h"
#include "comm/message.h"

namespace moe {

struct BootstrapPeer {
  std::string hostId;
  UniqueFd socket; // non-blocking; empty for the rank itself
};

// peers: [nRanks].  Errors: ncclInvalidArgument, ncclSystemError, ncclRemoteError.
ncclResult_t bootstrap(const CommConfig& config, int rank, int nRanks, const char* rendezvous,
                       std::vector<BootstrapPeer>* peers);

} // namespace moe
