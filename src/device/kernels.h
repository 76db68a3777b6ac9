// What host code hands to the kernels, and their launchers.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "device/layout.h"
#include "nccl_moe.h"

namespace moe {

// A communicator as a kernel sees it.
struct CommView {
  int rank, nRanks, nExperts;
  CommLayout layout;
  char* self;              // this rank's communicator window
  char* const* windows;    // [kMaxWindows][nRanks] base of every window at every rank; window 0 is the communicator's
  const uint32_t* homes;   // [nExperts] expert id -> position in the order (rank, local expert) | rank << 16
  const int* positionRank; // [nExperts] rank of a position
  const int* rankStart;    // [nRanks+1] first position of a rank
  CommShared* shared;      // masks and statistics
  Failure* failure;        // host memory
  const volatile int* abortFlag; // host memory
  uint64_t timeoutNs;

  __device__ __forceinline__ char* peer(int r) const { return windows[r]; }
};

// A routing as a kernel sees it.
struct RoutingView {
  RoutingLayout layout;
  char* self; // this rank's window of it
  int window; // its number
  int kind;   // ncclMoeLayout_t
  int alignment;
  RoutingOutcome* outcome; // host memory

  __device__ __forceinline__ RoutingLayout::State* state() const {
    return reinterpret_cast<RoutingLayout::State*>(self + layout.state());
  }
  __device__ __forceinline__ RoutingLayout::PerRank* perRank() const {
    return reinterpret_cast<RoutingLayout::PerRank*>(self + layout.perRank);
  }
  __device__ __forceinline__ int* ints(size_t offset) const { return reinterpret_cast<int*>(self + offset); }
};

struct RouteArgs {
  CommView comm;
  RoutingView routing;
  const void* topkIdx;
  bool idx64;
  bool keep;
  int nTokens;
  const int* nTokensDev;
  int nTogether; // chunks that a block counts at a time; launchRoute sets it
  long long capacity;
  int recvWindow; // -1: recvX lies in no window
  long long recvOffset;
  int* recvCount;
  int* expertCounts;
  int* expertOffsets;
  uint32_t signature;
};

struct PushArgs {
  CommView comm;
  RoutingView routing;
  const char* x;
  int rowBytes;  // of x
  int wireBytes; // after the cast
  int hidden;
  ncclMoeQuant_t quant;
  const float* topkWeights;
  const char* scales;
  int scaleBytes; // on the wire
  bool columnMajor;
  long long rows; // leading dimension of column-major scales
  char* recvX;
  bool recvDirect; // peers write to recvX themselves
  char* recvScales;
  int* recvTopkIdx;
  float* recvWeights;
};

struct CombineArgs {
  CommView comm;
  RoutingView routing;
  const char* x;
  int rowBytes;
  ncclDataType_t type;
  const float* weights;
  const float* gradWeights;
  bool withGrads;
  bool exact;
  int firstToken, nTokens; // of every rank, that this pass brings back: all of them unless it is exact
  char* out;
  float* gradTopkWeights;
  uint32_t signature;
};

// Threads and dynamic shared memory of a kernel's blocks on the communicator's device.
struct BlockShape {
  int nThreads = 0, sharedBytes = 0;
};
// As many warps as the kernel was compiled for, or as find sharedPerWarp bytes each in a block that may have
// sharedBytes.
inline cudaError_t shapeKernel(const void* kernel, int sharedPerWarp, size_t sharedBytes, BlockShape* shape) {
  cudaFuncAttributes attributes;
  const cudaError_t result = cudaFuncGetAttributes(&attributes, kernel);
  if (result != cudaSuccess) return result;
  const int left = static_cast<int>(sharedBytes - attributes.sharedSizeBytes);
  const int nWarps = std::min(attributes.maxThreadsPerBlock / 32, left / sharedPerWarp);
  *shape = BlockShape{32 * nWarps, nWarps * sharedPerWarp};
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape->sharedBytes);
}
struct CombineShapes {
  BlockShape of[3][3]; // type and kind of combine
};

// Shared memory of a block that the route kernel needs.
size_t routeSharedNeeded(int nRanks, int nExperts);

// Before a communicator's first launch on its device, whose blocks may have so much shared memory.  It also loads the
// kernels: loading one at its first launch can wait for the device, and so for a kernel that waits for a peer.
cudaError_t prepareRoute(size_t sharedBytes);
// *overlaps: the code that is loaded waits in awaitKernelBefore.  Code made from PTX of an older architecture does not,
// on any device.
cudaError_t preparePush(bool* overlaps);
cudaError_t prepareCombine(size_t sharedBytes, CombineShapes* shapes);

// Only the launch's own error: cudaGetLastError would also give one that the caller's earlier calls left behind.
// overlap: the kernel begins with awaitKernelBefore, so its blocks may come while the kernel before it in the stream
// still runs.
template <class Args>
cudaError_t launchKernel(void (*kernel)(Args), int nBlocks, int nThreads, size_t sharedBytes, cudaStream_t stream,
                         const Args& args, bool overlap = false) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(nBlocks);
  config.blockDim = dim3(nThreads);
  config.dynamicSmemBytes = sharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}
cudaError_t launchRoute(RouteArgs args, int numSms, cudaStream_t stream);
cudaError_t launchPush(const PushArgs& args, int numSms, cudaStream_t stream, bool overlap);
cudaError_t launchCombine(const CombineArgs& args, const CombineShapes& shapes, int numSms, cudaStream_t stream);

} // namespace moe
