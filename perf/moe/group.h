// The ranks of a run, apart from the library under test: barriers and small exchanges, and the word that one failed.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>

#include "nccl_moe.h"

namespace moe::perf {

class Group {
 public:
  virtual ~Group() = default;
  virtual int rank() const = 0;
  virtual int nRanks() const = 0;
  virtual ncclResult_t barrier() = 0;
  // out [nRanks * bytes], in the order of ranks.
  virtual ncclResult_t allGather(const void* in, void* out, size_t bytes) = 0;
  // Ends the waiting of all ranks; any thread.
  virtual void abort() = 0;
};

// Rank 0 waits, which is then so much later than the others.
void beLate(const Group& group, int us);

// In memory that forked processes and threads share.  The barrier is a counter and a generation: the last to come
// resets the counter, then moves the generation on (release); the others spin on it for a while, then sleep in a futex,
// until it has moved, the run is aborted or timeoutMs has passed.
struct GroupMemory {
  std::atomic<int> arrived;
  std::atomic<int> generation;
  std::atomic<int> aborted;
  // then nRanks slots of slotBytes
  static constexpr size_t slotBytes = 4096;
};

struct GroupMemoryDeleter {
  size_t bytes = 0;
  void operator()(GroupMemory* memory) const;
};
using GroupMemoryPtr = std::unique_ptr<GroupMemory, GroupMemoryDeleter>;

// Shared by all processes that are forked afterwards.
ncclResult_t makeGroupMemory(int nRanks, GroupMemoryPtr* memory);

std::unique_ptr<Group> makeSharedGroup(GroupMemory* memory, int rank, int nRanks, int timeoutMs);

#ifdef MOE_MPI
// Around all of MPI; MPI_Init has been called.
std::unique_ptr<Group> makeMpiGroup();
#endif

} // namespace moe::perf
