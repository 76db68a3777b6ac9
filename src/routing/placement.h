// Where experts live.  Written once for host and device.
#pragma once

#include "base/hd.h"

namespace moe {

// One expert's rank and its index among that rank's experts.
struct ExpertHome {
  int rank;
  int local;
};

// View of the placement; the table lies in memory of whoever uses the view.
struct Placement {
  int nExperts;
  int nRanks;
  const ExpertHome* home; // [nExperts]
};

// Default placement: blocks of consecutive experts, the first nExperts % nRanks ranks hold one more.
MOE_HD ExpertHome blockHome(int expert, int nExperts, int nRanks) {
  const int small = nExperts / nRanks;
  const int nLarge = nExperts % nRanks;
  const int firstSmall = nLarge * (small + 1); // experts below this one lie in the larger blocks
  if (expert < firstSmall) return ExpertHome{expert / (small + 1), expert % (small + 1)};
  return ExpertHome{nLarge + (expert - firstSmall) / small, (expert - firstSmall) % small};
}

} // namespace moe
