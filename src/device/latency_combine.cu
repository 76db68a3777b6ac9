// Latency mode's combine: one kernel.
//
// Send.  Items: 0 the headers; then for each row that the last dispatch brought, source by source and token by token,
// its segments, and with weight gradients unit 0.  A warp adds up this rank's (weighted) rows of the token and stores
// the sum into the owner's record of plane "this rank"; with EXACT it stores each row into the plane of its selection,
// with its weight.  With the cast, sums travel as FP8, with the scales of a segment in its extra packets.
// Receive.  By the last warps of each block from the start, and by the others when they have sent.  Items: 0 the
// headers of all ranks; then for each own token its segments.  A warp waits for the packets of all planes that the
// token has, in groups, adds them in the order of the planes and stores the sum where the caller wants it.
// See latency.cuh for packets, waits and who sends.
#include "device/cast.cuh"
#include "device/latency.cuh"
#include "device/row_sum.cuh"

namespace moe {
namespace {

constexpr int kThreads = 512;
constexpr int kSenders = 14; // warps of a block; the others receive from the start
template <bool kExact> constexpr int kPlanesAtATime = kExact ? 2 : 4;
constexpr int kRowsAtATime = 4;

struct Shape {
  int nSegments, nPackets; // of a row
  int nUnits;              // 1 + segments, or without weight gradients the segments alone
  int firstUnit;
  __device__ __forceinline__ explicit Shape(const LatencyCombineArgs& a)
    : nSegments((a.wireBytes + kSegmentPackets * kPacketBytes - 1) / (kSegmentPackets * kPacketBytes)),
      nPackets(a.wireBytes / kPacketBytes), nUnits(nSegments + (a.withGrads ? 1 : 0)), firstUnit(a.withGrads ? 0 : 1) {}
};

// The place of one lane's packets in a segment.
struct Place {
  int at[2];
  bool has[2];
  bool hasExtras; // of a cast
  __device__ __forceinline__ Place(int segment, int nPackets) : hasExtras(carriesScales(segment, nPackets)) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      at[i] = segment * kSegmentPackets + static_cast<int>(threadIdx.x & 31) + 32 * i;
      has[i] = at[i] < nPackets;
    }
  }
};

__device__ __forceinline__ float weightOf(const LatencyCombineArgs& a, int entry) {
  return entry >= 0 && a.weights != nullptr ? a.weights[entry] : 1.0f;
}

// Adds a lane's N vectors of each of a token's rows, at[i] where has[i], with their weights.  here: lanes whose entry
// is a row.
template <class T, int N>
__device__ __forceinline__ void addRows(const LatencyCombineArgs& a, const int (&at)[N], const bool (&has)[N],
                                        int entry, unsigned here, float (&acc)[N][Vec<T>::kElems]) {
  constexpr int kElems = Vec<T>::kElems;
  const float weight = weightOf(a, entry);
#pragma unroll 1
  for (unsigned rest = here; rest != 0;) {
    uint4 raw[kRowsAtATime][N] = {};
    const Few<kRowsAtATime> few(&rest); // selections; their weights may still be on their way
#pragma unroll
    for (int j = 0; j < kRowsAtATime; j++) {
      if (j >= few.n) continue;
      const long long slot = __shfl_sync(~0u, entry, few.bit[j]);
      const uint4* row = reinterpret_cast<const uint4*>(a.x + slot * a.rowBytes);
#pragma unroll
      for (int i = 0; i < N; i++) {
        if (has[i]) raw[j][i] = loadInput(row + at[i]);
      }
    }
#pragma unroll
    for (int j = 0; j < kRowsAtATime; j++) {
      if (j >= few.n) continue;
      const float w = __shfl_sync(~0u, weight, few.bit[j]);
#pragma unroll
      for (int i = 0; i < N; i++) {
        float f[kElems];
        Vec<T>::load(raw[j][i], f);
        addProduct<kElems>(acc[i], w, f);
      }
    }
  }
}

