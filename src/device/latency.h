// The latency kernels' arguments and launchers.
#pragma once

#include "device/kernels.h"
#include "device/latency_layout.h"

namespace moe {

// A routing in latency mode as a kernel sees it.
struct LatencyView {
  CommView comm;
  LatencyLayout layout;
  char* peers[kMaxDeviceRanks]; // the routing's window at every rank
  int nLocal, firstPosition;    // this rank's experts
  int kind;                     // ncclMoeLayout_t
  int alignment;
  bool hostCounts;
  RoutingOutcome* outcome; // host memory
};

// Which halves of a call a kernel does.
struct LatencyHalves {
  bool send, receive;
};

struct LatencyDispatchArgs {
  LatencyView view;
  LatencyHalves halves;
  const char* x;
  int rowBytes;  // of x
  int wireBytes; // after the cast
  ncclMoeQuant_t quant;
  const void* topkIdx;
  bool idx64;
  bool keep;
  const float* topkWeights;
  const char* scales;
  int scaleBytes; // of recvScales
  bool columnMajor;
  long long rows; // leading dimension of column-major scales
  char* recvX;
  char* recvScales;
  int* recvTopkIdx;
  float* recvWeights;
  int* recvCount;
  int* expertCounts;
  int* expertOffsets;
  int nTokens;
  const int* nTokensDev;
  long long capacity;
  uint32_t signature;
};

struct LatencyCombineArgs {
  LatencyView view;
  LatencyHalves halves;
  const char* x;
  int rowBytes;
  ncclDataType_t type;
  bool exact;
  bool cast;     // sums travel as FP8
  int wireBytes; // of a row on its way
  const float* weights;
  const float* gradWeights;
  bool withGrads;
  char* out;
  float* gradTopkWeights;
  int nTokens; // at most so many
  uint32_t signature;
};

// The ranks that are not masked meet: none goes on before all have come.
struct MeetArgs {
  CommView comm;
  unsigned long long masked;
  unsigned long long value; // larger than at any earlier meeting
};

// As the other prepare functions.
cudaError_t prepareMeet();
cudaError_t launchMeet(const MeetArgs& args, cudaStream_t stream);
cudaError_t prepareLatencyDispatch();
cudaError_t prepareLatencyCombine();
// Shared memory that a dispatch takes.
size_t latencyShared(const LatencyLayout& layout, int nExperts, int nLocal);
// They take fewer blocks than maxSms where there is less to do.  overlap: see launchKernel.
cudaError_t launchLatencyDispatch(const LatencyDispatchArgs& args, int maxSms, cudaStream_t stream, bool overlap);
cudaError_t launchLatencyCombine(const LatencyCombineArgs& args, int maxSms, cudaStream_t stream, bool overlap);

} // namespace moe
