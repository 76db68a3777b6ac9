// A layer's decode step as a server with expert parallelism runs it, in latency mode, with a thread for each GPU:
//
//   dispatch, first half    rows leave, cast from BF16 to FP8
//   shared expert           which every token has, while the rows travel
//   dispatch, second half   the rows that came are where this rank's experts want them
//   experts                 here each multiplies its rows by a number
//   combine                 brings the experts' rows back to their tokens and sums them, weighted
//
// All of it is captured once in a CUDA graph, and replayed with other tokens, other experts and another number of
// tokens each time.  Every output is compared with a plain computation on the host; exit status 1 if one differs.
// docs/decoding.md says more.
//
//   decode_step [-g GPUS] [-n STEPS] [-s SEED]      0 or no -g: all GPUs
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <getopt.h>
#include <nccl_moe.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

// Ends the program where a call fails; a server would throw.
#define CHECK(call, good, sentence)                                                                                    \
  do {                                                                                                                 \
    const auto result_ = (call);                                                                                       \
    if (result_ != (good)) {                                                                                           \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, sentence);                                         \
      exit(2);                                                                                                         \
    }                                                                                                                  \
  } while (0)
#define CUDA_OK(call) CHECK(call, cudaSuccess, cudaGetErrorString(result_))
#define NCCL_OK(call) CHECK(call, ncclSuccess, ncclGetErrorString(result_))
#define MOE_OK(call) CHECK(call, ncclSuccess, ncclMoeGetLastError(nullptr))