// The sum of a token's rows.  What of it is ready leaves at once.
template <class T, bool kCast>
__device__ __forceinline__ void sendSum(const LatencyCombineArgs& a, const Call& call, int owner, int t, int segment,
                                        const Place& place, int entry, unsigned here) {
  const LatencyView& v = a.view;
  const int rank = v.comm.rank;
  uint4* record = packets(v.peers[owner], v.layout.record(call.parity, rank, t));
  bool looksEmpty = false;
  const auto store = [&](uint4* to, const uint4& packet) {
    storePacket(to, packet);
    looksEmpty = looksEmpty || isEmpty(packet);
  };
  const bool rankMajor = v.kind == ncclMoeLayoutRankMajor; // one row: all its selections name it
  if constexpr (kCast) {
    uint4 extras{};
#pragma unroll
    for (int i = 0; i < 2; i++) { // a packet holds the elements of two vectors
      const int at[2] = {2 * place.at[i], 2 * place.at[i] + 1};
      const bool has[2] = {place.has[i], place.has[i]};
      float acc[2][8] = {}, scale;
      addRows<T>(a, at, has, entry, rankMajor ? here & -here : here, acc);
      const uint4 packet = castSixteen(reinterpret_cast<const float(&)[16]>(acc), false, &scale);
      packScales(scale, place.has[i], i, &extras);
      if (place.has[i]) store(record + place.at[i], packet);
    }
    if (place.hasExtras) store(record + v.layout.extrasOf(segment) + (threadIdx.x & 31), extras);
  } else {
    uint4 sum[2] = {};
    if (rankMajor) {
      const long long slot = __shfl_sync(~0u, entry, __ffs(here) - 1);
      const uint4* row = reinterpret_cast<const uint4*>(a.x + slot * a.rowBytes);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (place.has[i]) sum[i] = loadInput(row + place.at[i]);
      }
    } else {
      float acc[2][Vec<T>::kElems] = {};
      addRows<T>(a, place.at, place.has, entry, here, acc);
#pragma unroll
      for (int i = 0; i < 2; i++) sum[i] = Vec<T>::store(acc[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (place.has[i]) store(record + place.at[i], sum[i]);
    }
  }
  if (__builtin_expect(__any_sync(~0u, looksEmpty), 0)) sendLiteral(v, call, owner, rank, t, 1 + segment);
}

__device__ __forceinline__ void sendRows(const LatencyCombineArgs& a, const Call& call, int owner, int t, int segment,
                                         const Place& place, int entry, unsigned here) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31;
  const float weight = weightOf(a, entry);
#pragma unroll 1
  for (unsigned rest = here; rest != 0; rest &= rest - 1) {
    const int k = __ffs(rest) - 1;
    const long long slot = __shfl_sync(~0u, entry, k);
    const uint4* row = reinterpret_cast<const uint4*>(a.x + slot * a.rowBytes);
    uint4* record = packets(v.peers[owner], v.layout.record(call.parity, k, t));
    bool looksEmpty = false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!place.has[i]) continue;
      const uint4 packet = loadInput(row + place.at[i]);
      storePacket(record + place.at[i], packet);
      looksEmpty = looksEmpty || isEmpty(packet);
    }
    const uint32_t w = __float_as_uint(__shfl_sync(~0u, weight, k));
    if (lane == 0) storePacket(record + v.layout.extrasOf(segment), make_uint4(w, 0, 0, 0)); // never looks empty
    if (__builtin_expect(__any_sync(~0u, looksEmpty), 0)) sendLiteral(v, call, owner, k, t, 1 + segment);
  }
}

__device__ __forceinline__ void sendGrads(const LatencyCombineArgs& a, const Call& call, int owner, int t, int entry) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31, k = v.layout.topK;
  float grad = 0.0f;
  if (entry >= 0) {
    grad = a.gradWeights[v.kind == ncclMoeLayoutRankMajor ? static_cast<long long>(entry) * k + lane : entry];
  }
  const uint4 packet = packFours(grad, k);
  const bool has = lane < (k + 3) / 4;
  uint4* aux = packets(v.peers[owner], v.layout.record(call.parity, v.comm.rank, t)) + v.layout.aux();
  if (has) storePacket(aux + lane, packet);
  if (__any_sync(~0u, has && isEmpty(packet))) sendLiteral(v, call, owner, v.comm.rank, t, 0);
}

