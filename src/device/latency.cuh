// What the latency kernels have in common: packets that need no flag, waits, and who sends what.
//
// Packets.  Rows travel in packets of 16 bytes that say by themselves whether they are there: an empty packet holds
// kEmptyByte in every byte, and a store of 16 bytes by one b128 instruction is seen as a whole (PTX: b128 accesses are
// single-copy atomic).  So a receiver polls the very packet that it wants; the sender neither fences nor stores a flag,
// and packets may arrive in any order.  A receiver makes a packet empty again when it has used it.
//   Data may look like an empty packet.  The sender of such data then also stores the unit's tag into the record's
// literals, with release after the packets of the unit; a receiver that waits for long looks there, with acquire, and
// takes what is there.
//   Headers and picks, which several blocks read and nobody empties, carry the tag of their call instead.  Picks are
// loaded once more, by other warps, when a barrier has told that they are there.
//
// Why two parities are enough.  A rank writes into records of parity p in call n+2 after its own call n+1 has ended,
// that is, after it has seen its peer's header of call n+1.  The peer stored that in a kernel that had waited for the
// end of its kernel of call n (awaitKernelBefore), which had emptied what it read: kernels of a routing run one after
// the other, and a kernel's stores to its own memory are performed when it ends.  (The header's load is relaxed: this
// rests on the kernels' boundaries, not on the header, and takes a boundary to be a fence at system scope.)  A header
// comes in every call from every rank, even where nothing else is to be sent.  The same holds of the two buffers of
// picks: dispatch n+2 of those that choose experts anew writes where calls up to dispatch n+1 have read.
//
// A bad index is reported (badCall), with a fence before the token's picks are stored.  The block that tells the host
// looks when it has seen all picks of its own rank and passed a barrier, with a fence before it looks, so it sees the
// report.  (To the letter, PTX wants that fence of the threads that have loaded the picks.)
//
// What stands between kernels.  A kernel reads what earlier ones of its rank left (the count of calls, what the last
// dispatch brought, the map, the picks) without any order but theirs: each waits for the end of the kernel before it
// (awaitKernelBefore) before it reads anything that is ever written again, and one warp of each block reads the state
// (Opening).  The count of calls is raised by every block after its own look (of the kernel that receives; that of
// SEND_ONLY adds nothing), and shows the next call only when all blocks have looked.  What a dispatch leaves in the
// state, its last block stores while others may still begin: of it they use the numbers of tokens alone, and those only
// with KEEP_ROUTING, which stores them as they were (of masked ranks 0, whom nobody asks).  Masks change only while no
// kernel runs.  A rank's failure is sticky; what a call begins after it sends nothing.
//   A kernel that has heard from all peers, or waits for none, admits the one behind it (admitKernelBehind).  That one
// comes when all blocks of this one have admitted it or ended, so none of them still wants an SM.  Not before: this one
// may wait for a late peer for long, and a kernel that waits behind it would hold SMs which the peer's way here may
// need.  Once all have come, only a peer whose other blocks have not found an SM yet can still keep this one waiting,
// and with it the one behind.
//
// Who sends.  The items to send are shared out among the sending warps of the grid (Shares).  A warp claims its share
// by an exchange and then sends it without waiting for anyone.  A block may be kept from running for as long as another
// kernel occupies the SMs, and that one may wait for a peer which waits for this rank.  So a warp that has waited
// kStallNs claims and sends whatever nobody has claimed yet, and one that ends leaves its SM to the next: one resident
// block that receives is enough for the peers to go on, and once they do, so does this rank.
//
// Every wait ends by what it waits for, by the communicator's timeout, by abort, or by a failure of another wait of
// this rank; but that for the kernel before, which ends by itself.  Each wait has its own deadline.
#pragma once

#include <algorithm>

#include "device/latency.h"
#include "device/primitives.cuh"

