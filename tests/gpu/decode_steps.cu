#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cstdio>

#include "gpu/decode_steps.h"

namespace moe::test {
namespace {

constexpr int kThreads = 128; // few, so that they find room beside another rank's kernels
constexpr uint32_t kEmpty = 0xa5a5a5a5u, kPoison = 0x5b5b5b5bu;
// In BF16 -0.203125, twice, and 448.  Where that is a block's largest element, the cast makes 0xa5 of the former, and
// does so in the block's positive multiples; a rank's sums are multiples of what experts return.
constexpr uint32_t kEmptyOnceCast = 0xbe50be50u, k448 = 0x43e0u;
enum What {
  kWhatRow = 1,
  kWhatWeight,
  kWhatIndex,
  kWhatCount,
  kWhatTotal,
  kWhatOffset,
  kWhatBeyond,
  kWhatWeightBeyond,
  kWhatIndexBeyond,
  kWhatOut,
  kWhatOutBeyond,
  kWhatScale,
  kWhatScaleBeyond,
  kWhatGrad
};
const char* const kNames[] = {"nothing",
                              "a received row",
                              "a received weight",
                              "a received index",
                              "expertCounts",
                              "recvCount",
                              "expertOffsets",
                              "a row that nobody sent",
                              "a weight of no row",
                              "an index of no row",
                              "a combined row",
                              "a row beyond the tokens",
                              "a scale",
                              "a scale of no row",
                              "a gradient of a weight"};

// Selection k takes its salts from kSaltExpert + 64 * k on; rounds and kinds of rows have salts of their own.
enum Salt { kSaltTokens = 1, kSaltSparse, kSaltDelay, kSaltExpert = 16, kSaltWeight = 2048, kSaltRow = 4096 };
constexpr int kSaltsOfRow = 4096, kSaltsOfWeights = 64;
enum Rows { kRowsSent, kRowsReturned }; // what dispatch is given, what experts make of that

__device__ uint64_t mix(uint64_t h) {
  h ^= h >> 30, h *= 0xbf58476d1ce4e5b9ull;
  h ^= h >> 27, h *= 0x94d049bb133111ebull;
  return h ^ h >> 31;
}
__device__ uint64_t draw(const Steps& s, unsigned step, int rank, int t, int salt) {
  return mix(mix(s.seed + step * 0x9e3779b97f4a7c15ull) ^
             mix((static_cast<uint64_t>(rank) << 40) + (static_cast<uint64_t>(t) << 20) + salt));
}

// None at all, as many as there may be, or any number.
__device__ int tokensOf(const Steps& s, unsigned step, int rank) {
  const uint64_t h = draw(s, step, rank, 0, kSaltTokens);
  const int kind = static_cast<int>(h % 8);
  if (kind == 1 || step == 1) return s.maxTokens; // also in the shortest of runs, and by all ranks at once
  if (kind == 0) return 0;
  return static_cast<int>((h >> 8) % (s.maxTokens + 1));
}

// Loops over selections are unrolled, so that these stay in registers: the first kernel that needs a stack might have
// to wait until the device is idle, which another rank's kernel may not let it be.
struct Selections {
  int expert[kMaxStepTopK]; // -1: none
  __device__ int at(int wanted) const {
    int found = -1;
#pragma unroll
    for (int k = 0; k < kMaxStepTopK; k++) found = k == wanted ? expert[k] : found;
    return found;
  }
};
__device__ Selections selectionsOf(const Steps& s, unsigned step, int rank, int t) {
  const bool sparse = draw(s, step, rank, 0, kSaltSparse) % 4 == 0;
  Selections all;
#pragma unroll
  for (int k = 0; k < kMaxStepTopK; k++) {
    all.expert[k] = -1;
#pragma unroll 1
    for (int attempt = 0; k < s.topK; attempt++) {
      const uint64_t h = draw(s, step, rank, t, kSaltExpert + k * 64 + attempt);
      const int expert = static_cast<int>(h % s.nExperts);
      if (sparse && (h >> 32) % 2 == 0) break;
      bool fresh = true;
#pragma unroll
      for (int j = 0; j < k; j++) fresh = fresh && all.expert[j] != expert;
      if (!fresh) continue;
      all.expert[k] = expert;
      break;
    }
  }
  return all;
}

__device__ uint32_t weightOf(const Steps& s, unsigned step, int rank, int t, int k) {
  const int salt = kSaltWeight + kSaltsOfWeights * s.round;
  if (draw(s, step, rank, t, salt) % 8 == 0) return kEmpty;
  const uint64_t h = draw(s, step, rank, t, salt + 1 + k);
  return __float_as_uint(static_cast<float>(h % 65536) / 32768.0f - 1.0f);
}

__device__ uint4 packetOf(const Steps& s, unsigned step, int rank, int t, int p, Rows rows) {
  const int salt = kSaltRow + kSaltsOfRow * (2 * s.round + rows);
  const uint64_t h = draw(s, step, rank, t, salt + p);
  const bool cast = rows == kRowsReturned && s.format.castSums;
  // Where sums are cast, two packets become one: both look empty, or neither.
  const uint64_t emptiness = cast ? draw(s, step, rank, t, salt + p / 2 * 2) : h;
  const uint32_t empty = cast ? kEmptyOnceCast : kEmpty;
  uint4 packet = make_uint4(empty, empty, empty, empty);
  const auto numbers = [](uint32_t bits) { // two BF16, or FP16, of moderate size
    return (bits & 0x807f807fu) | ((bits >> 8 & 0x000f000fu) + 0x00760076u) << 7;
  };
  if (emptiness % 8 != 0) {
    const uint64_t other = mix(h);
    packet = make_uint4(numbers(static_cast<uint32_t>(h)), numbers(static_cast<uint32_t>(h >> 32)),
                        numbers(static_cast<uint32_t>(other)), numbers(static_cast<uint32_t>(other >> 32)));
  }
  if (cast && p % 16 == 0) packet.x = (packet.x & 0xffff0000u) | k448;
  return packet;
}

__device__ bool same(const uint4& a, const uint4& b) { return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w; }

__device__ void complain(const Steps& s, What what, int a, int b) {
  if (atomicAdd(&s.fault->count, 1u) != 0) return;
  s.fault->step = static_cast<int>(*s.step);
  s.fault->round = s.round;
  s.fault->what = what;
  s.fault->a = a;
  s.fault->b = b;
}

__device__ float elementOf(const Steps& s, const uint4& packet, int i) {
  const uint32_t word = i / 2 == 0 ? packet.x : i / 2 == 1 ? packet.y : i / 2 == 2 ? packet.z : packet.w;
  if (s.format.type == ncclFloat16) return __half2float(__ushort_as_half(word >> (16 * (i % 2)) & 0xffffu));
  return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}
__device__ float rounded(const Steps& s, float x) {
  return s.format.type == ncclFloat16 ? __half2float(__float2half_rn(x)) : __bfloat162float(__float2bfloat16_rn(x));
}

// Packet p of a row, and its block's scale, after the FP8 cast that include/nccl_moe.h describes.
__device__ uint4 castPacketOf(const Steps& s, unsigned step, int rank, int t, int p, float* scale) {
  float amax = 0x1p-64f;
  for (int q = p / 8 * 16; q < p / 8 * 16 + 16 && q < s.hidden / 8; q++) {
    const uint4 packet = packetOf(s, step, rank, t, q, kRowsSent);
    for (int e = 0; e < 8; e++) amax = fmaxf(amax, fabsf(elementOf(s, packet, e)));
  }
  *scale = __fdiv_rn(amax, 448.0f);
  const bool ue8m0 = s.format.quant == ncclMoeQuantFp8Ue8m0;
  if (ue8m0) *scale = __uint_as_float((__float_as_uint(*scale) + 0x7fffffu) & 0x7f800000u); // a power of two, upwards
  const float factor = __fdiv_rn(448.0f, amax);
  uint32_t words[4] = {};
  const uint4 halves[] = {packetOf(s, step, rank, t, 2 * p, kRowsSent),
                          packetOf(s, step, rank, t, 2 * p + 1, kRowsSent)};
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const float x = elementOf(s, halves[i / 8], i % 8);
    const float scaled = ue8m0 ? __fdiv_rn(x, *scale) : __fmul_rn(x, factor);
    const uint32_t q = __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);
    words[i / 4] |= q << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// By a warp, of which sixteen lanes hold a block: a sum of a rank as its owner gets it, after the cast.
__device__ void castAndBack(float (&sum)[8]) {
  float amax = 0x1p-64f;
#pragma unroll
  for (int e = 0; e < 8; e++) amax = fmaxf(amax, fabsf(sum[e]));
#pragma unroll
  for (int d = 1; d < 16; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  const float scale = __fdiv_rn(amax, 448.0f), factor = __fdiv_rn(448.0f, amax);
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const __nv_fp8_storage_t q = __nv_cvt_float_to_fp8(__fmul_rn(sum[e], factor), __NV_SATFINITE, __NV_E4M3);
    sum[e] = __fmul_rn(__half2float(__half(__nv_cvt_fp8_to_halfraw(q, __NV_E4M3))), scale);
  }
}

// Where word w of a row's scales is.
__device__ long long scaleAt(const Steps& s, long long row, int w) {
  const int nWords = s.scaleWords();
  if (s.format.scaleLayout == ncclMoeScaleRowMajor) return row * nWords + w;
  const bool padded = s.layout == ncclMoeLayoutExpertPadded;
  const long long ld = padded ? static_cast<long long>(s.nRanks) * s.maxTokens : s.rows();
  return row / ld * nWords * ld + w * ld + row % ld;
}

// Of block b; an exponent's word also has those of the blocks beside it, and zeros behind the last one.
__device__ bool isScale(const Steps& s, long long row, int b, float scale) {
  if (s.format.quant == ncclMoeQuantFp8) return s.recvScales[scaleAt(s, row, b)] == __float_as_uint(scale);
  const uint32_t rest = s.recvScales[scaleAt(s, row, b / 4)] >> (8 * (b % 4));
  const bool last = b == (s.hidden - 1) / 128;
  return (last ? rest : rest & 0xffu) == __float_as_uint(scale) >> 23;
}

// By a warp: row `row` of what was received is token t of a rank, as sent; and what the expert makes of it.
__device__ void checkRow(const Steps& s, unsigned step, long long row, int rank, int t) {
  const int lane = threadIdx.x & 31, nPackets = s.packetsOfRow(), nReturned = s.hidden / 8, each = s.cast() ? 2 : 1;
  for (int p = lane; p < nPackets; p += 32) {
    float scale = 0.0f;
    const uint4 want = s.cast() ? castPacketOf(s, step, rank, t, p, &scale) : packetOf(s, step, rank, t, p, kRowsSent);
    if (!same(s.recvX[row * nPackets + p], want)) complain(s, kWhatRow, static_cast<int>(row), p);
    if (s.cast() && !isScale(s, row, p / 8, scale)) complain(s, kWhatScale, static_cast<int>(row), p / 8);
    for (int q = each * p; q < each * p + each; q++) {
      s.y[row * nReturned + q] = packetOf(s, step, rank, t, q, kRowsReturned);
    }
  }
}

// First of all in a kernel that a call follows: from sm_90 on the call's kernel is launched as soon as every block has
// been here, so it is up to that kernel to wait for what this one does.
__device__ void admitCall() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// By a whole block.
__device__ void linger(const Steps& s, unsigned step, int when) {
  if (s.maxDelayNs == 0) return;
  const uint64_t h = draw(s, step, s.rank, 2 * s.round + when, kSaltDelay);
  if (h % 2 == 0) return;
  if (threadIdx.x == 0) {
    const uint64_t ns = (h >> 8) % s.maxDelayNs;
    uint64_t start = 0, now = 0;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < ns);
  }
  __syncthreads();
}

__global__ void nextStep(Steps s) { ++*s.step; }

// What the call shall write is poisoned first, so that a call which began too early would lose what it has written.
__global__ void __launch_bounds__(kThreads) drawKernel(Steps s) {
  admitCall();
  const unsigned step = *s.step;
  linger(s, step, 0);
  const int id = blockIdx.x * kThreads + threadIdx.x, stride = gridDim.x * kThreads;
  const int nTokens = tokensOf(s, step, s.rank), nPackets = s.hidden / 8;
  const uint4 poison = make_uint4(kPoison, kPoison, kPoison, kPoison);
  for (long long i = id; i < s.rows() * s.packetsOfRow(); i += stride) s.recvX[i] = poison;
  for (long long i = id; s.cast() && i < s.rows() * s.scaleWords(); i += stride) s.recvScales[i] = kPoison;
  for (int i = id; i < s.maxTokens * nPackets; i += stride) s.out[i] = poison;
  for (int i = id; s.format.withGrads && i < s.maxTokens * s.topK; i += stride) {
    s.gradTopkWeights[i] = __uint_as_float(kPoison);
  }
  for (long long i = id; i < s.rows() * s.weightsOfRow(); i += stride) {
    s.recvWeights[i] = __uint_as_float(kPoison);
    if (s.layout == ncclMoeLayoutRankMajor) s.recvTopkIdx[i] = kPoison;
  }
  for (int i = id; i < s.nLocal; i += stride) s.expertCounts[i] = kPoison;
  for (int i = id; i <= s.nLocal; i += stride) s.expertOffsets[i] = kPoison;
  if (id == 0) *s.recvCount = kPoison;
  for (int i = id; i < nTokens * s.topK; i += stride) {
    const int t = i / s.topK, k = i % s.topK;
    s.topkIdx[i] = s.round == 0 ? selectionsOf(s, step, s.rank, t).at(k) : static_cast<int>(kPoison);
    s.topkWeights[i] = __uint_as_float(weightOf(s, step, s.rank, t, k));
  }
  for (int i = id; i < nTokens * nPackets; i += stride) {
    s.x[i] = packetOf(s, step, s.rank, i / nPackets, i % nPackets, kRowsSent);
  }
  if (id == 0) *s.nTokens = nTokens;
}

// In the rows of local expert l, or anywhere on this rank in RANK_MAJOR.
__device__ bool isHere(const Steps& s, int expert, int l) {
  if (expert < 0 || s.experts[expert].x != s.rank) return false;
  return s.layout == ncclMoeLayoutRankMajor || s.experts[expert].y == l;
}

// Blocks x for each local expert, or for the rank in RANK_MAJOR, go through all tokens of all ranks in order; blocks y
// share the rows.
__global__ void __launch_bounds__(kThreads) checkDispatchKernel(Steps s) {
  __shared__ int list[kThreads], counts[kThreads / 32];
  admitCall();
  const unsigned step = *s.step;
  linger(s, step, 1);
  const bool rankMajor = s.layout == ncclMoeLayoutRankMajor;
  const int l = blockIdx.x, nPackets = s.packetsOfRow(), lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const long long plane = static_cast<long long>(s.nRanks) * s.maxTokens;
  const int share = blockIdx.y, nShares = gridDim.y;
  long long first = 0, end = 0; // its rows, with those that nobody may write
  if (rankMajor) end = plane;
  if (l < s.nLocal && s.layout == ncclMoeLayoutExpertPadded) first = l * plane, end = first + plane;
  if (l < s.nLocal && s.layout == ncclMoeLayoutExpertMajor) {
    first = s.expertOffsets[l], end = s.expertOffsets[l + 1];
    if (first < 0 || first > end || end > s.rows()) {
      complain(s, kWhatOffset, static_cast<int>(first), static_cast<int>(end));
      first = end = 0;
    }
  }
  int n = 0;
  for (int chunk = 0; chunk < plane; chunk += kThreads) {
    const int i = chunk + threadIdx.x, source = i / s.maxTokens, t = i % s.maxTokens;
    bool hit = false;
    if (i < plane && t < tokensOf(s, step, source)) {
      const Selections all = selectionsOf(s, step, source, t);
#pragma unroll
      for (int k = 0; k < kMaxStepTopK; k++) hit = hit || isHere(s, all.expert[k], l);
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
      if ((n + h) / (kThreads / 32) % nShares != share) continue;
      const long long row = first + n + h;
      if (row >= end) {
        complain(s, kWhatRow, static_cast<int>(row), -1);
        continue;
      }
      const int from = list[h] / s.maxTokens, token = list[h] % s.maxTokens;
      checkRow(s, step, row, from, token);
      if (lane >= s.topK) continue;
      const int expert = selectionsOf(s, step, from, token).at(lane);
      const bool mine = isHere(s, expert, l);
      const uint32_t weight = mine ? weightOf(s, step, from, token, lane) : 0u;
      if (rankMajor) {
        if (s.recvTopkIdx[row * s.topK + lane] != (mine ? s.experts[expert].y : -1)) {
          complain(s, kWhatIndex, static_cast<int>(row), lane);
        }
        if (__float_as_uint(s.recvWeights[row * s.topK + lane]) != weight) {
          complain(s, kWhatWeight, static_cast<int>(row), lane);
        }
      } else if (mine && __float_as_uint(s.recvWeights[row]) != weight) {
        complain(s, kWhatWeight, static_cast<int>(row), lane);
      }
    }
    n += here;
    __syncthreads();
  }
  if (s.layout == ncclMoeLayoutExpertMajor && l == s.nLocal - 1) end = s.rows(); // behind the last group too
  const uint4 poison = make_uint4(kPoison, kPoison, kPoison, kPoison);
  const int offset = share * kThreads + threadIdx.x;
  for (long long i = (first + n) * nPackets + offset; i < end * nPackets; i += nShares * kThreads) {
    if (!same(s.recvX[i], poison)) complain(s, kWhatBeyond, static_cast<int>(i / nPackets), n);
  }
  const int nWeights = s.weightsOfRow();
  for (long long i = (first + n) * nWeights + offset; i < end * nWeights; i += nShares * kThreads) {
    const int row = static_cast<int>(i / nWeights);
    if (__float_as_uint(s.recvWeights[i]) != kPoison) complain(s, kWhatWeightBeyond, row, n);
    if (rankMajor && s.recvTopkIdx[i] != static_cast<int>(kPoison)) complain(s, kWhatIndexBeyond, row, n);
  }
  const int nWords = s.cast() ? s.scaleWords() : 0;
  for (long long i = (first + n) * nWords + offset; i < end * nWords; i += nShares * kThreads) {
    const long long row = i / nWords;
    const int w = static_cast<int>(i % nWords);
    if (s.recvScales[scaleAt(s, row, w)] != kPoison) complain(s, kWhatScaleBeyond, static_cast<int>(row), w);
  }
  if (threadIdx.x != 0 || share != 0) return;
  if (rankMajor) {
    if (*s.recvCount != n) complain(s, kWhatTotal, *s.recvCount, n);
    return;
  }
  if (l < s.nLocal && s.expertCounts[l] != n) complain(s, kWhatCount, s.expertCounts[l], n);
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

// A warp for each token.  The 1 lets it have the registers that it needs.
__global__ void __launch_bounds__(kThreads, 1) checkCombineKernel(Steps s) {
  const unsigned step = *s.step;
  const bool rankMajor = s.layout == ncclMoeLayoutRankMajor;
  const int nTokens = *s.nTokens, nPackets = s.hidden / 8, lane = threadIdx.x & 31;
  const int nWarps = gridDim.x * (kThreads / 32);
  const bool hasGrad = s.format.withGrads && lane < s.topK;
  for (int t = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; t < s.maxTokens; t += nWarps) {
    const uint4* out = s.out + static_cast<long long>(t) * nPackets;
    const uint32_t grad = hasGrad ? __float_as_uint(s.gradTopkWeights[t * s.topK + lane]) : 0u;
    if (t >= nTokens) {
      if (hasGrad && grad != kPoison) complain(s, kWhatGrad, t, lane);
      for (int p = lane; p < nPackets; p += 32) {
        if (!same(out[p], make_uint4(kPoison, kPoison, kPoison, kPoison))) complain(s, kWhatOutBeyond, t, p);
      }
      continue;
    }
    const Selections all = selectionsOf(s, step, s.rank, t);
    int home[kMaxStepTopK];
    float weight[kMaxStepTopK];
#pragma unroll
    for (int k = 0; k < kMaxStepTopK; k++) {
      home[k] = all.expert[k] < 0 ? -1 : s.experts[all.expert[k]].x;
      weight[k] = home[k] < 0 ? 0.0f : __uint_as_float(weightOf(s, step, s.rank, t, k));
    }
    if (hasGrad) {
      const uint32_t want = all.at(lane) < 0 ? 0u : weightOf(s, step, s.rank, t, lane);
      if (grad != want) complain(s, kWhatGrad, t, lane);
    }
    for (int first = 0; first < nPackets; first += 32) {
      const int p = first + lane;
      const bool has = p < nPackets; // the others add zeros, for the cast wants all lanes
      const uint4 row = has ? packetOf(s, step, s.rank, t, p, kRowsReturned) : uint4{};
      float x[8], total[8] = {};
#pragma unroll
      for (int e = 0; e < 8; e++) x[e] = elementOf(s, row, e);
#pragma unroll 1
      for (int r = 0; r < s.nRanks; r++) {
        float sum[8] = {};
        bool any = false;
#pragma unroll
        for (int k = 0; k < kMaxStepTopK; k++) {
          if (home[k] != r) continue;
          any = true;
#pragma unroll
          for (int e = 0; e < 8; e++) sum[e] = rankMajor ? x[e] : __fadd_rn(sum[e], __fmul_rn(weight[k], x[e]));
        }
        if (!any) continue;
        if (s.format.castSums) castAndBack(sum);
#pragma unroll
        for (int e = 0; e < 8; e++) total[e] = __fadd_rn(total[e], s.format.castSums ? sum[e] : rounded(s, sum[e]));
      }
      if (!has) continue;
      const uint4 got = out[p];
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float want = rounded(s, total[e]);
        if (__float_as_uint(elementOf(s, got, e)) != __float_as_uint(want)) complain(s, kWhatOut, t, p);
      }
    }
  }
}

// More of them where there is much to do.
int blocksOf(const Steps& s) { return std::min(std::max(s.maxTokens * (s.hidden / 8) / 2048, 8), 64); }

template <class T> void placeOne(char* memory, size_t* used, T** pointer, size_t count) {
  *pointer = reinterpret_cast<T*>(memory + *used);
  *used += (count * sizeof(T) + 255) / 256 * 256;
}

} // namespace