// What a warp is about to send, the load of its entries under way.  Item 1 + n: row n % nRows, its unit n / nRows.
struct Outgoing {
  int unit, owner, t;
  int entry; // lane k: where the row of selection k is, -1: not here
};
__device__ __forceinline__ Outgoing fetch(const LatencyView& v, const Shape& shape, const int* nTokens, int nRows,
                                          int item) {
  Outgoing out{0, 0, 0, -1};
  if (item == 0) return out;
  const unsigned i = item - 1, n = nRows;
  out.t = static_cast<int>(i % n);
  out.unit = static_cast<int>(shape.firstUnit + i / n);
  locate(nTokens, &out.owner, &out.t);
  const int lane = threadIdx.x & 31, k = v.layout.topK;
  const size_t at = (static_cast<size_t>(out.owner) * v.layout.maxTokens + out.t) * k + lane;
  if (lane < k) out.entry = reinterpret_cast<const int*>(own(v) + v.layout.map)[at];
  return out;
}

// False: the share is another's.
template <class T, bool kCast>
__device__ __forceinline__ bool sendItem(const LatencyCombineArgs& a, const Call& call, const Shape& shape,
                                         unsigned long long masked, int item, const Outgoing& out, const Claim& claim) {
  if (!claim.mine()) return false;
  if (item == 0) {
    sendHeaders(a.view, call, masked, 0, a.signature, 0);
    return true;
  }
  const int owner = out.owner, t = out.t, unit = out.unit, entry = out.entry;
  if ((masked >> owner & 1) != 0) return true;
  const unsigned here = __ballot_sync(~0u, entry >= 0);
  if (here == 0) return true;
  if (unit == 0) {
    sendGrads(a, call, owner, t, entry);
    return true;
  }
  const Place place(unit - 1, shape.nPackets);
  if (!kCast && a.exact) {
    sendRows(a, call, owner, t, unit - 1, place, entry, here);
  } else {
    sendSum<T, kCast>(a, call, owner, t, unit - 1, place, entry, here);
  }
  return true;
}

// ---------------------------------------------------------------------------------------------------- receive ------

// Bit p: the token's record of plane p holds a row; a plane is a rank or, with EXACT, a selection.
__device__ __forceinline__ unsigned long long planesOf(const LatencyCombineArgs& a, int rankOfPick,
                                                       unsigned long long masked) {
  const bool there = rankOfPick >= 0 && (masked >> rankOfPick & 1) == 0;
  if (a.exact) return __ballot_sync(~0u, there);
  const unsigned low = __reduce_or_sync(~0u, there && rankOfPick < 32 ? 1u << rankOfPick : 0u);
  const unsigned high = __reduce_or_sync(~0u, there && rankOfPick >= 32 ? 1u << (rankOfPick - 32) : 0u);
  return static_cast<unsigned long long>(high) << 32 | low;
}

// Makes a segment of the token's planes empty again.  extras: this lane has an extra packet.
__device__ __forceinline__ void emptySegment(const LatencyView& v, const Call& call, int t, int segment,
                                             const Place& place, bool extras, unsigned long long planes) {
#pragma unroll 1
  for (unsigned long long rest = planes; rest != 0; rest &= rest - 1) {
    const int plane = __ffsll(static_cast<long long>(rest)) - 1;
    uint4* base = packets(own(v), v.layout.record(call.parity, plane, t));
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (place.has[i]) base[place.at[i]] = emptyPacket();
    }
    if (extras) base[v.layout.extrasOf(segment) + (threadIdx.x & 31)] = emptyPacket();
  }
}

