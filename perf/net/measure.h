// The measurements, as both processes run them.
#pragma once

#include <vector>

#include "perf/net/link.h"
#include "perf/net/options.h"

namespace moe {
namespace netperf {

struct Result {
  size_t bytes = 0;
  size_t iters = 0;
  double outGBs = 0, bothGBs = 0;            // one way; both ways at once, the sum
  double messagesPerSecond = 0;              // one way
  double latencyUs = 0, latency99Us = 0;     // half a round trip: median, 99th percentile
  double socketGBs = 0, socketLatencyUs = 0; // the same over one plain TCP socket
  long wrong = -1;                           // bytes; -1: not compared
};

// One size.  first: the process that sends one way and begins the ping-pong; its result has the numbers of both.
ncclResult_t measure(Link* link, Control* control, bool first, const Options& options, size_t bytes, Result* result);

// Sends count messages each way and compares every byte, the sizes told, and the bytes behind each message.
ncclResult_t verify(Link* link, Control* control, size_t bytes, int count, bool first, long* wrong);

} // namespace netperf
} // namespace moe
