// The combine kernel.
//
// Protocol.  Every block stores ready[this rank] = epoch << 32 | signature at every peer (release, system scope): this
// rank's earlier calls have ended, so its window may be written.  It waits for all peers' ready flags (acquire).  A
// block that comes onto an SM late may find a peer's flag of the next epoch: other blocks have done all that the peer
// waited for, and it is in its next call, which it cannot finish before this one has ended here.  Then warps take rows
// to send, or pieces of them (RowWork), from a counter: a warp adds the row's (weighted) contributions here, stores the
// sum, rounded to the type, into the owner's window, with the first piece its weight gradients, and after __syncwarp
// the flags of the pieces: the epoch, with release at system scope.  Between rows a warp takes tokens to reduce, or
// pieces of them, from a second counter: once the flags of all the token's rows are the epoch (acquire) it adds them in
// the order of the ranks.  Warps block on flags only when all rows to send have been taken, and a warp that has taken
// one never blocks before it has sent it: one resident block per rank is enough to finish.  All waits are bounded by
// the communicator's timeout and abort.  The last block advances the epoch.
//   An EXACT combine is the same but that each of the rows goes to the owner by itself, with its weight, and stands
// there under its token and selection.  There is room for the rows of a few tokens only, so the host launches one
// kernel, a call with an epoch of its own, for each range of tokens.
#include "device/row_sum.cuh"
#include "device/token.cuh"

