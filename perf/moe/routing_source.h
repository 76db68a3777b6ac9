// Which experts a token selects.  A token's selections depend on seed, rank and token alone, so that every rank
// can tell every other's, and those of a smaller T are the first of a larger one's.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "perf/moe/options.h"

namespace moe::perf {

class RoutingSource {
 public:
  virtual ~RoutingSource() = default;
  // idx [topK]: expert ids, -1 for none.
  virtual void select(int rank, int token, int* idx) const = 0;
};

// Reads options.routing.path where the routing has one.
ncclResult_t makeRoutingSource(const Options& options, int nRanks, std::unique_ptr<RoutingSource>* source);

// The lower-case words of a text: runs of letters and digits.
std::vector<std::string> wordsOf(const std::string& text);

} // namespace moe::perf
