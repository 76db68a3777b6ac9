// A hash by which ranks compare what they were called with.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace moe {

inline uint32_t hash(std::initializer_list<long long> values) {
  uint64_t h = 1469598103934665603ull;
  for (long long value : values) {
    for (int shift = 0; shift < 64; shift += 8) h = (h ^ ((value >> shift) & 0xff)) * 1099511628211ull;
  }
  return static_cast<uint32_t>(h ^ h >> 32);
}

} // namespace moe
