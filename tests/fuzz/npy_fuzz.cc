// No bytes may make the .npy parser read outside them, and what it accepts must lie inside them.
#include <cstdlib>

#include "perf/moe/npy.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  moe::perf::NpyArray array;
  std::string error;
  if (!moe::perf::parseNpy(data, size, &array, &error)) {
    if (error.empty()) abort(); // a refusal says why
    return 0;
  }
  if (array.data < data || array.data + array.dataBytes > data + size) abort();
  uint64_t rows = 0;
  uint64_t columns = 0;
  std::vector<int> ids;
  if (moe::perf::npyToIndices(array, &rows, &columns, &ids, &error) && ids.size() != rows * columns) abort();
  return 0;
}
