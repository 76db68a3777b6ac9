// What a GPU that asks for puts and the CPU proxy thread that makes them share: descriptors, ring, and their order.
//
// A ring is one block of host memory that the GPU can reach (mapped and page-locked):
//
//   ProxyHeader | counters, 8 bytes each | slots, 64 bytes each, a power of two of them
//
// Producers are any threads of any kernel (in tests: of the host); the consumer is one proxy thread.
//
//  1. A producer reserves position p = fetch-add of the tail.  The tail and a copy of the head are in the producers'
//     own memory (the GPU's), for atomics and polling across PCIe are slow.
//  2. It waits for its credit: p - head < capacity.  head, in the header, is written by the proxy thread alone, with
//     release, once it has copied the slots before it.  The wait ends at a deadline, on the header's error (written by
//     the proxy thread) and on its abort (written by whoever gives up).  A producer whose wait ends so has left a hole
//     in the ring, so it stores abort: the ring is dead from then on.
//  3. It fences (release, system scope), so that the data which the put is to send is visible before the descriptor,
//     and stores the 8 words, in any order and without further fences: each word carries the tag of its lap, so the
//     consumer sees of each word whether it is there.
//  4. The proxy thread reads slot head % capacity with acquire.  When the first word's tag is this lap's, it waits for
//     the others, across its polls, no longer than the timeout; a tag that is neither this lap's nor the last one's,
//     a check word or a position that does not fit, or an operand out of range is an error.  Errors are sticky.
//  5. When a put is complete (its source may be reused) the thread adds 1 to the descriptor's counter, with release.
//     A consumer of the counter reads it with acquire, and never waits for it without deadline, error and abort.
//
// Descriptors of one producer are carried out in the order in which they were pushed, per peer; signals are visible
// at the peer only after the data of all earlier puts to that peer.  Nothing is said about different peers, unless
// by proxyFence or by waiting for a quiet.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/hd.h"

namespace moe {
namespace net {

constexpr uint32_t proxyMaxPeers = 1u << 16;
constexpr uint32_t proxyMaxRegions = 1u << 16;
constexpr uint32_t proxyMaxCounters = 1u << 16;
constexpr uint32_t proxyMaxCapacityBits = 20;
constexpr uint64_t proxyMaxBytes = (1ull << 40) - 1;  // of one put
constexpr uint64_t proxyMaxOffset = (1ull << 48) - 1; // within a region
constexpr int proxyWords = 8;

enum ProxyOpCode : uint32_t {
  proxyPut = 1,       // bytes from the local region to the remote one
  proxyPutSignal = 2, // as put (bytes may be 0), then signalValue to the signal region
  proxyQuiet = 3      // nothing; complete when all descriptors before it in this ring are
};
enum ProxyFlags : uint32_t { proxyFence = 1 }; // start only when all descriptors before it in this ring are complete

struct ProxyOp {
  uint32_t code = proxyPut;
  uint32_t flags = 0;
  uint32_t peer = 0;
  uint32_t counter = 0; // counts its completion
  uint32_t localRegion = 0;
  uint32_t remoteRegion = 0;
  uint32_t signalRegion = 0; // a remote region of the peer
  uint64_t localOffset = 0;
  uint64_t remoteOffset = 0;
  uint64_t signalOffset = 0; // a multiple of 8
  uint64_t signalValue = 0;
  uint64_t bytes = 0;
};

struct alignas(64) ProxySlot {
  uint64_t words[proxyWords];
};
static_assert(sizeof(ProxySlot) == 64, "a slot is four 16-byte stores");

struct ProxyHeader {
  alignas(64) uint64_t head;  // proxy thread: positions before it are copied and may be overwritten
  alignas(64) uint32_t error; // proxy thread: an ncclResult_t, or 0
  alignas(64) uint32_t abort; // anyone: not 0 ends everything
};
static_assert(sizeof(ProxyHeader) == 192, "");

// A ring as one side sees it; passed to kernels by value.
struct ProxyRing {
  char* base = nullptr;         // in the address space of the side
  uint64_t* tail = nullptr;     // producers' memory, 0 at first
  uint64_t* headCopy = nullptr; // likewise
  uint64_t timeoutNs = 0;
  uint32_t capacityBits = 0; // log2 of the number of slots
  uint32_t nCounters = 0;

