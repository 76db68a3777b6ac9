// Routing against a naive reading of its definitions.
#include "routing/plan.h"

#include <climits>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace {

using namespace moe;

struct Case {
  int nRanks, nExperts, topK, maxTokens;
  std::vector<ExpertHome> home;
  std::vector<int> nLocal, firstLocal;
  std::vector<std::vector<int64_t>> topk; // [rank][T * K]
};

Case makeCase(std::mt19937& random) {
  auto upTo = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  Case c;
  c.nRanks = upTo(1, 9);
  c.nExperts = upTo(1, 40);
  c.topK = upTo(1, 12);
  c.maxTokens = upTo(0, 30);
  const bool mapped = upTo(0, 1) == 1;
  c.nLocal.assign(c.nRanks, 0);
  for (int e = 0; e < c.nExperts; e++) {
    const int rank = mapped ? upTo(0, c.nRanks - 1) : blockHome(e, c.nExperts, c.nRanks).rank;
    c.home.push_back(ExpertHome{rank, c.nLocal[rank]++});
    if (!mapped) {
      EXPECT_EQ(c.home[e].local, blockHome(e, c.nExperts, c.nRanks).local);
    }
  }
  c.firstLocal.assign(c.nRanks, 0);
  for (int r = 1; r < c.nRanks; r++) c.firstLocal[r] = c.firstLocal[r - 1] + c.nLocal[r - 1];
  c.topk.resize(c.nRanks);
  for (auto& topk : c.topk) {
    const int nTokens = upTo(0, c.maxTokens);
    for (int t = 0; t < nTokens; t++) {
      std::set<int64_t> used;
      for (int k = 0; k < c.topK; k++) {
        const int64_t expert = upTo(-1, c.nExperts - 1);
        topk.push_back(expert >= 0 && used.insert(expert).second ? expert : -1);
      }
    }
  }
  return c;
}

TEST(Routing, BlockPlacement) {
  std::mt19937 random(7);
  for (int i = 0; i < 200; i++) {
    const int nRanks = 1 + static_cast<int>(random() % 20), nExperts = 1 + static_cast<int>(random() % 60);
    int expert = 0;
    for (int r = 0; r < nRanks; r++) {
      const int n = nExperts / nRanks + (r < nExperts % nRanks ? 1 : 0);
      for (int l = 0; l < n; l++, expert++) {
        EXPECT_EQ(blockHome(expert, nExperts, nRanks).rank, r);
        EXPECT_EQ(blockHome(expert, nExperts, nRanks).local, l);
      }
    }
    EXPECT_EQ(expert, nExperts);
  }
}

TEST(Routing, SendAndReceivePlansAgreeWithTheDefinition) {
  std::mt19937 random(3);
  for (int round = 0; round < 300; round++) {
    const Case c = makeCase(random);
    const Placement placement{c.nExperts, c.nRanks, c.home.data()};
    std::vector<SendPlan> send(c.nRanks);
    for (int r = 0; r < c.nRanks; r++) {
      ASSERT_EQ(send[r].allocate(c.nRanks, c.nExperts, c.maxTokens, c.topK), ncclSuccess);
      const int nTokens = static_cast<int>(c.topk[r].size()) / c.topK;
      BadSelection bad{};
      ASSERT_TRUE(
        send[r].build(TopkView{c.topk[r].data(), true, c.topK}, nTokens, placement, c.firstLocal.data(), &bad));
      for (int t = 0; t < nTokens; t++) {
        std::set<int> ranks;
        for (int k = 0; k < c.topK; k++) {
          const int64_t e = c.topk[r][t * c.topK + k];
          EXPECT_EQ(send[r].homes(t)[k].rank, e < 0 ? -1 : c.home[e].rank);
          if (e >= 0) ranks.insert(c.home[e].rank);
        }
        EXPECT_EQ(std::vector<int>(send[r].dests(t), send[r].dests(t) + send[r].nDests(t)),
                  std::vector<int>(ranks.begin(), ranks.end()));
      }
    }
    for (const auto layout : {ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded}) {
      const int alignment = layout == ncclMoeLayoutExpertMajor ? 1 + static_cast<int>(random() % 8) : 1;
      for (int me = 0; me < c.nRanks; me++) {
        RecvPlan plan;
        const int nLocal = c.nLocal[me];
        ASSERT_EQ(plan.allocate(layout, c.nRanks, nLocal, c.maxTokens, c.topK, alignment), ncclSuccess);
        std::vector<int64_t> rows;
        std::vector<int32_t> counts;
        for (int r = 0; r < c.nRanks; r++) {
          rows.push_back(send[r].rowsTo(me));
          const int32_t* mine = send[r].counts() + c.firstLocal[me];
          ASSERT_TRUE(plan.plausible(rows.back(), mine));
          counts.insert(counts.end(), mine, mine + nLocal);
        }
        ASSERT_TRUE(plan.build(rows.data(), counts.data()));
        // The definition: rows in order of (source, token), each expert's rows likewise.
        std::vector<int64_t> used(nLocal, 0);
        int64_t row = 0;
        for (int r = 0; r < c.nRanks; r++) {
          EXPECT_EQ(plan.rowBase(r), row);
          for (size_t t = 0; t < c.topk[r].size() / c.topK; t++) {
            std::vector<int32_t> ids;
            bool here = false;
            for (int k = 0; k < c.topK; k++) {
              const int64_t e = c.topk[r][t * c.topK + k];
              ids.push_back(e >= 0 && c.home[e].rank == me ? c.home[e].local : -1);
              here |= ids.back() >= 0;
            }
            if (!here) continue;
            ASSERT_TRUE(plan.place(r, ids.data()));
            for (int k = 0; k < c.topK; k++) {
              EXPECT_EQ(plan.ids(row)[k], ids[k]);
              if (ids[k] < 0) continue;
              const int64_t slot = used[ids[k]]++;
              if (layout != ncclMoeLayoutRankMajor) {
                EXPECT_EQ(plan.slots(row)[k], slot);
              }
            }
            row++;
          }
          EXPECT_FALSE(plan.place(r, std::vector<int32_t>(c.topK, -1).data())) << "one row too many";
        }
        int64_t group = 0, sum = 0;
        for (int l = 0; l < nLocal; l++) {
          EXPECT_EQ(plan.expertCounts()[l], used[l]);
          if (layout != ncclMoeLayoutRankMajor) {
            EXPECT_EQ(plan.group(l), group);
          }
          sum += used[l];
          group += layout == ncclMoeLayoutExpertPadded ? c.nRanks * c.maxTokens
                                                       : (used[l] + alignment - 1) / alignment * alignment;
        }
        EXPECT_EQ(plan.nRows(), layout == ncclMoeLayoutRankMajor     ? row
                                : layout == ncclMoeLayoutExpertMajor ? group
                                                                     : sum);
      }
    }
  }
}

