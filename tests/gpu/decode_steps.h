// Decode steps that a GPU makes up and checks by itself, so that thousands of them run without the host looking.
//
// Everything about a step follows from (seed, step, rank): the number of tokens, the selections, the weights, the rows,
// and what an expert makes of a token's row, the same whichever it is.  So every rank knows what it must receive and
// what it must get back.
// One in eight packets of a row, and of the weights, looks like an empty packet of the latency kernels.  Where sums are
// cast, what experts return looks so after the cast, if the weights' sum is positive.
//
// The kernels that make a call's inputs let the call's kernel begin before they store anything: one that did not wait
// for them would send what the step before left there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "nccl_moe.h"

namespace moe::test {

constexpr int kMaxStepTopK = 16;

// What dispatch does to the rows, BF16 or FP16 ones without a cast, and how the scales of a cast lie; and what combine
// does beside adding.
struct StepFormat {
  ncclDataType_t type = ncclBfloat16;
  ncclMoeQuant_t quant = ncclMoeQuantNone;
  ncclMoeScaleLayout_t scaleLayout = ncclMoeScaleRowMajor;
  bool castSums = false;  // sums travel as FP8: BF16, and latency mode, only
  bool withGrads = false; // the weights go back as their own gradients
};

struct StepFault {
  unsigned count;              // of wrong things
  int step, round, what, a, b; // the first
};
const char* describeFault(const StepFault& fault, char* text, int bytes);

// On one rank; pointers are device memory.
struct Steps {
  uint64_t seed;
  int rank, nRanks, nExperts, nLocal; // experts of all ranks, of this one
  int topK, maxTokens, hidden;        // at most 32768
  StepFormat format;
  ncclMoeLayout_t layout;
  int alignment;
  int maxDelayNs; // before each dispatch and before each combine
  // 1: the step's second dispatch and combine, of other rows and weights with the routing kept.  topkIdx is spoilt.
  int round;
  // State.
  unsigned* step;
  StepFault* fault;
  int2* experts; // [nExperts] each one's rank and its number there, which the host sets
  // Tensors of the calls.
  int* nTokens;
  int64_t* topkIdx;
  float* topkWeights;
  uint4* x;
  uint4* recvX;
  uint32_t* recvScales; // with a cast
  uint4* y;             // what the experts return: in place of recvX, unless cast
  float* recvWeights;
  int* recvTopkIdx;
  int* recvCount;
  int* expertCounts;
  int* expertOffsets;
  uint4* out;
  float* gradTopkWeights; // with gradients

  __host__ __device__ long long rows() const; // of recvX
  __host__ __device__ int weightsOfRow() const { return layout == ncclMoeLayoutRankMajor ? topK : 1; }
  __host__ __device__ bool cast() const { return format.quant != ncclMoeQuantNone; }
  __host__ __device__ int packetsOfRow() const { return hidden / (cast() ? 16 : 8); }
  // Words of a row's scales: FP32, or four exponents each.
  __host__ __device__ int scaleWords() const {
    const int perWord = format.quant == ncclMoeQuantFp8Ue8m0 ? 4 : 1;
    return (hidden + 128 * perWord - 1) / (128 * perWord);
  }
  // All tensors and the state from one piece of device memory, which may be NULL to learn its size.
  size_t place(char* memory);
  ncclMoeDispatchArgs_t dispatchArgs() const;
  ncclMoeCombineArgs_t combineArgs() const;
};

// Enqueued in this order around the calls of every step, and of its second round where it has one.
cudaError_t drawStep(const Steps& steps, cudaStream_t stream); // before dispatch: the next step, or its second round
cudaError_t checkDispatch(const Steps& steps, cudaStream_t stream); // behind dispatch; then the experts do their work
cudaError_t checkCombine(const Steps& steps, cudaStream_t stream);  // behind combine
// Loads the kernels: at its first launch one may wait for another rank's that runs.
cudaError_t loadStepKernels();

} // namespace moe::test
