// A mixture-of-experts layer as Megatron has it, forward and backward, with its experts spread over the ranks of an
// NCCL communicator (expert parallelism).  Every rank has tokens of its own, a copy of the router, and L of the E
// experts.
//
//   p = softmax(x Wr^T);  of each token the K experts with the largest p are selected
//   out = sum over the selected experts e of  p_e * expert_e(x)
//   expert_e(x) = (silu(x Wgate^T) * (x Wup^T)) Wdown^T,  W1 = Wgate above Wup,  W2 = Wdown
#pragma once

#include "support.h"

struct LayerConfig {
  int tokens = 128;   // T, of each rank and call
  int hidden = 256;   // H, a multiple of 8
  int ffn = 128;      // F, an expert's inner width
  int experts = 16;   // E, of all ranks
  int topK = 4;       // K
  int alignment = 16; // an expert's first row is a multiple of this, which GEMM kernels like
};

class MoeLayer {
 public:
  // comm: one rank for each GPU, whether threads or processes.  All ranks construct, call and destroy together.
  MoeLayer(const LayerConfig& config, ncclComm_t comm, cudaStream_t stream);
  ~MoeLayer();
  MoeLayer(const MoeLayer&) = delete;
  MoeLayer& operator=(const MoeLayer&) = delete;

  // The work is enqueued on the stream.  The host waits once in forward, for the number of rows of each expert.
  void forward(bf16* x, bf16* out);                   // [T, H] both
  void backward(bf16* x, bf16* gradOut, bf16* gradX); // of the forward before it
  int localExperts() const { return info_.nLocalExperts; }
  void checkErrors(); // waits for the stream; ends the program if the collectives met an error on the device

 private:
  static ncclMoeComm_t makeComm(const LayerConfig& config, ncclComm_t comm);
  static ncclMoeCommInfo_t infoOf(ncclMoeComm_t moe);
  bf16* reachable();
  void gemm(bool transA, bool transB, int m, int n, int k, bf16* a, bf16* b, void* c, cudaDataType cType, float beta);

  const LayerConfig c_;
  ncclComm_t comm_;
  cudaStream_t stream_;
  cublasHandle_t cublas_ = nullptr;
  ncclMoeComm_t moe_;
  const ncclMoeCommInfo_t info_;
  ncclMoeRouting_t routing_ = nullptr;
  const size_t capacity_; // rows that this rank can receive

  DeviceArray<float> logits_, probs_;                // [T, E]
  DeviceArray<float> topkWeights_, gradTopkWeights_; // [T, K]
  DeviceArray<bf16> gradLogits_;                     // [T, E]
  // Of the rows at their experts, [capacity, ...].
  bf16 *rows_, *expertOut_, *gradRows_;            // H, in memory that dispatch and combine reach without a copy
  DeviceArray<float> rowWeights_, gradRowWeights_; // 1
  DeviceArray<bf16> inner_, gradInner_;            // 2F: gate and up
  DeviceArray<bf16> active_, gradActive_;          // F
  std::vector<int> counts_, offsets_;              // [L] rows of each expert, and its first

 public:
  DeviceArray<int64_t> topkIdx;  // [T, K], of the last forward
  DeviceArray<bf16> router;      // Wr [E, H]
  DeviceArray<bf16> w1, w2;      // [L, 2F, H] and [L, H, F]
  DeviceArray<float> gradRouter; // of all ranks' tokens
  DeviceArray<float> gradW1, gradW2;
};
