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

// In a build with DELAYS=1 one call in `oneIn` waits, for up to maxNs; otherwise nothing.  What the protocols do not
// order shall then come in any order, and whoever helps a late one shall have to.  Lanes draw for themselves.
__device__ __forceinline__ void delaySometimes([[maybe_unused]] unsigned oneIn, [[maybe_unused]] unsigned maxNs) {
#ifdef MOE_DELAYS
  unsigned x = static_cast<unsigned>(clock64()) ^ (blockIdx.x << 16) ^ (threadIdx.x * 0x9e3779b9u);
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  x ^= x >> 16;
  if (x % oneIn == 0) __nanosleep((x >> 8) % maxNs);
#endif
}

// A row that nothing writes while the kernel runs: through the read-only path, and not kept in L1.
__device__ __forceinline__ uint4 loadOnce(const uint4* ptr) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(ptr));
  return v;
}
// A row of the caller's, not kept in L1.  Not through the read-only path (loadOnce): where kernels overlap, the one
// that writes the row may still run when this one begins.
__device__ __forceinline__ uint4 loadInput(const uint4* ptr) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(ptr)
               : "memory");
  return v;
}
// A row's vector to this rank's memory or a peer's: the compiler, which does not know that it is global, would store
// generically.
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

// Sixteen bytes that are seen as a whole: PTX makes accesses by a b128 instruction single-copy atomic.  So a packet
// that has a tag among its words says by itself whether it is there, without a flag or a fence.
__device__ __forceinline__ void storePacket(uint4* to, const uint4& v) {
  delaySometimes(1024, 20000);
  const unsigned long long lo = static_cast<unsigned long long>(v.y) << 32 | v.x;
  const unsigned long long hi = static_cast<unsigned long long>(v.w) << 32 | v.z;
  asm volatile("{ .reg .b128 p; mov.b128 p, {%1, %2}; st.relaxed.sys.global.b128 [%0], p; }" ::"l"(to), "l"(lo), "l"(hi)
               : "memory");
}
__device__ __forceinline__ uint4 loadPacket(const uint4* from) {
  unsigned long long lo, hi;
  asm volatile("{ .reg .b128 p; ld.relaxed.sys.global.b128 p, [%2]; mov.b128 {%0, %1}, p; }"
               : "=l"(lo), "=l"(hi)
               : "l"(from)
               : "memory");
  return make_uint4(static_cast<uint32_t>(lo), static_cast<uint32_t>(lo >> 32), static_cast<uint32_t>(hi),
                    static_cast<uint32_t>(hi >> 32));
}
// Component i of a packet.
__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// A kernel that was launched to overlap with the one before it in its stream (launchKernel) waits here until that one
// has ended and its stores are visible.
__device__ __forceinline__ void awaitKernelBefore() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the blocks of such a kernel may take the SMs that this one does not need.
__device__ __forceinline__ void admitKernelBehind() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
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

// Whether it is this SM's turn to look at the abort flag: each has one in 8 ms, so that few warps look at a time.  The
// flag lies in host memory.  Were all the warps that wait to look there at once, the answers would take longer than
// most waits: a rank that waits for a late one would be late itself, the other would wait for it in the same manner,
// and so on, call after call.
__device__ __forceinline__ bool abortIsDue() {
  // A turn is 66 us: few waits that look every 32 polls miss it, and they have another in 8 ms.
  constexpr unsigned kTurnBits = 16;
  constexpr unsigned kTurns = 128;
  uint32_t ns, sm;
  asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(ns));
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  return ((ns >> kTurnBits) + sm) % kTurns == 0;
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
    if (abortIsDue() && *c.abortFlag != 0) {
      recordFailure(c, kFailAborted, phase, peer, epoch);
      return false;
    }
  }
}

// Tells the host of an index in topkIdx that is out of range or repeated: fields first, code last.
__device__ __forceinline__ void storeIndexOutcome(volatile RoutingOutcome* o, int code, int token, int position,
                                                  long long expert) {
  o->token = token;
  o->position = position;
  o->expert = static_cast<int>(expert > INT32_MAX ? INT32_MAX : expert < INT32_MIN ? INT32_MIN : expert);
  __threadfence_system();
  o->code = code;
}

// Adds the time since start to what this rank has waited for the peer to begin a call.  By one of the threads that wait
// for that.
__device__ __forceinline__ void countWait(const CommView& c, int peer, uint64_t start) {
  atomicAdd(&c.shared->waitNs[peer], static_cast<unsigned long long>(globalTimerNs() - start));
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

// Items of a counter, one after the other, for a whole warp: taken ahead, so that the counter's latency passes
// meanwhile, but for the last ones, which another warp may have time for.  The first is one of those that firstItems
// took for the block.
class Items {
 public:
  __device__ __forceinline__ Items(uint32_t* counter, uint32_t first)
    : counter_(counter), ahead_(first + threadIdx.x / 32) {}
  __device__ __forceinline__ uint32_t next(uint32_t nItems) {
    const uint32_t item = __shfl_sync(~0u, isAhead_ ? ahead_ : take(), 0);
    isAhead_ = item + gridDim.x * blockDim.x / 16 < nItems; // two for each warp
    if (isAhead_) ahead_ = take();
    return item;
  }

 private:
  __device__ __forceinline__ uint32_t take() { return (threadIdx.x & 31) == 0 ? atomicAdd(counter_, 1u) : 0; }

  uint32_t* const counter_;
  uint32_t ahead_; // lane 0 has it
  bool isAhead_ = true;
};
// An item for each of a block's warps, by one thread: were all warps of a grid to go to the counter at once, the last
// would wait for microseconds.
__device__ __forceinline__ uint32_t firstItems(uint32_t* counter, int nWarps) {
  return atomicAdd(counter, static_cast<uint32_t>(nWarps));
}

// Which part of a row an item of work covers: pieces [piece, piece + nPieces), which are vectors [begin, end).
struct Span {
  int piece, nPieces, begin, end;
};

// Items of work on n rows by a grid.  The first rows are whole items.  The last ones, one for each warp, are divided
// into their pieces, so that all warps end at about the same time; few rows are all divided.  It lies in shared memory,
// where it costs no registers.
class RowWork {
 public:
  // By one thread.
  __device__ __forceinline__ void plan(uint32_t nRows, int nVec, bool divide = true) {
    pieces_ = RowPieces(nVec);
    nVec_ = nVec;
    nWhole_ = nRows - (divide ? min(nRows, gridDim.x * blockDim.x / 32) : 0);
    nItems_ = nWhole_ + (nRows - nWhole_) * pieces_.n;
  }
  __device__ __forceinline__ uint32_t nItems() const { return nItems_; }
  // The row of an item, and its part of that.
  __device__ __forceinline__ uint32_t at(uint32_t item, Span* span) const {
    if (item < nWhole_) {
      *span = Span{0, pieces_.n, 0, nVec_};
      return item;
    }
    const uint32_t row = (item - nWhole_) / pieces_.n;
    const int piece = static_cast<int>(item - nWhole_ - row * pieces_.n);
    *span = Span{piece, 1, piece * pieces_.nVec, min(nVec_, (piece + 1) * pieces_.nVec)};
    return nWhole_ + row;
  }

 private:
  RowPieces pieces_;
  int nVec_;
  uint32_t nWhole_, nItems_;
};

} // namespace moe
