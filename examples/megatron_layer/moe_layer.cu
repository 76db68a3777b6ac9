#include "moe_layer.h"

#include <algorithm>

namespace {

constexpr int kThreads = 256;
int blocksFor(size_t n) { return static_cast<int>((n + kThreads - 1) / kThreads); }

__device__ float warpSum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
__device__ float warpMax(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// A warp for each token: softmax, then the K largest one after the other, the lower expert first where two are equal.
__global__ void routeKernel(const float* logits, int nTokens, int nExperts, int topK, float* probs, int64_t* topkIdx,
                            float* topkWeights) {
  const int token = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (token >= nTokens) return;
  const float* in = logits + static_cast<size_t>(token) * nExperts;
  float* p = probs + static_cast<size_t>(token) * nExperts;
  float most = -INFINITY, sum = 0;
  for (int e = lane; e < nExperts; e += 32) most = fmaxf(most, in[e]);
  most = warpMax(most);
  for (int e = lane; e < nExperts; e += 32) sum += expf(in[e] - most);
  sum = warpSum(sum);
  for (int e = lane; e < nExperts; e += 32) p[e] = expf(in[e] - most) / sum;

  float last = INFINITY;
  int lastExpert = -1;
  for (int k = 0; k < topK; k++) {
    float best = -1;
    int expert = nExperts;
    for (int e = lane; e < nExperts; e += 32) { // the best that comes after the last one
      const bool after = p[e] < last || (p[e] == last && e > lastExpert);
      if (after && p[e] > best) best = p[e], expert = e;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const float otherBest = __shfl_xor_sync(0xffffffffu, best, offset);
      const int otherExpert = __shfl_xor_sync(0xffffffffu, expert, offset);
      if (otherBest > best || (otherBest == best && otherExpert < expert)) best = otherBest, expert = otherExpert;
    }
    if (lane == 0) {
      topkIdx[static_cast<size_t>(token) * topK + k] = expert;
      topkWeights[static_cast<size_t>(token) * topK + k] = best;
    }
    last = best, lastExpert = expert;
  }
}

// gradLogits_e = p_e (g_e - sum_j g_j p_j), where g is the gradient of the selected probabilities and else 0.
__global__ void routeBackwardKernel(const float* probs, const int64_t* topkIdx, const float* gradTopkWeights,
                                    int nTokens, int nExperts, int topK, bf16* gradLogits) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= nTokens * nExperts) return;
  const int token = i / nExperts, expert = i % nExperts;
  float mine = 0, dot = 0;
  for (int k = 0; k < topK; k++) {
    const int64_t e = topkIdx[token * topK + k];
    const float g = gradTopkWeights[token * topK + k];
    dot += g * probs[static_cast<size_t>(token) * nExperts + e];
    if (e == expert) mine = g;
  }
  gradLogits[i] = __float2bfloat16(probs[i] * (mine - dot));
}

// inner [rows, 2F] holds gate and up: active [rows, F] = silu(gate) * up.
__global__ void swigluKernel(const bf16* inner, size_t rows, int ffn, bf16* active) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * ffn) return;
  const size_t at = i / ffn * 2 * ffn + i % ffn;
  const float gate = __bfloat162float(inner[at]), up = __bfloat162float(inner[at + ffn]);
  active[i] = __float2bfloat16(gate / (1 + expf(-gate)) * up);
}

__global__ void swigluBackwardKernel(const bf16* inner, const bf16* gradActive, size_t rows, int ffn, bf16* gradInner) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * ffn) return;
  const size_t at = i / ffn * 2 * ffn + i % ffn;
  const float gate = __bfloat162float(inner[at]), up = __bfloat162float(inner[at + ffn]);
  const float grad = __bfloat162float(gradActive[i]);
  const float sigmoid = 1 / (1 + expf(-gate));
  gradInner[at] = __float2bfloat16(grad * up * sigmoid * (1 + gate * (1 - sigmoid)));
  gradInner[at + ffn] = __float2bfloat16(grad * gate * sigmoid);
}

