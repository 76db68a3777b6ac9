#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <set>

#include "perf/moe/perf_error.h"
#include "perf/moe/reference.h"

namespace moe::perf {
namespace {

ncclResult_t parse(std::vector<std::string> words, Options* options) {
  std::vector<char*> argv;
  words.insert(words.begin(), "moe_perf");
  argv.reserve(words.size() + 1);
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  return parseOptions(static_cast<int>(words.size()), argv.data(), options);
}

std::vector<int> select(const Options& o, int nRanks, int rank, int token) {
  std::unique_ptr<RoutingSource> source;
  EXPECT_EQ(makeRoutingSource(o, nRanks, &source), ncclSuccess) << perfError();
  std::vector<int> idx(o.topK, -2);
  if (source != nullptr) source->select(rank, token, idx.data());
  return idx;
}

std::string writeFile(const std::string& name, const std::string& content) {
  const std::string path = testing::TempDir() + "moe_perf_" + std::to_string(getpid()) + name;
  std::ofstream(path, std::ios::binary) << content;
  return path;
}

TEST(PerfOptions, ReadsSizesAndNames) {
  Options o;
  ASSERT_EQ(
    parse({"-b", "1K", "-e", "5K", "-f", "2", "-d", "fp8", "--layout", "expert", "--align", "16", "--exact"}, &o),
    ncclSuccess);
  EXPECT_EQ(tokenSteps(o), (std::vector<int>{1024, 2048, 4096}));
  EXPECT_EQ(o.type, ncclMoeFloat8e4m3);
  EXPECT_EQ(o.align, 16);
  EXPECT_TRUE(o.exact);
  EXPECT_TRUE(o.weightsInside);
  ASSERT_EQ(parse({"-b", "0", "-e", "10", "-i", "5"}, &o), ncclSuccess);
  EXPECT_EQ(tokenSteps(o), (std::vector<int>{0, 5, 10}));
  EXPECT_FALSE(o.weightsInside);
  ASSERT_EQ(parse({"-b", "0", "-e", "4"}, &o), ncclSuccess);
  EXPECT_EQ(tokenSteps(o), (std::vector<int>{0, 1, 2, 4}));
  ASSERT_EQ(parse({"-b", "77"}, &o), ncclSuccess);
  EXPECT_EQ(tokenSteps(o), (std::vector<int>{77}));
}

TEST(PerfOptions, RefusesWhatMakesNoSense) {
  const std::vector<std::vector<std::string>> bad = {{"-b", "x"},
                                                     {"-b", "-1"},
                                                     {"-n", "0"},
                                                     {"-b", "9", "-e", "8"},
                                                     {"-d", "int8"},
                                                     {"--topk", "33"},
                                                     {"--topk", "9", "--experts", "8"},
                                                     {"--exact"},
                                                     {"--align", "8"},
                                                     {"--weights", "inside"},
                                                     {"--quant", "fp8", "-d", "half"},
                                                     {"--routing", "zipf"},
                                                     {"--routing", "zipf:x"},
                                                     {"--routing", "zipf:nan"},
                                                     {"--routing", "grouped:8"},
                                                     {"--routing", "grouped:7,2"},
                                                     {"--routing", "grouped:64,1"},
                                                     {"--routing", "file:"},
                                                     {"--routing", "hotter"},
                                                     {"--nonsense"},
                                                     {"-b"},
                                                     {"stray"},
                                                     {"-b", "99999999999999999999"},
                                                     {"-e", "20M"}};
  for (const auto& words : bad) {
    Options o;
    EXPECT_EQ(parse(words, &o), ncclInvalidArgument) << words[0] << (words.size() > 1 ? words[1] : "");
    EXPECT_STRNE(perfError(), "");
  }
}

TEST(PerfRouting, SelectionsAreDistinctInRangeAndRepeatable) {
  const std::string text = writeFile("text", "one two three Two, ONE four-five");
  for (const std::string& routing : {std::string("uniform"), std::string("zipf:1.2"), std::string("grouped:8,4"),
                                     std::string("hot"), "hash:" + text}) {
    Options o;
    ASSERT_EQ(parse({"--experts", "64", "--topk", "6", "--routing", routing}, &o), ncclSuccess) << perfError();
    std::set<std::vector<int>> seen;
    for (int t = 0; t < 50; t++) {
      const std::vector<int> idx = select(o, 4, 1, t);
      EXPECT_EQ(idx, select(o, 4, 1, t));
      EXPECT_EQ(std::set<int>(idx.begin(), idx.end()).size(), 6u) << routing;
      EXPECT_GE(*std::min_element(idx.begin(), idx.end()), 0) << routing;
      EXPECT_LT(*std::max_element(idx.begin(), idx.end()), 64) << routing;
      seen.insert(idx);
    }
    EXPECT_EQ(seen.size(), routing.rfind("hash", 0) == 0 ? 5u : seen.size()) << routing; // five different words
    EXPECT_GT(seen.size(), 4u) << routing;
  }
  unlink(text.c_str());
}

TEST(PerfRouting, GroupedKeepsToItsGroups) {
  Options o;
  ASSERT_EQ(parse({"--experts", "256", "--topk", "8", "--routing", "grouped:8,4"}, &o), ncclSuccess);
  for (int t = 0; t < 100; t++) {
    std::set<int> groups;
    for (const int e : select(o, 2, 0, t)) groups.insert(e / 32);
    EXPECT_LE(groups.size(), 4u);
  }
}

TEST(PerfRouting, HotGoesToRankZeroAndFillsWithNone) {
  Options o;
  ASSERT_EQ(parse({"--experts", "10", "--topk", "4", "--routing", "hot"}, &o), ncclSuccess);
  const std::vector<int> idx = select(o, 4, 3, 7); // rank 0 of 4 has 3 of 10 experts
  EXPECT_EQ(std::set<int>(idx.begin(), idx.begin() + 3), (std::set<int>{0, 1, 2}));
  EXPECT_EQ(idx[3], -1);
}

TEST(PerfRouting, ZipfFavoursSomeExperts) {
  Options o;
  ASSERT_EQ(parse({"--experts", "64", "--topk", "2", "--routing", "zipf:1.5"}, &o), ncclSuccess);
  std::vector<int> counts(64);
  std::unique_ptr<RoutingSource> source;
  ASSERT_EQ(makeRoutingSource(o, 2, &source), ncclSuccess);
  int idx[2];
  for (int t = 0; t < 4000; t++) {
    source->select(0, t, idx);
    counts[idx[0]]++;
    counts[idx[1]]++;
  }
  std::sort(counts.rbegin(), counts.rend());
  EXPECT_GT(counts[0], 2000); // uniform would give 125
  EXPECT_LT(counts[63], 60);
}

TEST(PerfRouting, ReadsNpyAndNamesWhatIsWrongInIt) {
  const auto file = [](const std::vector<int>& ids) {
    std::string header = "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }\n";
    std::string content("\x93NUMPY\x01\x00", 8);
    content += static_cast<char>(header.size());
    content += '\0';
    content += header;
    content.append(reinterpret_cast<const char*>(ids.data()), ids.size() * 4);
    return writeFile("ids.npy", content);
  };
  Options o;
  const std::string path = file({3, -1, 0, 7, 2, 1});
  ASSERT_EQ(parse({"-b", "1", "--experts", "8", "--topk", "3", "--routing", "file:" + path}, &o), ncclSuccess);
  EXPECT_EQ(select(o, 2, 0, 0), (std::vector<int>{3, -1, 0}));
  EXPECT_EQ(select(o, 2, 1, 0), (std::vector<int>{7, 2, 1}));
  EXPECT_EQ(select(o, 4, 3, 0), (std::vector<int>{7, 2, 1}));
  std::unique_ptr<RoutingSource> source;
  file({3, -1, 0, 7, 8, 1});
  EXPECT_EQ(makeRoutingSource(o, 2, &source), ncclInvalidArgument);
  EXPECT_NE(std::string(perfError()).find("token 1, selection 1: expert 8 is out of range"), std::string::npos);
  file({3, -1, 3, 7, 2, 1});
  EXPECT_EQ(makeRoutingSource(o, 2, &source), ncclInvalidArgument);
  EXPECT_NE(std::string(perfError()).find("token 0, selection 2: expert 3 is repeated"), std::string::npos);
  o.topK = 2;
  EXPECT_EQ(makeRoutingSource(o, 2, &source), ncclInvalidArgument);
  unlink(path.c_str());
  EXPECT_EQ(makeRoutingSource(o, 2, &source), ncclInvalidArgument);
}

// A table of three ranks with four experts (rank 0 has 0 and 1), worked out by hand.
TEST(PerfReference, DeliversAndCountsAsByHand) {
  struct Fixed : RoutingSource {
    void select(int rank, int token, int* idx) const override {
      static const int table[3][2][2] = {{{0, 1}, {2, 0}}, {{3, -1}, {-1, -1}}, {{1, 2}, {3, 1}}};
      idx[0] = table[rank][token][0];
      idx[1] = table[rank][token][1];
    }
  };
  Options o;
  ASSERT_EQ(parse({"-b", "2", "--experts", "4", "--topk", "2", "--hidden", "8"}, &o), ncclSuccess);
  Shape s = shapeOf(o, 3, 2);
  const Routing routing(s, Fixed());
  Delivery d = deliveryOf(s, routing, 0);
  EXPECT_EQ(d.nRows, 4); // (0,0) (0,1) (2,0) (2,1)
  EXPECT_EQ(d.counts, (std::vector<int>{2, 3}));
  EXPECT_EQ(d.rows[3].source, 2);
  EXPECT_EQ(d.rows[3].token, 1);
  EXPECT_EQ(slotsOf(s, routing, 0), 4);
  EXPECT_EQ(mostSlotsOf(s, 0), 6); // all tokens
  // To other ranks: (0,1)->1, (1,0)->2, (2,0)->0 and ->1, (2,1)->0; it stays on rank 2 with expert 3.
  const Traffic traffic = trafficOf(s, routing);
  EXPECT_DOUBLE_EQ(traffic.wireDispatch, 5.0 * (16 + 2 * 8) / 3);
  EXPECT_DOUBLE_EQ(traffic.wireCombine, 5.0 * 16 / 3);
  EXPECT_DOUBLE_EQ(traffic.allCombine, 8.0 * 16 / 3);
  s.layout = ncclMoeLayoutExpertMajor;
  s.align = 4;
  d = deliveryOf(s, routing, 0);
  EXPECT_EQ(d.nRows, 8);
  EXPECT_EQ(d.offsets, (std::vector<int>{0, 4, 8}));
  EXPECT_EQ(d.rowAt, (std::vector<int32_t>{0, 1, -1, -1, 2, 3, 4, -1}));
  EXPECT_EQ(d.rows[2].k, 1); // token (0,0) selects expert 1 second
  EXPECT_EQ(slotsOf(s, routing, 0), 8);
  EXPECT_EQ(mostSlotsOf(s, 0), 6 * 2 + 2 * 3); // both experts of all tokens, and 3 rows of padding for each
  s.layout = ncclMoeLayoutExpertPadded;
  d = deliveryOf(s, routing, 0);
  EXPECT_EQ(d.rowAt.size(), 12u);
  EXPECT_EQ(d.rowAt[6], 2);
  EXPECT_EQ(slotsOf(s, routing, 0), 12);
}

} // namespace
} // namespace moe::perf
