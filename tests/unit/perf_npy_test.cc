#include <gtest/gtest.h>

#include <cstring>

#include "perf/moe/npy.h"

namespace moe::perf {
namespace {

std::string npy(int major, const std::string& header, const std::string& data) {
  std::string file = "\x93NUMPY";
  file += static_cast<char>(major);
  file += '\0';
  const size_t n = header.size();
  for (int i = 0; i < (major == 1 ? 2 : 4); i++) file += static_cast<char>(n >> (8 * i) & 0xff);
  return file + header + data;
}

template <typename T> std::string bytesOf(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

bool parse(const std::string& file, NpyArray* array, std::string* error) {
  return parseNpy(reinterpret_cast<const uint8_t*>(file.data()), file.size(), array, error);
}

TEST(PerfNpy, ReadsInt32AndInt64OfAllVersions) {
  for (int major = 1; major <= 3; major++) {
    for (const bool wide : {false, true}) {
      const std::string data = wide ? bytesOf<int64_t>({1, -1, 3, 4, 5, 6}) : bytesOf<int32_t>({1, -1, 3, 4, 5, 6});
      const std::string descr = wide ? "<i8" : "<i4";
      const std::string file =
        npy(major, "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (3, 2), }   \n", data);
      NpyArray array;
      std::string error;
      ASSERT_TRUE(parse(file, &array, &error)) << error;
      uint64_t rows = 0;
      uint64_t columns = 0;
      std::vector<int> ids;
      ASSERT_TRUE(npyToIndices(array, &rows, &columns, &ids, &error)) << error;
      EXPECT_EQ(rows, 3u);
      EXPECT_EQ(columns, 2u);
      EXPECT_EQ(ids, (std::vector<int>{1, -1, 3, 4, 5, 6}));
    }
  }
}

TEST(PerfNpy, RefusesWhatItCannotRead) {
  const std::string good = "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 2), }";
  const std::string data = bytesOf<int32_t>({1, 2});
  NpyArray array;
  std::string error;
  ASSERT_TRUE(parse(npy(1, good, data), &array, &error)) << error;
  const std::string bad[] = {
    "",
    "\x93NUMPY",
    npy(4, good, data),
    npy(1, good, data.substr(1)),
    npy(1, good, data).substr(0, 30),
    npy(1, good + "x", data),
    npy(1, "{'descr': '<i4', 'fortran_order': False}", data),
    npy(1, "{'descr': '<i4', 'fortran_order': False, 'shape': (2), }", data),
    npy(1, "{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 2), }", data),
    npy(1, "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1, 2), }", data),
    npy(1, "{'descr': '<i4', 'fortran_order': 0, 'shape': (1, 2), }", data),
    npy(1, "{'descr': '<i4', 'descr': '<i4', 'fortran_order': False, 'shape': (1, 2), }", data),
    npy(1, "{'descr': '<i4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }", data),
    npy(1, "{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999, 2), }", data),
  };
  for (const std::string& file : bad) {
    error.clear();
    EXPECT_FALSE(parse(file, &array, &error)) << file;
    EXPECT_FALSE(error.empty());
  }
}

TEST(PerfNpy, RefusesArraysThatAreNoIndices) {
  const std::string headers[] = {"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }",
                                 "{'descr': '>i4', 'fortran_order': False, 'shape': (1, 2), }",
                                 "{'descr': '<i4', 'fortran_order': True, 'shape': (1, 2), }",
                                 "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }",
                                 "{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1), }"};
  const std::string data = bytesOf<int64_t>({int64_t{1} << 40});
  for (const std::string& header : headers) {
    NpyArray array;
    std::string error;
    uint64_t rows = 0;
    uint64_t columns = 0;
    std::vector<int> ids;
    const std::string file = npy(1, header, data);
    ASSERT_TRUE(parse(file, &array, &error)) << header << error;
    EXPECT_FALSE(npyToIndices(array, &rows, &columns, &ids, &error)) << header;
    EXPECT_FALSE(error.empty());
  }
}

} // namespace
} // namespace moe::perf