// A warp for each row: a weight's gradient is <gradient of the sum, expert's output>; the expert's output has the
// gradient weight * (gradient of the sum), which takes that one's place.
__global__ void weightBackwardKernel(const bf16* expertOut, const float* rowWeights, size_t rows, int hidden,
                                     bf16* gradRows, float* gradRowWeights) {
  const size_t row = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float dot = 0;
  for (int h = lane; h < hidden; h += 32) {
    const size_t i = row * hidden + h;
    const float grad = __bfloat162float(gradRows[i]);
    dot += grad * __bfloat162float(expertOut[i]);
    gradRows[i] = __float2bfloat16(rowWeights[row] * grad);
  }
  dot = warpSum(dot);
  if (lane == 0) gradRowWeights[row] = dot;
}

// Every token of every rank may choose experts of this rank only, and each of its experts' rows are rounded up.
size_t capacityOf(const LayerConfig& c, const ncclMoeCommInfo_t& info) {
  const size_t perToken = std::min(c.topK, info.nLocalExperts);
  return static_cast<size_t>(info.nRanks) * c.tokens * perToken +
         static_cast<size_t>(info.nLocalExperts) * (c.alignment - 1);
}

} // namespace

ncclMoeComm_t MoeLayer::makeComm(const LayerConfig& c, ncclComm_t comm) {
  ncclMoeConfig_t config = NCCL_MOE_CONFIG_INITIALIZER;
  config.nExperts = c.experts;
  config.maxTokens = c.tokens;
  config.maxTopK = c.topK;
  config.maxRowBytes = c.hidden * sizeof(bf16);
  ncclMoeComm_t moe = nullptr;
  MOE_OK(ncclMoeCommInit(&moe, comm, &config));
  return moe;
}

ncclMoeCommInfo_t MoeLayer::infoOf(ncclMoeComm_t moe) {
  ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
  MOE_OK(ncclMoeCommGetInfo(moe, &info));
  return info;
}

// [capacity, H] that peers write to and read from, the same size on every rank: the ranks with one expert more decide.
bf16* MoeLayer::reachable() {
  ncclMoeCommInfo_t largest = info_;
  largest.nLocalExperts = (c_.experts + info_.nRanks - 1) / info_.nRanks;
  const size_t bytes = std::max<size_t>(capacityOf(c_, largest), 1) * c_.hidden * sizeof(bf16);
  void* memory = nullptr;
  MOE_OK(ncclMoeMemAlloc(&memory, bytes, moe_));
  CUDA_OK(cudaMemsetAsync(memory, 0, bytes, stream_));
  return static_cast<bf16*>(memory);
}

MoeLayer::MoeLayer(const LayerConfig& config, ncclComm_t comm, cudaStream_t stream)
  : c_(config), comm_(comm), stream_(stream), moe_(makeComm(config, comm)), info_(infoOf(moe_)),
    capacity_(capacityOf(config, info_)), logits_(static_cast<size_t>(c_.tokens) * c_.experts), probs_(logits_.size()),
    topkWeights_(static_cast<size_t>(c_.tokens) * c_.topK), gradTopkWeights_(topkWeights_.size()),
    gradLogits_(logits_.size()), rows_(reachable()), expertOut_(reachable()), gradRows_(reachable()),
    rowWeights_(capacity_), gradRowWeights_(capacity_), inner_(capacity_ * 2 * c_.ffn), gradInner_(inner_.size()),
    active_(capacity_ * c_.ffn), gradActive_(active_.size()), counts_(info_.nLocalExperts),
    offsets_(info_.nLocalExperts + 1), topkIdx(topkWeights_.size()),
    router(static_cast<size_t>(c_.experts) * c_.hidden),
    w1(static_cast<size_t>(info_.nLocalExperts) * 2 * c_.ffn * c_.hidden), w2(w1.size() / 2), gradRouter(router.size()),
    gradW1(w1.size()), gradW2(w2.size()) {
  CUBLAS_OK(cublasCreate(&cublas_));
  CUBLAS_OK(cublasSetStream(cublas_, stream_));
  ncclMoeRoutingConfig_t routing = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  routing.topK = c_.topK;
  routing.layout = ncclMoeLayoutExpertMajor;
  routing.expertAlignment = c_.alignment;
  routing.hostCounts = 1; // the host sizes the GEMMs
  MOE_OK(ncclMoeRoutingCreate(&routing_, moe_, &routing));
}

