// Ranges of the public functions in profiles.
#pragma once

#include <nvtx3/nvToolsExt.h>

namespace moe {

class NvtxRange {
 public:
  explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
  ~NvtxRange() { nvtxRangePop(); }
};

} // namespace moe
