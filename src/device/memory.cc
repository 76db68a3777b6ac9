// Windows: memory that all ranks of a communicator reach.
#include <algorithm>
#include <type_traits>

#include "device/device_backend.h"

namespace moe {

// Takes a released window where all ranks have released one that fits: the one of the lowest number, for ranks may
// release in different orders.
ncclResult_t DeviceBackend::addWindow(size_t bytes, bool zeroed, int* number) {
  struct State {
    std::bitset<kMaxWindows> taken, spare;
  } mine{};
  static_assert(std::is_trivially_copyable<State>::value, "it travels as bytes");
  for (int w = 0; w < kMaxWindows; w++) {
    mine.taken[w] = windows_[w] != nullptr;
    mine.spare[w] = released_[w] && windows_[w]->bytes() >= bytes;
  }
  std::vector<State> all(moe_.nRanks);
  MOECHECK(bootstrap_->allGather(&mine, sizeof(mine), all.data()));
  std::bitset<kMaxWindows> taken, spare = mine.spare;
  for (const State& theirs : all) {
    taken |= theirs.taken;
    spare &= theirs.spare;
  }
  int reuse = 0, next = 0;
  while (reuse < kMaxWindows && !spare[reuse]) reuse++;
  while (next < kMaxWindows && taken[next]) next++;
  if (reuse < kMaxWindows) {
    *number = reuse;
    released_[reuse] = false;
    if (zeroed) CUDACHECK(cudaMemset(windows_[reuse]->self(), 0, bytes));
    CUDACHECK(cudaDeviceSynchronize());
    return bootstrap_->allGather(&mine, sizeof(mine), all.data()); // nobody writes into it before it is zeroed
  }
  if (next == kMaxWindows) {
    return fail(
      ncclInvalidUsage,
      "more than %d routings and allocations at a time; %zu of those that have gone are kept, for their ranks "
      "share a process, but too small for %zu bytes on every rank",
      kMaxWindows - 1, released_.count(), bytes);
  }
  auto window = std::make_unique<Window>();
  const ncclResult_t created = window->create(*bootstrap_, moe_.rank, moe_.nRanks, bytes, zeroed);
  if (created != ncclSuccess) {
    if (bootstrap_->stuck()) (void)window.release(); // freeing would wait for the device
    return created;
  }
  CUDACHECK(cudaMemcpy(dWindows_ + next * moe_.nRanks, window->bases().data(), sizeof(char*) * moe_.nRanks,
                       cudaMemcpyHostToDevice));
  CUDACHECK(cudaStreamSynchronize(nullptr)); // a copy from pageable memory may return before it is done
  windows_[next] = std::move(window);
  *number = next;
  return ncclSuccess;
}

// CUDA frees memory only when every GPU of the process that reaches it is idle; one of them may be running a kernel of
// NCCL that waits for this rank's next call.  So where ranks share a process, memory is kept and used again.
void DeviceBackend::releaseWindow(int number) {
  if (bootstrap_->stuck()) {
    (void)windows_[number].release();
  } else if (windows_[0]->ranksShareProcess()) {
    released_[number] = true;
  } else {
    windows_[number].reset();
  }
}

ncclResult_t DeviceBackend::memAlloc(void** ptr, size_t bytes) {
  DeviceScope scope(device_);
  MOECHECK(usable("ncclMoeMemAlloc"));
  MOECHECK(nobodyMasked("ncclMoeMemAlloc"));
  int window = -1;
  MOECHECK(addWindow(bytes, false, &window));
  *ptr = windows_[window]->self();
  userWindows_.push_back(window);
  return ncclSuccess;
}

ncclResult_t DeviceBackend::memFree(void* ptr) {
  DeviceScope scope(device_);
  const auto found =
    std::find_if(userWindows_.begin(), userWindows_.end(), [&](int window) { return windows_[window]->self() == ptr; });
  if (found == userWindows_.end()) {
    return fail(ncclInvalidArgument, "ncclMoeMemFree: ptr is not ncclMoeMemAlloc memory of this communicator");
  }
  const ncclResult_t result = drain();
  releaseWindow(*found);
  userWindows_.erase(found);
  return result;
}

ncclResult_t DeviceBackend::findWindow(const void* ptr, long long rows, long long rowBytes, int* window,
                                       long long* offset) const {
  *window = -1;
  *offset = 0;
  for (int w : userWindows_) {
    if (!windows_[w]->contains(ptr)) continue;
    *offset = static_cast<const char*>(ptr) - windows_[w]->self();
    if (rows > (static_cast<long long>(windows_[w]->bytes()) - *offset) / rowBytes) {
      return fail(ncclInvalidArgument,
                  "ncclMoeDispatch: args.recvX with %lld rows of %lld bytes ends beyond its ncclMoeMemAlloc memory",
                  rows, rowBytes);
    }
    *window = w;
  }
  return ncclSuccess;
}

size_t DeviceBackend::memoryBytes() {
  size_t bytes = tableBytes(config_, moe_.nRanks);
  for (int w = 0; w < kMaxWindows; w++) {
    const bool users = std::find(userWindows_.begin(), userWindows_.end(), w) != userWindows_.end();
    if (windows_[w] != nullptr && !users) bytes += Window::memoryOf(windows_[w]->bytes());
  }
  return bytes;
}

} // namespace moe