MoeLayer::~MoeLayer() {
  ncclMoeCommDestroy(moe_); // with its routing and its memory
  if (cublas_ != nullptr) cublasDestroy(cublas_);
}

// Row-major c [m, n] = a b + beta c, where a is [m, k], or [k, m] if transposed, and b [k, n], or [n, k].  cuBLAS takes
// matrices by columns, to which the same memory is the transposed one: c^T = b^T a^T.
void MoeLayer::gemm(bool transA, bool transB, int m, int n, int k, bf16* a, bf16* b, void* c, cudaDataType cType,
                    float beta) {
  const float one = 1;
  CUBLAS_OK(cublasGemmEx(cublas_, transB ? CUBLAS_OP_T : CUBLAS_OP_N, transA ? CUBLAS_OP_T : CUBLAS_OP_N, n, m, k, &one,
                         b, CUDA_R_16BF, transB ? k : n, a, CUDA_R_16BF, transA ? m : k, &beta, c, cType, n,
                         CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

void MoeLayer::forward(bf16* x, bf16* out) {
  gemm(false, true, c_.tokens, c_.experts, c_.hidden, x, router, logits_, CUDA_R_32F, 0);
  routeKernel<<<blocksFor(static_cast<size_t>(c_.tokens) * 32), kThreads, 0, stream_>>>(
    logits_, c_.tokens, c_.experts, c_.topK, probs_, topkIdx, topkWeights_);
  CUDA_OK(cudaGetLastError());

  ncclMoeDispatchArgs_t send = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  send.x = x;
  send.type = ncclBfloat16;
  send.hidden = c_.hidden;
  send.nTokens = c_.tokens;
  send.topkIdx = topkIdx;
  send.topkWeights = topkWeights_;
  send.recvX = rows_;
  send.recvCapacity = static_cast<int64_t>(capacity_);
  send.recvWeights = rowWeights_;
  MOE_OK(ncclMoeDispatch(&send, routing_, moe_, stream_));
  int64_t nRows = 0;
  MOE_OK(ncclMoeRoutingGetCounts(routing_, moe_, &nRows, counts_.data()));
  for (int l = 0; l < localExperts(); l++)
    offsets_[l + 1] = offsets_[l] + (counts_[l] + c_.alignment - 1) / c_.alignment * c_.alignment;

  // One GEMM after the other; from CUDA 12.5 on cublasGemmGroupedBatchedEx takes them all in one call.  Padding between
  // the experts is left out here; kernels for single elements compute it too, for nobody reads it.
  for (int l = 0; l < localExperts(); l++) {
    if (counts_[l] == 0) continue;
    const size_t at = offsets_[l];
    gemm(false, true, counts_[l], 2 * c_.ffn, c_.hidden, rows_ + at * c_.hidden,
         w1 + static_cast<size_t>(l) * 2 * c_.ffn * c_.hidden, inner_ + at * 2 * c_.ffn, CUDA_R_16BF, 0);
  }
  if (nRows > 0) swigluKernel<<<blocksFor(nRows * c_.ffn), kThreads, 0, stream_>>>(inner_, nRows, c_.ffn, active_);
  CUDA_OK(cudaGetLastError());
  for (int l = 0; l < localExperts(); l++) {
    if (counts_[l] == 0) continue;
    const size_t at = offsets_[l];
    gemm(false, true, counts_[l], c_.hidden, c_.ffn, active_ + at * c_.ffn,
         w2 + static_cast<size_t>(l) * c_.hidden * c_.ffn, expertOut_ + at * c_.hidden, CUDA_R_16BF, 0);
  }

  ncclMoeCombineArgs_t back = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
  back.x = expertOut_;
  back.type = ncclBfloat16;
  back.hidden = c_.hidden;
  back.weights = rowWeights_;
  back.out = out;
  MOE_OK(ncclMoeCombine(&back, routing_, moe_, stream_));
}

// The backward of combine is a dispatch and that of dispatch a combine, both with forward's routing.
void MoeLayer::backward(bf16* x, bf16* gradOut, bf16* gradX) {
  ncclMoeDispatchArgs_t send = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  send.x = gradOut;
  send.type = ncclBfloat16;
  send.hidden = c_.hidden;
  send.nTokens = c_.tokens;
  send.recvX = gradRows_;
  send.recvCapacity = static_cast<int64_t>(capacity_);
  send.flags = NCCL_MOE_KEEP_ROUTING;
  MOE_OK(ncclMoeDispatch(&send, routing_, moe_, stream_));

  const size_t nRows = offsets_[localExperts()];
  if (nRows > 0)
    weightBackwardKernel<<<blocksFor(nRows * 32), kThreads, 0, stream_>>>(expertOut_, rowWeights_, nRows, c_.hidden,
                                                                          gradRows_, gradRowWeights_);
  CUDA_OK(cudaGetLastError());
  CUDA_OK(cudaMemsetAsync(gradW1, 0, gradW1.size() * sizeof(float), stream_)); // experts without rows
  CUDA_OK(cudaMemsetAsync(gradW2, 0, gradW2.size() * sizeof(float), stream_));
  for (int l = 0; l < localExperts(); l++) {
    if (counts_[l] == 0) continue;
    const size_t at = offsets_[l], weights = static_cast<size_t>(l) * c_.hidden * c_.ffn;
    gemm(false, false, counts_[l], c_.ffn, c_.hidden, gradRows_ + at * c_.hidden, w2 + weights,
         gradActive_ + at * c_.ffn, CUDA_R_16BF, 0);
    gemm(true, false, c_.hidden, c_.ffn, counts_[l], gradRows_ + at * c_.hidden, active_ + at * c_.ffn,
         gradW2 + weights, CUDA_R_32F, 0);
  }
  if (nRows > 0)
    swigluBackwardKernel<<<blocksFor(nRows * c_.ffn), kThreads, 0, stream_>>>(inner_, gradActive_, nRows, c_.ffn,
                                                                              gradInner_);
  CUDA_OK(cudaGetLastError());
  bf16* gradExpertIn = expertOut_; // the outputs are not needed any more
  for (int l = 0; l < localExperts(); l++) {
    if (counts_[l] == 0) continue;
    const size_t at = offsets_[l], weights = static_cast<size_t>(l) * 2 * c_.ffn * c_.hidden;
    gemm(false, false, counts_[l], c_.hidden, 2 * c_.ffn, gradInner_ + at * 2 * c_.ffn, w1 + weights,
         gradExpertIn + at * c_.hidden, CUDA_R_16BF, 0);
    gemm(true, false, 2 * c_.ffn, c_.hidden, counts_[l], gradInner_ + at * 2 * c_.ffn, rows_ + at * c_.hidden,
         gradW1 + weights, CUDA_R_32F, 0);
  }

  ncclMoeCombineArgs_t back = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
  back.x = gradExpertIn;
  back.type = ncclBfloat16;
  back.hidden = c_.hidden;
  back.out = gradX;
  back.withGradWeights = 1;
  back.gradWeights = gradRowWeights_;
  back.gradTopkWeights = gradTopkWeights_;
  MOE_OK(ncclMoeCombine(&back, routing_, moe_, stream_));

  routeBackwardKernel<<<blocksFor(logits_.size()), kThreads, 0, stream_>>>(probs_, topkIdx, gradTopkWeights_, c_.tokens,
                                                                           c_.experts, c_.topK, gradLogits_);
  CUDA_OK(cudaGetLastError());
  gemm(false, false, c_.tokens, c_.hidden, c_.experts, gradLogits_, router, gradX, CUDA_R_16BF, 1);
  gemm(true, false, c_.experts, c_.hidden, c_.tokens, gradLogits_, x, gradRouter, CUDA_R_32F, 0);
  // Every rank has the router and other tokens; an expert has seen the tokens of all ranks already.
  NCCL_OK(ncclAllReduce(gradRouter, gradRouter, gradRouter.size(), ncclFloat32, ncclSum, comm_, stream_));
}

void MoeLayer::checkErrors() {
  CUDA_OK(cudaStreamSynchronize(stream_));
  ncclResult_t met = ncclSuccess;
  MOE_OK(ncclMoeCommGetAsyncError(moe_, &met));
  CHECK(met, ncclSuccess, ncclMoeGetLastError(moe_));
}
