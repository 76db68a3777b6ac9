// Errors that need several ranks to arise: every rank returns, the sentence names who and what, nothing is written, and
// the communicator works afterwards.
#include <gtest/gtest.h>

#include <functional>

#include "host/job.h"

namespace moe::test {
namespace {

constexpr int kExperts = 8;

World smallWorld(int nRanks) {
  World world;
  world.nRanks = nRanks;
  world.nExperts = kExperts;
  world.maxTokens = 32;
  world.maxTopK = 4;
  world.maxRowBytes = 512;
  world.expertToRank = blockPlacement(kExperts, nRanks);
  return world;
}

const Place kPlaces[] = {{"threads", 0, 0}, {"processes", 1, 0}, {"hosts", 1, 2}};

ClusterOptions optionsFor(const Place& place, int nRanks) {
  ClusterOptions options;
  options.nRanks = nRanks;
  options.ranksPerProcess = place.ranksPerProcess;
  options.nHosts = place.nHosts;
  return options;
}

// A problem in which every rank receives rows.
DispatchProblem busyProblem(const World& world, ncclMoeLayout_t layout) {
  Random random(testSeed());
  DispatchProblem p;
  p.nRanks = world.nRanks;
  p.nExperts = world.nExperts;
  p.expertToRank = world.expertToRank;
  p.topK = 3;
  p.hidden = 48;
  p.maxTokens = world.maxTokens;
  p.type = ncclBfloat16;
  p.layout = layout;
  p.weighted = true;
  p.scaleBytes = 4;
  p.sources.resize(static_cast<size_t>(world.nRanks));
  for (size_t s = 0; s < p.sources.size(); s++) {
    Source& source = p.sources[s];
    source.nTokens = 20 + static_cast<int>(s);
    const size_t nTokens = static_cast<size_t>(source.nTokens);
    fillSelections(random, world, Selections::uniform, p.topK, &source);
    source.x.resize(nTokens * 48 * 2);
    fillElements(random, p.type, false, false, source.x.data(), nTokens * 48);
    source.topkWeights.assign(nTokens * 3, 0.5f);
    source.scales.assign(nTokens * 4, 9);
  }
  return p;
}

// The healthy exchange of that problem, on a routing that exists.
std::string exchange(Rank& rank, ncclMoeRouting_t routing, const Reference& reference, bool sendOnly = false) {
  DispatchStyle style;
  style.flags = sendOnly ? NCCL_MOE_SEND_ONLY : 0u;
  const DispatchCall call(reference, rank.rank(), style);
  RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), nullptr), rank.comm());
  if (sendOnly) RANK_OK(ncclMoeComplete(routing, rank.comm(), nullptr), rank.comm());
  return call.verify();
}

class Errors : public testing::TestWithParam<Place> {};
INSTANTIATE_TEST_SUITE_P(Places, Errors, testing::ValuesIn(kPlaces), testing::PrintToStringParamName());

TEST_P(Errors, ReceiveCapacityExceeded) {
  const int nRanks = 3;
  const World world = smallWorld(nRanks);
  for (const ncclMoeLayout_t layout : {ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor}) {
    for (const bool sendOnly : {false, true}) {
      const Reference reference(busyProblem(world, layout));
      const ClusterResult result = runRanks(optionsFor(GetParam(), nRanks), [&](Rank& rank) -> std::string {
        RANK_OK(rank.init(world.config()), nullptr);
        const ncclMoeRoutingConfig_t config = routingConfig(world, reference.problem(), true);
        ncclMoeRouting_t routing = nullptr;
        RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
        for (int round = 0; round < 2; round++) {
          // One row too few on rank 1, all at once too few on another round.
          const int64_t needed = reference.rowsNeeded(1);
          DispatchStyle style;
          style.slack = 0;
          style.flags = sendOnly ? NCCL_MOE_SEND_ONLY : 0u;
          DispatchCall call(reference, rank.rank(), style);
          if (rank.rank() == 1) call.args().recvCapacity = round == 0 ? needed - 1 : 0;
          ncclResult_t result = ncclMoeDispatch(&call.args(), routing, rank.comm(), nullptr);
          if (result == ncclSuccess && sendOnly) result = ncclMoeComplete(routing, rank.comm(), nullptr);
          const std::string words = "rank 1," + std::to_string(needed);
          RANK_TRY(expectResult("dispatch into too little", result, ncclInvalidUsage, rank.comm(), words));
          RANK_TRY(call.verifyRowsUntouched());
          int64_t nRows = -1;
          RANK_RESULT(ncclMoeRoutingGetCounts(routing, rank.comm(), &nRows, nullptr), ncclInvalidUsage, rank.comm(),
                      std::to_string(needed));
          RANK_CHECK(nRows == reference.delivery(rank.rank()).nRows, "GetCounts says %lld",
                     static_cast<long long>(nRows));
          RANK_TRY(exchange(rank, routing, reference, sendOnly));
        }
        return "";
      });
      ASSERT_EQ(result.failures(), "") << "layout " << layout << ", sendOnly " << sendOnly;
    }
  }
}

