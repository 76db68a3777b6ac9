// A host thread in the GPU's place: src/device/proxy.cuh in C++.
#pragma once

#include <chrono>
#include <thread>

#include "net/proxy_layout.h"

namespace moe {
namespace net {

inline uint64_t proxyNowNs() {
  return uint64_t(
    std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count());
}

inline bool proxyDead(const ProxyRing& ring) {
  return __atomic_load_n(&ring.header()->abort, __ATOMIC_ACQUIRE) != 0 ||
         __atomic_load_n(&ring.header()->error, __ATOMIC_ACQUIRE) != 0;
}

inline bool proxyAwaitCredit(const ProxyRing& ring, uint64_t position) {
  const uint64_t deadline = proxyNowNs() + ring.timeoutNs;
  while (position - __atomic_load_n(&ring.header()->head, __ATOMIC_ACQUIRE) >= ring.capacity()) {
    if (proxyDead(ring)) return false;
    if (proxyNowNs() > deadline) {
      __atomic_store_n(&ring.header()->abort, 1u, __ATOMIC_RELEASE);
      return false;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(10));
  }
  return true;
}

// Release on every word instead of a fence before all of them: the thread sanitizer does not know fences.
inline void proxyStore(const ProxyRing& ring, uint64_t position, const uint64_t words[proxyWords], int first = 0,
                       int last = proxyWords) {
  for (int i = first; i < last; i++) __atomic_store_n(&ring.slot(position)->words[i], words[i], __ATOMIC_RELEASE);
}

inline bool proxyPush(const ProxyRing& ring, const ProxyOp& op, uint64_t* at = nullptr) {
  const uint64_t position = __atomic_fetch_add(ring.tail, 1, __ATOMIC_RELAXED);
  if (at != nullptr) *at = position;
  if (!proxyAwaitCredit(ring, position)) return false;
  uint64_t words[proxyWords];
  proxyEncode(op, position, ring.capacityBits, words);
  proxyStore(ring, position, words);
  return true;
}

inline bool proxyAwaitCounter(const ProxyRing& ring, uint32_t counter, uint64_t value) {
  const uint64_t deadline = proxyNowNs() + ring.timeoutNs;
  while (__atomic_load_n(ring.counter(counter), __ATOMIC_ACQUIRE) < value) {
    if (proxyDead(ring) || proxyNowNs() > deadline)
      return __atomic_load_n(ring.counter(counter), __ATOMIC_ACQUIRE) >= value;
    std::this_thread::sleep_for(std::chrono::microseconds(10));
  }
  return true;
}

} // namespace net
} // namespace moe
