// A hash by which ranks compare what they are and what they were called with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace moe {

inline uint64_t hashBytes(const void* data, size_t bytes) {
  uint64_t h = 1469598103934665603ull;
  for (size_t i = 0; i < bytes; i++) h = (h ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211ull;
  return h;
}

// Of a call or a config; for a call, the first value says which.
inline uint32_t hash(std::initializer_list<long long> values) {
  const uint64_t h = hashBytes(values.begin(), sizeof(long long) * values.size());
  return static_cast<uint32_t>(h ^ h >> 32);
}

} // namespace moe