TEST_P(Errors, RefusedWhileKeepingTheRouting) {
  const World world = smallWorld(2);
  const Reference reference(busyProblem(world, ncclMoeLayoutExpertMajor));
  Random random(testSeed());
  const CombineProblem sums = randomCombine(random, world, reference);
  const ClusterResult result = runRanks(optionsFor(GetParam(), 2), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(world.config()), nullptr);
    const ncclMoeRoutingConfig_t config = routingConfig(world, reference.problem(), false);
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
    RANK_TRY(exchange(rank, routing, reference));
    for (const bool sendOnly : {false, true}) {
      DispatchStyle style;
      style.flags = NCCL_MOE_KEEP_ROUTING | (sendOnly ? NCCL_MOE_SEND_ONLY : 0u);
      style.slack = 0;
      const auto keep = [&](const DispatchCall& call) {
        const ncclResult_t result = ncclMoeDispatch(&call.args(), routing, rank.comm(), nullptr);
        return result == ncclSuccess && sendOnly ? ncclMoeComplete(routing, rank.comm(), nullptr) : result;
      };
      DispatchCall tight(reference, rank.rank(), style);
      if (rank.rank() == 0) tight.args().recvCapacity = 1;
      const std::string words = "rank 0," + std::to_string(reference.rowsNeeded(0));
      RANK_RESULT(keep(tight), ncclInvalidUsage, rank.comm(), words);
      RANK_TRY(tight.verifyRowsUntouched());
      // The routing is still there, for a combine and for another dispatch.
      CombineCall combine(reference, sums, rank.rank(), false, 0);
      RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), nullptr), rank.comm());
      RANK_TRY(combine.verify());
      // Nor do other tokens than the kept ones end it.
      DispatchCall other(reference, rank.rank(), style);
      const int nTokens = other.args().nTokens - 1;
      if (rank.rank() == 0) other.args().nTokensDev = &nTokens;
      RANK_RESULT(keep(other), ncclInvalidArgument, rank.comm(), "rank 0,nTokensDev");
      RANK_TRY(other.verifyRowsUntouched());
      CombineCall again(reference, sums, rank.rank(), false, 0);
      RANK_OK(ncclMoeCombine(&again.args(), routing, rank.comm(), nullptr), rank.comm());
      RANK_TRY(again.verify());
      const DispatchCall call(reference, rank.rank(), style);
      RANK_OK(keep(call), rank.comm());
      RANK_TRY(call.verify());
    }
    return exchange(rank, routing, reference);
  });
  EXPECT_EQ(result.failures(), "");
}

// One rank's selections are wrong: it learns which token, the others learn which rank.
TEST_P(Errors, InvalidSelectionsOnOneRank) {
  const int nRanks = 3;
  const World world = smallWorld(nRanks);
  const Reference reference(busyProblem(world, ncclMoeLayoutExpertMajor));
  struct Wrong {
    int token, k;
    int64_t expert; // -100: repeat the token's first
  };
  for (const Wrong& wrong : {Wrong{7, 1, kExperts}, Wrong{0, 0, -2}, Wrong{19, 2, -100}}) {
    const ClusterResult result = runRanks(optionsFor(GetParam(), nRanks), [&](Rank& rank) -> std::string {
      RANK_OK(rank.init(world.config()), nullptr);
      const ncclMoeRoutingConfig_t config = routingConfig(world, reference.problem(), false);
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
      DispatchCall call(reference, rank.rank(), DispatchStyle());
      std::vector<int64_t> idx = reference.problem().sources[2].topkIdx;
      if (rank.rank() == 2) {
        idx[wrong.token * 3 + wrong.k] = wrong.expert != -100 ? wrong.expert : idx[wrong.token * 3];
        call.args().topkIdx = idx.data();
      }
      const ncclResult_t result = ncclMoeDispatch(&call.args(), routing, rank.comm(), nullptr);
      if (rank.rank() == 2) {
        const std::string words = "topkIdx,token " + std::to_string(wrong.token);
        RANK_TRY(expectResult("dispatch of wrong selections", result, ncclInvalidArgument, rank.comm(), words));
      } else {
        RANK_CHECK(result != ncclSuccess, "the other rank's wrong selections went unnoticed");
        const std::string sentence = ncclMoeGetLastError(rank.comm());
        RANK_CHECK(sentence.find("rank 2") != std::string::npos, "%s", sentence.c_str());
      }
      RANK_TRY(call.verifyRowsUntouched());
      return exchange(rank, routing, reference);
    });
    ASSERT_EQ(result.failures(), "") << "token " << wrong.token << " selection " << wrong.k;
  }
}

