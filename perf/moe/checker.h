// Compares every element that a collective delivered, and everything that it must leave alone, with the reference.
#pragma once

#include "perf/moe/buffers.h"

namespace moe::perf {

// One rank's case: capacity is what dispatch was told.
struct Case {
  const Shape& shape;
  const Routing& routing;
  const Delivery& delivery;
  int rank;
  int64_t capacity;
};

// Fills the inputs; weights and indices too.
ncclResult_t writeInputs(Device& device, const Buffers& buffers, const Case& c);
// Fills combine's input: NaNs where no token lies.
ncclResult_t writeExpertRows(Device& device, const Buffers& buffers, const Case& c);

ncclResult_t poisonDispatch(Device& device, const Buffers& buffers, const Case& c);
ncclResult_t poisonCombine(Device& device, const Buffers& buffers, const Case& c);

// *wrong grows by the elements that differ.
ncclResult_t checkDispatch(Device& device, const Buffers& buffers, const Case& c, int64_t* wrong);
ncclResult_t checkCombine(Device& device, const Buffers& buffers, const Case& c, int64_t* wrong);

} // namespace moe::perf