namespace moe {

constexpr uint64_t kStallNs = 20000;
constexpr int kPollsBetweenChecks = 32;

// One call of a routing: the tag is never 0.
struct Call {
  unsigned long long number;
  uint32_t tag;
  unsigned parity;
};

enum class Progress { done, stalled, failed };

__device__ __forceinline__ LatencyState* stateOf(const LatencyView& v) {
  return reinterpret_cast<LatencyState*>(v.peers[v.comm.rank] + v.layout.state);
}
__device__ __forceinline__ char* own(const LatencyView& v) { return v.peers[v.comm.rank]; }

// What every thread of a block must know before it sends or receives, in shared memory.  One warp loads it: were all
// warps of a grid to ask, thousands of loads would queue up at the few lines that it lies in, for about two
// microseconds.
struct Opening {
  unsigned long long calls, dispatches, masked;
  uint32_t failed;
  int go, reported;
  int nTokens[kMaxDeviceRanks]; // of each rank in the dispatch before
};
// By the first warp; the others may look after a barrier.  All loads are under way before the first is waited for.
__device__ __forceinline__ void open(const LatencyView& v, Opening* opening) {
  const volatile LatencyState* state = stateOf(v);
  const int lane = threadIdx.x;
  const unsigned long long calls = state->calls, dispatches = state->dispatches;
  const unsigned long long masked = *reinterpret_cast<const volatile unsigned long long*>(&v.comm.shared->masked);
  const uint32_t failed = *reinterpret_cast<const volatile uint32_t*>(&control(v.comm)->failed);
  const int go = state->go, reported = state->reported;
  int nTokens[kMaxDeviceRanks / 32];
#pragma unroll
  for (int i = 0; i < kMaxDeviceRanks / 32; i++) {
    nTokens[i] = lane + 32 * i < v.comm.nRanks ? state->nTokens[lane + 32 * i] : 0;
  }
#pragma unroll
  for (int i = 0; i < kMaxDeviceRanks / 32; i++) opening->nTokens[lane + 32 * i] = nTokens[i];
  if (lane != 0) return;
  opening->calls = calls;
  opening->dispatches = dispatches;
  opening->masked = masked;
  opening->failed = failed;
  opening->go = go;
  opening->reported = reported;
}
__device__ __forceinline__ Call callOf(const Opening& opening) {
  Call call;
  call.number = opening.calls >> kTicketBits;
  call.tag = tagOf(call.number);
  call.parity = static_cast<unsigned>(call.number & 1);
  return call;
}
// By one thread of a block that has read the counter.
__device__ __forceinline__ void addTicket(unsigned long long* tickets) {
  delaySometimes(4, 20000);
  atomicAdd(tickets, blockIdx.x == 0 ? (1ull << kTicketBits) - (gridDim.x - 1) : 1ull);
}

// Of all ranks' tokens, nTokens[r] of rank r: token *t becomes token *t of rank *source.
__device__ __forceinline__ void locate(const int* nTokens, int* source, int* t) {
  *source = 0;
#pragma unroll 1
  while (*t >= nTokens[*source]) *t -= nTokens[(*source)++];
}

// The next N set bits of a mask, n of which there were; the others are 0.  What is done for each of N need not wait for
// the one before.
template <int N> struct Few {
  int n = 0, bit[N];
  __device__ __forceinline__ explicit Few(unsigned* rest) {
#pragma unroll
    for (int j = 0; j < N; j++) {
      n += *rest != 0 ? 1 : 0;
      bit[j] = max(__ffs(*rest) - 1, 0);
      *rest &= *rest - 1;
    }
  }
};

// ----------------------------------------------------------------------------------------------------- packets ----

constexpr uint32_t kEmptyWord = kEmptyByte * 0x01010101u;
__device__ __forceinline__ bool isEmpty(const uint4& v) {
  return v.x == kEmptyWord && v.y == kEmptyWord && v.z == kEmptyWord && v.w == kEmptyWord;
}
__device__ __forceinline__ uint4 emptyPacket() { return make_uint4(kEmptyWord, kEmptyWord, kEmptyWord, kEmptyWord); }

__device__ __forceinline__ uint4* packets(char* window, size_t offset) {
  return reinterpret_cast<uint4*>(window + offset);
}

// Eight picks of 12 bits in three words; the fourth is the tag.
__device__ __forceinline__ int pickOf(const uint4& v, int i) {
  const int bit = 12 * i;
  const uint32_t low = word(v, bit / 32);
  const uint32_t high = bit / 32 < 2 ? word(v, bit / 32 + 1) : 0;
  return static_cast<int>(__funnelshift_r(low, high, bit % 32) & 0xfff);
}

// The picks of token t of source, their load under way: each lane has the packet of selection `lane`.
__device__ __forceinline__ uint4 loadPicks(const LatencyView& v, unsigned buffer, int source, int t) {
  const int lane = threadIdx.x & 31;
  if (lane >= v.layout.topK) return uint4{};
  return loadPacket(packets(own(v), v.layout.pick(buffer, source, t)) + lane / kPicksPerPacket);
}
// Selection `lane`, kNoPick for lanes >= K.
__device__ __forceinline__ int pickOfLane(const LatencyView& v, const uint4& picks) {
  const int lane = threadIdx.x & 31;
  return lane < v.layout.topK ? pickOf(picks, lane % kPicksPerPacket) : kNoPick;
}

// Lane i: values 4 i to 4 i + 3 of the lanes' n.
__device__ __forceinline__ uint4 packFours(float value, int n) {
  const int lane = threadIdx.x & 31;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t bits = __shfl_sync(~0u, __float_as_uint(value), (4 * lane + i) & 31);
    words[i] = 4 * lane + i < n ? bits : 0u;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Whether this lane has an extra packet of a cast segment: lane i that of half i, if there is any of it.
__device__ __forceinline__ bool carriesScales(int segment, int nPackets) {
  const int lane = threadIdx.x & 31;
  return lane < 2 && segment * kSegmentPackets + 32 * lane < nPackets;
}
// The scales of half i of a segment: of the warp's four blocks, one for each eight lanes.  They travel as one packet,
// which lane i of *extras gets and, after the journey, has.
__device__ __forceinline__ void packScales(float scale, bool active, int i, uint4* extras) {
  const uint32_t bits = active ? __float_as_uint(scale) : 0u;
  const uint4 four = make_uint4(__shfl_sync(~0u, bits, 0), __shfl_sync(~0u, bits, 8), __shfl_sync(~0u, bits, 16),
                                __shfl_sync(~0u, bits, 24));
  if (static_cast<int>(threadIdx.x & 31) == i) *extras = four;
}
__device__ __forceinline__ float unpackScale(const uint4& extras, int i) {
  uint32_t mine = 0;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const uint32_t bits = __shfl_sync(~0u, word(extras, w), i);
    if ((threadIdx.x & 31) / 8 == w) mine = bits;
  }
  return __uint_as_float(mine);
}

// ------------------------------------------------------------------------------------------------------- waits ----

// Whether a wait that began at `start` shall go on.  May diverge.
__device__ __forceinline__ Progress goOn(const CommView& c, int phase, int peer, uint32_t tag, uint64_t start,
                                         bool mayStall) {
  if (*reinterpret_cast<volatile uint32_t*>(&control(c)->failed) != 0) return Progress::failed;
  const uint64_t waited = globalTimerNs() - start;
  const bool timedOut = waited > c.timeoutNs;
  if (timedOut || (waited > kStallNs && abortIsDue() && *c.abortFlag != 0)) {
    recordFailure(c, timedOut ? kFailTimeout : kFailAborted, phase, peer, tag);
    return Progress::failed;
  }
  return waited > kStallNs && mayStall ? Progress::stalled : Progress::done;
}

// By one thread.
template <class Ready>
__device__ __forceinline__ Progress await(const CommView& c, int phase, int peer, uint32_t tag, bool mayStall,
                                          Ready ready) {
  uint64_t start = 0;
#pragma unroll 1
  for (uint32_t polls = 1; !ready(); polls++) {
    if (__builtin_expect(polls % kPollsBetweenChecks != 0, 1)) continue;
    if (start == 0) start = globalTimerNs();
    const Progress progress = goOn(c, phase, peer, tag, start, mayStall);
    if (progress != Progress::done) return progress;
  }
  return Progress::done;
}

// By a whole warp: waits for the packets at from[i], where that is not NULL.  literal(i): what is at from[i] is data
// whatever it is.  peerOf(i): whom it comes from.  kLoaded: got has been loaded once already.
template <bool kLoaded, int N, class Peer, class Literal>
__device__ __forceinline__ Progress take(const CommView& c, int phase, Peer peerOf, uint32_t tag, bool mayStall,
                                         const uint4* const (&from)[N], uint4 (&got)[N], Literal literal) {
  delaySometimes(256, 20000);
  unsigned missing = 0;
#pragma unroll
  for (int i = 0; i < N; i++) missing |= from[i] != nullptr ? 1u << i : 0u;
  uint64_t start = 0;
#pragma unroll 1
  for (uint32_t polls = 1;; polls++) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if ((missing >> i & 1) != 0 && (!kLoaded || polls > 1)) got[i] = loadPacket(from[i]);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      if ((missing >> i & 1) != 0 && !isEmpty(got[i])) missing &= ~(1u << i);
    }
    if (__all_sync(~0u, missing == 0)) return Progress::done;
    if (__builtin_expect(polls % kPollsBetweenChecks != 0, 1)) continue;
    if (start == 0) start = globalTimerNs();
    Progress progress = Progress::done;
    if (missing != 0) {
      int peer = -1;
#pragma unroll
      for (int i = 0; i < N; i++) {
        if ((missing >> i & 1) == 0) continue;
        if (literal(i)) {
          got[i] = loadPacket(from[i]);
          missing &= ~(1u << i);
        } else {
          peer = peerOf(i);
        }
      }
      if (missing != 0) progress = goOn(c, phase, peer, tag, start, mayStall);
    }
    if (__any_sync(~0u, progress == Progress::failed)) return Progress::failed;
    if (__any_sync(~0u, progress == Progress::stalled)) return Progress::stalled;
  }
}