const char* describeFault(const StepFault& fault, char* text, int bytes) {
  snprintf(text, static_cast<size_t>(bytes), "%u things are wrong, first %s (%d, %d) of step %d%s", fault.count,
           kNames[fault.what], fault.a, fault.b, fault.step, fault.round == 0 ? "" : ", with the routing kept");
  return text;
}

__host__ __device__ long long Steps::rows() const {
  const long long all = static_cast<long long>(nRanks) * maxTokens;
  if (layout == ncclMoeLayoutRankMajor) return all;
  if (layout == ncclMoeLayoutExpertPadded) return all * nLocal;
  const int most = topK < nLocal ? topK : nLocal;
  return (all * most + static_cast<long long>(nLocal) * (alignment - 1) + 3) / 4 * 4; // for scales by columns
}

size_t Steps::place(char* memory) {
  const size_t tokens = static_cast<size_t>(maxTokens), nRows = static_cast<size_t>(rows());
  const size_t nPackets = static_cast<size_t>(hidden) / 8, nSelections = static_cast<size_t>(topK);
  size_t used = 0;
  placeOne(memory, &used, &step, 1);
  placeOne(memory, &used, &fault, 1);
  placeOne(memory, &used, &experts, static_cast<size_t>(nExperts));
  placeOne(memory, &used, &nTokens, 1);
  placeOne(memory, &used, &topkIdx, tokens * nSelections);
  placeOne(memory, &used, &topkWeights, tokens * nSelections);
  placeOne(memory, &used, &x, tokens * nPackets);
  placeOne(memory, &used, &recvX, nRows * static_cast<size_t>(packetsOfRow()));
  y = recvX;
  if (cast()) placeOne(memory, &used, &y, nRows * nPackets);
  if (cast()) placeOne(memory, &used, &recvScales, nRows * static_cast<size_t>(scaleWords()));
  placeOne(memory, &used, &recvWeights, nRows * nSelections);
  placeOne(memory, &used, &recvTopkIdx, nRows * nSelections);
  placeOne(memory, &used, &recvCount, 1);
  placeOne(memory, &used, &expertCounts, static_cast<size_t>(nLocal));
  placeOne(memory, &used, &expertOffsets, static_cast<size_t>(nLocal) + 1);
  placeOne(memory, &used, &out, tokens * nPackets);
  if (format.withGrads) placeOne(memory, &used, &gradTopkWeights, tokens * nSelections);
  return used;
}

