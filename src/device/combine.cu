// The combine kernel.
//
// Protocol.  Every block stores ready[this rank] = epoch << 32 | signature at every peer (release, system scope): this
// rank's earlier calls have ended, so its window may be written.  It waits for all peers' ready flags (acquire).  Then
// warps take rows to send from a counter: a warp adds the row's (weighted) contributions here, stores the sum, rounded
// to the type, into the owner's window, then its weight gradients, and after __syncwarp the row's flag: the epoch, with
// release at system scope. Between rows a warp takes tokens to reduce from a second counter: once the flags of all the
// token's rows are the epoch (acquire) it adds them in the order of the ranks.  Warps block on row flags only when all
// rows to send have been taken, and a warp that has taken one never blocks before it has sent it: one resident block
// per rank is enough to finish. All waits are bounded by the communicator's timeout and abort.  The last block advances
// the epoch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/token.cuh"

namespace moe {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxReductionsPerPush = 2;

struct WarpScratch {
  const uint4* rows[32]; // rows to add; NULL: this rank's own contribution
  const uint4* own[32];  // this rank's rows of a token
  float weights[32];     // and their weights
};

// Sixteen bytes of a row as floats, and back.
template <class T> struct Vec;
template <> struct Vec<float> {
  static constexpr int kElems = 4;
  static __device__ __forceinline__ void load(const uint4& v, float* f) {
    f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y), f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ uint4 store(const float* f) {
    return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
  }
};
template <> struct Vec<__nv_bfloat16> {
  static constexpr int kElems = 8;
  static __device__ __forceinline__ void load(const uint4& v, float* f) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      f[2 * i] = __uint_as_float(words[i] << 16);
      f[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint4 store(const float* f) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};
template <> struct Vec<__half> {
  static constexpr int kElems = 8;
  static __device__ __forceinline__ void load(const uint4& v, float* f) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      f[2 * i] = pair.x;
      f[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ uint4 store(const float* f) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const __half2 pair = __floats2half2_rn(f[2 * i], f[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// acc += w * row, product and sum rounded apart, for kUnroll vectors of each lane.
template <class T, int kUnroll, bool kArrived>
__device__ __forceinline__ void accumulate(float (&acc)[kUnroll][Vec<T>::kElems], const uint4* row, float w, int v,
                                           int nVec) {
  uint4 data[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    if (v + 32 * u < nVec) data[u] = kArrived ? loadArrived(row + v + 32 * u) : loadOnce(row + v + 32 * u);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    if (v + 32 * u >= nVec) continue;
    float f[Vec<T>::kElems];
    Vec<T>::load(data[u], f);
#pragma unroll
    for (int e = 0; e < Vec<T>::kElems; e++) acc[u][e] = __fadd_rn(acc[u][e], kArrived ? f[e] : __fmul_rn(w, f[e]));
  }
}

// This rank's contribution to a token: nOwn weighted rows, from vector v on, rounded to the type.
template <class T, int kUnroll>
__device__ __forceinline__ void partialSum(const WarpScratch& scratch, int nOwn, int v, int nVec,
                                           uint4 (&sum)[kUnroll]) {
  float acc[kUnroll][Vec<T>::kElems] = {};
  for (int j = 0; j < nOwn; j++) accumulate<T, kUnroll, false>(acc, scratch.own[j], scratch.weights[j], v, nVec);
#pragma unroll
  for (int u = 0; u < kUnroll; u++) sum[u] = Vec<T>::store(acc[u]);
}

// Lists this rank's rows of a token in the order of its selections; lane k knows whether selection k is here and its
// slot.
__device__ __forceinline__ int listOwn(const CombineArgs& a, WarpScratch& scratch, bool here, int slot) {
  const int lane = threadIdx.x & 31;
  const bool rankMajor = a.routing.kind == ncclMoeLayoutRankMajor;
  unsigned rows = __ballot_sync(~0u, here);
  if (rankMajor) rows &= -rows; // one row for all selections
  if ((rows >> lane & 1) != 0) {
    const int at = __popc(rows & ((1u << lane) - 1));
    scratch.own[at] = reinterpret_cast<const uint4*>(a.x + static_cast<long long>(slot) * a.rowBytes);
    scratch.weights[at] = a.weights != nullptr ? a.weights[slot] : 1.0f;
  }
  __syncwarp();
  return __popc(rows);
}

__device__ __forceinline__ float gradOf(const CombineArgs& a, bool here, int slot) {
  if (!here) return 0.0f;
  if (a.routing.kind != ncclMoeLayoutRankMajor) return a.gradWeights[slot];
  return a.gradWeights[static_cast<long long>(slot) * a.routing.layout.topK + (threadIdx.x & 31)];
}

template <class T>
__device__ __forceinline__ void sendRow(const CombineArgs& a, WarpScratch& scratch, int owner, int row,
                                        uint32_t epoch) {
  constexpr int kUnroll = 4;
  const CommView& c = a.comm;
  const int lane = threadIdx.x & 31;
  const int k = a.routing.layout.topK;
  const bool rankMajor = a.routing.kind == ncclMoeLayoutRankMajor;
  const int entry = lane < k ? a.routing.ints(a.routing.layout.map)[mapIndex(a.routing, owner, row, lane)] : -1;
  const bool here = entry >= 0;
  const int slot = rankMajor ? a.routing.perRank()[owner].recvBase + row : entry;
  const int nOwn = listOwn(a, scratch, here, slot);
  uint4* to = reinterpret_cast<uint4*>(c.peer(owner) + c.layout.rowOf(owner, c.rank, row));
  const int nVec = a.rowBytes / 16;
  if (rankMajor) {
    copyRow<4, false>(scratch.own[0], &to, 1, nVec);
  } else {
    for (int v = lane; v < nVec; v += 32 * kUnroll) {
      uint4 sum[kUnroll];
      partialSum<T, kUnroll>(scratch, nOwn, v, nVec, sum);
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        if (v + 32 * u < nVec) to[v + 32 * u] = sum[u];
      }
    }
  }
  if (a.withGrads && lane < k) {
    float* grads = reinterpret_cast<float*>(c.peer(owner) + c.layout.grads);
    grads[c.layout.slot(c.rank, row) * c.layout.maxTopK + lane] = gradOf(a, here, slot);
  }
  __syncwarp();
  if (lane == 0) {
    storeRelease(reinterpret_cast<uint32_t*>(c.peer(owner) + c.layout.rowFlags) + c.layout.slot(c.rank, row), epoch);
  }
}

// False if a row has not arrived (or, with wait, did not in time).
template <class T>
__device__ __forceinline__ bool reduceToken(const CombineArgs& a, WarpScratch& scratch, int t, uint32_t epoch,
                                            bool wait) {
  constexpr int kUnroll = 4;
  const CommView& c = a.comm;
  const int lane = threadIdx.x & 31;
  const int k = a.routing.layout.topK;
  const Token token = loadToken(c, a.routing, t);
  const bool remote = token.leader && token.rank != c.rank;
  const uint32_t* flag =
    reinterpret_cast<const uint32_t*>(c.self + c.layout.rowFlags) + (remote ? c.layout.slot(token.rank, token.row) : 0);
  bool arrived = true;
  if (remote) {
    arrived = wait ? waitUntil(c, kPhaseCombineRow, token.rank, epoch, [&] { return loadAcquire(flag) == epoch; })
                   : loadAcquire(flag) == epoch;
  }
  if (!__all_sync(~0u, arrived)) return false;
  // The rows in the order of the ranks.
  const unsigned leaders = __ballot_sync(~0u, token.leader);
  int order = 0;
  for (unsigned rest = leaders; rest != 0; rest &= rest - 1) {
    order += __shfl_sync(~0u, token.rank, __ffs(rest) - 1) < token.rank ? 1 : 0;
  }
  if (token.leader) {
    scratch.rows[order] =
      remote ? reinterpret_cast<const uint4*>(c.self + c.layout.rowOf(c.rank, token.rank, token.row)) : nullptr;
  }
  const int nOwn = listOwn(a, scratch, token.rank == c.rank, token.slot);
  const int nRows = __popc(leaders), nVec = a.rowBytes / 16;
  uint4* out = reinterpret_cast<uint4*>(a.out + static_cast<size_t>(t) * a.rowBytes);
  for (int v = lane; v < nVec; v += 32 * kUnroll) {
    float acc[kUnroll][Vec<T>::kElems] = {};
    for (int j = 0; j < nRows; j++) {
      const uint4* row = scratch.rows[j];
      if (row != nullptr) {
        accumulate<T, kUnroll, true>(acc, row, 1.0f, v, nVec);
        continue;
      }
      uint4 sum[kUnroll];
      partialSum<T, kUnroll>(scratch, nOwn, v, nVec, sum);
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        float f[Vec<T>::kElems];
        Vec<T>::load(sum[u], f);
#pragma unroll
        for (int e = 0; e < Vec<T>::kElems; e++) acc[u][e] = __fadd_rn(acc[u][e], f[e]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (v + 32 * u < nVec) out[v + 32 * u] = Vec<T>::store(acc[u]);
    }
  }
  if (a.withGrads) {
    const float* grads = reinterpret_cast<const float*>(c.self + c.layout.grads);
    float grad = 0.0f;
    if (token.rank == c.rank) {
      grad = gradOf(a, true, token.slot);
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
  bool ok = true;
  if (threadIdx.x < c.nRanks) {
    const int r = threadIdx.x;
    const unsigned long long flag = static_cast<unsigned long long>(epoch) << 32 | a.signature;
    storeRelease(reinterpret_cast<unsigned long long*>(c.peer(r) + c.layout.ready) + c.rank, flag);
    const unsigned long long* theirs = reinterpret_cast<const unsigned long long*>(c.self + c.layout.ready) + r;
    unsigned long long seen = 0;
    ok = waitUntil(c, kPhaseReady, r, epoch, [&] {
      seen = loadAcquire(theirs);
      return seen >> 32 == epoch;
    });
    if (ok && seen != flag) {
      recordFailure(c, kFailMismatch, kPhaseReady, r, epoch, static_cast<uint32_t>(seen));
      ok = false;
    }
  }
  return __syncthreads_and(ok) != 0;
}

template <class T> __global__ void __launch_bounds__(kThreads, 1) combineKernel(const __grid_constant__ CombineArgs a) {
  __shared__ WarpScratch scratches[kWarps];
  WarpScratch& scratch = scratches[threadIdx.x / 32];
  const CommView& c = a.comm;
  Control* ctl = control(c);
  const RoutingLayout::State state = *a.routing.state();
  const RoutingLayout::PerRank* perRank = a.routing.perRank();
  const uint32_t epoch = ctl->epoch + 1;
  const bool go = meet(a, epoch) && state.go != 0;
  uint32_t nSend = 0; // items: row n / (R-1) for the n % (R-1)th other rank, where it exists
  for (int r = 0; r < c.nRanks; r++) {
    if (r != c.rank) nSend = max(nSend, static_cast<uint32_t>(perRank[r].recvRows));
  }
  nSend *= c.nRanks - 1;
  bool sending = go && nSend > 0, reducing = go;
  int token = -1; // taken, but not yet reduced
  while (sending || reducing) {
    if (sending) {
      const uint32_t item = claim(&ctl->pushNext);
      sending = item < nSend;
      if (sending) {
        const int other = item % (c.nRanks - 1);
        const int owner = other + (other >= c.rank ? 1 : 0);
        const int row = item / (c.nRanks - 1);
        if (row < perRank[owner].recvRows) sendRow<T>(a, scratch, owner, row, epoch);
      }
    }
    for (int n = 0; reducing && (!sending || n < kMaxReductionsPerPush); n++) {
      if (token < 0) {
        const uint32_t item = claim(&ctl->recvNext);
        if (item >= static_cast<uint32_t>(state.nTokens)) {
          reducing = false;
          break;
        }
        token = item;
      }
      if (!reduceToken<T>(a, scratch, token, epoch, !sending)) {
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

} // namespace

cudaError_t prepareCombine() {
  cudaFuncAttributes attributes;
  cudaError_t result = cudaFuncGetAttributes(&attributes, combineKernel<__nv_bfloat16>);
  if (result == cudaSuccess) result = cudaFuncGetAttributes(&attributes, combineKernel<__half>);
  return result != cudaSuccess ? result : cudaFuncGetAttributes(&attributes, combineKernel<float>);
}

cudaError_t launchCombine(const CombineArgs& args, int numSms, cudaStream_t stream) {
  switch (args.type) {
  case ncclBfloat16:
    combineKernel<__nv_bfloat16><<<numSms, kThreads, 0, stream>>>(args);
    break;
  case ncclFloat16:
    combineKernel<__half><<<numSms, kThreads, 0, stream>>>(args);
    break;
  default:
    combineKernel<float><<<numSms, kThreads, 0, stream>>>(args);
    break;
  }
  return cudaGetLastError();
}

} // namespace moe