// ------------------------------------------------------------------------------------------------------ sending ----

// A claim under way: what a warp may read meanwhile need not wait for the answer.  A rank that had failed when the
// block began sends nothing (silent), for its calls no longer wait for the peers' and would overwrite what they have
// yet to read.  A claim hands over no data, so it is relaxed.  It stores the call's tag: one that is 2^32 - 1 calls old
// would pass for this call's.
struct Claim {
  uint32_t tag, before; // lane 0: the answer, which nothing looks at before mine()
  bool silent;
  // The same answer in all lanes.
  __device__ __forceinline__ bool mine() const { return !silent && __shfl_sync(~0u, before, 0) != tag; }
};

// The first nWarps warps of the first nBlocks blocks send.
struct Shares {
  const LatencyView& v;
  uint32_t tag; // of this call
  int nItems, nBlocks, nWarps;
  bool silent, allTaken = false;

  __device__ __forceinline__ Shares(const LatencyView& view, const Call& call, int items, int blocks, int warps,
                                    bool failed)
    : v(view), tag(call.tag), nItems(items), nBlocks(blocks), nWarps(warps), silent(failed) {}
  __device__ __forceinline__ uint32_t* claims() const { return reinterpret_cast<uint32_t*>(own(v) + v.layout.claims); }

  // This warp's share, or -1.  Neighbouring shares go to different SMs.
  static __device__ __forceinline__ int first(int nItems, int nBlocks, int nWarps) {
    const int warp = threadIdx.x / 32, block = blockIdx.x, share = warp * nBlocks + block;
    return warp < nWarps && block < nBlocks && share < nItems ? share : -1;
  }
  __device__ __forceinline__ int stride() const { return nBlocks * nWarps; }

