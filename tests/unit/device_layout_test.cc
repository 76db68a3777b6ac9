// The part of the CUDA backend's layout that needs no GPU.
#include "device/layout.h"

#include <gtest/gtest.h>

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

} // namespace
} // namespace moe
