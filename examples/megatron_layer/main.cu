// Runs the layer of moe_layer.h on every GPU of this machine, a thread for each, and compares output and gradients with
// the same layer computed without parallelism (reference.h).  Exit status 1 if they differ.
//
//   megatron_layer [-g GPUS] [-t TOKENS] [-e EXPERTS] [-k TOPK] [-s SEED]      0 or no -g: all GPUs
#include <getopt.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "moe_layer.h"
#include "reference.h"

namespace {

constexpr int kSteps = 2; // the second has other tokens, and uses everything again

// n numbers of that standard deviation that BF16 holds exactly, so that layer and reference start from the same.
std::vector<float> randomNumbers(std::mt19937_64& random, size_t n, double deviation) {
  std::normal_distribution<double> normal(0, deviation);
  std::vector<float> values(n);
  for (float& v : values) v = __bfloat162float(__float2bfloat16(static_cast<float>(normal(random))));
  return values;
}

std::vector<bf16> toBf16(const float* values, size_t n) {
  std::vector<bf16> rounded(n);
  for (size_t i = 0; i < n; i++) rounded[i] = __float2bfloat16(values[i]);
  return rounded;
}

// Tokens and weights of all ranks together.
Problem randomProblem(const LayerConfig& c, int nRanks, uint64_t seed) {
  std::mt19937_64 random(seed);
  Problem p{nRanks * c.tokens, c.hidden, c.ffn, c.experts, c.topK, {}, {}, {}, {}, {}};
  const size_t expert = static_cast<size_t>(c.experts) * c.ffn * c.hidden;
  p.router = randomNumbers(random, static_cast<size_t>(c.experts) * c.hidden, 1 / std::sqrt(c.hidden));
  p.w1 = randomNumbers(random, 2 * expert, 1 / std::sqrt(c.hidden));
  p.w2 = randomNumbers(random, expert, 1 / std::sqrt(c.ffn));
  return p;
}

void drawTokens(Problem* p, uint64_t seed) {
  std::mt19937_64 random(seed);
  const size_t n = static_cast<size_t>(p->tokens) * p->hidden;
  p->x = randomNumbers(random, n, 1);
  p->gradOut = randomNumbers(random, n, 1);
}

// What the ranks computed in one step, put together as the reference has it.
struct Got {
  std::vector<int64_t> topkIdx;
  std::vector<bf16> out, gradX;
  std::vector<std::vector<float>> gradRouter; // of each rank: all have the sum
  std::vector<float> gradW1, gradW2;
};

// data's place is that of the rank in the whole: ranks come in order, and experts are placed in blocks.
template <typename T> void put(const std::vector<T>& data, size_t first, std::vector<T>* whole) {
  std::copy(data.begin(), data.end(), whole->begin() + static_cast<ptrdiff_t>(first));
}

void runRank(const LayerConfig& c, int rank, int nRanks, ncclComm_t comm, const std::vector<Problem>& steps,
             std::vector<Got>* got) {
  CUDA_OK(cudaSetDevice(rank));
  cudaStream_t stream = nullptr;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  {
    MoeLayer layer(c, comm, stream);
    const size_t firstExpert = static_cast<size_t>(rank) * (c.experts / nRanks) + std::min(rank, c.experts % nRanks);
    const size_t firstW2 = firstExpert * c.ffn * c.hidden, firstX = static_cast<size_t>(rank) * c.tokens * c.hidden;
    const Problem& p = steps[0];
    layer.router.copyFrom(toBf16(p.router.data(), layer.router.size()).data());
    layer.w1.copyFrom(toBf16(p.w1.data() + 2 * firstW2, layer.w1.size()).data());
    layer.w2.copyFrom(toBf16(p.w2.data() + firstW2, layer.w2.size()).data());
    const size_t n = static_cast<size_t>(c.tokens) * c.hidden;
    DeviceArray<bf16> x(n), out(n), gradOut(n), gradX(n);
    for (int step = 0; step < kSteps; step++) {
      x.copyFrom(toBf16(steps[step].x.data() + firstX, n).data());
      gradOut.copyFrom(toBf16(steps[step].gradOut.data() + firstX, n).data());
      layer.forward(x, out);
      layer.backward(x, gradOut, gradX);
      layer.checkErrors();
      Got& g = (*got)[step];
      put(layer.topkIdx.toHost(), static_cast<size_t>(rank) * c.tokens * c.topK, &g.topkIdx);
      put(out.toHost(), firstX, &g.out);
      put(gradX.toHost(), firstX, &g.gradX);
      g.gradRouter[rank] = layer.gradRouter.toHost();
      put(layer.gradW1.toHost(), 2 * firstW2, &g.gradW1);
      put(layer.gradW2.toHost(), firstW2, &g.gradW2);
    }
  }
  CUDA_OK(cudaStreamDestroy(stream));
}

// The layer rounds to BF16, half a unit being 2^-9 = 0.2 %, after each GEMM, activation and collective: five to seven
// times on the way to an element.  These errors are independent and as large as the row (of a token; of an expert's
// gradient, and the router's, the whole matrix) is, however small the one element: an element's error is compared with
// its size plus the row's root mean square.  (An expert's row of the router's gradient is a difference of its tokens'
// dot products, which may nearly cancel while their errors do not: of experts with one token, every thirtieth or so
// comes to less than a fiftieth of the others.)  So measured, errors of correct arithmetic have a root mean square of
// 0.3 %, and the largest of some hundred thousand comes to 2 to 4 %, as products of normally distributed numbers have
// long tails.
constexpr double kTolerance = 0.08, kMeanTolerance = 0.01;

double valueOf(float v) { return v; }
double valueOf(bf16 v) { return __bfloat162float(v); }

template <typename T>
bool compare(const char* name, const std::vector<T>& got, const std::vector<double>& want, size_t rowSize) {
  double worst = 0, squaredErrors = 0;
  size_t where = 0;
  for (size_t row = 0; row < want.size(); row += rowSize) {
    double squares = 0;
    for (size_t i = row; i < row + rowSize; i++) squares += want[i] * want[i];
    const double scale =
      std::sqrt(squares / static_cast<double>(rowSize)) + 1e-30; // an expert without tokens: exactly 0
    for (size_t i = row; i < row + rowSize; i++) {
      const double error = std::fabs(valueOf(got[i]) - want[i]) / (scale + std::fabs(want[i]));
      squaredErrors += error * error;
      if (!(error <= worst)) worst = error, where = i; // also where it is not a number
    }
  }
  const double mean = std::sqrt(squaredErrors / static_cast<double>(want.size()));
  const bool fine = worst <= kTolerance && mean <= kMeanTolerance;
  printf("  %-26s errors: largest %.4f, root mean square %.4f%s\n", name, worst, mean, fine ? "" : "  WRONG");
  if (!fine) printf("    element %zu is %g instead of %g\n", where, valueOf(got[where]), want[where]);
  return fine;
}

bool check(const LayerConfig& c, const Problem& p, const Got& got) {
  Answer want;
  if (!solve(p, got.topkIdx, &want)) return false;
  const size_t hidden = c.hidden, expert = hidden * c.ffn;
  bool fine = compare("output", got.out, want.out, hidden);
  fine = compare("gradient of the tokens", got.gradX, want.gradX, hidden) && fine;
  for (size_t r = 0; r < got.gradRouter.size(); r++) {
    const std::string name = "gradient of the router, " + std::to_string(r);
    fine = compare(name.c_str(), got.gradRouter[r], want.gradRouter, want.gradRouter.size()) && fine;
  }
  fine = compare("gradient of W1", got.gradW1, want.gradW1, 2 * expert) && fine;
  return compare("gradient of W2", got.gradW2, want.gradW2, expert) && fine;
}

} // namespace

