// Exchanges for the tests of latency mode, and ranks to run them.
#pragma once

#include "gpu/gpu.h"

namespace moe::test {

// What stays the same in all exchanges of a routing.
struct DecodeShape {
  int nRanks = 2;
  int nTokens = 48; // at most; each rank has any number of them
  int topK = 4;
  int hidden = 512;
  ncclDataType_t type = ncclBfloat16;
  ncclMoeLayout_t layout = ncclMoeLayoutExpertPadded;
  int alignment = 1;
  ncclMoeQuant_t quant = ncclMoeQuantNone;
  ncclMoeScaleLayout_t scaleLayout = ncclMoeScaleRowMajor;
  int scaleBytes = 0;
  ncclDataType_t combineType = ncclBfloat16;
  bool combineCast = false; // sums travel as FP8
  bool exact = false;
  bool weighted = false; // combine
  bool withGrads = false;
  bool sparse = false;    // many tokens have one expert, or none
  bool likeEmpty = false; // much of the data looks like an empty packet of the latency kernels

  World world() const;
  ncclMoeRoutingConfig_t routing() const;
};
DecodeShape randomShape(uint64_t seed, int nRanks);

struct DecodeCase {
  std::unique_ptr<Reference> reference;
  CombineProblem combine;
};
DecodeCase makeDecode(uint64_t seed, const DecodeShape& shape);
// For a graph, which keeps the host's number of tokens, the capacity, and with that the places of column-major scales:
// as many rows as there can be.
DispatchStyle styleInGraph(const DecodeShape& shape, const DecodeCase& e, int rank);

// Runs ranks on the GPUs there are.  Those of one GPU leave room for each other and for what else a test runs.
struct DecodeRun {
  int nRanks = 2;
  RanksAs as = RanksAs::threads;
  ncclMoeMode_t mode = ncclMoeModeLatency;
  int numSms = 8; // of a kernel
  int timeoutMs = 10000;
  int timeLimitMs = 60000;
};
using DecodeBody = std::function<std::string(GpuRank& rank, Meeting& meeting)>;
std::vector<std::string> runDecodeRanks(const World& world, const DecodeRun& run, const DecodeBody& body);
std::string runDecode(const World& world, const DecodeRun& run, const DecodeBody& body);

class Stream {
 public:
  Stream() { cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; } // NOLINT: it is used like one

 private:
  cudaStream_t stream_ = nullptr;
};

} // namespace moe::test
