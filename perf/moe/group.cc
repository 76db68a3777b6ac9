#include "perf/moe/group.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <new>

#include "perf/moe/perf_error.h"

#ifdef MOE_MPI
#include <mpi.h>
#endif

namespace moe::perf {

namespace {

using Clock = std::chrono::steady_clock;

int availableCores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

class SharedGroup : public Group {
 public:
  SharedGroup(GroupMemory* memory, int rank, int nRanks, int timeoutMs)
    : memory_(memory), rank_(rank), nRanks_(nRanks), timeoutMs_(timeoutMs),
      // Spinning helps ranks to leave together, but where they share cores it keeps others from arriving.
      spin_(nRanks <= availableCores() ? std::chrono::microseconds(500) : std::chrono::microseconds(0)) {}

  int rank() const override { return rank_; }
  int nRanks() const override { return nRanks_; }

  ncclResult_t barrier() override {
    const int generation = memory_->generation.load(std::memory_order_acquire);
    if (memory_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == nRanks_) {
      memory_->arrived.store(0, std::memory_order_relaxed);
      memory_->generation.store(generation + 1, std::memory_order_release);
      wake();
      return ncclSuccess;
    }
    const Clock::time_point start = Clock::now();
    while (memory_->generation.load(std::memory_order_acquire) == generation) {
      if (memory_->aborted.load(std::memory_order_acquire) != 0)
        return perfFail(ncclRemoteError, "the run was ended by another rank's failure");
      const auto waited = Clock::now() - start;
      if (waited < spin_) continue;
      if (waited > std::chrono::milliseconds(timeoutMs_))
        return perfFail(ncclRemoteError, "a rank did not come to the barrier within %d ms", timeoutMs_);
      const timespec nap{0, 50 * 1000 * 1000}; // bounds how long an abort goes unseen
      syscall(SYS_futex, &memory_->generation, FUTEX_WAIT, generation, &nap, nullptr, 0);
    }
    return ncclSuccess;
  }

  ncclResult_t allGather(const void* in, void* out, size_t bytes) override {
    auto* slots = reinterpret_cast<char*>(memory_ + 1);
    for (size_t at = 0; at < bytes; at += GroupMemory::slotBytes) {
      const size_t n = std::min(bytes - at, GroupMemory::slotBytes);
      memcpy(slots + rank_ * GroupMemory::slotBytes, static_cast<const char*>(in) + at, n);
      PERFCHECK(barrier());
      for (int r = 0; r < nRanks_; r++)
        memcpy(static_cast<char*>(out) + r * bytes + at, slots + r * GroupMemory::slotBytes, n);
      PERFCHECK(barrier()); // nobody overwrites a slot that another still reads
    }
    return ncclSuccess;
  }

  void abort() override {
    memory_->aborted.store(1, std::memory_order_release);
    wake();
  }

 private:
  void wake() { syscall(SYS_futex, &memory_->generation, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

  GroupMemory* memory_;
  int rank_;
  int nRanks_;
  int timeoutMs_;
  std::chrono::microseconds spin_;
};

#ifdef MOE_MPI
class MpiGroup : public Group {
 public:
  MpiGroup() {
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &nRanks_);
  }
  int rank() const override { return rank_; }
  int nRanks() const override { return nRanks_; }
  ncclResult_t barrier() override {
    if (MPI_Barrier(MPI_COMM_WORLD) != MPI_SUCCESS) return perfFail(ncclRemoteError, "MPI_Barrier failed");
    return ncclSuccess;
  }
  ncclResult_t allGather(const void* in, void* out, size_t bytes) override {
    const int n = static_cast<int>(bytes);
    if (MPI_Allgather(in, n, MPI_BYTE, out, n, MPI_BYTE, MPI_COMM_WORLD) != MPI_SUCCESS)
      return perfFail(ncclRemoteError, "MPI_Allgather failed");
    return ncclSuccess;
  }
  void abort() override { MPI_Abort(MPI_COMM_WORLD, 1); }

 private:
  int rank_ = 0;
  int nRanks_ = 0;
};
#endif

size_t groupBytes(int nRanks) { return sizeof(GroupMemory) + static_cast<size_t>(nRanks) * GroupMemory::slotBytes; }

} // namespace

void beLate(const Group& group, int us) {
  if (group.rank() != 0) return;
  const Clock::time_point until = Clock::now() + std::chrono::microseconds(us);
  while (Clock::now() < until) sched_yield(); // sleeping takes 50 us longer
}

void GroupMemoryDeleter::operator()(GroupMemory* memory) const { munmap(memory, bytes); }

ncclResult_t makeGroupMemory(int nRanks, GroupMemoryPtr* memory) {
  const size_t bytes = groupBytes(nRanks);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return perfFail(ncclSystemError, "%zu bytes of shared memory cannot be mapped: %m", bytes);
  *memory = GroupMemoryPtr(new (p) GroupMemory{{0}, {0}, {0}}, GroupMemoryDeleter{bytes});
  return ncclSuccess;
}

std::unique_ptr<Group> makeSharedGroup(GroupMemory* memory, int rank, int nRanks, int timeoutMs) {
  return std::make_unique<SharedGroup>(memory, rank, nRanks, timeoutMs);
}

#ifdef MOE_MPI
std::unique_ptr<Group> makeMpiGroup() { return std::make_unique<MpiGroup>(); }
#endif

} // namespace moe::perf
