// Latency mode's dispatch: one kernel, no exchange of counts before rows travel.
//
// Send.  Items: 0 the headers; then for each token its unit 0 (its picks to every rank, so that every rank can work out every
// row's place; to the token's ranks the caller's scales and the weights), then for each token its segments.  Everything goes to
// fixed places, by source rank and token.
// Receive.  Each block reads the picks of all tokens as they come and marks them in bitmaps: one for each local expert, and one
// of the tokens that have any here.  From those follows the place of every row, in the order (source, token), by counting bits.
// Then warps take (token, unit) items, wait for the packets and store them where the caller wants them.  The last block, where
// there are several, tells the caller the counts instead.
// See latency.cuh for packets, waits and who sends.
#include "device/latency_dispatch_rows.cuh"

namespace moe {
namespace {

template <bool kCast>
__global__ void __launch_bounds__(kDispatchThreads, 1)
  latencyDispatchKernel(const __grid_constant__ LatencyDispatchArgs a) {
  extern __shared__ uint32_t dynamicShared[];
  const LatencyView& v = a.view;
  LatencyState* state = stateOf(v);
  const unsigned long long tickets = loadTickets(&state->calls), dispatches = loadTickets(&state->dispatches);
  const unsigned long long masked = *reinterpret_cast<volatile unsigned long long*>(&v.comm.shared->masked);
  const int nUnits = 1 + (a.wireBytes + kSegmentPackets * kPacketBytes - 1) / (kSegmentPackets * kPacketBytes);
  int nTokens = a.nTokens;
  if (a.keep) {
    nTokens = state->nTokens[v.comm.rank];
  } else if (a.nTokensDev != nullptr) {
    nTokens = max(0, min(nTokens, *a.nTokensDev));
  }
  const int nItems = 1 + nTokens * nUnits;
  int share = a.halves.send && Shares::first() < min(nItems, Shares::stride()) ? Shares::first() : -1;
  const Lists lists(v, dynamicShared);
  const int nReceivers = max(1, static_cast<int>(gridDim.x) - 1);
  const bool publisher = blockIdx.x == gridDim.x - 1;
  int item = threadIdx.x / 32 * nReceivers + blockIdx.x; // to receive
  int nArrivals = -1;                                    // tokens of all ranks, once they are known
  Call call{};
  bool go = false, cleared = false, allTaken = false, stalled = false;
#pragma unroll 1
  for (bool working = true; working;) {
    // Nothing waits for the tickets before a warp's first loads are on their way.
    Outgoing<kCast> out{};
    if (share >= 0) out = fetch<kCast>(a, nTokens, share);
    if (a.halves.receive && !cleared) {
#pragma unroll 1
      for (int i = threadIdx.x; i < (v.nLocal + 1) * lists.words; i += kDispatchThreads) lists.bits[i] = 0;
      cleared = true;
    }
    call = callOf(tickets);
    const unsigned buffer = static_cast<unsigned>((dispatches >> kTicketBits) + (a.keep ? 0 : 1)) & 1;
    Shares shares(v, call, nItems, allTaken);
    if (share >= 0) {
      const Claim claim = shares.claim(share);
#pragma unroll 1
      while (send<kCast>(a, call, masked, buffer, nTokens, out, claim) && out.item + Shares::stride() < nItems) {
        out = fetch<kCast>(a, nTokens, out.item + Shares::stride());
      }
      share = stalled ? shares.unclaimed() : -1;
      allTaken = shares.allTaken;
      if (share >= 0) continue;
    }
    if (!a.halves.receive) break;
    const bool mayStall = a.halves.send && !shares.allTaken;
    if (nArrivals < 0) { // the same in the whole block
      __syncthreads();   // the bitmaps are clear
      const Progress progress = gather(a, call, masked, buffer, lists, mayStall);
      if (__builtin_expect(__syncthreads_or(progress != Progress::done) != 0, 0)) {
        if (__syncthreads_or(progress == Progress::failed) != 0) break;
        share = shares.unclaimed();
        allTaken = shares.allTaken;
        stalled = true;
        continue;
      }
      go = fits(a, buffer, lists);
      if (v.kind == ncclMoeLayoutExpertMajor || publisher) measure(v, lists);
      nArrivals = 0;
#pragma unroll 1
      for (int r = 0; r < v.comm.nRanks; r++) nArrivals += lists.nTokens[r];
      if (publisher && gridDim.x > 1) break;
    }
    working = false;
#pragma unroll 1
    for (; item < nArrivals * nUnits; item += nReceivers * (kDispatchThreads / 32)) {
      Arrival arrival = locate(v, lists, item % nArrivals);
      if (!comesHere(v, lists, arrival)) continue;
      const int unit = item / nArrivals;
      Packets<kCast> packetsOfLane(a, call, arrival, unit);
      findPlaces(v, lists, buffer, &arrival);
      const Progress progress = unit == 0
                                  ? receiveAux(a, call, lists, arrival, go, mayStall)
                                  : receiveSegment<kCast>(a, call, arrival, packetsOfLane, unit - 1, go, mayStall);
      if (__builtin_expect(progress == Progress::failed, 0)) break;
      if (__builtin_expect(progress == Progress::stalled, 0)) {
        share = shares.unclaimed();
        allTaken = shares.allTaken;
        stalled = true;
        working = true;
        break;
      }
    }
  }
  if (!a.halves.receive) return;
  if (publisher && nArrivals >= 0) publish(a, call, lists, go);
  __syncthreads(); // all threads have read the counters
  if (threadIdx.x == 0) {
    addTicket(&state->calls);
    if (!a.keep) addTicket(&state->dispatches);
  }
}

} // namespace

size_t latencyShared(const LatencyLayout& layout, int nExperts, int nLocal) {
  const size_t words = static_cast<size_t>(layout.words()), r = static_cast<size_t>(layout.nRanks);
  return sizeof(int) * ((static_cast<size_t>(nLocal) + 1) * words + 2 * static_cast<size_t>(nLocal) + 1 + 5 * r +
                        static_cast<size_t>(nExperts));
}

cudaError_t prepareLatencyDispatch() {
  cudaError_t result = cudaSuccess;
#pragma unroll 1
  for (auto* kernel : {latencyDispatchKernel<false>, latencyDispatchKernel<true>}) {
    if (result == cudaSuccess) {
      result = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxLatencyShared);
    }
  }
  return result;
}

cudaError_t launchLatencyDispatch(const LatencyDispatchArgs& args, int maxSms, cudaStream_t stream) {
  auto* kernel = args.quant == ncclMoeQuantNone ? latencyDispatchKernel<false> : latencyDispatchKernel<true>;
  return launchKernel<LatencyDispatchArgs>(
    kernel, latencyBlocks(args.view, args.nTokens, args.wireBytes, maxSms), kDispatchThreads,
    latencyShared(args.view.layout, args.view.comm.nExperts, args.view.nLocal), stream, args);
}

} // namespace moe