int main(int argc, char** argv) {
  LayerConfig c;
  int nRanks = 0, opt = 0;
  uint64_t seed = 1;
  while ((opt = getopt(argc, argv, "g:t:e:k:s:")) != -1) {
    switch (opt) {
    case 'g':
      nRanks = atoi(optarg);
      break;
    case 't':
      c.tokens = atoi(optarg);
      break;
    case 'e':
      c.experts = atoi(optarg);
      break;
    case 'k':
      c.topK = atoi(optarg);
      break;
    case 's':
      seed = strtoull(optarg, nullptr, 10);
      break;
    default:
      fprintf(stderr, "usage: megatron_layer [-g GPUS] [-t TOKENS] [-e EXPERTS] [-k TOPK] [-s SEED]\n");
      return 2;
    }
  }
  int nGpus = 0;
  CUDA_OK(cudaGetDeviceCount(&nGpus));
  if (nRanks == 0) nRanks = nGpus;
  if (nRanks < 1 || nRanks > nGpus || c.tokens < 1 || c.topK < 1 || c.topK > c.experts) {
    fprintf(stderr, "megatron_layer: %d ranks need as many GPUs (there are %d), and %d of %d experts can be chosen\n",
            nRanks, nGpus, c.topK, c.experts);
    return 2;
  }

  std::vector<Problem> steps(kSteps, randomProblem(c, nRanks, seed));
  const size_t tokens = static_cast<size_t>(nRanks) * c.tokens, rows = tokens * c.hidden;
  std::vector<Got> got(kSteps);
  for (int step = 0; step < kSteps; step++) {
    drawTokens(&steps[step], seed * 1000 + step + 1);
    got[step] = Got{std::vector<int64_t>(tokens * c.topK),
                    std::vector<bf16>(rows),
                    std::vector<bf16>(rows),
                    std::vector<std::vector<float>>(nRanks),
                    std::vector<float>(steps[step].w1.size(), NAN),
                    std::vector<float>(steps[step].w2.size(), NAN)};
  }

  // One process with a thread for each GPU.  Processes would share a ncclUniqueId and call ncclCommInitRank; nothing
  // else differs.
  std::vector<ncclComm_t> comms(nRanks);
  NCCL_OK(ncclCommInitAll(comms.data(), nRanks, nullptr));
  std::vector<std::thread> threads;
  for (int r = 0; r < nRanks; r++) threads.emplace_back([&, r] { runRank(c, r, nRanks, comms[r], steps, &got); });
  for (std::thread& t : threads) t.join();
  for (const ncclComm_t comm : comms) NCCL_OK(ncclCommDestroy(comm));

  bool fine = true;
  for (int step = 0; step < kSteps; step++) {
    printf("step %d: %d tokens on %d GPUs, %d of %d experts for each, seed %llu\n", step, nRanks * c.tokens, nRanks,
           c.topK, c.experts, static_cast<unsigned long long>(seed));
    fine = check(c, steps[step], got[step]) && fine;
  }
  printf("%s\n", fine ? "the layer is right" : "the layer is WRONG");
  return fine ? 0 : 1;
}
