// The same layer without parallelism: plain loops in double precision over all tokens of all ranks and all experts.
#pragma once

#include <cstdint>
#include <vector>

struct Problem {
  int tokens, hidden, ffn, experts, topK; // tokens of all ranks together
  std::vector<float> x, gradOut;          // [tokens, H]
  std::vector<float> router, w1, w2;      // [E, H], [E, 2F, H], [E, H, F]
};

struct Answer {
  std::vector<double> out, gradX, gradRouter, gradW1, gradW2;
};

// topkIdx: [tokens, K], the experts that were selected.  They are checked: each is named once, and none has a smaller
// probability than an expert that was left out, but for the rounding of FP32 sums.  False, with a line on stderr, if
// one does.
bool solve(const Problem& problem, const std::vector<int64_t>& topkIdx, Answer* answer);
