#include "gpu/exchange_case.h"

namespace moe::test {
namespace {

void fill(uint64_t seed, DispatchProblem p, ExchangeCase* e) {
  Random random(seed);
  for (Source& source : p.sources) {
    fillSelections(random, e->world, Selections::uniform, p.topK, &source);
    const size_t nTokens = static_cast<size_t>(source.nTokens);
    source.x.resize(nTokens * static_cast<size_t>(p.hidden) * 2);
    fillElements(random, p.type, false, false, source.x.data(), nTokens * static_cast<size_t>(p.hidden));
    source.topkWeights.assign(nTokens * static_cast<size_t>(p.topK), 0.0f);
    for (float& w : source.topkWeights) w = std::uniform_real_distribution<float>(-1, 1)(random);
  }
  e->reference = std::make_unique<Reference>(p);
  e->combine.hidden = p.hidden; // one shape for all draws: a captured graph keeps it
  e->combine.weighted = true;
  e->combine.withGradWeights = true;
  fillCombine(random, *e->reference, false, &e->combine);
}

} // namespace

ExchangeCase makeExchange(uint64_t seed, int nRanks, int nTokens, int maxTokens) {
  ExchangeCase e;
  e.world.nRanks = nRanks;
  e.world.nExperts = 8 * nRanks;
  e.world.maxTokens = maxTokens;
  e.world.maxTopK = 4;
  e.world.maxRowBytes = 1024;
  e.world.expertToRank = blockPlacement(e.world.nExperts, nRanks);
  e.routing.topK = 4;
  e.routing.layout = ncclMoeLayoutExpertMajor;
  e.routing.expertAlignment = 16;
  DispatchProblem p;
  p.nRanks = nRanks;
  p.nExperts = e.world.nExperts;
  p.topK = 4;
  p.hidden = 512;
  p.maxTokens = maxTokens;
  p.layout = ncclMoeLayoutExpertMajor;
  p.expertAlignment = 16;
  p.weighted = true;
  p.expertToRank = e.world.expertToRank;
  p.sources.resize(static_cast<size_t>(nRanks));
  for (Source& source : p.sources) source.nTokens = nTokens;
  fill(seed, p, &e);
  return e;
}

ncclMoeConfig_t configFor(const ExchangeCase& e, int timeoutMs) {
  ncclMoeConfig_t config = e.world.config();
  config.mode = ncclMoeModeThroughput;
  config.numSms = 8;
  config.timeoutMs = timeoutMs;
  return config;
}

void redraw(uint64_t seed, ExchangeCase* exchange) { fill(seed, exchange->reference->problem(), exchange); }

} // namespace moe::test
