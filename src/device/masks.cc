// ncclMoeCommMaskRanks.
#include "device/device_backend.h"

namespace moe {

ncclResult_t DeviceBackend::nobodyMasked(const char* function) const {
  if (masked_ == 0) return ncclSuccess;
  return fail(ncclInvalidUsage,
              "%s: ranks are masked (ncclMoeCommMaskRanks); only latency mode's calls go on without them", function);
}

ncclResult_t DeviceBackend::meetRanks(const MeetArgs& meet, const char* function) {
  CUDACHECK(launchMeet(meet, own_.get()));
  CUDACHECK(cudaStreamSynchronize(own_.get()));
  return usable(function);
}

// What was under way when a rank went missing is given up: between two meetings, when nobody's kernels run, everybody
// empties what peers write into and starts counting calls anew.
ncclResult_t DeviceBackend::maskRanks(const int* masked, uint64_t generation) {
  DeviceScope scope(device_);
  const char* function = "ncclMoeCommMaskRanks";
  if (generation <= generation_ || generation >> 62 != 0) {
    return fail(ncclInvalidArgument, "%s: generation %llu is not in %llu..2^62-1", function,
                static_cast<unsigned long long>(generation), static_cast<unsigned long long>(generation_) + 1);
  }
  // What a masked rank still sends lies where nobody looks, but for rows that go by selection.
  if (exactUsed_) {
    return fail(ncclInvalidUsage, "%s: the communicator has combined with NCCL_MOE_EXACT in latency mode", function);
  }
  MOECHECK(drain()); // what fails meanwhile counts
  if (host_->failure.code != kFailTimeout || *static_cast<volatile const int*>(&host_->abortFlag) != 0) {
    MOECHECK(usable(function));
  }
  generation_ = generation;
  host_->failure = Failure{};
  CUDACHECK(cudaMemsetAsync(windows_[0]->self() + offsetof(Control, failed), 0, sizeof(Control::failed), own_.get()));
  MeetArgs meet{view(), 0, 2 * generation};
  for (int r = 0; r < moe_.nRanks; r++) meet.masked |= static_cast<unsigned long long>(masked[r]) << r;
  MOECHECK(meetRanks(meet, function));
  masked_ = meet.masked;
  CUDACHECK(cudaMemcpyAsync(&shared_->masked, &masked_, sizeof(masked_), cudaMemcpyHostToDevice, own_.get()));
  char* window = windows_[0]->self();
  CUDACHECK(cudaMemsetAsync(window, 0, layout_.meeting, own_.get()));
  CUDACHECK(cudaMemsetAsync(window + layout_.rowFlags, 0, layout_.scales - layout_.rowFlags, own_.get()));
  CUDACHECK(cudaStreamSynchronize(own_.get()));
  for (const auto& routing : moe_.routings) {
    if (stateOf(*routing).latency != nullptr) MOECHECK(stateOf(*routing).latency->empty(own_.get()));
  }
  meet.value++;
  return meetRanks(meet, function);
}

} // namespace moe