  __device__ __forceinline__ Claim claim(int share) const {
    Claim claim{tag, 0, silent};
    if ((threadIdx.x & 31) == 0) delaySometimes(16, 10 * kStallNs); // then others help
    if ((threadIdx.x & 31) == 0) claim.before = atomicExch(&claims()[share], tag);
    return claim;
  }
  // One that nobody had claimed a moment ago, or -1.
  __device__ __forceinline__ int unclaimed() {
    if (allTaken) return -1;
    const int count = min(nItems, stride()); // shares that have items
    const int start = static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x) % count;
#pragma unroll 1
    for (int n = 0; n < count; n += 32) {
      const int i = n + (threadIdx.x & 31);
      const int share = (start + i) % count;
      const bool open = i < count && *reinterpret_cast<volatile uint32_t*>(&claims()[share]) != tag;
      const unsigned opens = __ballot_sync(~0u, open);
      if (opens != 0) return __shfl_sync(~0u, share, __ffs(opens) - 1);
    }
    allTaken = true;
    return -1;
  }
};

// To every rank that takes part: how many tokens, or whatever z and x say, and that the call has begun.  By a whole
// warp.
__device__ __forceinline__ void sendHeaders(const LatencyView& v, const Call& call, unsigned long long masked,
                                            uint32_t x, uint32_t signature, uint32_t z) {
#pragma unroll 1
  for (int r = threadIdx.x & 31; r < v.comm.nRanks; r += 32) {
    if ((masked >> r & 1) != 0) continue;
    storePacket(packets(v.peers[r], v.layout.header(call.parity, v.comm.rank)), make_uint4(x, signature, z, call.tag));
  }
}

