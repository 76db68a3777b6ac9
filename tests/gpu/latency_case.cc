#include "gpu/latency_case.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace moe::test {
namespace {

constexpr size_t kArenaBytes = size_t{96} << 20;
constexpr uint8_t kEmptyByte = 0xa5;

// Much of the rows becomes packets that look empty.  cast: they look so after the FP8 cast.
void emptyRows(Random& random, size_t nRows, size_t rowBytes, bool cast, uint8_t* data) {
  const size_t piece = cast ? 32 : 16; // what becomes a packet
  for (size_t row = 0; row < nRows; row++) {
    const int kind = pick(random, 0, 2);
    if (kind == 2) continue;
    for (size_t at = 0; at + piece <= rowBytes; at += piece) {
      if (kind == 1 && chance(random, 0.7)) continue;
      uint8_t* to = data + row * rowBytes + at;
      if (!cast) {
        memset(to, kEmptyByte, piece);
        continue;
      }
      // A block whose largest magnitude is 448 keeps its values: 0xa5 is -0.203125.
      const bool head = at % 256 == 0;
      for (size_t i = 0; i < piece / 2; i++) storeElement(ncclBfloat16, head && i == 0 ? 448.0 : -0.203125, to + 2 * i);
    }
  }
}

void emptyFloats(Random& random, size_t nRows, size_t each, std::vector<float>* values) {
  for (size_t row = 0; row < nRows && each > 0; row++) {
    if (chance(random, 0.4)) continue;
    for (size_t i = row * each; i < (row + 1) * each; i++) {
      if (!std::isnan((*values)[i])) memset(&(*values)[i], kEmptyByte, sizeof(float)); // NaN: must not be read
    }
  }
}

} // namespace

World DecodeShape::world() const {
  World w;
  w.nRanks = nRanks;
  w.nExperts = 8 * nRanks;
  w.maxTokens = nTokens;
  w.maxTopK = topK;
  w.maxRowBytes = 4096;
  w.expertToRank = blockPlacement(w.nExperts, nRanks);
  return w;
}

ncclMoeRoutingConfig_t DecodeShape::routing() const {
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = topK;
  config.maxTokens = nTokens;
  config.layout = layout;
  config.expertAlignment = alignment;
  config.hostCounts = 1;
  return config;
}

DecodeShape randomShape(uint64_t seed, int nRanks) {
  Random random(seed);
  DecodeShape s;
  s.nRanks = nRanks;
  s.nTokens = 4 * pick(random, 1, 8); // whole words in column-major scales
  s.topK = pick(random, 1, 8);
  s.hidden = 16 * pick(random, 1, 40);
  s.layout = static_cast<ncclMoeLayout_t>(pick(random, 0, 2));
  if (s.layout == ncclMoeLayoutExpertMajor) s.alignment = pick(random, 1, 16);
  s.quant = static_cast<ncclMoeQuant_t>(pick(random, 0, 2));
  if (s.quant == ncclMoeQuantNone) {
    const ncclDataType_t types[] = {ncclBfloat16, ncclFloat16, ncclFloat32, ncclMoeFloat8e4m3};
    s.type = types[pick(random, 0, 3)];
    if (chance(random, 0.5)) s.scaleBytes = 4 * pick(random, 1, 16);
  }
  if (chance(random, 0.5)) s.scaleLayout = ncclMoeScaleColumnMajor;
  const ncclDataType_t types[] = {ncclBfloat16, ncclFloat16, ncclFloat32};
  s.combineType = types[pick(random, 0, 2)];
  s.combineCast = s.combineType == ncclBfloat16 && chance(random, 0.5);
  s.exact = s.layout != ncclMoeLayoutRankMajor && !s.combineCast && chance(random, 0.4);
  s.weighted = s.layout != ncclMoeLayoutRankMajor && chance(random, 0.6);
  s.withGrads = chance(random, 0.4);
  s.sparse = chance(random, 0.3);
  s.likeEmpty = chance(random, 0.3);
  return s;
}