namespace moe {
namespace {

enum Kind : int { kRankMajor = 0, kExperts = 1, kExact = 2 };
// As many as leave the registers that each needs, or as find shared memory.
template <int kKind> constexpr int kWarps = kKind == kRankMajor ? 28 : 20;
constexpr int kMaxReductionsPerPush = 2;

// Lists this rank's rows of a token, from vector `begin` on, in the order of its selections; lane k knows whether
// selection k is here and its slot.
__device__ __forceinline__ int listOwn(const CombineArgs& a, RowList& list, bool here, int slot, int begin) {
  const int lane = threadIdx.x & 31;
  const unsigned rows = __ballot_sync(~0u, here);
  if (here) {
    const int at = __popc(rows & ((1u << lane) - 1));
    list.rows[at] = reinterpret_cast<const uint4*>(a.x + static_cast<long long>(slot) * a.rowBytes) + begin;
    list.weights[at] = a.weights != nullptr ? a.weights[slot] : 1.0f;
  }
  __syncwarp();
  return __popc(rows);
}

// Where the weights of row `row` of rank `source` lie in an EXACT combine.
__device__ __forceinline__ float* exactWeights(const CommView& c, char* window, int source, int row) {
  return reinterpret_cast<float*>(window + c.layout.scales + c.layout.slot(source, row) * c.layout.scaleStride);
}

template <int kKind> __device__ __forceinline__ float gradOf(const CombineArgs& a, bool here, int slot) {
  if (!here) return 0.0f;
  if (kKind != kRankMajor) return a.gradWeights[slot];
  return a.gradWeights[static_cast<long long>(slot) * a.routing.layout.topK + (threadIdx.x & 31)];
}

template <class T, int kKind>
__device__ __forceinline__ void sendRow(const CombineArgs& a, RowList& list, uint4* ring, RowMover& mover, int owner,
                                        int row, const Span& span, uint32_t epoch) {
  const CommView& c = a.comm;
  const int lane = threadIdx.x & 31;
  const int k = a.routing.layout.topK;
  const int inLine = kKind == kRankMajor ? a.routing.perRank()[owner].recvBase + row : 0;
  const int nVec = span.end - span.begin;
  const bool withGrads = a.withGrads && span.piece == 0;
  if constexpr (kKind == kRankMajor) {
    mover.start(a.x + static_cast<long long>(inLine) * a.rowBytes + 16 * span.begin, nVec);
  }
  int entry = -1;
  if ((kKind != kRankMajor || withGrads) && lane < k) {
    entry = a.routing.ints(a.routing.layout.map)[mapIndex(a.routing, owner, row, lane)];
  }
  const bool here = entry >= 0;
  const int slot = kKind == kRankMajor ? inLine : entry;
  if (withGrads && lane < k) {
    float* grads = reinterpret_cast<float*>(c.peer(owner) + c.layout.grads);
    grads[c.layout.slot(c.rank, row) * c.layout.maxTopK + lane] = gradOf<kKind>(a, here, slot);
  }
  uint4* to = reinterpret_cast<uint4*>(c.peer(owner) + c.layout.rowOf(owner, c.rank, row)) + span.begin;
  if constexpr (kKind == kRankMajor) {
    // The sum of one row but for the signs of zeros and the payloads of NaNs, which the owner's sum levels.
    mover.finish(to);
  } else if constexpr (kKind == kExact) {
    const int nOwn = listOwn(a, list, here, slot, span.begin);
    if (here) exactWeights(c, c.peer(owner), c.rank, row)[lane] = a.weights != nullptr ? a.weights[slot] : 1.0f;
    const int token = a.routing.ints(a.routing.layout.tokens)[tokenIndex(a.routing, owner, row)] - a.firstToken;
    unsigned rest = __ballot_sync(~0u, here);
    for (int n = 0; n < nOwn; n++, rest &= rest - 1) {
      to = reinterpret_cast<uint4*>(c.peer(owner) + c.layout.exactRowOf(token, __ffs(rest) - 1, k)) + span.begin;
      mover.start(list.rows[n], nVec);
      mover.finish(to);
    }
  } else {
    const int nOwn = listOwn(a, list, here, slot, span.begin);
    if (a.weights == nullptr) {
      sumRows<T, Sum::plain>(list, nOwn, 0, 0, nVec, ring, to);
    } else {
      sumRows<T, Sum::weighted>(list, nOwn, 0, 0, nVec, ring, to);
    }
  }
  __syncwarp();
  if (lane < span.nPieces) {
    storeRelease(reinterpret_cast<uint32_t*>(c.peer(owner) + c.layout.rowFlag(c.rank, row, span.piece + lane)), epoch);
  }
}

// Lists all of a token's rows, from vector `begin` on, in the order of its selections, for an EXACT combine.
__device__ __forceinline__ int listExact(const CombineArgs& a, RowList& list, const Token& token, int t, int begin) {
  const CommView& c = a.comm;
  const int lane = threadIdx.x & 31;
  const unsigned rows = __ballot_sync(~0u, token.rank >= 0);
  if (token.rank >= 0) {
    const int at = __popc(rows & ((1u << lane) - 1));
    const bool own = token.rank == c.rank;
    list.rows[at] = reinterpret_cast<const uint4*>(
                      own ? a.x + static_cast<long long>(token.slot) * a.rowBytes
                          : c.self + c.layout.exactRowOf(t - a.firstToken, lane, a.routing.layout.topK)) +
                    begin;
    list.weights[at] = !own                   ? __ldcg(exactWeights(c, c.self, token.rank, token.row) + lane)
                       : a.weights != nullptr ? a.weights[token.slot]
                                              : 1.0f;
  }
  __syncwarp();
  return __popc(rows);
}

// False if a row has not arrived (or, with wait, did not in time).
template <class T, int kKind>
__device__ __forceinline__ bool reduceToken(const CombineArgs& a, RowList& list, uint4* ring, int t, const Span& span,
                                            uint32_t epoch, bool wait) {
  const CommView& c = a.comm;
  const int lane = threadIdx.x & 31;
  const int k = a.routing.layout.topK;
  const Token token = loadToken(c, a.routing, t);
  const bool remote = token.leader && token.rank != c.rank;
  bool arrived = true;
  for (int piece = span.piece; remote && arrived && piece < span.piece + span.nPieces; piece++) {
    const uint32_t* flag = reinterpret_cast<const uint32_t*>(c.self + c.layout.rowFlag(token.rank, token.row, piece));
    arrived = wait ? waitUntil(c, kPhaseCombineRow, token.rank, epoch, [&] { return loadAcquire(flag) == epoch; })
                   : loadAcquire(flag) == epoch;
  }
  if (!__all_sync(~0u, arrived)) return false;
  __syncwarp(); // orders the other lanes' loads after the flags; a vote orders nothing
  const bool here = token.rank == c.rank;
  const int nVec = span.end - span.begin;
  uint4* out = reinterpret_cast<uint4*>(a.out + static_cast<size_t>(t) * a.rowBytes) + span.begin;
  int nRows = 0;
  if constexpr (kKind == kExact) {
    nRows = listExact(a, list, token, t, span.begin);
    if (nRows > 0) sumRows<T, Sum::weighted>(list, nRows, 0, 0, nVec, ring, out);
  } else {
    // The other ranks' rows in the order of the ranks, nBefore of them before this rank's.  A single own row is already
    // what its rank's sum would be and stands among them; several are summed first.
    const unsigned remotes = __ballot_sync(~0u, remote);
    const int nBefore = __popc(__ballot_sync(~0u, remote && token.rank < c.rank));
    const bool inLine = kKind == kRankMajor && __any_sync(~0u, here);
    const int nOwn = kKind == kRankMajor ? 0 : listOwn(a, list, here, token.slot, span.begin);
    int order = nOwn;
    for (unsigned rest = remotes; rest != 0; rest &= rest - 1) {
      order += __shfl_sync(~0u, token.rank, __ffs(rest) - 1) < token.rank ? 1 : 0;
    }
    if (remote) {
      list.rows[order + (inLine && token.rank > c.rank ? 1 : 0)] =
        reinterpret_cast<const uint4*>(c.self + c.layout.rowOf(c.rank, token.rank, token.row)) + span.begin;
    }
    if (inLine && here && token.leader) {
      list.rows[nBefore] =
        reinterpret_cast<const uint4*>(a.x + static_cast<long long>(token.slot) * a.rowBytes) + span.begin;
    }
    __syncwarp();
    nRows = nOwn + __popc(remotes) + (inLine ? 1 : 0);
    if (nRows > 0 && nOwn == 0) sumRows<T, Sum::plain>(list, nRows, 0, 0, nVec, ring, out);
    if (kKind == kExperts && nOwn > 0) sumRows<T, Sum::mixed>(list, nRows, nOwn, nBefore, nVec, ring, out);
  }
  if (nRows == 0) {
    for (int v = lane; v < nVec; v += 32) out[v] = make_uint4(0, 0, 0, 0);
  }
  if (a.withGrads && span.piece == 0) {
    const float* grads = reinterpret_cast<const float*>(c.self + c.layout.grads);
    float grad = 0.0f;
    if (token.rank == c.rank) {
      grad = gradOf<kKind>(a, true, token.slot);
    } else if (token.rank >= 0) {
      grad = __ldcg(grads + c.layout.slot(token.rank, token.row) * c.layout.maxTopK + lane);
    }
    if (lane < k) a.gradTopkWeights[static_cast<size_t>(t) * k + lane] = grad;
  }
  __syncwarp();
  return true;
}

// Tells the peers that this rank is there, and waits for them.
__device__ __forceinline__ bool meet(const CombineArgs& a, uint32_t epoch) {
  const CommView& c = a.comm;
  bool ok = control(c)->failed == 0; // a rank that has failed says nothing more, as in dispatch
  if (ok && threadIdx.x < c.nRanks) {
    const int r = threadIdx.x;
    const unsigned long long flag = static_cast<unsigned long long>(epoch) << 32 | a.signature;
    storeRelease(reinterpret_cast<unsigned long long*>(c.peer(r) + c.layout.ready) + c.rank, flag);
    const unsigned long long* theirs = reinterpret_cast<const unsigned long long*>(c.self + c.layout.ready) + r;
    unsigned long long seen = 0;
    const uint64_t start = globalTimerNs();
    ok = waitUntil(c, kPhaseReady, r, epoch, [&] {
      seen = loadAcquire(theirs);
      return seen >> 32 == epoch || seen >> 32 == nextEpoch(epoch);
    });
    if (blockIdx.x == 0) countWait(c, r, start); // all blocks wait, at the same time
    if (ok && seen >> 32 == epoch && seen != flag) {
      recordFailure(c, kFailMismatch, kPhaseReady, r, epoch, static_cast<uint32_t>(seen));
      ok = false;
    }
  }
  return __syncthreads_and(ok) != 0;
}

// How many of the n ascending tokens are below bound.
__device__ __forceinline__ int countBelow(const int* tokens, int n, int bound) {
  int low = 0;
  while (low < n) {
    const int middle = (low + n) / 2;
    if (tokens[middle] < bound) {
      low = middle + 1;
    } else {
      n = middle;
    }
  }
  return low;
}

template <class T, int kKind>
__global__ void __launch_bounds__(32 * kWarps<kKind>, 1) combineKernel(const __grid_constant__ CombineArgs a) {
  __shared__ RowList lists[kWarps<kKind>];
  __shared__ RowWork sendWork, reduceWork;
  __shared__ uint32_t firstSend, firstReduce;
  __shared__ int firstRow[kMaxDeviceRanks], endRow[kMaxDeviceRanks]; // of each owner's, that are to be sent
  extern __shared__ uint4 rings[];
  const int warp = threadIdx.x / 32;
  RowList& list = lists[warp];
  uint4* ring = rings + warp * (kRingBytes / sizeof(uint4));
  RowMover mover(ring);
  const CommView& c = a.comm;
  Control* ctl = control(c);
  if (threadIdx.x == 0) {
    firstSend = firstItems(&ctl->pushNext, blockDim.x / 32);
    firstReduce = firstItems(&ctl->recvNext, blockDim.x / 32);
  }
  const RoutingLayout::State state = *a.routing.state();
  const RoutingLayout::PerRank* perRank = a.routing.perRank();
  const uint32_t epoch = nextEpoch(ctl->epoch);
  const bool go = meet(a, epoch) && state.go != 0;
  const int nTokens = min(a.nTokens, state.nTokens - a.firstToken);
  if (go && threadIdx.x < c.nRanks) {
    const int r = threadIdx.x;
    firstRow[r] = 0;
    endRow[r] = perRank[r].recvRows;
    if constexpr (kKind == kExact) {
      const int* tokens = a.routing.ints(a.routing.layout.tokens) + tokenIndex(a.routing, r, 0);
      firstRow[r] = countBelow(tokens, endRow[r], a.firstToken);
      endRow[r] = countBelow(tokens, endRow[r], a.firstToken + a.nTokens);
    }
  }
  __syncthreads();
  uint32_t nSend = 0; // items: row n / (R-1) for the n % (R-1)th other rank, where it exists
  for (int r = 0; go && r < c.nRanks; r++) {
    if (r != c.rank) nSend = max(nSend, static_cast<uint32_t>(endRow[r] - firstRow[r]));
  }
  nSend *= c.nRanks - 1;
  if (threadIdx.x == 0) {
    sendWork.plan(nSend, a.rowBytes / 16);
    reduceWork.plan(static_cast<uint32_t>(max(nTokens, 0)), a.rowBytes / 16);
  }
  __syncthreads();
  bool sending = go && nSend > 0, reducing = go;
  Items toSend(&ctl->pushNext, firstSend), toReduce(&ctl->recvNext, firstReduce);
  int token = -1; // taken, but not yet reduced
  Span span{};
  while (sending || reducing) {
    if (sending) {
      uint32_t item = toSend.next(sendWork.nItems());
      sending = item < sendWork.nItems();
      if (sending) {
        Span part;
        item = sendWork.at(item, &part);
        const int other = item % (c.nRanks - 1);
        const int owner = other + (other >= c.rank ? 1 : 0);
        const int row = firstRow[owner] + item / (c.nRanks - 1);
        if (row < endRow[owner]) sendRow<T, kKind>(a, list, ring, mover, owner, row, part, epoch);
      }
    }
    for (int n = 0; reducing && (!sending || n < kMaxReductionsPerPush); n++) {
      if (token < 0) {
        const uint32_t item = toReduce.next(reduceWork.nItems());
        if (item >= reduceWork.nItems()) {
          reducing = false;
          break;
        }
        token = a.firstToken + static_cast<int>(reduceWork.at(item, &span));
      }
      if (!reduceToken<T, kKind>(a, list, ring, token, span, epoch, !sending)) {
        reducing = sending; // a wait that failed ends the kernel
        break;
      }
      token = -1;
    }
  }
  if (lastBlock(ctl) && threadIdx.x == 0) {
    ctl->pushNext = 0;
    ctl->recvNext = 0;
    ctl->epoch = epoch;
  }
}

template <class T> cudaError_t prepare(size_t sharedBytes, BlockShape* shapes) {
  const void* const kernels[] = {reinterpret_cast<const void*>(combineKernel<T, kRankMajor>),
                                 reinterpret_cast<const void*>(combineKernel<T, kExperts>),
                                 reinterpret_cast<const void*>(combineKernel<T, kExact>)};
  cudaError_t result = cudaSuccess;
  for (int kind = 0; kind < 3 && result == cudaSuccess; kind++) {
    result = shapeKernel(kernels[kind], kRingBytes, sharedBytes, &shapes[kind]);
  }
  return result;
}

template <class T>
cudaError_t launch(const CombineArgs& args, const BlockShape* shapes, int numSms, cudaStream_t stream) {
  const Kind kind = args.exact ? kExact : args.routing.kind == ncclMoeLayoutRankMajor ? kRankMajor : kExperts;
  auto* kernel = kind == kExact       ? combineKernel<T, kExact>
                 : kind == kRankMajor ? combineKernel<T, kRankMajor>
                                      : combineKernel<T, kExperts>;
  return launchKernel<CombineArgs>(kernel, numSms, shapes[kind].nThreads, shapes[kind].sharedBytes, stream, args);
}

} // namespace

cudaError_t prepareCombine(size_t sharedBytes, CombineShapes* shapes) {
  cudaError_t result = prepare<__nv_bfloat16>(sharedBytes, shapes->of[0]);
  if (result == cudaSuccess) result = prepare<__half>(sharedBytes, shapes->of[1]);
  if (result == cudaSuccess) result = prepare<float>(sharedBytes, shapes->of[2]);
  return result;
}

cudaError_t launchCombine(const CombineArgs& args, const CombineShapes& shapes, int numSms, cudaStream_t stream) {
  if (args.type == ncclBfloat16) return launch<__nv_bfloat16>(args, shapes.of[0], numSms, stream);
  if (args.type == ncclFloat16) return launch<__half>(args, shapes.of[1], numSms, stream);
  return launch<float>(args, shapes.of[2], numSms, stream);
}

} // namespace moe