// A first half that one rank refuses, before the others have come: they hear of it from the second half, although that
// rank has none.
TEST_P(Errors, RefusedFirstHalf) {
  const int nRanks = 3;
  const World world = smallWorld(nRanks);
  const Reference reference(busyProblem(world, ncclMoeLayoutExpertMajor));
  Random random(testSeed());
  const CombineProblem sums = randomCombine(random, world, reference);
  const ClusterResult result = runRanks(optionsFor(GetParam(), nRanks), [&](Rank& rank) -> std::string {
    ncclMoeConfig_t config = world.config();
    config.timeoutMs = 1000 * kSlow;
    RANK_OK(rank.init(config), nullptr);
    const ncclMoeRoutingConfig_t routingOf = routingConfig(world, reference.problem(), false);
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &routingOf), rank.comm());
    const bool refuses = rank.rank() == 1;
    const auto inHalves = [&](const char* words, const std::function<ncclResult_t()>& firstHalf) -> std::string {
      if (refuses) {
        RANK_TRY(expectResult("the first half", firstHalf(), ncclInvalidArgument, rank.comm(), words));
        RANK_RESULT(ncclMoeComplete(routing, rank.comm(), nullptr), ncclInvalidUsage, rank.comm(), "SEND_ONLY");
      } else {
        sleepMs(100);
        RANK_OK(firstHalf(), rank.comm());
        RANK_TRY(expectResult("the second half", ncclMoeComplete(routing, rank.comm(), nullptr), ncclInvalidArgument,
                              rank.comm(), "rank 1"));
      }
      // Until the next call, for which the others must not have to wait.
      sleepMs(config.timeoutMs + 500);
      return "";
    };
    DispatchStyle style;
    style.flags = NCCL_MOE_SEND_ONLY;
    DispatchCall dispatch(reference, rank.rank(), style);
    std::vector<int64_t> idx = reference.problem().sources[1].topkIdx;
    idx[7] = kExperts;
    if (refuses) dispatch.args().topkIdx = idx.data();
    RANK_TRY(inHalves("topkIdx", [&] { return ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), nullptr); }));
    RANK_TRY(dispatch.verifyRowsUntouched());
    RANK_TRY(exchange(rank, routing, reference));
    CombineCall combine(reference, sums, rank.rank(), false, NCCL_MOE_SEND_ONLY);
    if (refuses) combine.args().x = nullptr;
    RANK_TRY(inHalves("args.x", [&] { return ncclMoeCombine(&combine.args(), routing, rank.comm(), nullptr); }));
    RANK_TRY(combine.verifyUntouched());
    return exchange(rank, routing, reference);
  });
  EXPECT_EQ(result.failures(), "");
}

