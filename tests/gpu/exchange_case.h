// A fixed exchange for tests of what surrounds a dispatch and a combine: graphs, streams, errors.
#pragma once

#include "gpu/gpu.h"

namespace moe::test {

struct ExchangeCase {
  World world;
  std::unique_ptr<Reference> reference;
  CombineProblem combine;
  ncclMoeRoutingConfig_t routing = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
};

// BF16 rows in EXPERT_MAJOR with weights, nTokens on every rank.
ExchangeCase makeExchange(uint64_t seed, int nRanks, int nTokens, int maxTokens);

// Of a communicator that a test runs it on: throughput mode, on few SMs.
ncclMoeConfig_t configFor(const ExchangeCase& e, int timeoutMs = 10000);

// Puts other data, and other selections, of the same shape into an exchange.
void redraw(uint64_t seed, ExchangeCase* exchange);

} // namespace moe::test
