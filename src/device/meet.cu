// A meeting of the ranks that are not masked, for ncclMoeCommMaskRanks.
//
// Thread r stores the meeting's value into meeting[this rank] of rank r (release, system scope) and waits until rank r
// has stored one at least as large here (acquire).  Kernels of this rank that ran before have ended, so that whoever
// has met this rank finds all of their stores done.  A wait is bounded by the communicator's timeout.
#include "device/latency.h"
#include "device/primitives.cuh"

namespace moe {
namespace {

__global__ void __launch_bounds__(kMaxDeviceRanks) meetKernel(const __grid_constant__ MeetArgs a) {
  const CommView& c = a.comm;
  const int r = threadIdx.x;
  if (r >= c.nRanks || (a.masked >> r & 1) != 0) return;
  const auto meeting = [&](int of) { return reinterpret_cast<unsigned long long*>(c.peer(of) + c.layout.meeting); };
  storeRelease(meeting(r) + c.rank, a.value);
  waitUntil(c, kPhaseMeeting, r, static_cast<uint32_t>(a.value),
            [&] { return loadAcquire(meeting(c.rank) + r) >= a.value; });
}

} // namespace

cudaError_t prepareMeet() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, meetKernel);
}

cudaError_t launchMeet(const MeetArgs& args, cudaStream_t stream) {
  return launchKernel<MeetArgs>(meetKernel, 1, kMaxDeviceRanks, 0, stream, args);
}

} // namespace moe