ncclMoeDispatchArgs_t Steps::dispatchArgs() const {
  ncclMoeDispatchArgs_t args = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  args.x = x;
  args.type = format.type;
  args.hidden = hidden;
  args.nTokens = maxTokens;
  args.nTokensDev = nTokens;
  args.topkIdx = topkIdx;
  args.topkIdxType = ncclInt64;
  args.topkWeights = topkWeights;
  if (round > 0) args.flags = NCCL_MOE_KEEP_ROUTING;
  args.recvX = recvX;
  args.quant = format.quant;
  args.scaleLayout = format.scaleLayout;
  if (cast()) args.recvScales = recvScales;
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
  args.type = format.type;
  args.hidden = hidden;
  if (layout != ncclMoeLayoutRankMajor) args.weights = recvWeights;
  args.out = out;
  if (format.castSums) args.quant = ncclMoeQuantFp8;
  if (format.withGrads) {
    args.withGradWeights = 1;
    args.gradWeights = recvWeights;
    args.gradTopkWeights = gradTopkWeights;
  }
  return args;
}

cudaError_t drawStep(const Steps& steps, cudaStream_t stream) {
  if (steps.round == 0) nextStep<<<1, 1, 0, stream>>>(steps);
  drawKernel<<<blocksOf(steps), kThreads, 0, stream>>>(steps);
  return cudaGetLastError();
}

cudaError_t checkDispatch(const Steps& steps, cudaStream_t stream) {
  const bool rankMajor = steps.layout == ncclMoeLayoutRankMajor;
  const dim3 nBlocks = rankMajor ? dim3(1, 8) : dim3(std::max(steps.nLocal, 1));
  checkDispatchKernel<<<nBlocks, kThreads, 0, stream>>>(steps);
  return cudaGetLastError();
}

cudaError_t checkCombine(const Steps& steps, cudaStream_t stream) {
  checkCombineKernel<<<blocksOf(steps), kThreads, 0, stream>>>(steps);
  return cudaGetLastError();
}

cudaError_t loadStepKernels() {
  cudaError_t result = cudaSuccess;
  cudaFuncAttributes attributes;
  for (auto* kernel : {nextStep, drawKernel, checkDispatchKernel, checkCombineKernel}) {
    if (result == cudaSuccess) result = cudaFuncGetAttributes(&attributes, kernel);
  }
  return result;
}

} // namespace moe::test