DecodeCase makeDecode(uint64_t seed, const DecodeShape& shape) {
  Random random(seed);
  const World world = shape.world();
  DispatchProblem p;
  p.nRanks = shape.nRanks;
  p.nExperts = world.nExperts;
  p.topK = shape.topK;
  p.hidden = shape.hidden;
  p.maxTokens = shape.nTokens;
  p.type = shape.type;
  p.layout = shape.layout;
  p.expertAlignment = shape.alignment;
  p.quant = shape.quant;
  p.scaleLayout = shape.scaleLayout;
  p.scaleBytes = shape.scaleBytes;
  p.weighted = true;
  p.expertToRank = world.expertToRank;
  p.sources.resize(static_cast<size_t>(shape.nRanks));
  const size_t k = static_cast<size_t>(p.topK);
  std::uniform_real_distribution<float> number(-1.0f, 1.0f);
  for (Source& source : p.sources) {
    source.nTokens = chance(random, 0.1) ? 0 : chance(random, 0.3) ? p.maxTokens : pick(random, 0, p.maxTokens);
    fillSelections(random, world, shape.sparse ? Selections::sparse : Selections::uniform, p.topK, &source);
    const size_t n = static_cast<size_t>(source.nTokens),
                 rowBytes = static_cast<size_t>(p.hidden) * elementBytes(p.type);
    source.x.resize(n * rowBytes);
    fillElements(random, p.type, false, false, source.x.data(), n * static_cast<size_t>(p.hidden));
    source.topkWeights.resize(n * k);
    for (float& w : source.topkWeights) w = number(random);
    source.scales.resize(n * static_cast<size_t>(p.scaleBytes));
    for (uint8_t& byte : source.scales) byte = static_cast<uint8_t>(random());
    if (!shape.likeEmpty) continue;
    emptyRows(random, n, rowBytes, p.quant != ncclMoeQuantNone, source.x.data());
    emptyFloats(random, n, k, &source.topkWeights);
    emptyRows(random, n, static_cast<size_t>(p.scaleBytes), false, source.scales.data());
  }
  DecodeCase e;
  e.reference = std::make_unique<Reference>(p);
  CombineProblem& c = e.combine;
  c.type = shape.combineType;
  c.hidden = shape.hidden;
  c.cast = shape.combineCast;
  c.exact = shape.exact;
  c.weighted = shape.weighted;
  c.withGradWeights = shape.withGrads;
  const bool rankMajor = p.layout == ncclMoeLayoutRankMajor;
  const size_t rowBytes = static_cast<size_t>(c.hidden) * elementBytes(c.type), each = rankMajor ? k : 1;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int r = 0; r < p.nRanks; r++) {
    const Delivery& d = e.reference->delivery(r);
    const size_t span = static_cast<size_t>(d.span);
    // What must not be read would show: as NaNs.
    std::vector<uint8_t> x(span * rowBytes, 0xff);
    std::vector<float> weights(c.weighted ? span : 0, nan), gradients(c.withGradWeights ? span * each : 0, nan);
    for (const Row& row : d.rows) {
      const size_t at = static_cast<size_t>(row.row);
      fillElements(random, c.type, false, false, &x[at * rowBytes], static_cast<size_t>(c.hidden));
      if (shape.likeEmpty) emptyRows(random, 1, rowBytes, c.cast, &x[at * rowBytes]);
      if (c.weighted) weights[at] = shape.likeEmpty && chance(random, 0.6) ? 1.0f : number(random);
      for (size_t i = 0; c.withGradWeights && i < each; i++) {
        const bool read = !rankMajor || e.reference->rankOf(row.source, row.token, static_cast<int>(i)) == r;
        if (read) gradients[at * each + i] = number(random);
      }
    }
    if (shape.likeEmpty && c.withGradWeights) emptyFloats(random, span, each, &gradients);
    c.x.push_back(std::move(x));
    c.weights.push_back(std::move(weights));
    c.gradWeights.push_back(std::move(gradients));
  }
  return e;
}

DispatchStyle styleInGraph(const DecodeShape& shape, const DecodeCase& e, int rank) {
  DispatchStyle style;
  style.tokensDev = true;
  const int perToken = shape.layout == ncclMoeLayoutRankMajor ? 1 : shape.topK;
  const int64_t most = int64_t{shape.nRanks} * shape.nTokens * perToken + 8 * shape.alignment;
  style.slack = static_cast<int>((most + 3) / 4 * 4 - e.reference->rowsNeeded(rank));
  return style;
}

std::vector<std::string> runDecodeRanks(const World& world, const DecodeRun& run, const DecodeBody& body) {
  const int nDevices = gpuCount();
  return runGpuRanks(run.nRanks, run.as, run.timeLimitMs, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
    GpuRank rank(r, run.nRanks, r % nDevices);
    ncclMoeConfig_t config = world.config();
    config.mode = run.mode;
    config.numSms = run.numSms;
    config.timeoutMs = run.timeoutMs;
    RANK_TRY(rank.init(config, meeting, kArenaBytes));
    RANK_TRY(body(rank, *meeting));
    return rank.destroy();
  });
}

std::string runDecode(const World& world, const DecodeRun& run, const DecodeBody& body) {
  std::string failures;
  const std::vector<std::string> ranks = runDecodeRanks(world, run, body);
  for (size_t r = 0; r < ranks.size(); r++) {
    if (!ranks[r].empty()) failures += format("rank %zu: %s\n", r, ranks[r].c_str());
  }
  return failures;
}

} // namespace moe::test
