// Where everything lies: in a row on the wire, and in the receive tensors.  Host code and kernels share these.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/hd.h"
#include "nccl_moe.h"

namespace moe {

constexpr size_t kRowAlign = 16;

template <class T> MOE_HD T alignUp(T value, T alignment) { return (value + alignment - 1) / alignment * alignment; }

// One row on the wire, with what travels beside it.  Parts that a call does not have take no room.
//   dispatch: payload, scales, local expert ids [K] (-1: not at this rank), weights [K]
//   combine:  payload, weights [1] of an EXACT row, gradients [K] of the weights (EXACT: [1])
struct WireRow {
  static constexpr int kMaxScaleBytes = 4096; // of a row

  size_t payloadBytes;
  size_t scaleAt, scaleBytes;
  size_t idAt, nIds;
  size_t weightAt, nWeights;
  size_t gradAt, nGrads;
  size_t stride; // from one row to the next

  static MOE_HD WireRow make(size_t payloadBytes, size_t scaleBytes, size_t nIds, size_t nWeights, size_t nGrads) {
    WireRow row{};
    row.payloadBytes = payloadBytes;
    row.scaleBytes = scaleBytes;
    row.nIds = nIds;
    row.nWeights = nWeights;
    row.nGrads = nGrads;
    row.scaleAt = alignUp(payloadBytes, kRowAlign);
    row.idAt = row.scaleAt + alignUp(scaleBytes, kRowAlign);
    row.weightAt = row.idAt + nIds * sizeof(int32_t);
    row.gradAt = row.weightAt + nWeights * sizeof(float);
    row.stride = alignUp(row.gradAt + nGrads * sizeof(float), kRowAlign);
    return row;
  }
};

// First row of local expert l's group, given the group's own first row and its rows: EXPERT_MAJOR groups follow each
// other at multiples of alignment, EXPERT_PADDED ones are planeRows apart.  RANK_MAJOR has no groups.
MOE_HD int64_t nextGroup(ncclMoeLayout_t layout, int64_t group, int64_t rows, int64_t alignment, int64_t planeRows) {
  return layout == ncclMoeLayoutExpertPadded ? group + planeRows : group + alignUp(rows, alignment);
}

// Byte at which 4-byte word w of a row's scales lies when scales are column-major.  plane: 0 but for EXPERT_PADDED,
// where rows count within their plane; ld: rows of a plane, or recvCapacity.
MOE_HD int64_t columnScaleAt(int64_t plane, int64_t row, int64_t word, int64_t nWords, int64_t ld) {
  return ((plane * nWords + word) * ld + row) * 4;
}

} // namespace moe
