// Decode steps that a GPU makes up and checks by itself, so that thousands of them run without the host looking.
//
// Everything about a step follows from (seed, step, rank): the number of tokens, the selections, the weights, the rows.  So every
// rank knows what it must receive from all others.  Experts are copies, so a rank also knows what it must get back.
// One in eight packets of a row, and of the weights, looks like an empty packet of the latency kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "nccl_moe.h"

namespace moe::test {

constexpr int kStepTopK = 4;

struct StepFault {
  unsigned count;       // of wrong things
  int step, what, a, b; // the first
};
const char* describeFault(const StepFault& fault, char* text, int bytes);

// On one rank; pointers are device memory.
struct Steps {
  uint64_t seed;
  int rank, nRanks, nLocal; // experts of each rank, in blocks
  int maxTokens, hidden;    // BF16
  bool cast;                // dispatch makes them FP8; experts give back the rows as they were
  ncclMoeLayout_t layout;
  int alignment;
  int maxDelayNs; // before each step's dispatch and before its combine
  // State.
  unsigned* step;
  StepFault* fault;
  // Tensors of the calls.
  int* nTokens;
  int64_t* topkIdx;
  float* topkWeights;
  uint4* x;
  uint4* recvX;
  float* recvScales; // with the cast
  uint4* y;          // what the experts return: recvX, unless cast
  float* recvWeights;
  int* recvTopkIdx;
  int* recvCount;
  int* expertCounts;
  int* expertOffsets;
  uint4* out;

  __host__ __device__ long long rows() const; // of recvX
  __host__ __device__ int packetsOfRow() const { return hidden / (cast ? 16 : 8); }
  __host__ __device__ int scalesOfRow() const { return (hidden + 127) / 128; }
  // All tensors and the state from one piece of device memory, which may be NULL to learn its size.
  size_t place(char* memory);
  ncclMoeDispatchArgs_t dispatchArgs() const;
  ncclMoeCombineArgs_t combineArgs() const;
};

// Enqueued in this order around the calls of every step.
cudaError_t drawStep(const Steps& steps, cudaStream_t stream);      // before dispatch: the next step
cudaError_t checkDispatch(const Steps& steps, cudaStream_t stream); // behind dispatch
cudaError_t checkCombine(const Steps& steps, cudaStream_t stream);  // behind combine
// Loads the kernels: at its first launch one may wait for another rank's that runs.
cudaError_t loadStepKernels();

} // namespace moe::test