namespace {

using bf16 = __nv_bfloat16;
using fp8 = __nv_fp8_e4m3;

constexpr int kMaxTokens = 64; // of a rank in a step
constexpr int kHidden = 1024;
constexpr int kTopK = 4;
constexpr int kLocalExperts = 8; // of a rank; by default the first rank has the first eight, and so on
constexpr int kScales = NCCL_MOE_QUANT_SCALE_BYTES(ncclMoeQuantFp8, kHidden) / sizeof(float); // of a row
constexpr int kThreads = 256;

// --------------------------------------------------------------------------------------------------- the model ----

// What an expert multiplies its rows by, 1 to 4; and the shared one.
__host__ __device__ float factorOf(int expert) { return 1.0f + (expert + expert / kLocalExperts) % 4; }
constexpr float kSharedFactor = 2.0f;

// Blocks y: the local experts.  The first counts[l] rows of expert l's plane of planeRows are there.
__global__ void expertsKernel(const fp8* rows, const float* scales, const int* counts, int planeRows, int firstExpert,
                              bf16* y) {
  const int l = blockIdx.y;
  const float factor = factorOf(firstExpert + l);
  for (int i = blockIdx.x; i < counts[l]; i += gridDim.x) {
    const size_t row = static_cast<size_t>(l) * planeRows + i;
    for (int h = threadIdx.x; h < kHidden; h += kThreads) {
      const float x = static_cast<float>(rows[row * kHidden + h]) * scales[row * kScales + h / NCCL_MOE_SCALE_BLOCK];
      y[row * kHidden + h] = __float2bfloat16(factor * x);
    }
  }
}

// A block for each token that there may be.
__global__ void sharedExpertKernel(const bf16* x, const int* nTokens, bf16* shared) {
  const int t = blockIdx.x;
  if (t >= *nTokens) return;
  for (int i = t * kHidden + threadIdx.x; i < (t + 1) * kHidden; i += kThreads) {
    shared[i] = __float2bfloat16(kSharedFactor * __bfloat162float(x[i]));
  }
}
__global__ void addKernel(const bf16* shared, const int* nTokens, bf16* out) {
  const int t = blockIdx.x;
  if (t >= *nTokens) return;
  for (int i = t * kHidden + threadIdx.x; i < (t + 1) * kHidden; i += kThreads) {
    out[i] = __float2bfloat16(__bfloat162float(out[i]) + __bfloat162float(shared[i]));
  }
}

// What a rank's step starts from, on the host and, one copy later, on the device.
struct Batch {
  alignas(16) bf16 x[kMaxTokens * kHidden]; // [T, H]
  int64_t experts[kMaxTokens * kTopK];      // [T, K], -1: none
  float weights[kMaxTokens * kTopK];        // [T, K]
  int nTokens;                              // T: only the first are sent
};

// Numbers that neither FP8 nor BF16 rounds, so that outputs can be compared exactly: whole ones up to 7, where each
// block has a 7, so that its scale is 7/448 = 1/64; weights of 1/2 and 1.  Sums come to 126 at most, a multiple of 1/2:
// BF16 has 8 bits.
Batch drawBatch(uint64_t seed, int step, int rank, int nExperts) {
  std::seed_seq words{seed, static_cast<uint64_t>(step), static_cast<uint64_t>(rank)};
  std::mt19937_64 random(words);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  Batch b{};
  for (int i = 0; i < kMaxTokens * kHidden; i++) {
    b.x[i] = __float2bfloat16(static_cast<float>(i % NCCL_MOE_SCALE_BLOCK == 0 ? 7 : below(15) - 7));
  }
  for (int i = 0; i < kMaxTokens * kTopK; i++) {
    int64_t* ofToken = b.experts + i / kTopK * kTopK;
    do { // a token names an expert once
      b.experts[i] = below(nExperts);
    } while (std::find(ofToken, b.experts + i, b.experts[i]) != b.experts + i);
    b.weights[i] = below(2) == 0 ? 0.5f : 1.0f;
  }
  for (int64_t& expert : b.experts) expert = below(8) == 0 ? -1 : expert;
  b.nTokens = step == 0 ? kMaxTokens : below(kMaxTokens + 1);
  return b;
}

int countWrong(const Batch& b, const std::vector<bf16>& out) {
  int wrong = 0;
  for (int i = 0; i < b.nTokens * kHidden; i++) {
    const int token = i / kHidden;
    float factor = kSharedFactor;
    for (int j = token * kTopK; j < (token + 1) * kTopK; j++) {
      if (b.experts[j] >= 0) factor += b.weights[j] * factorOf(static_cast<int>(b.experts[j]));
    }
    if (!(__bfloat162float(out[i]) == factor * __bfloat162float(b.x[i]))) wrong++;
  }
  return wrong;
}

// ------------------------------------------------------------------------------------------------------ a rank ----

// Zeroed memory of the current device.
template <typename T> std::shared_ptr<T> deviceArray(size_t n) {
  T* data = nullptr;
  CUDA_OK(cudaMalloc(&data, n * sizeof(T)));
  CUDA_OK(cudaMemset(data, 0, n * sizeof(T)));
  CUDA_OK(cudaStreamSynchronize(nullptr)); // other streams do not wait for it
  return {data, cudaFree};
}

// steps[s][rank]; nReady: where the ranks meet.  Whether all that this rank got is right.
bool runRank(int rank, int nRanks, ncclComm_t nccl, const std::vector<std::vector<Batch>>& steps,
             std::atomic<int>* nReady) {
  CUDA_OK(cudaSetDevice(rank));
  cudaStream_t stream = nullptr;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

  ncclMoeConfig_t config = NCCL_MOE_CONFIG_INITIALIZER;
  config.nExperts = nRanks * kLocalExperts;
  config.maxTokens = kMaxTokens;
  config.maxTopK = kTopK;
  config.maxRowBytes = kHidden * sizeof(bf16);
  config.mode = ncclMoeModeLatency;
  config.timeoutMs = 20000; // a kernel waits no longer for a peer
  ncclMoeComm_t moe = nullptr;
  MOE_OK(ncclMoeCommInit(&moe, nccl, &config));
  ncclMoeRoutingConfig_t layer = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  layer.topK = kTopK;
  layer.layout = ncclMoeLayoutExpertPadded;
  ncclMoeRouting_t routing = nullptr; // layers that run one after the other can share it
  MOE_OK(ncclMoeRoutingCreate(&routing, moe, &layer));

  // EXPERT_PADDED has room for every token of every rank at every expert.  To latency mode ncclMoeMemAlloc's memory is
  // as any other.
  const int planeRows = nRanks * kMaxTokens;
  const size_t rows = static_cast<size_t>(kLocalExperts) * planeRows;
  const auto in = deviceArray<Batch>(1);
  const auto received = deviceArray<fp8>(rows * kHidden);
  const auto scales = deviceArray<float>(rows * kScales), weights = deviceArray<float>(rows); // of the rows
  const auto counts = deviceArray<int>(kLocalExperts); // zeros: a dispatch that fails may leave them
  const auto y = deviceArray<bf16>(rows * kHidden);
  const auto shared = deviceArray<bf16>(kMaxTokens * kHidden), out = deviceArray<bf16>(kMaxTokens * kHidden);
  const int* nTokens = &in.get()->nTokens; // on the device

  ncclMoeDispatchArgs_t send = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  send.x = in.get()->x;
  send.type = ncclBfloat16;
  send.hidden = kHidden;
  send.nTokens = kMaxTokens; // at most; each replay reads how many there are
  send.nTokensDev = nTokens;
  send.topkIdx = in.get()->experts;
  send.topkIdxType = ncclInt64;
  send.topkWeights = in.get()->weights;
  send.quant = ncclMoeQuantFp8;
  send.recvX = received.get();
  send.recvScales = scales.get();
  send.recvWeights = weights.get();
  send.expertCounts = counts.get();
  send.flags = NCCL_MOE_SEND_ONLY;
  ncclMoeCombineArgs_t back = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
  back.x = y.get();
  back.type = ncclBfloat16;
  back.hidden = kHidden;
  back.weights = weights.get(); // those that came with the rows
  back.out = out.get();         // it could have halves as well, and send its sums as FP8 (back.quant)

  // Loads the kernels: at its first launch one might wait for the device, and so for a peer.
  cudaFuncAttributes attributes;
  CUDA_OK(cudaFuncGetAttributes(&attributes, expertsKernel));
  CUDA_OK(cudaFuncGetAttributes(&attributes, sharedExpertKernel));
  CUDA_OK(cudaFuncGetAttributes(&attributes, addKernel));

  // Every rank captures the same calls in the same order.
  cudaGraph_t captured = nullptr;
  cudaGraphExec_t graph = nullptr;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  MOE_OK(ncclMoeDispatch(&send, routing, moe, stream));
  sharedExpertKernel<<<kMaxTokens, kThreads, 0, stream>>>(in.get()->x, nTokens, shared.get());
  MOE_OK(ncclMoeComplete(routing, moe, stream)); // from here on rows, scales, weights and counts are there
  expertsKernel<<<dim3(16, kLocalExperts), kThreads, 0, stream>>>(received.get(), scales.get(), counts.get(), planeRows,
                                                                  rank * kLocalExperts, y.get());
  MOE_OK(ncclMoeCombine(&back, routing, moe, stream));
  addKernel<<<kMaxTokens, kThreads, 0, stream>>>(shared.get(), nTokens, out.get());
  CUDA_OK(cudaStreamEndCapture(stream, &captured));
  CUDA_OK(cudaGetLastError());
  CUDA_OK(cudaGraphInstantiate(&graph, captured, 0));
  CUDA_OK(cudaGraphDestroy(captured));
  CUDA_OK(cudaGraphUpload(graph, stream));
  CUDA_OK(cudaStreamSynchronize(stream));

  // All ranks are ready before the first step: what CUDA does to get ready may wait for kernels, and those wait for
  // peers.
  for (++*nReady; *nReady < nRanks;) std::this_thread::yield();

  bool fine = true;
  std::vector<bf16> got(kMaxTokens * kHidden);
  for (size_t s = 0; s < steps.size(); s++) {
    const Batch& batch = steps[s][rank];
    // In a model kernels write these.  A graph is ordered by the stream that it is launched on, and by nothing else.
    CUDA_OK(cudaMemcpyAsync(in.get(), &batch, sizeof(batch), cudaMemcpyHostToDevice, stream));
    CUDA_OK(cudaMemsetAsync(out.get(), 0xff, sizeof(bf16) * got.size(), stream)); // NaN: what is not written shows
    CUDA_OK(cudaGraphLaunch(graph, stream));
    // This ends also where a peer has not come, and without an error: the next call alone tells.
    CUDA_OK(cudaStreamSynchronize(stream));
    ncclResult_t met = ncclSuccess;
    MOE_OK(ncclMoeCommGetAsyncError(moe, &met));
    CHECK(met, ncclSuccess, ncclMoeGetLastError(moe));
    CUDA_OK(cudaMemcpy(got.data(), out.get(), sizeof(bf16) * got.size(), cudaMemcpyDeviceToHost));
    const int wrong = countWrong(batch, got);
    if (wrong > 0) fprintf(stderr, "rank %d, step %zu: %d elements are WRONG\n", rank, s, wrong);
    fine = fine && wrong == 0;
  }

  std::vector<uint64_t> waitNs(nRanks), had(kLocalExperts), want(kLocalExperts);
  ncclMoeCommStats_t stats = NCCL_MOE_COMM_STATS_INITIALIZER;
  stats.waitNs = waitNs.data();
  stats.expertTokens = had.data();
  MOE_OK(ncclMoeCommGetStats(moe, &stats));
  for (const std::vector<Batch>& step : steps) {
    for (const Batch& b : step) {
      for (int i = 0; i < b.nTokens * kTopK; i++) {
        if (b.experts[i] >= 0 && b.experts[i] / kLocalExperts == rank) want[b.experts[i] % kLocalExperts]++;
      }
    }
  }
  std::string line = "rank " + std::to_string(rank) + ": tokens of each expert";
  for (const uint64_t n : had) line += " " + std::to_string(n);
  line += had == want ? "; us of waiting for each rank" : " are WRONG; us of waiting for each rank";
  for (const uint64_t ns : waitNs) line += " " + std::to_string(ns / 1000);
  printf("%s\n", line.c_str());

  CUDA_OK(cudaGraphExecDestroy(graph));
  MOE_OK(ncclMoeCommDestroy(moe)); // with its routing
  CUDA_OK(cudaStreamDestroy(stream));
  return fine && had == want;
}

} // namespace

