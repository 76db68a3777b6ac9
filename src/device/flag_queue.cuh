// The flags of rows that a block's warps have written, on their way out.
//
// A release at system scope ends when the peers have all that was written before, and on few SMs rows would spend much
// of their time in one each.  So warps put their flags into a queue in shared memory (release, block scope), and the
// block's last warp takes what is there (acquire), up to 32 flags, makes one fence at system scope for them, and stores
// them.  Both are cumulative: a flag that a peer sees says that the row is there.
#pragma once

#include "device/primitives.cuh"

namespace moe {

class FlagQueue { // lies in shared memory
 public:
  // Warps of the block that take part in the work: all but the last.
  static __device__ __forceinline__ int nPosting() { return static_cast<int>(blockDim.x) / 32 - 1; }
  // By all threads of the block.  True for the warps that take part in the work; the last one serves the others first.
  __device__ __forceinline__ bool open(uint32_t epoch) {
    for (int i = threadIdx.x; i < kEntries; i += blockDim.x) entries_[i] = 0;
    if (threadIdx.x == 0) {
      tail_ = 0;
      nPosting_ = nPosting();
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x / 32) < nPosting()) return true;
    serve(epoch);
    return false;
  }
  // By a whole warp that takes part: each lane that has posts n <= 4 flags that lie in a row.
  __device__ __forceinline__ void post(bool has, uint32_t* flags, int n) {
    const int lane = threadIdx.x & 31;
    const unsigned posting = __ballot_sync(~0u, has);
    __syncwarp(); // a ballot orders nothing
    uint32_t at = 0;
    if (lane == 0 && posting != 0) at = atomicAdd(&tail_, __popc(posting));
    at = __shfl_sync(~0u, at, 0) + __popc(posting & ((1u << lane) - 1));
    if (!has) return;
    __threadfence_block();
    const unsigned long long entry = reinterpret_cast<unsigned long long>(flags) | static_cast<unsigned>(n - 1);
    while (atomicCAS(&entries_[at % kEntries], 0ull, entry) != 0ull) continue;
  }
  // By a whole warp that took part, after its last post.
  __device__ __forceinline__ void leave() {
    __syncwarp();
    if ((threadIdx.x & 31) != 0) return;
    __threadfence_block();
    atomicSub(&nPosting_, 1);
  }

 private:
  static constexpr int kEntries = 256;

  __device__ __forceinline__ void serve(uint32_t epoch) {
    const uint32_t lane = threadIdx.x & 31;
    for (uint32_t head = 0;;) {
      const bool last = __shfl_sync(~0u, lane == 0 ? atomicAdd(&nPosting_, 0) : 0, 0) == 0;
      __threadfence_block();
      unsigned long long* entry = &entries_[(head + lane) % kEntries];
      const unsigned long long posted = atomicCAS(entry, 0ull, 0ull);
      const unsigned there = __ballot_sync(~0u, posted != 0);
      const uint32_t n = there == ~0u ? 32 : __ffs(~there) - 1;
      if (n == 0) {
        if (last) return;
        __nanosleep(100);
        continue;
      }
      __threadfence_system();
      if (lane < n) {
        uint32_t* flags = reinterpret_cast<uint32_t*>(posted & ~3ull);
        for (int i = 0; i <= static_cast<int>(posted & 3); i++) {
          asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flags + i), "r"(epoch) : "memory");
        }
        atomicExch(entry, 0ull);
      }
      __syncwarp();
      head += n;
    }
  }

  unsigned long long entries_[kEntries]; // address of the first flag + number of further ones; 0: free
  uint32_t tail_;                        // entries taken
  int nPosting_;                         // warps that may still post
};

} // namespace moe
