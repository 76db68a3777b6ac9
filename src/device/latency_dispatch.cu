// Latency mode's dispatch: one kernel, no exchange of counts before rows travel.
//
// Send.  Items: 0 the headers; then for each token its unit 0 (its picks to every rank, so that every rank can work out
// every row's place; to the token's ranks the caller's scales and the weights), then for each token its segments.
// Everything goes to fixed places, by source rank and token.
// Receive.  The last warp of a block waits for the headers; then the block reads the picks of all tokens as they come,
// and marks and counts them in lists: one for each local expert, and one of the tokens that have any here.  From those
// follows the place of every row, in the order (source, token), by counting bits.  Then warps take (token, unit) items,
// wait for the packets and store them where the caller wants them.  The last block tells the caller the counts, and
// mostly receives no rows.
// Who does what.  The first blocks send and end, the others receive; where there are few blocks, or one half of a call,
// all do all that there is to do.  In an SM whose stores to peers wait for the link, loads wait behind the stores:
// blocks that did both saw headers and picks only once all their rows had gone.  And few senders leave the picks, which
// go first, a free way.  Receiving blocks that have waited for long send what no sender has claimed.
// See latency.cuh for packets, waits and who sends.
#include "device/latency_dispatch_rows.cuh"

namespace moe {
namespace {

constexpr int kDispatchWarps = kDispatchThreads / 32;

// How many of the nBlocks blocks that wait for nItems receive rows: but for the last, which tells the caller the
// counts, if the others can take them all at once or if one block less hardly matters.
__device__ __forceinline__ int receivingBlocks(int nBlocks, int nItems) {
  return nBlocks >= 32 || (nBlocks > 1 && nItems <= (nBlocks - 1) * kDispatchWarps) ? nBlocks - 1 : nBlocks;
}

// How many of nBlocks blocks send and do nothing else.  A rank sends a row once, to one rank about as fast as to
// several, and receives one for each of up to min(R, K) ranks, a unit of which takes about half as long again (measured
// with two and with four ranks).  Eight SMs and more are enough for the link.
__device__ __forceinline__ int sendingBlocks(const LatencyView& v, int nBlocks) {
  return max(1 + 2 * nBlocks / (2 + 3 * min(v.comm.nRanks, v.layout.topK)), min(8, nBlocks / 4));
}

template <bool kCast>
__global__ void __launch_bounds__(kDispatchThreads, 1)
  latencyDispatchKernel(const __grid_constant__ LatencyDispatchArgs a) {
  extern __shared__ uint32_t dynamicShared[];
  __shared__ Opening opening;
  __shared__ int nRows; // that arrive
  const LatencyView& v = a.view;
  LatencyState* state = stateOf(v);
  const int nUnits = 1 + (a.wireBytes + kSegmentPackets * kPacketBytes - 1) / (kSegmentPackets * kPacketBytes);
  const Lists lists(v, dynamicShared);
  const int nBlocks = gridDim.x, block = blockIdx.x;
  const bool divided = a.halves.send && a.halves.receive && nBlocks >= 4;
  const int nSending = divided ? sendingBlocks(v, nBlocks) : nBlocks, firstReceiving = divided ? nSending : 0;
  const bool receives = a.halves.receive && block >= firstReceiving;
  if (receives) lists.clear(v);
  if (threadIdx.x == 0) nRows = 0;
  awaitKernelBefore();
  int nTokens = a.nTokens;
  if (a.keep) {
    nTokens = state->nTokens[v.comm.rank];
  } else if (a.nTokensDev != nullptr) {
    nTokens = max(0, min(nTokens, *a.nTokensDev));
  }
  const int nItems = 1 + nTokens * nUnits;
  int share = a.halves.send ? Shares::first(nItems, nSending, kDispatchWarps) : -1;
  Outgoing<kCast> out{};
  if (share >= 0) out = fetch<kCast>(a, nTokens, share);
  if (threadIdx.x < 32) open(v, &opening);
  __syncthreads();                             // the first loads of rows are on their way meanwhile
  if (threadIdx.x == 32 && a.halves.receive) { // the first warp and the last have other things to do
    addTicket(&state->calls);
    if (!a.keep) addTicket(&state->dispatches);
  }
  const Call call = callOf(opening);
  const unsigned long long masked = opening.masked;
  const unsigned buffer = static_cast<unsigned>((opening.dispatches >> kTicketBits) + (a.keep ? 0 : 1)) & 1;
  int nArrivals = -1;            // tokens of all ranks, once all about them is known
  int nReceivers = 0, item = -1; // to receive
  Arrival<kCast> arrival;
  bool go = false, stalled = false;
  Shares shares(v, call, nItems, nSending, kDispatchWarps, opening.failed != 0);
#pragma unroll 1
  for (bool working = true; working;) {
    if (share >= 0) {
      const Claim claim = shares.claim(share);
#pragma unroll 1
      for (int i = share; i < nItems; i += shares.stride()) {
        if (i != out.item) out = fetch<kCast>(a, nTokens, i);
        if (!send<kCast>(a, call, masked, buffer, nTokens, out, claim)) break;
      }
      share = stalled ? shares.unclaimed() : -1;
      if (share >= 0) continue;
    }
    if (!receives) break;
    const bool mayStall = a.halves.send && !shares.allTaken;
    if (nArrivals < 0) { // the same in the whole block
      if (stalled) {
        lists.clear(v);
        __syncthreads();
      }
      Progress progress = gatherHeaders(a, call, opening, lists, mayStall, block == firstReceiving);
      int n = 0;
      if (__syncthreads_and(progress == Progress::done) != 0) {
        admitKernelBehind();
#pragma unroll 1
        for (int r = 0; r < v.comm.nRanks; r++) n += lists.nTokens[r];
        nReceivers = receivingBlocks(nBlocks - firstReceiving, n * nUnits);
        item = threadIdx.x / 32 * nReceivers + block - firstReceiving;
        if (block - firstReceiving >= nReceivers) item = n * nUnits; // it only tells
        // Its loads are on their way while picks come.
        if (item < n * nUnits) arrival = Arrival<kCast>(a, call, buffer, lists, item, n);
        progress = gatherPicks(a, call, buffer, n, lists, mayStall);
      }
      if (__builtin_expect(__syncthreads_and(progress == Progress::done) == 0, 0)) {
        if (__syncthreads_or(progress == Progress::failed) != 0) break;
        share = shares.unclaimed();
        stalled = true;
        continue;
      }
      nArrivals = n;
      go = fits(a, buffer, lists);
      if (v.kind == ncclMoeLayoutExpertMajor) addOffsets(v, lists);
      if (block == nBlocks - 1) publish(a, call, lists, n, go, opening.reported != 0, &nRows);
    }
    working = false;
#pragma unroll 1
    for (; item < nArrivals * nUnits; item += nReceivers * kDispatchWarps) {
      if (arrival.item != item) arrival = Arrival<kCast>(a, call, buffer, lists, item, nArrivals);
      arrival.completePicks(a, call, buffer);
      const Places places = findPlaces(a, lists, arrival.picks, arrival.source, arrival.t);
      if (places.here == 0) continue;
      const Progress progress = arrival.unit == 0 ? receiveAux(a, call, lists, arrival, places, go, mayStall)
                                                  : receiveSegment<kCast>(a, call, arrival, places, go, mayStall);
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

size_t latencyShared(const LatencyLayout& layout, int nExperts, int nLocal) {
  return latencyListBytes(layout.nRanks, nExperts, nLocal, layout.maxTokens);
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

cudaError_t launchLatencyDispatch(const LatencyDispatchArgs& args, int maxSms, cudaStream_t stream, bool overlap) {
  auto* kernel = args.quant == ncclMoeQuantNone ? latencyDispatchKernel<false> : latencyDispatchKernel<true>;
  return launchKernel<LatencyDispatchArgs>(
    kernel, latencyBlocks(args.view, args.nTokens, args.wireBytes, maxSms), kDispatchThreads,
    latencyShared(args.view.layout, args.view.comm.nExperts, args.view.nLocal), stream, args, overlap);
}

} // namespace moe