TEST(Routing, BadSelectionsAreNamed) {
  const std::vector<ExpertHome> home = {{0, 0}, {0, 1}, {1, 0}};
  const int firstLocal[] = {0, 2};
  const Placement placement{3, 2, home.data()};
  SendPlan plan;
  ASSERT_EQ(plan.allocate(2, 3, 4, 3), ncclSuccess);
  BadSelection bad{};
  const int32_t tooLarge[] = {0, 1, 2, 0, -1, 3};
  EXPECT_FALSE(plan.build(TopkView{tooLarge, false, 3}, 2, placement, firstLocal, &bad));
  EXPECT_EQ(bad.token, 1);
  EXPECT_EQ(bad.position, 2);
  EXPECT_EQ(bad.expert, 3);
  const int64_t negative[] = {-1, -1, -1, -2, 0, 0};
  EXPECT_FALSE(plan.build(TopkView{negative, true, 3}, 2, placement, firstLocal, &bad));
  EXPECT_EQ(bad.token, 1);
  EXPECT_EQ(bad.position, 0);
  EXPECT_EQ(bad.expert, -2);
  const int64_t repeated[] = {1, -1, 1};
  EXPECT_FALSE(plan.build(TopkView{repeated, true, 3}, 1, placement, firstLocal, &bad));
  EXPECT_EQ(bad.token, 0);
  EXPECT_EQ(bad.position, 2);
  EXPECT_EQ(bad.expert, 1);
  const int64_t huge[] = {0, -1, int64_t{1} << 32}; // 0 if it were cut to 32 bits
  EXPECT_FALSE(plan.build(TopkView{huge, true, 3}, 1, placement, firstLocal, &bad));
  EXPECT_EQ(bad.position, 2);
}

TEST(Routing, WhatAPeerSaysIsChecked) {
  RecvPlan plan;
  ASSERT_EQ(plan.allocate(ncclMoeLayoutExpertMajor, 2, 2, 10, 2, 1), ncclSuccess);
  const auto plausible = [&](int64_t rows, int32_t a, int32_t b) {
    const int32_t counts[] = {a, b};
    return plan.plausible(rows, counts);
  };
  EXPECT_TRUE(plausible(10, 10, 10));
  EXPECT_TRUE(plausible(0, 0, 0));
  EXPECT_FALSE(plausible(11, 10, 10)) << "more rows than tokens";
  EXPECT_FALSE(plausible(-1, 0, 0));
  EXPECT_FALSE(plausible(5, 6, 0)) << "more rows for an expert than rows";
  EXPECT_FALSE(plausible(5, -1, 5));
  EXPECT_FALSE(plausible(5, 2, 2)) << "rows without a selection";
  const int64_t rows[] = {1, 1};
  const int32_t counts[] = {1, 0, 0, 1};
  ASSERT_TRUE(plan.build(rows, counts));
  const int32_t outOfRange[] = {2, -1}, below[] = {-2, 0}, notCounted[] = {1, -1}, good[] = {0, -1};
  EXPECT_FALSE(plan.place(0, outOfRange));
  EXPECT_FALSE(plan.place(0, below));
  EXPECT_FALSE(plan.place(0, notCounted)) << "expert 1 gets none from rank 0";
  EXPECT_TRUE(plan.place(0, good));
}

TEST(Routing, WireRowPartsDoNotOverlap) {
  for (const size_t payload : {16, 48, 7168}) {
    for (const size_t scale : {0, 4, 56}) {
      for (const size_t k : {0, 1, 8, 31}) {
        const WireRow row = WireRow::make(payload, scale, k, k, 1);
        EXPECT_GE(row.scaleAt, payload);
        EXPECT_GE(row.idAt, row.scaleAt + scale);
        EXPECT_EQ(row.weightAt, row.idAt + 4 * k);
        EXPECT_EQ(row.gradAt, row.weightAt + 4 * k);
        EXPECT_GE(row.stride, row.gradAt + 4);
        EXPECT_EQ(row.stride % 16, 0U);
        EXPECT_EQ(row.idAt % 16, 0U);
      }
    }
  }
}

} // namespace
