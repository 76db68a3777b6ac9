// Reads the header of NumPy's .npy format (versions 1 to 3).  Pure, so that it can be fuzzed: no file, no global.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moe::perf {

struct NpyArray {
  std::string descr; // such as "<i4"
  bool fortranOrder = false;
  std::vector<uint64_t> shape;
  const uint8_t* data = nullptr; // into the bytes that were parsed
  size_t dataBytes = 0;
};

// Parses a whole file's bytes; false with a sentence in *error where they are no .npy of a known version, or
// where the data is shorter than shape and descr say.
bool parseNpy(const uint8_t* bytes, size_t size, NpyArray* array, std::string* error);

// The [T, K] expert ids of an int32 or int64 array in C order; false with a sentence otherwise, also where an id does
// not fit an int.
bool npyToIndices(const NpyArray& array, uint64_t* rows, uint64_t* columns, std::vector<int>* ids, std::string* error);

} // namespace moe::perf