  MOE_HD uint32_t capacity() const { return 1u << capacityBits; }
  MOE_HD ProxyHeader* header() const { return reinterpret_cast<ProxyHeader*>(base); }
  MOE_HD uint64_t* counter(uint32_t i) const { return reinterpret_cast<uint64_t*>(base + sizeof(ProxyHeader)) + i; }
  MOE_HD ProxySlot* slot(uint64_t position) const {
    const size_t begin = (sizeof(ProxyHeader) + 8 * size_t(nCounters) + 63) / 64 * 64;
    return reinterpret_cast<ProxySlot*>(base + begin) + (position & (capacity() - 1));
  }
};

MOE_HD size_t proxyRingBytes(uint32_t capacityBits, uint32_t nCounters) {
  return (sizeof(ProxyHeader) + 8 * size_t(nCounters) + 63) / 64 * 64 + (sizeof(ProxySlot) << capacityBits);
}

// The tag of a position's lap, never 0, so that neither a word of the lap before nor zeroed memory has it.
MOE_HD uint64_t proxyTag(uint64_t position, uint32_t capacityBits) { return 0x80 | (position >> capacityBits & 0x7f); }

constexpr uint64_t proxyPayload = (1ull << 56) - 1;

// Fields that do not fit are cut off here; the proxy thread checks what it gets.  In debugging builds of a kernel,
// check proxyFits first.
MOE_HD void proxyEncode(const ProxyOp& op, uint64_t position, uint32_t capacityBits, uint64_t words[proxyWords]) {
  words[0] = (uint64_t(op.code & 15) | uint64_t(op.flags & 15) << 4 | uint64_t(op.peer & 0xffff) << 8 |
              uint64_t(op.localRegion & 0xffff) << 24 | uint64_t(op.remoteRegion & 0xffff) << 40);
  words[1] = (op.bytes & proxyMaxBytes) | uint64_t(op.counter & 0xffff) << 40;
  words[2] = (op.localOffset & proxyMaxOffset) | uint64_t(op.signalRegion & 0xff) << 48;
  words[3] = (op.remoteOffset & proxyMaxOffset) | uint64_t(op.signalRegion >> 8 & 0xff) << 48;
  words[4] = (op.signalOffset & proxyMaxOffset) | (op.signalValue >> 56) << 48;
  words[5] = op.signalValue & proxyPayload;
  words[6] = position & proxyPayload;
  words[7] = 0;
  for (int i = 0; i < proxyWords - 1; i++) words[7] ^= words[i];
  const uint64_t tag = proxyTag(position, capacityBits) << 56;
  for (int i = 0; i < proxyWords; i++) words[i] |= tag;
}

MOE_HD bool proxyFits(const ProxyOp& op) {
  return op.code <= 15 && op.flags <= 15 && op.peer < proxyMaxPeers && op.counter < proxyMaxCounters &&
         op.localRegion < proxyMaxRegions && op.remoteRegion < proxyMaxRegions && op.signalRegion < proxyMaxRegions &&
         op.bytes <= proxyMaxBytes && op.localOffset <= proxyMaxOffset && op.remoteOffset <= proxyMaxOffset &&
         op.signalOffset <= proxyMaxOffset;
}

// Words whose tags fit; false if they are not what proxyEncode wrote for this position.
MOE_HD bool proxyDecode(const uint64_t words[proxyWords], uint64_t position, ProxyOp* op) {
  uint64_t check = 0;
  for (int i = 0; i < proxyWords; i++) check ^= words[i] & proxyPayload;
  if (check != 0 || (words[6] & proxyPayload) != (position & proxyPayload)) return false;
  op->code = uint32_t(words[0] & 15);
  op->flags = uint32_t(words[0] >> 4 & 15);
  op->peer = uint32_t(words[0] >> 8 & 0xffff);
  op->localRegion = uint32_t(words[0] >> 24 & 0xffff);
  op->remoteRegion = uint32_t(words[0] >> 40 & 0xffff);
  op->bytes = words[1] & proxyMaxBytes;
  op->counter = uint32_t(words[1] >> 40 & 0xffff);
  op->localOffset = words[2] & proxyMaxOffset;
  op->remoteOffset = words[3] & proxyMaxOffset;
  op->signalRegion = uint32_t((words[2] >> 48 & 0xff) | (words[3] >> 48 & 0xff) << 8);
  op->signalOffset = words[4] & proxyMaxOffset;
  op->signalValue = (words[5] & proxyPayload) | (words[4] >> 48 & 0xff) << 56;
  return true;
}

} // namespace net
} // namespace moe
