// The push kernel: second half of a dispatch.  Every row crosses once per destination rank, straight to its final slot.
//
// Protocol.  The route kernel has exchanged counts, so every slot is known and every peer's memory may be written.
// Warps take tokens, or pieces of their rows (RowWork), from a counter.  For each destination rank a warp stores the
// row (into the first of its slots if peers reach recvX, otherwise into the communicator window), with the first piece
// the map, weights and the caller's scales, and then posts the flags of the pieces, the epoch, which leave with release
// at system scope (flag_queue.cuh).  Between tokens a warp takes rows to deliver from a second counter: it checks the
// flags (acquire), for a piece of an expert layout's row also the first piece's, behind which the map has come, and,
// once they are the epoch, copies the row to its further slots and the small tensors to the caller's.  Warps block on a
// flag only when all tokens have been taken, and a warp that has taken a token never blocks before it has pushed it: so
// one resident block per rank is enough to finish, whatever else occupies the SMs, and no cooperative launch is needed.
// Waits are bounded by the communicator's timeout and abort.  Blocks may come while the route kernel still runs; until
// that has ended they touch the counters of items only.
#include "device/cast.cuh"
#include "device/flag_queue.cuh"
#include "device/token.cuh"

namespace moe {
namespace {

// As many as leave the registers that each needs.
template <bool kCast> constexpr int kThreads = kCast ? 640 : 896;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kUnroll = 2; // registers spill on sm_80 with more
#else
constexpr int kUnroll = 4;
#endif
constexpr int kMaxDeliveriesPerPush = 4;

struct WarpScratch {
  uint4* rows[32];  // where the token's row goes
  char* scales[32]; // where its scales go
};

// Copies a span of a row to nDst rows.
template <bool kArrived>
__device__ __forceinline__ void copyRow(const uint4* from, uint4* const* to, int nDst, const Span& span) {
  for (int v = span.begin + (threadIdx.x & 31); v < span.end; v += 32 * kUnroll) {
    uint4 data[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (v + 32 * u < span.end) data[u] = kArrived ? loadArrived(from + v + 32 * u) : loadOnce(from + v + 32 * u);
    }
    for (int d = 0; d < nDst; d++) {
      uint4* dst = to[d];
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        if (v + 32 * u < span.end) storeVector(dst + v + 32 * u, data[u]);
      }
    }
  }
}

__device__ __forceinline__ void copyBytes(char* to, const char* from, int bytes) {
  const int lane = threadIdx.x & 31;
  if (((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) & 3) == 0) {
    for (int w = lane; w < bytes / 4; w += 32) {
      reinterpret_cast<uint32_t*>(to)[w] = reinterpret_cast<const uint32_t*>(from)[w];
    }
  } else {
    for (int b = lane; b < bytes; b += 32) to[b] = from[b];
  }
}

// BF16 to FP8 on the way to nDst rows; a block's scale goes to nScales places.  Eight lanes share a block of 128
// elements.
__device__ __forceinline__ void castRow(const PushArgs& a, const uint4* from, const WarpScratch& scratch, int nDst,
                                        int nScales, const Span& span) {
  const int lane = threadIdx.x & 31;
  uint4 next[2]; // loaded while the ones before are cast
  const auto load = [&](int g) {
    next[0] = next[1] = uint4{}; // what lies behind the end counts for no scale
    if (g >= span.end) return;
    next[0] = loadOnce(from + 2 * g);
    next[1] = loadOnce(from + 2 * g + 1);
  };
  load(span.begin + lane);
  for (int g0 = span.begin; g0 < span.end; g0 += 32) {
    const int g = g0 + lane;
    const bool active = g < span.end;
    const uint4 raw[2] = {next[0], next[1]};
    load(g + 32);
    float scale;
    const bool ue8m0 = a.quant == ncclMoeQuantFp8Ue8m0;
    const uint4 out = castSixteen(raw, ue8m0, &scale);
    if (active) {
      for (int d = 0; d < nDst; d++) storeVector(scratch.rows[d] + g, out);
      if (g % 8 == 0) {
        for (int d = 0; d < nScales; d++) {
          if (ue8m0) {
            scratch.scales[d][g / 8] = static_cast<char>(__float_as_uint(scale) >> 23);
          } else {
            reinterpret_cast<float*>(scratch.scales[d])[g / 8] = scale;
          }
        }
      }
    }
  }
  if (a.quant == ncclMoeQuantFp8Ue8m0 && span.end == a.hidden / 16) {
    const int nBlocks = (a.hidden + NCCL_MOE_SCALE_BLOCK - 1) / NCCL_MOE_SCALE_BLOCK;
    if (nBlocks + lane < a.scaleBytes) {
      for (int d = 0; d < nScales; d++) scratch.scales[d][nBlocks + lane] = 0;
    }
  }
}

// Copies bytes [begin, end) of a row's scales from the communicator window to the caller's tensor.
__device__ __forceinline__ void deliverScales(const PushArgs& a, const char* from, long long slot, int begin, int end) {
  if (!a.columnMajor) {
    copyBytes(a.recvScales + slot * a.scaleBytes + begin, from + begin, end - begin);
    return;
  }
  const int nWords = a.scaleBytes / 4;
  uint32_t* to = reinterpret_cast<uint32_t*>(a.recvScales);
  if (a.routing.kind == ncclMoeLayoutExpertPadded) {
    to += slot / a.rows * a.rows * nWords;
    slot %= a.rows;
  }
  for (int w = begin / 4 + (threadIdx.x & 31); w < end / 4; w += 32)
    to[w * a.rows + slot] = reinterpret_cast<const uint32_t*>(from)[w];
}

// Where the scales end that come with a row's vectors before v: the cast makes them piece by piece, the caller's come
// with the first.
__device__ __forceinline__ int scalesUpTo(const PushArgs& a, int v) {
  if (v == 0) return 0;
  if (a.quant == ncclMoeQuantNone || v == a.wireBytes / 16) return a.scaleBytes;
  return v / 8 * (a.quant == ncclMoeQuantFp8Ue8m0 ? 1 : 4);
}

// What is left to do with part of a row that has arrived, or (own) that this rank has put into all of its slots itself.
// Lane k has selection k's entry in the map and its weight.
__device__ __forceinline__ void deliver(const PushArgs& a, WarpScratch& scratch, int source, int row, int entry,
                                        float weight, const Span& span) {
  const CommView& c = a.comm;
  const int lane = threadIdx.x & 31;
  const int k = a.routing.layout.topK;
  const bool own = source == c.rank;
  const bool rankMajor = a.routing.kind == ncclMoeLayoutRankMajor;
  const char* scales = c.self + c.layout.scales + c.layout.slot(source, row) * c.layout.scaleStride;
  const int slot = rankMajor ? a.routing.perRank()[source].recvBase + row : entry;
  const unsigned targets = rankMajor ? 1u : __ballot_sync(~0u, entry >= 0);
  if (targets == 0) return;
  if (!own) {
    const int first = __ffs(targets) - 1;
    const bool isTarget = (targets >> lane & 1) != 0;
    const bool wanted = isTarget && !(a.recvDirect && lane == first);
    const int firstSlot = __shfl_sync(~0u, slot, first);
    const unsigned copies = __ballot_sync(~0u, wanted);
    if (wanted) {
      scratch.rows[__popc(copies & ((1u << lane) - 1))] =
        reinterpret_cast<uint4*>(a.recvX + static_cast<long long>(slot) * a.wireBytes);
    }
    __syncwarp();
    const char* from = a.recvDirect ? a.recvX + static_cast<long long>(firstSlot) * a.wireBytes
                                    : c.self + c.layout.rowOf(c.rank, source, row);
    if (copies != 0) {
      copyRow<true>(reinterpret_cast<const uint4*>(from), scratch.rows, __popc(copies), span);
    }
  }
  if (span.piece != 0) {
    // the small tensors came with the first piece
  } else if (rankMajor) {
    const long long first = static_cast<long long>(slot) * k;
    if (a.recvTopkIdx != nullptr && lane < k) a.recvTopkIdx[first + lane] = entry;
    if (a.recvWeights != nullptr && lane < k) a.recvWeights[first + lane] = weight;
  } else if (a.recvWeights != nullptr && entry >= 0) {
    a.recvWeights[entry] = weight;
  }
  const int firstScale = scalesUpTo(a, span.begin), endScale = scalesUpTo(a, span.end);
  if (firstScale < endScale) {
    for (unsigned rest = targets; rest != 0; rest &= rest - 1) {
      deliverScales(a, scales, __shfl_sync(~0u, slot, __ffs(rest) - 1), firstScale, endScale);
    }
  }
  __syncwarp(); // scratch is free again
}

template <bool kCast>
__device__ __forceinline__ void pushToken(const PushArgs& a, WarpScratch& scratch, FlagQueue& flags, int t,
                                          const Span& span) {
  const CommView& c = a.comm;
  const int lane = threadIdx.x & 31;
  const int k = a.routing.layout.topK;
  const bool rankMajor = a.routing.kind == ncclMoeLayoutRankMajor;
  const float weight = a.topkWeights != nullptr && lane < k ? a.topkWeights[static_cast<size_t>(t) * k + lane] : 0.0f;
  const Token token = loadToken(c, a.routing, t);
  const int entry = rankMajor ? token.position - (token.rank >= 0 ? c.rankStart[token.rank] : 0) : token.slot;
  const bool own = token.rank == c.rank;
  const bool hasRow = own && !rankMajor ? true : token.leader;
  const unsigned leaders = __ballot_sync(~0u, token.leader);
  if (leaders == 0) return;
  const unsigned rows = __ballot_sync(~0u, hasRow);
  const unsigned below = (1u << lane) - 1;
  if (hasRow) {
    char* direct = own ? a.recvX : a.routing.perRank()[token.rank].recvX;
    char* to = direct != nullptr ? direct + static_cast<long long>(token.slot) * a.wireBytes
                                 : c.peer(token.rank) + c.layout.rowOf(token.rank, c.rank, token.row);
    scratch.rows[__popc(rows & below)] = reinterpret_cast<uint4*>(to);
  }
  if (token.leader) {
    scratch.scales[__popc(leaders & below)] =
      c.peer(token.rank) + c.layout.scales + c.layout.slot(c.rank, token.row) * c.layout.scaleStride;
  }
  __syncwarp();
  const uint4* from = reinterpret_cast<const uint4*>(a.x + static_cast<size_t>(t) * a.rowBytes);
  if constexpr (kCast) {
    castRow(a, from, scratch, __popc(rows), __popc(leaders), span);
  } else {
    copyRow<false>(from, scratch.rows, __popc(rows), span);
  }
  for (unsigned rest = span.piece == 0 ? leaders : 0; rest != 0; rest &= rest - 1) {
    const int leader = __ffs(rest) - 1;
    const int rank = __shfl_sync(~0u, token.rank, leader);
    const int row = __shfl_sync(~0u, token.row, leader);
    char* window = c.windows[a.routing.window * c.nRanks + rank];
    if (!rankMajor && lane == 0) {
      reinterpret_cast<int*>(window + a.routing.layout.tokens)[tokenIndex(a.routing, c.rank, row)] = t;
    }
    if (lane < k) {
      const size_t at = mapIndex(a.routing, c.rank, row, lane);
      reinterpret_cast<int*>(window + a.routing.layout.map)[at] = token.rank == rank ? entry : -1;
      if (a.topkWeights != nullptr) {
        reinterpret_cast<float*>(window + a.routing.layout.weights)[at] = token.rank == rank ? weight : 0.0f;
      }
    }
    if (!kCast && a.scaleBytes > 0) {
      copyBytes(scratch.scales[__popc(leaders & ((1u << leader) - 1))],
                a.scales + static_cast<size_t>(t) * a.scaleBytes, a.scaleBytes);
    }
  }
  uint32_t* flag = nullptr;
  if (token.leader && !own) {
    flag = reinterpret_cast<uint32_t*>(c.peer(token.rank) + c.layout.rowFlag(c.rank, token.row, span.piece));
  }
  flags.post(flag != nullptr, flag, span.nPieces);
  const unsigned ownLeader = __ballot_sync(~0u, token.leader && own);
  if (ownLeader != 0) {
    const int row = __shfl_sync(~0u, token.row, __ffs(ownLeader) - 1);
    deliver(a, scratch, c.rank, row, own ? entry : -1, own ? weight : 0.0f, span);
  }
  __syncwarp();
}

template <bool kCast>
__global__ void __launch_bounds__(kThreads<kCast>, 1) pushKernel(const __grid_constant__ PushArgs a) {
  __shared__ WarpScratch scratches[kThreads<kCast> / 32];
  __shared__ FlagQueue posted;
  __shared__ RowWork pushWork, recvWork;
  __shared__ uint32_t firstPush, firstRecv;
  WarpScratch& scratch = scratches[threadIdx.x / 32];
  const CommView& c = a.comm;
  Control* ctl = control(c);
  if (threadIdx.x == 0) {
    firstPush = firstItems(&ctl->pushNext, FlagQueue::nPosting());
    firstRecv = firstItems(&ctl->recvNext, FlagQueue::nPosting());
  }
  awaitKernelBefore();
  const RoutingLayout::State state = *a.routing.state();
  const RoutingLayout::PerRank* perRank = a.routing.perRank();
  const uint32_t epoch = ctl->epoch;
  uint32_t mostRows = 0; // from any other rank
  for (int r = threadIdx.x & 31; r < c.nRanks; r += 32) {
    if (r != c.rank) mostRows = max(mostRows, static_cast<uint32_t>(perRank[r].recvRows));
  }
  // Items to receive: row n / (R-1) of the n % (R-1)th other rank, where it exists.
  const uint32_t nRecv = __reduce_max_sync(~0u, mostRows) * (c.nRanks - 1);
  if (threadIdx.x == 0) {
    pushWork.plan(static_cast<uint32_t>(state.nTokens), a.wireBytes / 16);
    // Rows that stay where they arrived are little work.
    recvWork.plan(nRecv, a.wireBytes / 16, !a.recvDirect || a.routing.kind != ncclMoeLayoutRankMajor);
  }
  const bool working = posted.open(epoch);
  bool pushing = working && state.go != 0, receiving = pushing && nRecv > 0;
  Items toPush(&ctl->pushNext, firstPush), toReceive(&ctl->recvNext, firstRecv);
  bool taken = false; // an item that is not yet delivered
  uint32_t toDeliver = 0;
  while (pushing || receiving) {
    if (pushing) {
      const uint32_t item = toPush.next(pushWork.nItems());
      pushing = item < pushWork.nItems();
      if (pushing) {
        Span part;
        const uint32_t t = pushWork.at(item, &part);
        pushToken<kCast>(a, scratch, posted, static_cast<int>(t), part);
      }
    }
    for (int n = 0; receiving && (!pushing || n < kMaxDeliveriesPerPush); n++) {
      if (!taken) toDeliver = toReceive.next(recvWork.nItems());
      if (toDeliver >= recvWork.nItems()) {
        receiving = false;
        break;
      }
      taken = true;
      Span span;
      const uint32_t index = recvWork.at(toDeliver, &span);
      const int row = static_cast<int>(index / (c.nRanks - 1));
      const int other = static_cast<int>(index) - row * (c.nRanks - 1);
      const int source = other + (other >= c.rank ? 1 : 0);
      if (row >= perRank[source].recvRows) {
        taken = false;
        continue;
      }
      const int lane = threadIdx.x & 31;
      // With the first piece comes the map, which says where the others go but in RANK_MAJOR.
      const bool alsoFirst = span.piece != 0 && a.routing.kind != ncclMoeLayoutRankMajor;
      bool arrived = true;
      if (lane < span.nPieces + (alsoFirst ? 1 : 0)) {
        const int piece = lane < span.nPieces ? span.piece + lane : 0;
        const uint32_t* flag = reinterpret_cast<const uint32_t*>(c.self + c.layout.rowFlag(source, row, piece));
        arrived = pushing ? loadAcquire(flag) == epoch
                          : waitUntil(c, kPhaseDispatchRow, source, epoch, [&] { return loadAcquire(flag) == epoch; });
      }
      arrived = __all_sync(~0u, arrived);
      __syncwarp(); // orders the other lanes' loads after the flags; a vote orders nothing
      if (!arrived) {
        receiving = pushing; // a wait that failed ends the kernel
        break;
      }
      const size_t at = mapIndex(a.routing, source, row, lane);
      const bool selects = lane < a.routing.layout.topK;
      const int entry = selects ? __ldcg(a.routing.ints(a.routing.layout.map) + at) : -1;
      const float* weights = reinterpret_cast<const float*>(a.routing.self + a.routing.layout.weights);
      const float weight = selects && a.recvWeights != nullptr ? __ldcg(weights + at) : 0.0f;
      deliver(a, scratch, source, row, entry, weight, span);
      taken = false;
    }
  }
  if (working) posted.leave();
  if (lastBlock(ctl) && threadIdx.x == 0) {
    ctl->pushNext = 0;
    ctl->recvNext = 0;
  }
}

} // namespace

cudaError_t preparePush(bool* overlaps) {
  cudaFuncAttributes attributes;
  cudaError_t result = cudaFuncGetAttributes(&attributes, pushKernel<true>);
  if (result == cudaSuccess) result = cudaFuncGetAttributes(&attributes, pushKernel<false>);
  if (result == cudaSuccess) *overlaps = attributes.ptxVersion >= 90;
  return result;
}

cudaError_t launchPush(const PushArgs& args, int numSms, cudaStream_t stream, bool overlap) {
  return args.quant != ncclMoeQuantNone
           ? launchKernel<PushArgs>(pushKernel<true>, numSms, kThreads<true>, 0, stream, args, overlap)
           : launchKernel<PushArgs>(pushKernel<false>, numSms, kThreads<false>, 0, stream, args, overlap);
}

} // namespace moe
