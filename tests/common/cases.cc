#include "common/cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "common/cluster.h"

namespace moe::test {
namespace {

// Bounds the work of a case: rows times elements, of all ranks.
constexpr int64_t kElements = kSanitized ? 60000 : 250000;
constexpr int64_t kPaddedBytes = kSanitized ? 4 << 20 : 12 << 20;

// Small numbers are the common ones, large ones must come too.
int pickSkewed(Random& random, int low, int high) {
  const double u = std::uniform_real_distribution<double>(0, 1)(random);
  const int span = high - low;
  return low + static_cast<int>(std::lround(span * u * u * u));
}

int unit(ncclDataType_t type, bool cast) { return cast ? 16 : static_cast<int>(16 / elementBytes(type)); }

// An H that is allowed and keeps rows * H within the budget.
int pickHidden(Random& random, const World& world, ncclDataType_t type, bool cast, int64_t rows) {
  const int step = unit(type, cast);
  const int64_t fits = static_cast<int64_t>(world.maxRowBytes / elementBytes(type));
  const int64_t budget = kElements / std::max<int64_t>(rows, 1);
  const int64_t most = std::max<int64_t>(1, std::min(fits, budget) / step);
  if (fits < step) return 0;
  return step * pick(random, 1, static_cast<int>(most));
}

} // namespace

int pick(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

bool chance(Random& random, double probability) {
  return std::uniform_real_distribution<double>(0, 1)(random) < probability;
}

std::string World::describe() const {
  return format("R %d, E %d%s, maxTokens %d, maxTopK %d, maxRowBytes %zu", nRanks, nExperts,
                explicitMap ? " (explicit map)" : "", maxTokens, maxTopK, maxRowBytes);
}

ncclMoeConfig_t World::config() const {
  ncclMoeConfig_t config = makeConfig(nExperts, maxTokens, maxTopK, maxRowBytes);
  if (explicitMap) config.expertToRank = expertToRank.data();
  return config;
}

World randomWorld(Random& random, const WorldLimits& limits) {
  World world;
  world.nRanks = chance(random, 0.3) ? pick(random, limits.minRanks, limits.maxRanks)
                                     : pickSkewed(random, limits.minRanks, limits.maxRanks);
  world.nExperts = pickSkewed(random, 1, limits.maxExperts);
  world.maxTokens = pickSkewed(random, 0, limits.maxTokens);
  // More selections than experts are legal: the rest is -1.
  world.maxTopK =
    pickSkewed(random, 1, chance(random, 0.1) ? NCCL_MOE_MAX_TOPK : std::min(NCCL_MOE_MAX_TOPK, world.nExperts));
  world.maxRowBytes = size_t{16} * pickSkewed(random, 1, 256);
  world.explicitMap = chance(random, 0.4);
  world.expertToRank = blockPlacement(world.nExperts, world.nRanks);
  if (world.explicitMap) {
    for (int& rank : world.expertToRank) rank = pick(random, 0, world.nRanks - 1);
  }
  return world;
}

void fillElements(Random& random, ncclDataType_t type, bool wild, bool infinities, uint8_t* data, size_t count) {
  std::normal_distribution<float> normal(0.0f, 2.0f);
  for (size_t i = 0; i < count; i++) {
    double value = normal(random);
    if (type == ncclMoeFloat8e4m3) {
      data[i] = static_cast<uint8_t>(random());
      continue;
    }
    if (wild && chance(random, 0.2)) {
      const int kind = pick(random, 0, 7);
      if (kind == 0) value = 0.0;
      if (kind == 1) value = -0.0;
      if (kind == 2) value = std::ldexp(value, 120);
      if (kind == 3) value = std::ldexp(value, -130);
      if (kind == 4) value = std::ldexp(value, 14);
      if (kind == 5) value = std::ldexp(value, -70);
      if (kind == 6 && chance(random, 0.1)) value = std::numeric_limits<double>::quiet_NaN();
      if (kind == 7 && infinities && chance(random, 0.1)) value = std::numeric_limits<double>::infinity();
    }
    storeElement(type, value, data + i * elementBytes(type));
  }
}

void fillSelections(Random& random, const World& world, Selections selections, int topK, Source* source) {
  const int nExperts = world.nExperts;
  std::vector<int> order(static_cast<size_t>(nExperts));
  std::iota(order.begin(), order.end(), 0);
  source->topkIdx.assign(static_cast<size_t>(source->nTokens) * static_cast<size_t>(topK), -1);
  if (selections == Selections::none) return;
  const int hotRank = pick(random, 0, world.nRanks - 1);
  const int nGroups = pick(random, 1, std::min(8, nExperts));
  const int groupSize = (nExperts + nGroups - 1) / nGroups;
  for (int t = 0; t < source->nTokens; t++) {
    // A random group or two, or a rank, is all that a token of the limited kinds may choose from.
    const int groupA = pick(random, 0, nGroups - 1);
    const int groupB = pick(random, 0, nGroups - 1);
    for (int k = 0, from = 0; k < topK; k++) {
      int expert = -1;
      while (from < nExperts && expert < 0) {
        std::swap(order[from], order[pick(random, from, nExperts - 1)]);
        const int candidate = order[from++];
        const int group = candidate / groupSize;
        if (selections == Selections::groupLimited && group != groupA && group != groupB) continue;
        if (selections == Selections::oneRank && world.expertToRank[candidate] != hotRank) continue;
        expert = candidate;
      }
      if (selections == Selections::sparse && chance(random, 0.6)) expert = -1;
      source->topkIdx[t * topK + k] = expert;
    }
  }
}

DispatchProblem randomDispatch(Random& random, const World& world, const DispatchProblem* kept) {
  DispatchProblem p;
  p.nRanks = world.nRanks;
  p.nExperts = world.nExperts;
  p.expertToRank = world.expertToRank;
  p.sources.resize(static_cast<size_t>(world.nRanks));
  if (kept != nullptr) {
    p.topK = kept->topK;
    p.maxTokens = kept->maxTokens;
    p.layout = kept->layout;
    p.expertAlignment = kept->expertAlignment;
  } else {
    p.topK = chance(random, 0.5) ? world.maxTopK : pick(random, 1, world.maxTopK);
    p.layout = static_cast<ncclMoeLayout_t>(pick(random, 0, 2));
    p.maxTokens = chance(random, 0.5) ? world.maxTokens : pick(random, 0, world.maxTokens);
    if (p.layout == ncclMoeLayoutExpertPadded) {
      const int64_t most = kPaddedBytes / (int64_t{16} * p.nExperts * p.nRanks);
      p.maxTokens = static_cast<int>(std::min<int64_t>(p.maxTokens, most));
    }
    if (p.maxTokens == 0) p.maxTokens = std::min(1, world.maxTokens); // 0 would mean the world's
    if (p.layout == ncclMoeLayoutExpertMajor && chance(random, 0.6)) p.expertAlignment = pick(random, 1, 40);
  }
  int64_t rows = 1;
  for (size_t s = 0; s < p.sources.size(); s++) {
    Source& source = p.sources[s];
    source.nTokens = kept != nullptr       ? kept->sources[s].nTokens
                     : chance(random, 0.2) ? 0
                     : chance(random, 0.2) ? p.maxTokens
                                           : pick(random, 0, p.maxTokens);
    rows += static_cast<int64_t>(source.nTokens) * p.topK;
  }
  if (p.layout == ncclMoeLayoutExpertPadded) {
    rows = std::max(rows, int64_t{p.nExperts} * p.nRanks * p.maxTokens / (kPaddedBytes / kElements / 4));
  }
  const ncclDataType_t types[] = {ncclBfloat16, ncclFloat16, ncclFloat32, ncclMoeFloat8e4m3};
  p.type = types[pick(random, 0, 3)];
  if (p.type == ncclBfloat16 && world.maxRowBytes >= 32 && chance(random, 0.7)) {
    p.quant = chance(random, 0.5) ? ncclMoeQuantFp8 : ncclMoeQuantFp8Ue8m0;
  }
  p.hidden = pickHidden(random, world, p.type, p.quant != ncclMoeQuantNone, rows);
  if (p.quant == ncclMoeQuantNone && chance(random, p.type == ncclMoeFloat8e4m3 ? 0.8 : 0.2)) {
    p.scaleBytes = chance(random, 0.1) ? 4096 : pick(random, 1, 64);
    if (rows > 200) p.scaleBytes = pick(random, 1, 64);
  }
  if (p.wireScaleBytes() > 0 && chance(random, 0.5)) {
    const bool words = p.layout != ncclMoeLayoutExpertPadded || p.nRanks * p.maxTokens % 4 == 0;
    if (words) p.scaleLayout = ncclMoeScaleColumnMajor;
    if (words && p.quant == ncclMoeQuantNone) p.scaleBytes = (p.scaleBytes + 3) / 4 * 4;
  }
  p.weighted = chance(random, 0.6);
  const Selections kinds[] = {Selections::uniform, Selections::uniform, Selections::groupLimited,
                              Selections::oneRank, Selections::sparse,  Selections::none};
  const bool mixed = chance(random, 0.3);
  Selections kind = kinds[pick(random, 0, 5)];
  if (kind == Selections::none && !mixed) kind = kinds[pick(random, 0, 5)]; // rarely nothing at all
  const bool wild = chance(random, 0.4);
  std::uniform_real_distribution<float> weight(-1.0f, 1.0f);
  for (size_t s = 0; s < p.sources.size(); s++) {
    Source& source = p.sources[s];
    const size_t nTokens = static_cast<size_t>(source.nTokens);
    if (kept != nullptr) {
      source.topkIdx = kept->sources[s].topkIdx;
    } else {
      fillSelections(random, world, mixed ? kinds[pick(random, 0, 5)] : kind, p.topK, &source);
    }
    const size_t count = nTokens * static_cast<size_t>(p.hidden);
    source.x.resize(count * elementBytes(p.type));
    // A power of two cannot be rounded up from infinity, so the header leaves that scale open.
    fillElements(random, p.type, wild, p.quant != ncclMoeQuantFp8Ue8m0, source.x.data(), count);
    if (p.weighted) {
      source.topkWeights.resize(nTokens * static_cast<size_t>(p.topK));
      for (float& w : source.topkWeights) w = weight(random);
    }
    source.scales.resize(nTokens * static_cast<size_t>(p.scaleBytes));
    for (uint8_t& byte : source.scales) byte = static_cast<uint8_t>(random());
  }
  return p;
}

bool mayBeCast(const CombineProblem& problem) {
  return problem.type == ncclBfloat16 && problem.hidden % 16 == 0 && !problem.exact;
}

CombineProblem randomCombine(Random& random, const World& world, const Reference& reference) {
  const DispatchProblem& p = reference.problem();
  const bool rankMajor = p.layout == ncclMoeLayoutRankMajor;
  CombineProblem c;
  const ncclDataType_t types[] = {ncclBfloat16, ncclFloat16, ncclFloat32};
  c.type = types[pick(random, 0, 2)];
  int64_t rows = 1;
  for (const Source& source : p.sources) rows += static_cast<int64_t>(source.nTokens) * p.topK;
  for (int rank = 0; rank < p.nRanks; rank++) rows = std::max(rows, reference.delivery(rank).span * p.nRanks / 4);
  c.hidden = pickHidden(random, world, c.type, false, rows);
  c.exact = !rankMajor && chance(random, 0.4);
  c.weighted = !rankMajor && chance(random, 0.6);
  c.withGradWeights = chance(random, 0.4);
  fillCombine(random, reference, chance(random, 0.3), &c);
  return c;
}

void fillCombine(Random& random, const Reference& reference, bool wild, CombineProblem* problem) {
  const DispatchProblem& p = reference.problem();
  CombineProblem& c = *problem;
  const bool rankMajor = p.layout == ncclMoeLayoutRankMajor;
  c.x.clear();
  c.weights.clear();
  c.gradWeights.clear();
  const size_t rowBytes = static_cast<size_t>(c.hidden) * elementBytes(c.type);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::uniform_real_distribution<float> weight(-1.0f, 1.0f);
  for (int rank = 0; rank < p.nRanks; rank++) {
    const Delivery& d = reference.delivery(rank);
    const size_t span = static_cast<size_t>(d.span);
    const size_t topK = static_cast<size_t>(p.topK);
    // What must not be read would show: as NaNs.
    std::vector<uint8_t> x(span * rowBytes, 0xff);
    std::vector<float> weights(c.weighted ? span : 0, nan);
    std::vector<float> gradients(c.withGradWeights ? span * (rankMajor ? topK : 1) : 0, nan);
    for (const Row& r : d.rows) {
      const size_t row = static_cast<size_t>(r.row);
      fillElements(random, c.type, wild, true, &x[row * rowBytes], static_cast<size_t>(c.hidden));
      if (c.weighted) weights[row] = weight(random);
      if (!c.withGradWeights) continue;
      if (!rankMajor) gradients[row] = weight(random);
      for (int k = 0; rankMajor && k < p.topK; k++) {
        if (reference.rankOf(r.source, r.token, k) == rank)
          gradients[row * topK + static_cast<size_t>(k)] = weight(random);
      }
    }
    c.x.push_back(std::move(x));
    c.weights.push_back(std::move(weights));
    c.gradWeights.push_back(std::move(gradients));
  }
}

DispatchStyle randomStyle(Random& random) {
  DispatchStyle style;
  style.idx32 = chance(random, 0.5);
  style.tokensDev = chance(random, 0.2);
  style.wantTopkIdx = chance(random, 0.8);
  style.wantWeights = chance(random, 0.8);
  style.wantCount = chance(random, 0.8);
  style.wantExpertCounts = chance(random, 0.8);
  style.wantExpertOffsets = chance(random, 0.8);
  style.slack = chance(random, 0.5) ? 0 : pick(random, 1, 9);
  style.emptyNull = chance(random, 0.5);
  return style;
}

std::string describe(const DispatchProblem& p) {
  std::string tokens;
  for (const Source& source : p.sources) tokens += (tokens.empty() ? "" : " ") + std::to_string(source.nTokens);
  return format("dispatch: K %d, H %d, maxTokens %d, type %d, layout %d, alignment %d, quant %d, scaleLayout %d, "
                "scaleBytes %d, weights %d, T ",
                p.topK, p.hidden, p.maxTokens, static_cast<int>(p.type), static_cast<int>(p.layout), p.expertAlignment,
                static_cast<int>(p.quant), static_cast<int>(p.scaleLayout), p.scaleBytes, p.weighted) +
         tokens;
}

std::string describe(const CombineProblem& c) {
  return format("combine: H %d, type %d, exact %d, cast %d, weights %d, gradients %d", c.hidden,
                static_cast<int>(c.type), c.exact, c.cast, c.weighted, c.withGradWeights);
}

} // namespace moe::test
