// The part of the CUDA backend's layout that needs no GPU.
#include "device/layout.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace moe {
namespace {

TEST(DeviceLayout, EpochsAreNeverZeroAndAlternate) {
  uint32_t epoch = 0; // before the first call
  for (const uint32_t from : {0u, 0x7ffffffdu, 0xfffffffcu}) {
    epoch = from;
    for (int call = 0; call < 8; call++) {
      const uint32_t next = nextEpoch(epoch);
      EXPECT_NE(next, 0u) << "after " << epoch;
      EXPECT_EQ(next % 2, 1 - epoch % 2) << "after " << epoch;
      EXPECT_NE(next, epoch);
      epoch = next;
    }
  }
}

// The pieces of a row cover it, whatever its size: each vector is in one of them.
TEST(DeviceLayout, PiecesCoverARow) {
  for (int nVec = 1; nVec <= 1200; nVec++) {
    const RowPieces pieces(nVec);
    ASSERT_GE(pieces.n, 1);
    ASSERT_LE(pieces.n, kMaxPieces);
    ASSERT_GE(pieces.n * pieces.nVec, nVec) << "of " << nVec;
    ASSERT_EQ(pieces.nVec % 32, 0);
    EXPECT_EQ(pieces.n, std::max(1, std::min(kMaxPieces, nVec / 64))) << "of " << nVec;
  }
}

} // namespace
} // namespace moe
