#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cstdio>

#include "gpu/decode_steps.h"

namespace moe::test {
namespace {

constexpr int kThreads = 128; // few, so that they find room beside another rank's kernels
constexpr uint32_t kEmpty = 0xa5a5a5a5u, kPoison = 0x5b5b5b5bu;
enum What {
  kWhatRow = 1,
  kWhatWeight,
  kWhatIndex,
  kWhatCount,
  kWhatTotal,
  kWhatOffset,
  kWhatBeyond,
  kWhatOut,
  kWhatOutBeyond,
  kWhatScale
};
const char* const kNames[] = {
  "nothing",   "a received row", "a received weight",      "a received index", "expertCounts",
  "recvCount", "expertOffsets",  "a row that nobody sent", "a combined row",   "a row beyond the tokens",
  "a scale"};

enum Salt { kSaltTokens = 1, kSaltSparse, kSaltDelay, kSaltExpert = 16, kSaltWeight = 1024, kSaltRow = 2048 };

__device__ uint64_t mix(uint64_t h) {
  h ^= h >> 30, h *= 0xbf58476d1ce4e5b9ull;
  h ^= h >> 27, h *= 0x94d049bb133111ebull;
  return h ^ h >> 31;
}
__device__ uint64_t draw(const Steps& s, unsigned step, int rank, int t, int salt) {
  return mix(mix(s.seed + step * 0x9e3779b97f4a7c15ull) ^
             mix((static_cast<uint64_t>(rank) << 40) + (static_cast<uint64_t>(t) << 20) + salt));
}

// None at all, few, or any number.
__device__ int tokensOf(const Steps& s, unsigned step, int rank) {
  const uint64_t h = draw(s, step, rank, 0, kSaltTokens);
  const int kind = static_cast<int>(h % 8);
  if (kind == 0) return 0;
  if (kind == 1) return s.maxTokens;
  return static_cast<int>((h >> 8) % (s.maxTokens + 1));
}

struct Selections {
  int expert[kStepTopK]; // -1: none
};
__device__ Selections selectionsOf(const Steps& s, unsigned step, int rank, int t) {
  const bool sparse = draw(s, step, rank, 0, kSaltSparse) % 4 == 0;
  const int nExperts = s.nRanks * s.nLocal;
  Selections all;
  for (int k = 0; k < kStepTopK; k++) {
    for (int attempt = 0;; attempt++) {
      const uint64_t h = draw(s, step, rank, t, kSaltExpert + k * 64 + attempt);
      all.expert[k] = static_cast<int>(h % nExperts);
      bool fresh = true;
      for (int j = 0; j < k; j++) fresh = fresh && all.expert[j] != all.expert[k];
      if (sparse && (h >> 32) % 2 == 0) all.expert[k] = -1;
      if (fresh || all.expert[k] < 0) break;
    }
  }
  return all;
}

__device__ uint32_t weightOf(const Steps& s, unsigned step, int rank, int t, int k) {
  if (draw(s, step, rank, t, kSaltWeight) % 8 == 0) return kEmpty;
  const uint64_t h = draw(s, step, rank, t, kSaltWeight + 1 + k);
  return __float_as_uint(static_cast<float>(h % 65536) / 32768.0f - 1.0f);
}

__device__ uint4 packetOf(const Steps& s, unsigned step, int rank, int t, int p) {
  const uint64_t h = draw(s, step, rank, t, kSaltRow + p);
  if (h % 8 == 0) return make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
  const uint64_t other = mix(h);
  const auto numbers = [](uint32_t bits) { // two BF16 of moderate size
    return (bits & 0x807f807fu) | ((bits >> 8 & 0x000f000fu) + 0x00760076u) << 7;
  };
  return make_uint4(numbers(static_cast<uint32_t>(h)), numbers(static_cast<uint32_t>(h >> 32)),
                    numbers(static_cast<uint32_t>(other)), numbers(static_cast<uint32_t>(other >> 32)));
}

__device__ bool same(const uint4& a, const uint4& b) { return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w; }

__device__ void complain(const Steps& s, What what, int a, int b) {
  if (atomicAdd(&s.fault->count, 1u) != 0) return;
  s.fault->step = static_cast<int>(*s.step);
  s.fault->what = what;
  s.fault->a = a;
  s.fault->b = b;
}

__device__ float elementOf(const uint4& packet, int i) {
  const uint32_t word = i / 2 == 0 ? packet.x : i / 2 == 1 ? packet.y : i / 2 == 2 ? packet.z : packet.w;
  return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

// Packet p of a row, and its block's scale, after the FP8 cast that include/nccl_moe.h describes.
__device__ uint4 castPacketOf(const Steps& s, unsigned step, int rank, int t, int p, float* scale) {
  float amax = 0x1p-64f;
  for (int q = p / 8 * 16; q < p / 8 * 16 + 16 && q < s.hidden / 8; q++) {
    const uint4 packet = packetOf(s, step, rank, t, q);
    for (int e = 0; e < 8; e++) amax = fmaxf(amax, fabsf(elementOf(packet, e)));
  }
  *scale = __fdiv_rn(amax, 448.0f);
  const float factor = __fdiv_rn(448.0f, amax);
  uint32_t words[4] = {};
  for (int i = 0; i < 16; i++) {
    const float x = elementOf(packetOf(s, step, rank, t, 2 * p + i / 8), i % 8);
    const uint32_t q = __nv_cvt_float_to_fp8(__fmul_rn(x, factor), __NV_SATFINITE, __NV_E4M3);
    words[i / 4] |= q << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// By a warp: row `row` of what was received is token t of a rank, as sent; and what the expert makes of it.
__device__ void checkRow(const Steps& s, unsigned step, long long row, int rank, int t) {
  const int lane = threadIdx.x & 31, nPackets = s.packetsOfRow();
  for (int p = lane; p < nPackets; p += 32) {
    float scale = 0.0f;
    const uint4 want = s.cast ? castPacketOf(s, step, rank, t, p, &scale) : packetOf(s, step, rank, t, p);
    if (!same(s.recvX[row * nPackets + p], want)) complain(s, kWhatRow, static_cast<int>(row), p);
    if (!s.cast) continue;
    const float got = s.recvScales[row * s.scalesOfRow() + p / 8];
    if (__float_as_uint(got) != __float_as_uint(scale)) complain(s, kWhatScale, static_cast<int>(row), p / 8);
    for (int q = 2 * p; q < 2 * p + 2; q++) s.y[row * (s.hidden / 8) + q] = packetOf(s, step, rank, t, q);
  }
}

__device__ void linger(const Steps& s, unsigned step, int when) {
  if (s.maxDelayNs == 0) return;
  const uint64_t h = draw(s, step, s.rank, when, kSaltDelay);
  if (h % 2 == 0) return;
  const uint64_t ns = (h >> 8) % s.maxDelayNs;
  uint64_t start = 0, now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < ns);
}

__global__ void nextStep(Steps s) {
  const unsigned step = ++*s.step;
  *s.nTokens = tokensOf(s, step, s.rank);
  linger(s, step, 0);
}

__global__ void __launch_bounds__(kThreads) drawKernel(Steps s) {
  const unsigned step = *s.step;
  const int id = blockIdx.x * kThreads + threadIdx.x, stride = gridDim.x * kThreads;
  const int nTokens = *s.nTokens, nPackets = s.hidden / 8;
  for (int i = id; i < nTokens * kStepTopK; i += stride) {
    const int t = i / kStepTopK, k = i % kStepTopK;
    s.topkIdx[i] = selectionsOf(s, step, s.rank, t).expert[k];
    s.topkWeights[i] = __uint_as_float(weightOf(s, step, s.rank, t, k));
  }
  for (int i = id; i < nTokens * nPackets; i += stride) s.x[i] = packetOf(s, step, s.rank, i / nPackets, i % nPackets);
  const uint4 poison = make_uint4(kPoison, kPoison, kPoison, kPoison);
  for (long long i = id; i < s.rows() * s.packetsOfRow(); i += stride) s.recvX[i] = poison;
  for (int i = id; i < s.maxTokens * nPackets; i += stride) s.out[i] = poison;
}

// A block for each local expert, or for the rank in RANK_MAJOR: goes through all tokens of all ranks in order.
__global__ void __launch_bounds__(kThreads) checkDispatchKernel(Steps s) {
  __shared__ int list[kThreads], counts[kThreads / 32];
  const unsigned step = *s.step;
  const bool rankMajor = s.layout == ncclMoeLayoutRankMajor;
  const int l = blockIdx.x, nPackets = s.packetsOfRow(), lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const long long plane = static_cast<long long>(s.nRanks) * s.maxTokens;
  long long first = 0, end = 0; // its rows, with those that nobody may write
  if (rankMajor) end = plane;
  if (s.layout == ncclMoeLayoutExpertPadded) first = l * plane, end = first + plane;
  if (s.layout == ncclMoeLayoutExpertMajor) first = s.expertOffsets[l], end = s.expertOffsets[l + 1];
  int n = 0;
  for (int chunk = 0; chunk < plane; chunk += kThreads) {
    const int i = chunk + threadIdx.x, source = i / s.maxTokens, t = i % s.maxTokens;
    bool hit = false;
    if (i < plane && t < tokensOf(s, step, source)) {
      const Selections all = selectionsOf(s, step, source, t);
      for (int k = 0; k < kStepTopK; k++) {
        const int local = all.expert[k] - s.rank * s.nLocal;
        hit = hit || (all.expert[k] >= 0 && (rankMajor ? local >= 0 && local < s.nLocal : local == l));
      }
    }
    const unsigned hits = __ballot_sync(~0u, hit);
    if (lane == 0) counts[warp] = __popc(hits);
    __syncthreads();
    int at = __popc(hits & ((1u << lane) - 1)), here = 0;
    for (int w = 0; w < kThreads / 32; w++) {
      if (w < warp) at += counts[w];
      here += counts[w];
    }
    if (hit) list[at] = i;
    __syncthreads();
    for (int h = warp; h < here; h += kThreads / 32) {
      const long long row = first + n + h;
      if (row >= end) {
        complain(s, kWhatRow, static_cast<int>(row), -1);
        continue;
      }
      const int from = list[h] / s.maxTokens, token = list[h] % s.maxTokens;
      checkRow(s, step, row, from, token);
      if (lane >= kStepTopK) continue;
      const int expert = selectionsOf(s, step, from, token).expert[lane], local = expert - s.rank * s.nLocal;
      const bool mine = expert >= 0 && (rankMajor ? local >= 0 && local < s.nLocal : local == l);
      const uint32_t weight = mine ? weightOf(s, step, from, token, lane) : 0u;
      if (rankMajor) {
        if (s.recvTopkIdx[row * kStepTopK + lane] != (mine ? local : -1)) {
          complain(s, kWhatIndex, static_cast<int>(row), lane);
        }
        if (__float_as_uint(s.recvWeights[row * kStepTopK + lane]) != weight) {
          complain(s, kWhatWeight, static_cast<int>(row), lane);
        }
      } else if (mine && __float_as_uint(s.recvWeights[row]) != weight) {
        complain(s, kWhatWeight, static_cast<int>(row), lane);
      }
    }
    n += here;
    __syncthreads();
  }
  const uint4 poison = make_uint4(kPoison, kPoison, kPoison, kPoison);
  for (long long i = (first + n) * nPackets + threadIdx.x; i < end * nPackets; i += kThreads) {
    if (!same(s.recvX[i], poison)) complain(s, kWhatBeyond, static_cast<int>(i / nPackets), n);
  }
  if (threadIdx.x != 0) return;
  if (rankMajor) {
    if (*s.recvCount != n) complain(s, kWhatTotal, *s.recvCount, n);
    return;
  }
  if (s.expertCounts[l] != n) complain(s, kWhatCount, s.expertCounts[l], n);
  if (l > 0) return;
  int total = 0;
  for (int e = 0; e < s.nLocal; e++) {
    if (s.layout == ncclMoeLayoutExpertMajor && s.expertOffsets[e] != total) {
      complain(s, kWhatOffset, s.expertOffsets[e], total);
    }
    total += (s.expertCounts[e] + s.alignment - 1) / s.alignment * s.alignment;
  }
  if (s.layout == ncclMoeLayoutExpertMajor && s.expertOffsets[s.nLocal] != total) {
    complain(s, kWhatOffset, s.expertOffsets[s.nLocal], total);
  }
  if (*s.recvCount != total) complain(s, kWhatTotal, *s.recvCount, total);
}

__global__ void lingerKernel(Steps s) { linger(s, *s.step, 1); }

__global__ void __launch_bounds__(kThreads) checkCombineKernel(Steps s) {
  const unsigned step = *s.step;
  const bool rankMajor = s.layout == ncclMoeLayoutRankMajor;
  const int nTokens = *s.nTokens, nPackets = s.hidden / 8;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < s.maxTokens * nPackets; i += gridDim.x * kThreads) {
    const int t = i / nPackets, p = i % nPackets;
    const uint4 got = s.out[i];
    if (t >= nTokens) {
      if (!same(got, make_uint4(kPoison, kPoison, kPoison, kPoison))) complain(s, kWhatOutBeyond, t, p);
      continue;
    }
    const Selections all = selectionsOf(s, step, s.rank, t);
    const uint4 row = packetOf(s, step, s.rank, t, p);
    for (int e = 0; e < 8; e++) {
      const float x = elementOf(row, e);
      float total = 0.0f;
      for (int r = 0; r < s.nRanks; r++) {
        float sum = 0.0f;
        bool any = false;
        for (int k = 0; k < kStepTopK; k++) {
          if (all.expert[k] < 0 || all.expert[k] / s.nLocal != r) continue;
          any = true;
          sum = rankMajor ? x : __fadd_rn(sum, __fmul_rn(__uint_as_float(weightOf(s, step, s.rank, t, k)), x));
        }
        if (any) total = __fadd_rn(total, __bfloat162float(__float2bfloat16_rn(sum)));
      }
      const float want = __bfloat162float(__float2bfloat16_rn(total));
      if (__float_as_uint(elementOf(got, e)) != __float_as_uint(want)) complain(s, kWhatOut, t, p);
    }
  }
}

template <class T> void placeOne(char* memory, size_t* used, T** pointer, size_t count) {
  *pointer = reinterpret_cast<T*>(memory + *used);
  *used += (count * sizeof(T) + 255) / 256 * 256;
}

} // namespace

const char* describeFault(const StepFault& fault, char* text, int bytes) {
  snprintf(text, static_cast<size_t>(bytes), "%u things are wrong, first %s (%d, %d) of step %d", fault.count,
           kNames[fault.what], fault.a, fault.b, fault.step);
  return text;
}

__host__ __device__ long long Steps::rows() const {
  const long long all = static_cast<long long>(nRanks) * maxTokens;
  if (layout == ncclMoeLayoutRankMajor) return all;
  if (layout == ncclMoeLayoutExpertPadded) return all * nLocal;
  const int most = kStepTopK < nLocal ? kStepTopK : nLocal;
  return all * most + static_cast<long long>(nLocal) * (alignment - 1);
}

size_t Steps::place(char* memory) {
  const size_t tokens = static_cast<size_t>(maxTokens), nRows = static_cast<size_t>(rows());
  const size_t nPackets = static_cast<size_t>(hidden) / 8;
  size_t used = 0;
  placeOne(memory, &used, &step, 1);
  placeOne(memory, &used, &fault, 1);
  placeOne(memory, &used, &nTokens, 1);
  placeOne(memory, &used, &topkIdx, tokens * kStepTopK);
  placeOne(memory, &used, &topkWeights, tokens * kStepTopK);
  placeOne(memory, &used, &x, tokens * nPackets);
  placeOne(memory, &used, &recvX, nRows * static_cast<size_t>(packetsOfRow()));
  y = recvX;
  if (cast) placeOne(memory, &used, &y, nRows * nPackets);
  if (cast) placeOne(memory, &used, &recvScales, nRows * static_cast<size_t>(scalesOfRow()));
  placeOne(memory, &used, &recvWeights, nRows * kStepTopK);
  placeOne(memory, &used, &recvTopkIdx, nRows * kStepTopK);
  placeOne(memory, &used, &recvCount, 1);
  placeOne(memory, &used, &expertCounts, static_cast<size_t>(nLocal));
  placeOne(memory, &used, &expertOffsets, static_cast<size_t>(nLocal) + 1);
  placeOne(memory, &used, &out, tokens * nPackets);
  return used;
}

ncclMoeDispatchArgs_t Steps::dispatchArgs() const {
  ncclMoeDispatchArgs_t args = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  args.x = x;
  args.type = ncclBfloat16;
  args.hidden = hidden;
  args.nTokens = maxTokens;
  args.nTokensDev = nTokens;
  args.topkIdx = topkIdx;
  args.topkIdxType = ncclInt64;
  args.topkWeights = topkWeights;
  args.recvX = recvX;
  if (cast) args.quant = ncclMoeQuantFp8;
  if (cast) args.recvScales = recvScales;
  args.recvCapacity = rows();
  if (layout == ncclMoeLayoutRankMajor) args.recvTopkIdx = recvTopkIdx;
  if (layout == ncclMoeLayoutExpertMajor) args.expertOffsets = expertOffsets;
  args.recvWeights = recvWeights;
  args.recvCount = recvCount;
  args.expertCounts = expertCounts;
  return args;
}

ncclMoeCombineArgs_t Steps::combineArgs() const {
  ncclMoeCombineArgs_t args = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
  args.x = y;
  args.type = ncclBfloat16;
  args.hidden = hidden;
  if (layout != ncclMoeLayoutRankMajor) args.weights = recvWeights;
  args.out = out;
  return args;
}

cudaError_t drawStep(const Steps& steps, cudaStream_t stream) {
  nextStep<<<1, 1, 0, stream>>>(steps);
  drawKernel<<<8, kThreads, 0, stream>>>(steps);
  return cudaGetLastError();
}

cudaError_t checkDispatch(const Steps& steps, cudaStream_t stream) {
  const int nBlocks = steps.layout == ncclMoeLayoutRankMajor ? 1 : steps.nLocal;
  checkDispatchKernel<<<nBlocks, kThreads, 0, stream>>>(steps);
  if (steps.maxDelayNs > 0) lingerKernel<<<1, 1, 0, stream>>>(steps);
  return cudaGetLastError();
}

cudaError_t checkCombine(const Steps& steps, cudaStream_t stream) {
  checkCombineKernel<<<8, kThreads, 0, stream>>>(steps);
  return cudaGetLastError();
}

cudaError_t loadStepKernels() {
  cudaError_t result = cudaSuccess;
  cudaFuncAttributes attributes;
  for (auto* kernel : {nextStep, drawKernel, checkDispatchKernel, lingerKernel, checkCombineKernel}) {
    if (result == cudaSuccess) result = cudaFuncGetAttributes(&attributes, kernel);
  }
  return result;
}

} // namespace moe::test
