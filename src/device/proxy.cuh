// The GPU's half of the proxy: pushes descriptors into a ring and waits for counters.  net/proxy_layout.h has the
// protocol; this file is its steps 1 to 3 and 5 in PTX.
//
// Memory order, as seen by a kernel:
//  - proxyPush is called by one thread.  What that thread wrote before, and what other threads wrote and it
//    synchronised with (__syncthreads, a flag read with acquire), is in memory before the descriptor can be seen: the
//    NIC sends the data that the kernel meant.
//  - A true proxyAwaitCounter orders what follows after the completions that it saw: the source of those puts may be
//    overwritten.
//  - Neither call ends otherwise than true, or false after a deadline, an error of the proxy or an abort.  After false
//    nothing more may be pushed into the ring, and the kernel should end.
#pragma once

#include "net/proxy_layout.h"

namespace moe {
namespace net {

__device__ __forceinline__ uint64_t proxyGlobalTimeNs() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

__device__ __forceinline__ uint64_t proxyLoadAcquire(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t proxyLoadRelaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void proxyStoreRelaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

__device__ __forceinline__ bool proxyDead(const ProxyRing& ring) {
  return proxyLoadRelaxed(&ring.header()->abort) != 0 || proxyLoadRelaxed(&ring.header()->error) != 0;
}

// Waits until the slot of the position is free.  The copy of the head, in GPU memory, spares most producers the read
// across PCIe.
__device__ inline bool proxyAwaitCredit(const ProxyRing& ring, uint64_t position) {
  auto* headCopy = reinterpret_cast<unsigned long long*>(ring.headCopy);
  if (position - *static_cast<volatile unsigned long long*>(headCopy) < ring.capacity()) return true;
  const uint64_t begin = proxyGlobalTimeNs();
  for (;;) {
    const uint64_t head = proxyLoadAcquire(&ring.header()->head);
    atomicMax(headCopy, static_cast<unsigned long long>(head));
    if (position - head < ring.capacity()) return true;
    if (proxyDead(ring)) return false;
    if (proxyGlobalTimeNs() - begin > ring.timeoutNs) {
      proxyStoreRelaxed(&ring.header()->abort, 1); // this position will never be filled
      return false;
    }
    __nanosleep(200);
  }
}

// One thread pushes one descriptor.  Compilers merge the fetch-adds of a warp's threads into one.
__device__ inline bool proxyPush(const ProxyRing& ring, const ProxyOp& op) {
  const uint64_t position = atomicAdd(reinterpret_cast<unsigned long long*>(ring.tail), 1ull);
  if (!proxyAwaitCredit(ring, position)) return false;
  uint64_t words[proxyWords];
  proxyEncode(op, position, ring.capacityBits, words);
  __threadfence_system();
  ProxySlot* slot = ring.slot(position);
#pragma unroll
  for (int i = 0; i < proxyWords; i += 2) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(&slot->words[i]), "l"(words[i]), "l"(words[i + 1])
                 : "memory");
  }
  return true;
}

// Waits until the counter has reached value.
__device__ inline bool proxyAwaitCounter(const ProxyRing& ring, uint32_t counter, uint64_t value) {
  const uint64_t begin = proxyGlobalTimeNs();
  for (;;) {
    if (proxyLoadAcquire(ring.counter(counter)) >= value) return true;
    if (proxyDead(ring) || proxyGlobalTimeNs() - begin > ring.timeoutNs)
      return proxyLoadAcquire(ring.counter(counter)) >= value;
    __nanosleep(100);
  }
}

} // namespace net
} // namespace moe
