// Device primitives: flags between ranks, waits that end, and copies by a warp.
//
// Memory order: a producer's lanes store a row, then __syncwarp(), then one lane stores the row's flag with release at
// system scope.  The consumer's lane loads the flag with acquire at system scope, then __syncwarp(), then all lanes
// load the row. Release and acquire are cumulative over __syncwarp(), so the row is visible to every lane.
#pragma once

#include <cstdint>

#include "device/kernels.h"

namespace moe {

__device__ __forceinline__ void storeRelease(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void storeRelease(unsigned long long* flag, unsigned long long value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ __forceinline__ uint32_t loadAcquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ unsigned long long loadAcquire(const unsigned long long* flag) {
  unsigned long long value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t globalTimerNs() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// A row that nothing writes while the kernel runs: through the read-only path, and not kept in L1.
__device__ __forceinline__ uint4 loadOnce(const uint4* ptr) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(ptr));
  return v;
}
// A row's vector to this rank's memory or a peer's: the compiler, which does not know that it is global, would store generically.
__device__ __forceinline__ void storeVector(uint4* ptr, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(ptr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// A row that a peer wrote.
__device__ __forceinline__ uint4 loadArrived(const uint4* ptr) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(ptr)
               : "memory");
  return v;
}

__device__ __forceinline__ Control* control(const CommView& c) { return reinterpret_cast<Control*>(c.self); }

// Records the first failure and ends all waits of this rank.
__device__ __forceinline__ void recordFailure(const CommView& c, int code, int phase, int peer, uint32_t epoch,
                                              uint32_t seen = 0) {
  if (atomicExch(&control(c)->failed, 1u) != 0) return;
  volatile Failure* f = c.failure;
  f->phase = phase;
  f->peer = peer;
  f->epoch = epoch;
  f->seen = seen;
  __threadfence_system();
  f->code = code;
}

// Calls ready() until it is true.  Ends with false, the failure recorded, after the communicator's timeout, on abort,
// or where another wait of this rank has failed.  May diverge.
template <class Ready>
__device__ __forceinline__ bool waitUntil(const CommView& c, int phase, int peer, uint32_t epoch, Ready ready) {
  if (ready()) return true;
  const uint64_t start = globalTimerNs();
  for (uint32_t polls = 1;; polls++) {
    if (ready()) return true;
    if (polls % 64 != 0) continue;
    if (*reinterpret_cast<volatile uint32_t*>(&control(c)->failed) != 0) return false;
    if (globalTimerNs() - start > c.timeoutNs) {
      recordFailure(c, kFailTimeout, phase, peer, epoch);
      return false;
    }
    if (polls % 1024 == 0 && *c.abortFlag != 0) {
      recordFailure(c, kFailAborted, phase, peer, epoch);
      return false;
    }
  }
}

// The last block of the grid to come here gets true in all its threads.
__device__ __forceinline__ bool lastBlock(Control* ctl) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&ctl->ticket, 1u) == gridDim.x - 1;
    if (last) ctl->ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Items of a counter, one after the other, for a whole warp: taken ahead, so that the counter's latency passes meanwhile, but
// for the last ones, which another warp may have time for.
class Items {
 public:
  __device__ __forceinline__ explicit Items(uint32_t* counter) : counter_(counter) {}
  __device__ __forceinline__ uint32_t next(uint32_t nItems) {
    const uint32_t item = __shfl_sync(~0u, isAhead_ ? ahead_ : take(), 0);
    isAhead_ = item + gridDim.x * blockDim.x / 16 < nItems; // two for each warp
    if (isAhead_) ahead_ = take();
    return item;
  }

 private:
  __device__ __forceinline__ uint32_t take() { return (threadIdx.x & 31) == 0 ? atomicAdd(counter_, 1u) : 0; }

  uint32_t* const counter_;
  uint32_t ahead_ = 0; // lane 0 has it
  bool isAhead_ = false;
};

} // namespace moe