template <class T, bool kExact>
__device__ __forceinline__ Progress receiveSegment(const LatencyCombineArgs& a, const Call& call, unsigned buffer,
                                                   int t, int segment, int nPackets, unsigned long long planes,
                                                   bool mayStall) {
  constexpr int kElems = Vec<T>::kElems;
  constexpr int kTaken = kPlanesAtATime<kExact>;
  constexpr int kEach = kExact ? 3 : 2; // packets of a lane in a plane
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31;
  const Place place(segment, nPackets);
  float acc[2][kElems] = {};
#pragma unroll 1
  for (unsigned long long rest = planes; rest != 0;) {
    const uint4* from[kTaken * kEach];
    uint4 got[kTaken * kEach] = {};
    int plane[kTaken];
#pragma unroll
    for (int j = 0; j < kTaken; j++) {
      plane[j] = rest != 0 ? __ffsll(static_cast<long long>(rest)) - 1 : -1;
      rest &= rest - 1;
      const uint4* base = packets(own(v), v.layout.record(call.parity, max(plane[j], 0), t));
#pragma unroll
      for (int i = 0; i < 2; i++) from[j * kEach + i] = plane[j] >= 0 && place.has[i] ? base + place.at[i] : nullptr;
      if constexpr (kExact) {
        from[j * kEach + 2] = plane[j] >= 0 && lane == 0 ? base + v.layout.extrasOf(segment) : nullptr;
      }
    }
    const auto planeOf = [&](int i) {
      int p = plane[0];
#pragma unroll
      for (int j = 1; j < kTaken; j++) p = i / kEach == j ? plane[j] : p;
      return p;
    };
    const auto peerOf = [&](int i) {
      if (!kExact) return planeOf(i);
      const uint4* picks = packets(own(v), v.layout.pick(buffer, v.comm.rank, t));
      return v.comm
        .positionRank[pickOf(loadPacket(picks + planeOf(i) / kPicksPerPacket), planeOf(i) % kPicksPerPacket)];
    };
    // Lanes whose packets are there keep others company in the wait, so every lane may shuffle.
    const Progress progress = take<false>(v.comm, kPhaseLatencyCombineRow, peerOf, call.tag, mayStall, from, got,
                                          [&](int i) { return isLiteral(v, call, planeOf(i), t, 1 + segment); });
    if (progress != Progress::done) return progress;
#pragma unroll
    for (int j = 0; j < kTaken; j++) {
      if (plane[j] < 0) continue;
      float weight = 1.0f;
      if constexpr (kExact) weight = __uint_as_float(__shfl_sync(~0u, got[j * kEach + 2].x, 0));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float f[kElems];
        Vec<T>::load(got[j * kEach + i], f);
        if constexpr (kExact) {
          addProduct<kElems>(acc[i], weight, f);
        } else {
          add<kElems>(acc[i], f);
        }
      }
    }
  }
  uint4* out = reinterpret_cast<uint4*>(a.out + static_cast<size_t>(t) * a.rowBytes);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (place.has[i]) out[place.at[i]] = Vec<T>::store(acc[i]);
  }
  emptySegment(v, call, t, segment, place, kExact && lane == 0, planes);
  return Progress::done;
}

// The same of sums that were cast.
__device__ __forceinline__ Progress receiveCast(const LatencyCombineArgs& a, const Call& call, int t, int segment,
                                                int nPackets, unsigned long long planes, bool mayStall) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31;
  const Place place(segment, nPackets);
  float sum[2][16] = {};
#pragma unroll 1
  for (unsigned long long rest = planes; rest != 0; rest &= rest - 1) {
    const int plane = __ffsll(static_cast<long long>(rest)) - 1;
    const uint4* base = packets(own(v), v.layout.record(call.parity, plane, t));
    const uint4* from[3] = {place.has[0] ? base + place.at[0] : nullptr, place.has[1] ? base + place.at[1] : nullptr,
                            place.hasExtras ? base + v.layout.extrasOf(segment) + lane : nullptr};
    uint4 got[3] = {};
    const Progress progress = take<false>(
      v.comm, kPhaseLatencyCombineRow, [&](int) { return plane; }, call.tag, mayStall, from, got,
      [&](int) { return isLiteral(v, call, plane, t, 1 + segment); });
    if (progress != Progress::done) return progress;
#pragma unroll
    for (int i = 0; i < 2; i++) addCast(sum[i], got[i], unpackScale(got[2], i));
  }
  uint4* out = reinterpret_cast<uint4*>(a.out + static_cast<size_t>(t) * a.rowBytes);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (!place.has[i]) continue;
    out[2 * place.at[i]] = Vec<__nv_bfloat16>::store(sum[i]);
    out[2 * place.at[i] + 1] = Vec<__nv_bfloat16>::store(sum[i] + 8);
  }
  emptySegment(v, call, t, segment, place, place.hasExtras, planes);
  return Progress::done;
}