int main(int argc, char** argv) {
  int nRanks = 0, nSteps = 20, nGpus = 0;
  uint64_t seed = 1;
  for (int opt; (opt = getopt(argc, argv, "g:n:s:")) != -1;) {
    if (opt == 'g') nRanks = atoi(optarg);
    if (opt == 'n') nSteps = atoi(optarg);
    if (opt == 's') seed = strtoull(optarg, nullptr, 10);
    if (opt == '?') nSteps = 0;
  }
  CUDA_OK(cudaGetDeviceCount(&nGpus));
  if (nRanks == 0) nRanks = nGpus;
  if (nRanks < 1 || nRanks > nGpus || nSteps < 1) {
    fprintf(stderr, "usage: decode_step [-g GPUS] [-n STEPS] [-s SEED], where there are %d GPUs\n", nGpus);
    return 2;
  }
  std::vector<std::vector<Batch>> steps(nSteps);
  for (int s = 0; s < nSteps; s++) {
    for (int r = 0; r < nRanks; r++) steps[s].push_back(drawBatch(seed, s, r, nRanks * kLocalExperts));
  }

  // One process with a thread for each GPU.  Processes would share a ncclUniqueId, call ncclCommInitRank, and meet
  // otherwise; nothing else differs.
  std::vector<ncclComm_t> comms(nRanks);
  NCCL_OK(ncclCommInitAll(comms.data(), nRanks, nullptr));
  std::vector<int> fine(nRanks);
  std::atomic<int> nReady{0};
  std::vector<std::thread> threads;
  for (int r = 0; r < nRanks; r++)
    threads.emplace_back([&, r] { fine[r] = runRank(r, nRanks, comms[r], steps, &nReady) ? 1 : 0; });
  for (std::thread& t : threads) t.join();
  for (const ncclComm_t comm : comms) NCCL_OK(ncclCommDestroy(comm));

  const bool right = std::count(fine.begin(), fine.end(), 1) == nRanks;
  printf("%d steps on %d GPUs, seed %llu: %s\n", nSteps, nRanks, static_cast<unsigned long long>(seed),
         right ? "every output is right" : "outputs are WRONG");
  return right ? 0 : 1;
}