// Arguments that must be the same on every rank.
TEST_P(Errors, DispatchMismatch) {
  const int nRanks = 3;
  const World world = smallWorld(nRanks);
  const Reference reference(busyProblem(world, ncclMoeLayoutExpertMajor));
  using Args = ncclMoeDispatchArgs_t;
  struct Mismatch {
    const char* word;
    std::function<void(Args&)> change;
  };
  alignas(16) static uint8_t scratch[65536];
  const std::vector<Mismatch> table = {
    {"hidden", [](Args& a) { a.hidden = 32; }},
    {"type", [](Args& a) { a.type = ncclFloat16; }},
    {"scaleBytes", [](Args& a) { a.scaleBytes = 2; }},
    {"quant",
     [](Args& a) {
       a.quant = ncclMoeQuantFp8;
       a.scales = nullptr;
       a.scaleBytes = 0;
     }},
    {"topkWeights differs,given on rank,NULL on rank",
     [](Args& a) {
       a.topkWeights = nullptr;
       a.recvWeights = nullptr;
     }},
    {"scale",
     [](Args& a) {
       a.scales = nullptr;
       a.scaleBytes = 0;
       a.recvScales = nullptr;
     }},
    {"flags", [](Args& a) { a.flags = NCCL_MOE_SEND_ONLY; }},
  };
  const ClusterResult result = runRanks(optionsFor(GetParam(), nRanks), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(world.config()), nullptr);
    for (const Mismatch& mismatch : table) {
      const ncclMoeRoutingConfig_t config = routingConfig(world, reference.problem(), false);
      ncclMoeRouting_t routing = nullptr;
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
      DispatchCall call(reference, rank.rank(), DispatchStyle());
      if (rank.rank() == 1) {
        call.args().recvX = scratch; // large enough for any of the changes
        mismatch.change(call.args());
      }
      ncclResult_t result = ncclMoeDispatch(&call.args(), routing, rank.comm(), nullptr);
      if (result == ncclSuccess && (call.args().flags & NCCL_MOE_SEND_ONLY) != 0) {
        result = ncclMoeComplete(routing, rank.comm(), nullptr);
      }
      RANK_TRY(expectResult((std::string("dispatch that differs in ") + mismatch.word).c_str(), result,
                            ncclInvalidUsage, rank.comm(), mismatch.word));
      if (rank.rank() != 1) RANK_TRY(call.verifyRowsUntouched());
      RANK_TRY(exchange(rank, routing, reference));
      RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
    }
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

TEST_P(Errors, CombineMismatch) {
  const int nRanks = 2;
  const World world = smallWorld(nRanks);
  const Reference reference(busyProblem(world, ncclMoeLayoutExpertMajor));
  Random random(testSeed());
  CombineProblem problem = randomCombine(random, world, reference);
  while (problem.exact || problem.withGradWeights || !problem.weighted || !mayBeCast(problem)) {
    problem = randomCombine(random, world, reference);
  }
  using Args = ncclMoeCombineArgs_t;
  struct Mismatch {
    const char* word;
    std::function<void(Args&)> change;
  };
  alignas(16) static uint8_t scratch[65536];
  const std::vector<Mismatch> table = {
    {"hidden", [](Args& a) { a.hidden = 8; }},
    {"type", [](Args& a) { a.type = ncclFloat16; }},
    {"quant", [](Args& a) { a.quant = ncclMoeQuantFp8; }},
    {"weights differs,given on rank,NULL on rank", [](Args& a) { a.weights = nullptr; }},
    {"withGradWeights",
     [](Args& a) {
       a.withGradWeights = 1;
       a.gradWeights = reinterpret_cast<float*>(scratch);
       a.gradTopkWeights = reinterpret_cast<float*>(scratch);
     }},
    {"flags", [](Args& a) { a.flags = NCCL_MOE_EXACT; }},
  };
  const ClusterResult result = runRanks(optionsFor(GetParam(), nRanks), [&](Rank& rank) -> std::string {
    RANK_OK(rank.init(world.config()), nullptr);
    const ncclMoeRoutingConfig_t config = routingConfig(world, reference.problem(), false);
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
    RANK_TRY(exchange(rank, routing, reference));
    for (const Mismatch& mismatch : table) {
      CombineCall call(reference, problem, rank.rank(), false, 0);
      const Args good = call.args();
      if (rank.rank() == 1) mismatch.change(call.args());
      RANK_TRY(expectResult((std::string("combine that differs in ") + mismatch.word).c_str(),
                            ncclMoeCombine(&call.args(), routing, rank.comm(), nullptr), ncclInvalidUsage, rank.comm(),
                            mismatch.word));
      RANK_TRY(call.verifyUntouched());
      RANK_OK(ncclMoeCombine(&good, routing, rank.comm(), nullptr), rank.comm());
      RANK_TRY(call.verify());
    }
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

// Ranks that call different collectives must both learn of it.
TEST_P(Errors, DifferentCollectives) {
  const World world = smallWorld(2);
  const Reference reference(busyProblem(world, ncclMoeLayoutExpertMajor));
  Random random(testSeed());
  const CombineProblem problem = randomCombine(random, world, reference);
  const ClusterResult result = runRanks(optionsFor(GetParam(), 2), [&](Rank& rank) -> std::string {
    ncclMoeConfig_t config = world.config();
    config.timeoutMs = 3000;
    RANK_OK(rank.init(config), nullptr);
    const ncclMoeRoutingConfig_t routingConf = routingConfig(world, reference.problem(), false);
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &routingConf), rank.comm());
    RANK_TRY(exchange(rank, routing, reference));
    const DispatchCall dispatch(reference, rank.rank(), DispatchStyle());
    const CombineCall combine(reference, problem, rank.rank(), false, 0);
    const ncclResult_t result = rank.rank() == 0 ? ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), nullptr)
                                                 : ncclMoeCombine(&combine.args(), routing, rank.comm(), nullptr);
    RANK_CHECK(result != ncclSuccess, "a dispatch and a combine passed for one collective");
    RANK_CHECK(*ncclMoeGetLastError(rank.comm()) != '\0');
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

TEST_P(Errors, RoutingConfigMismatch) {
  const World world = smallWorld(2);
  const ClusterResult result = runRanks(optionsFor(GetParam(), 2), [&](Rank& rank) -> std::string {
    ncclMoeConfig_t commConfig = world.config();
    commConfig.timeoutMs = 3000;
    RANK_OK(rank.init(commConfig), nullptr);
    ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
    config.topK = 2 + rank.rank();
    ncclMoeRouting_t routing = nullptr;
    const ncclResult_t result = ncclMoeRoutingCreate(&routing, rank.comm(), &config);
    RANK_CHECK(result == ncclInvalidArgument || result == ncclInvalidUsage || result == ncclRemoteError, "%s",
               resultName(result));
    RANK_CHECK(routing == nullptr);
    const std::string sentence = ncclMoeGetLastError(rank.comm());
    RANK_CHECK(sentence.find("topK") != std::string::npos, "%s", sentence.c_str());
    return runSmoke(rank, rank.comm(), kExperts);
  });
  EXPECT_EQ(result.failures(), "");
}

TEST_P(Errors, CommConfigMismatch) {
  struct Mismatch {
    const char* word;
    std::function<void(ncclMoeConfig_t&)> change;
  };
  static const int map[kExperts] = {0, 0, 0, 0, 1, 1, 0, 1};
  const std::vector<Mismatch> table = {
    {"nExperts", [](ncclMoeConfig_t& c) { c.nExperts = 4; }},
    {"maxTokens", [](ncclMoeConfig_t& c) { c.maxTokens = 31; }},
    {"maxTopK", [](ncclMoeConfig_t& c) { c.maxTopK = 3; }},
    {"maxRowBytes", [](ncclMoeConfig_t& c) { c.maxRowBytes = 256; }},
    {"mode", [](ncclMoeConfig_t& c) { c.mode = ncclMoeModeLatency; }},
    {"expertToRank", [](ncclMoeConfig_t& c) { c.expertToRank = map; }},
    {"maxMemory", [](ncclMoeConfig_t& c) { c.maxMemory = size_t{1} << 40; }},
  };
  const World world = smallWorld(2);
  for (const Mismatch& mismatch : table) {
    const ClusterResult result = runRanks(optionsFor(GetParam(), 2), [&](Rank& rank) -> std::string {
      ncclMoeConfig_t config = world.config();
      config.timeoutMs = 3000;
      if (rank.rank() == 1) mismatch.change(config);
      RANK_TRY(expectResult((std::string("init that differs in ") + mismatch.word).c_str(), rank.init(config),
                            ncclRemoteError, nullptr, mismatch.word));
      RANK_CHECK(rank.comm() == nullptr);
      return "";
    });
    EXPECT_EQ(result.failures(), "") << mismatch.word;
  }
}

// These may differ.
TEST_P(Errors, NoMismatchWhereRanksMayDiffer) {
  const World world = smallWorld(2);
  const ClusterResult result = runRanks(optionsFor(GetParam(), 2), [&](Rank& rank) -> std::string {
    ncclMoeConfig_t config = world.config();
    config.numSms = rank.rank() * 5;
    config.timeoutMs += rank.rank();
    if (rank.rank() == 1) config.expertToRank = world.expertToRank.data(); // the default map, spelled out
    RANK_OK(rank.init(config), nullptr);
    return runSmoke(rank, rank.comm(), kExperts);
  });
  EXPECT_EQ(result.failures(), "");
}

} // namespace
} // namespace moe::test