__device__ __forceinline__ Progress receiveGrads(const LatencyCombineArgs& a, const Call& call, int t, int rankOfPick,
                                                 unsigned long long masked, bool mayStall) {
  const LatencyView& v = a.view;
  const int lane = threadIdx.x & 31, k = v.layout.topK, n = (k + 3) / 4;
  const bool there = rankOfPick >= 0 && (masked >> rankOfPick & 1) == 0;
  const unsigned same = __match_any_sync(~0u, there ? rankOfPick : -1 - lane);
  const unsigned leaders = __ballot_sync(~0u, there && lane == __ffs(same) - 1);
  const auto aux = [&](int r) { return packets(own(v), v.layout.record(call.parity, r, t)) + v.layout.aux(); };
  float grad = 0.0f;
#pragma unroll 1
  for (unsigned rest = leaders; rest != 0; rest &= rest - 1) {
    const int r = __shfl_sync(~0u, rankOfPick, __ffs(rest) - 1);
    const uint4* const from[1] = {lane < n ? aux(r) + lane : nullptr};
    uint4 got[1] = {};
    const Progress progress = take<false>(
      v.comm, kPhaseLatencyCombineRow, [&](int) { return r; }, call.tag, mayStall, from, got,
      [&](int) { return isLiteral(v, call, r, t, 0); });
    if (progress != Progress::done) return progress;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t bits = __shfl_sync(~0u, word(got[0], i), lane / 4);
      if (lane % 4 == i && rankOfPick == r) grad = __uint_as_float(bits);
    }
  }
  if (lane < k) a.gradTopkWeights[static_cast<size_t>(t) * k + lane] = grad;
#pragma unroll 1
  for (unsigned rest = leaders; rest != 0; rest &= rest - 1) {
    const int r = __shfl_sync(~0u, rankOfPick, __ffs(rest) - 1);
    if (lane < n) aux(r)[lane] = emptyPacket();
  }
  return Progress::done;
}

template <class T, bool kCast>
__device__ __forceinline__ Progress receiveItem(const LatencyCombineArgs& a, const Call& call, const Shape& shape,
                                                unsigned long long masked, unsigned buffer, int nTokens, int item,
                                                bool mayStall) {
  const LatencyView& v = a.view;
  if (item == 0) {
    const Progress progress =
      receiveHeaders(v, call, masked, a.signature, 0, 32, mayStall, true, [](int, const uint4&) {});
    if (progress == Progress::done) admitKernelBehind();
    return progress;
  }
  const unsigned i = item - 1, n = nTokens;
  const int t = static_cast<int>(i % n), unit = static_cast<int>(shape.firstUnit + i / n);
  const int pick = pickOfLane(v, loadPicks(v, buffer, v.comm.rank, t));
  const int rankOfPick = pick != kNoPick ? v.comm.positionRank[pick] : -1;
  if (unit == 0) return receiveGrads(a, call, t, rankOfPick, masked, mayStall);
  const unsigned long long planes = planesOf(a, rankOfPick, masked);
  Progress progress;
  if constexpr (kCast) {
    progress = receiveCast(a, call, t, unit - 1, shape.nPackets, planes, mayStall);
  } else if (a.exact) {
    progress = receiveSegment<T, true>(a, call, buffer, t, unit - 1, shape.nPackets, planes, mayStall);
  } else {
    progress = receiveSegment<T, false>(a, call, buffer, t, unit - 1, shape.nPackets, planes, mayStall);
  }
  if (masked != 0 && unit == 1 && progress == Progress::done) {
    const unsigned lost = __ballot_sync(~0u, rankOfPick >= 0 && (masked >> rankOfPick & 1) != 0);
    if ((threadIdx.x & 31) == 0 && lost != 0) {
      atomicAdd(&v.comm.shared->leftOut, static_cast<unsigned long long>(__popc(lost)));
    }
  }
  return progress;
}

