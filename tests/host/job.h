// A random job on one communicator: routings with rounds of dispatch and combine, each checked against the reference.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/cases.h"
#include "common/cluster.h"

namespace moe::test {

struct CombineRound {
  CombineProblem problem;
  bool sendOnly = false;
  int repeats = 1; // a combine may be repeated
};

struct Round {
  std::unique_ptr<Reference> reference;
  std::vector<DispatchStyle> styles; // [R]
  std::vector<CombineRound> combines;
};

struct RoutingJob {
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  std::vector<Round> rounds;
};

struct Job {
  World world;
  std::vector<RoutingJob> routings;
  bool latency = false; // mode, in which sums may be cast but counts are not to be had between the halves
  std::string describe() const;
  ncclMoeConfig_t config() const; // points into this object
};

Job randomJob(uint64_t seed, int nRoutings, int nRounds, const WorldLimits& limits = WorldLimits());

ncclMoeRoutingConfig_t routingConfig(const World& world, const DispatchProblem& problem, bool hostCounts);

// One rank's part of a routing's rounds.  outputs, if not NULL, collects every byte that was delivered.
std::string runRouting(Rank& rank, const RoutingJob& job, bool latency, std::string* outputs = nullptr);
// Makes the communicator, runs every routing, destroys.
std::string runJob(Rank& rank, const Job& job, std::string* outputs = nullptr);
// A small fixed exchange that must work on any healthy communicator with at least 16 bytes of row, 1 token, K 1.
std::string runSmoke(Rank& rank, ncclMoeComm_t comm, int nExperts);

} // namespace moe::test
