// The CUDA backend against the host backend, to the bit: the same calls on both, every combination of what the header
// lets a caller choose, on random shapes.
#include <gtest/gtest.h>

#include "gpu/gpu.h"

namespace moe::test {
namespace {

constexpr size_t kArenaBytes = size_t{48} << 20;
constexpr int kTimeLimitMs = 120000, kMostTopK = 16;

struct Case {
  World world;
  // They make the buffers; what is compared are the two backends.  Where there are scales, the same dispatch in either
  // of their layouts.
  std::vector<std::unique_ptr<Reference>> references;
  DispatchStyle style;
  std::vector<CombineProblem> combines; // after the first
  bool reachable = false;
};

// Draws until the drawn is wanted.
template <class Draw, class Wanted> auto drawUntil(const Draw& draw, const Wanted& wanted) {
  auto drawn = draw();
  while (!wanted(drawn)) drawn = draw();
  return drawn;
}

struct Format {
  ncclDataType_t type;
  ncclMoeQuant_t quant;
};
constexpr Format kFormats[] = {
  {ncclBfloat16, ncclMoeQuantNone}, {ncclBfloat16, ncclMoeQuantFp8}, {ncclBfloat16, ncclMoeQuantFp8Ue8m0},
  {ncclFloat16, ncclMoeQuantNone},  {ncclFloat32, ncclMoeQuantNone}, {ncclMoeFloat8e4m3, ncclMoeQuantNone},
};
constexpr ncclDataType_t kCombineTypes[] = {ncclBfloat16, ncclFloat16, ncclFloat32};

// All combinations of type, order of the sum, weights, gradients and cast that the layout takes.
std::vector<CombineProblem> everyCombine(Random& random, const World& world, const Reference& reference) {
  const bool rankMajor = reference.problem().layout == ncclMoeLayoutRankMajor;
  std::vector<CombineProblem> combines;
  for (const ncclDataType_t type : kCombineTypes) {
    for (int choice = 0; choice < 8; choice++) {
      const bool exact = (choice & 1) != 0, weighted = (choice & 2) != 0, grads = (choice & 4) != 0;
      if (rankMajor && (exact || weighted)) continue;
      combines.push_back(drawUntil([&] { return randomCombine(random, world, reference); },
                                   [&](const CombineProblem& c) {
                                     const bool castable = type != ncclBfloat16 || exact || mayBeCast(c);
                                     return castable && c.type == type && c.exact == exact && c.weighted == weighted &&
                                            c.withGradWeights == grads;
                                   }));
      if (!mayBeCast(combines.back())) continue;
      combines.push_back(combines.back());
      combines.back().cast = true;
    }
  }
  return combines;
}

// With scales by columns, which are of whole words and, in EXPERT_PADDED, in planes of whole words.
DispatchProblem byColumns(Random& random, DispatchProblem p) {
  const auto wholeWords = [](int n) { return (n + 3) / 4 * 4; };
  p.scaleLayout = ncclMoeScaleColumnMajor;
  p.maxTokens = wholeWords(p.maxTokens);
  p.scaleBytes = wholeWords(p.scaleBytes); // 0 with the cast
  for (Source& source : p.sources) {
    source.scales.resize(static_cast<size_t>(source.nTokens) * static_cast<size_t>(p.scaleBytes));
    for (uint8_t& byte : source.scales) byte = static_cast<uint8_t>(random());
  }
  return p;
}

World drawWorld(Random& random, int nRanks) {
  const int leastTopK = chance(random, 0.25) ? 9 : 1; // large ones are rare otherwise
  WorldLimits limits;
  limits.minRanks = limits.maxRanks = nRanks;
  limits.maxTokens = 60;
  limits.maxExperts = 48;
  World world =
    drawUntil([&] { return randomWorld(random, limits); },
              [&](const World& w) {
                return w.maxTokens >= 4 && w.maxTopK >= leastTopK && w.maxTopK <= kMostTopK && w.maxRowBytes >= 64;
              });
  world.maxTokens = (world.maxTokens + 3) / 4 * 4; // room for byColumns
  return world;
}

bool hasTokens(const DispatchProblem& p) {
  int nTokens = 0;
  for (const Source& source : p.sources) nTokens += source.nTokens;
  return nTokens > 0;
}

std::vector<Case> everyCase(Random& random, int nRanks) {
  std::vector<Case> cases;
  for (const ncclMoeLayout_t layout : {ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded}) {
    for (const Format& format : kFormats) {
      for (const bool weighted : {false, true}) {
        Case c;
        c.world = drawWorld(random, nRanks);
        DispatchProblem problem = drawUntil([&] { return randomDispatch(random, c.world); },
                                            [&](const DispatchProblem& p) {
                                              return p.layout == layout && p.type == format.type &&
                                                     p.quant == format.quant && p.weighted == weighted &&
                                                     p.scaleBytes <= 256 && hasTokens(p);
                                            });
        if (problem.wireScaleBytes() > 0) {
          problem.scaleLayout = ncclMoeScaleRowMajor;
          c.references.push_back(std::make_unique<Reference>(problem));
          problem = byColumns(random, problem);
        }
        c.references.push_back(std::make_unique<Reference>(problem));
        c.style = randomStyle(random);
        if (c.style.tokensDev) c.style.emptyNull = false;
        c.reachable = chance(random, 0.5);
        // Every combine after one dispatch of each layout, one after the others.
        if (format.type == ncclFloat16 && weighted) {
          c.combines = everyCombine(random, c.world, *c.references[0]);
        } else {
          c.combines.push_back(randomCombine(random, c.world, *c.references[0]));
        }
        cases.push_back(std::move(c));
      }
    }
  }
  return cases;
}

// A dispatch of the case, and its combines behind the first, on both backends; what they say is compared by the
// reference's comparison, which knows no more than which elements are NaNs.
std::string compareBackends(GpuRank& rank, ncclMoeComm_t host, ncclMoeMode_t mode, const Case& c, size_t n) {
  const Reference& reference = *c.references[n];
  const DispatchProblem& p = reference.problem();
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = p.topK;
  config.maxTokens = p.maxTokens;
  config.layout = p.layout;
  config.expertAlignment = p.expertAlignment;
  config.hostCounts = 1;
  ncclMoeRouting_t onGpu = nullptr, onHost = nullptr;
  RANK_OK(ncclMoeRoutingCreate(&onGpu, rank.comm(), &config), rank.comm());
  RANK_OK(ncclMoeRoutingCreate(&onHost, host, &config), host);
  DispatchCall gpuCall(reference, rank.rank(), c.style), hostCall(reference, rank.rank(), c.style);
  RANK_OK(ncclMoeDispatch(&hostCall.args(), onHost, host, nullptr), host);
  RANK_TRY(rank.upload(gpuCall, c.reachable));
  RANK_OK(ncclMoeDispatch(&gpuCall.args(), onGpu, rank.comm(), rank.stream()), rank.comm());
  RANK_CUDA(cudaStreamSynchronize(rank.stream()));
  RANK_TRY(rank.download());
  std::string wrong = compareDispatch(reference, rank.rank(), hostCall.image(), gpuCall.image());
  if (!wrong.empty()) return wrong + " in " + describe(p);
  int64_t gpuRows = -1, hostRows = -2;
  std::vector<int> gpuCounts(reference.delivery(rank.rank()).expertCounts.size()), hostCounts(gpuCounts.size(), -1);
  RANK_OK(ncclMoeRoutingGetCounts(onGpu, rank.comm(), &gpuRows, gpuCounts.data()), rank.comm());
  RANK_OK(ncclMoeRoutingGetCounts(onHost, host, &hostRows, hostCounts.data()), host);
  RANK_CHECK(gpuRows == hostRows && gpuCounts == hostCounts, "GetCounts differ: %lld rows, host %lld",
             static_cast<long long>(gpuRows), static_cast<long long>(hostRows));
  rank.forget();
  for (size_t i = 0; n == 0 && i < c.combines.size(); i++) {
    const CombineProblem& problem = c.combines[i];
    if (problem.cast && mode != ncclMoeModeLatency) continue;
    CombineCall gpuCombine(reference, problem, rank.rank(), c.style.emptyNull, 0),
      hostCombine(reference, problem, rank.rank(), c.style.emptyNull, 0);
    RANK_OK(ncclMoeCombine(&hostCombine.args(), onHost, host, nullptr), host);
    RANK_TRY(rank.upload(gpuCombine, false));
    RANK_OK(ncclMoeCombine(&gpuCombine.args(), onGpu, rank.comm(), rank.stream()), rank.comm());
    RANK_CUDA(cudaStreamSynchronize(rank.stream()));
    RANK_TRY(rank.download());
    wrong = compareCombine(reference, problem, rank.rank(), hostCombine.image(), gpuCombine.image());
    if (!wrong.empty()) return wrong + " in " + describe(problem) + " after " + describe(p);
    rank.forget();
  }
  ncclResult_t async = ncclSuccess;
  RANK_OK(ncclMoeCommGetAsyncError(rank.comm(), &async), rank.comm());
  RANK_CHECK(async == ncclSuccess, "%s", ncclMoeGetLastError(rank.comm()));
  RANK_OK(ncclMoeRoutingDestroy(onGpu, rank.comm()), rank.comm());
  RANK_OK(ncclMoeRoutingDestroy(onHost, host), host);
  return "";
}

class GpuOracle : public testing::TestWithParam<int> {};

TEST_P(GpuOracle, SaysWhatTheHostBackendSays) {
  NEED_GPUS(1);
  const int nRanks = GetParam(), nDevices = gpuCount();
  const uint64_t seed = testSeed();
  Random random(seed + static_cast<uint64_t>(nRanks));
  const std::vector<Case> cases = everyCase(random, nRanks);
  const TempDir directory;
  const std::string wrong =
    runGpu(nRanks, RanksAs::threads, kTimeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      for (size_t n = 0; n < 2 * cases.size(); n++) {
        const Case& c = cases[n / 2];
        ncclMoeConfig_t config = c.world.config();
        config.timeoutMs = 20000;
        config.numSms = 8;
        config.mode = n % 2 == 0 ? ncclMoeModeThroughput : ncclMoeModeLatency;
        ncclMoeComm_t host = nullptr;
        const std::string rendezvous = "file://" + directory.path() + "/" + std::to_string(n);
        RANK_OK(ncclMoeCommInitHost(&host, nRanks, r, rendezvous.c_str(), &config), nullptr);
        GpuRank rank(r, nRanks, r % nDevices);
        RANK_TRY(rank.init(config, meeting, kArenaBytes));
        std::string wrong;
        for (size_t i = 0; i < c.references.size() && wrong.empty(); i++) {
          wrong = compareBackends(rank, host, config.mode, c, i);
        }
        if (!wrong.empty()) return format("case %zu, %s: ", n, c.world.describe().c_str()) + wrong;
        RANK_TRY(rank.destroy());
        RANK_OK(ncclMoeCommDestroy(host), nullptr);
      }
      return "";
    });
  EXPECT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}
INSTANTIATE_TEST_SUITE_P(Ranks, GpuOracle, testing::Values(1, 2, 3, 5, 8));

} // namespace
} // namespace moe::test