template <class T, bool kCast>
__global__ void __launch_bounds__(kThreads, 1) latencyCombineKernel(const __grid_constant__ LatencyCombineArgs a) {
  __shared__ Opening opening;
  __shared__ int nTaken; // of this block's items to receive
  const LatencyView& v = a.view;
  if (threadIdx.x == 0) nTaken = 0;
  const Shape shape(a);
  awaitKernelBefore();
  if (threadIdx.x < 32) open(v, &opening);
  __syncthreads();
  // Block 0 has the peers' headers among its items to receive; the kernel behind waits for all blocks' word.
  if (blockIdx.x != 0 || !a.halves.receive) admitKernelBehind();
  if (threadIdx.x == kThreads - 1 && a.halves.receive) addTicket(&stateOf(v)->calls);
  const unsigned long long masked = opening.masked;
  // A failed rank's last dispatch may not have come as far as to say what is in the tensors.
  const bool go = opening.go != 0 && opening.failed == 0;
  const int lane = threadIdx.x & 31;
  const int nRows = go ? __reduce_add_sync(~0u, opening.nTokens[lane] + opening.nTokens[lane + 32]) : 0;
  const int nTokens = go ? opening.nTokens[v.comm.rank] : 0;
  const Call call = callOf(opening);
  const unsigned buffer = static_cast<unsigned>(opening.dispatches >> kTicketBits) & 1;
  const int nSend = 1 + nRows * shape.nUnits, nReceive = 1 + nTokens * shape.nUnits;
  Shares shares(v, call, nSend, gridDim.x, kSenders, opening.failed != 0);
  int share = a.halves.send ? Shares::first(nSend, gridDim.x, kSenders) : -1;
  const auto takeItem = [&] {
    int n = 0;
    if (lane == 0) n = atomicAdd(&nTaken, 1);
    return __shfl_sync(~0u, n, 0) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  };
  int item = -1;
  bool stalled = false;
#pragma unroll 1
  for (bool working = true; working;) {
    if (share >= 0) {
      const Claim claim = shares.claim(share);
      Outgoing out = fetch(v, shape, opening.nTokens, nRows, share);
#pragma unroll 1
      for (int i = share; i < nSend; i += shares.stride()) {
        Outgoing next{};
        if (i + shares.stride() < nSend) next = fetch(v, shape, opening.nTokens, nRows, i + shares.stride());
        if (!sendItem<T, kCast>(a, call, shape, masked, i, out, claim)) break;
        out = next;
      }
      share = stalled ? shares.unclaimed() : -1;
      if (share >= 0) continue;
    }
    if (!a.halves.receive) break;
    working = false;
    if (item < 0) item = takeItem();
#pragma unroll 1
    for (; item < nReceive; item = takeItem()) {
      const Progress progress =
        receiveItem<T, kCast>(a, call, shape, masked, buffer, nTokens, item, a.halves.send && !shares.allTaken);
      if (__builtin_expect(progress == Progress::failed, 0)) break;
      if (__builtin_expect(progress == Progress::stalled, 0)) {
        share = shares.unclaimed();
        stalled = true;
        working = true;
        break;
      }
    }
  }
}

} // namespace

cudaError_t prepareLatencyCombine() {
  cudaError_t result = cudaSuccess;
  for (auto* kernel : {latencyCombineKernel<__nv_bfloat16, false>, latencyCombineKernel<__nv_bfloat16, true>,
                       latencyCombineKernel<__half, false>, latencyCombineKernel<float, false>}) {
    cudaFuncAttributes attributes;
    if (result == cudaSuccess) result = cudaFuncGetAttributes(&attributes, kernel);
  }
  return result;
}

cudaError_t launchLatencyCombine(const LatencyCombineArgs& args, int maxSms, cudaStream_t stream, bool overlap) {
  auto* kernel = args.cast                   ? latencyCombineKernel<__nv_bfloat16, true>
                 : args.type == ncclBfloat16 ? latencyCombineKernel<__nv_bfloat16, false>
                 : args.type == ncclFloat16  ? latencyCombineKernel<__half, false>
                                             : latencyCombineKernel<float, false>;
  return launchKernel<LatencyCombineArgs>(kernel, latencyBlocks(args.view, args.nTokens, args.wireBytes, maxSms),
                                          kThreads, 0, stream, args, overlap);
}

} // namespace moe