// By one thread; *header is the peer's when it returns done.
__device__ __forceinline__ Progress awaitHeader(const LatencyView& v, const Call& call, int peer, uint32_t signature,
                                                bool mayStall, uint4* header) {
  const uint4* at = packets(own(v), v.layout.header(call.parity, peer));
  const auto ready = [&] {
    *header = loadPacket(at);
    return header->w == call.tag;
  };
  const Progress progress = await(v.comm, kPhaseHeader, peer, call.tag, mayStall, ready);
  if (progress != Progress::done || header->y == signature) return progress;
  recordFailure(v.comm, kFailMismatch, kPhaseHeader, peer, call.tag, header->y);
  return Progress::failed;
}

// The headers of ranks [first, first + 32), and so on every `step` ranks, that take part: use(r, header).  By a whole
// warp, a lane for each rank; the same answer in all lanes.  counts: the time that it takes is counted, of a wait that
// stalls each part.
template <class Use>
__device__ __forceinline__ Progress receiveHeaders(const LatencyView& v, const Call& call, unsigned long long masked,
                                                   uint32_t signature, int first, int step, bool mayStall, bool counts,
                                                   Use use) {
  Progress worst = Progress::done;
#pragma unroll 1
  for (int r = first + (threadIdx.x & 31); r < v.comm.nRanks && worst == Progress::done; r += step) {
    if ((masked >> r & 1) != 0) continue;
    uint4 header;
    const uint64_t start = globalTimerNs();
    worst = awaitHeader(v, call, r, signature, mayStall, &header);
    if (counts) countWait(v.comm, r, start);
    if (worst == Progress::done) use(r, header);
  }
  if (__any_sync(~0u, worst == Progress::failed)) return Progress::failed;
  return __any_sync(~0u, worst == Progress::stalled) ? Progress::stalled : Progress::done;
}

// Says that the unit of the record at rank r holds packets that look empty, all of them stored by now.  By a whole
// warp.
__device__ __forceinline__ void sendLiteral(const LatencyView& v, const Call& call, int r, int plane, int t, int unit) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) {
    delaySometimes(8, 3 * kStallNs);
    storeRelease(reinterpret_cast<uint32_t*>(v.peers[r] + v.layout.literal(call.parity, plane, t, unit)), call.tag);
  }
}
__device__ __forceinline__ bool isLiteral(const LatencyView& v, const Call& call, int plane, int t, int unit) {
  return loadAcquire(reinterpret_cast<const uint32_t*>(own(v) + v.layout.literal(call.parity, plane, t, unit))) ==
         call.tag;
}

// As many blocks as have work for a warp on each of an SM's four schedulers, were all ranks like this one; and one
// more.  A rank that has few tokens itself may still receive many.
inline int latencyBlocks(const LatencyView& v, int ownTokens, int rowBytes, int maxSms) {
  constexpr int kItemsPerBlock = 4;
  const int nTokens = std::max(ownTokens, v.layout.maxTokens / 8);
  const int units = 1 + (rowBytes + kSegmentPackets * kPacketBytes - 1) / (kSegmentPackets * kPacketBytes);
  const long long items = static_cast<long long>(units) * std::min(v.comm.nRanks, v.layout.topK) * nTokens;
  const long long blocks = (items + kItemsPerBlock - 1) / kItemsPerBlock + 1;
  return static_cast<int>(std::min<long long>(blocks, std::min(maxSms, kMaxLatencyBlocks)));
}

} // namespace moe
