// Random jobs: what a communicator is made for, and calls that fit it, from a seed.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "common/exchange.h"
#include "common/reference.h"

namespace moe::test {

using Random = std::mt19937_64;
int pick(Random& random, int low, int high); // both included
bool chance(Random& random, double probability);

// What all calls of a communicator share.
struct World {
  int nRanks = 1;
  int nExperts = 1;
  int maxTokens = 0;
  int maxTopK = 1;
  size_t maxRowBytes = 16;
  bool explicitMap = false;
  std::vector<int> expertToRank; // [E], also where explicitMap is false

  std::string describe() const;
  ncclMoeConfig_t config() const; // points into this object
};

struct WorldLimits {
  int minRanks = 1;
  int maxRanks = 16;
  int maxExperts = 512;
  int maxTokens = 600;
};
World randomWorld(Random& random, const WorldLimits& limits = WorldLimits());

enum class Selections { uniform, groupLimited, oneRank, sparse, none };

// A dispatch problem that fits the world, within the budget of elements; kept: it repeats that problem's routing.
DispatchProblem randomDispatch(Random& random, const World& world, const DispatchProblem* kept = nullptr);
// Whether its sums may travel as FP8, where latency mode serves the routing.
bool mayBeCast(const CombineProblem& problem);
// A combine problem of rows that random ranks might return after that dispatch.
CombineProblem randomCombine(Random& random, const World& world, const Reference& reference);
// Draws the tensors of a combine whose shape is set.  wild: also infinities and the like.
void fillCombine(Random& random, const Reference& reference, bool wild, CombineProblem* problem);
DispatchStyle randomStyle(Random& random);

void fillSelections(Random& random, const World& world, Selections selections, int topK, Source* source);
// Numbers of the type; wild: large, tiny, infinite and NaN among them.
void fillElements(Random& random, ncclDataType_t type, bool wild, bool infinities, uint8_t* data, size_t count);

std::string describe(const DispatchProblem& problem);
std::string describe(const CombineProblem& problem);

} // namespace moe::test
