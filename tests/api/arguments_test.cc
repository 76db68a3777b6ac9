// Bad arguments one by one: each is refused with the right code and a sentence that names the argument, writes nothing,
// and leaves the communicator as usable as before.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "common/buffer.h"
#include "common/cluster.h"

namespace moe::test {
namespace {

constexpr int kExperts = 4;
constexpr int kMaxTokens = 8;
constexpr int kTopK = 2;
constexpr int kHidden = 16; // BF16: 32 bytes
constexpr int kTokens = 2;
constexpr int kRows = 4; // received by the only rank, in expert layouts

ncclMoeConfig_t goodConfig() { return makeConfig(kExperts, kMaxTokens, kTopK, 64, 5000 * kSlow); }

ncclMoeRoutingConfig_t goodRouting(ncclMoeLayout_t layout) {
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = kTopK;
  config.layout = layout;
  return config;
}

// Room for everything that any layout delivers here.
struct Tensors {
  GuardedBuffer x = GuardedBuffer::input(std::vector<uint16_t>(kTokens * kHidden, 0x3f80));
  GuardedBuffer idx = GuardedBuffer::input(std::vector<int64_t>{0, 3, 2, 1});
  GuardedBuffer weights = GuardedBuffer::input(std::vector<float>{1, 2, 3, 4});
  GuardedBuffer scales = GuardedBuffer::input(std::vector<uint8_t>(kTokens * 4096, 7));
  GuardedBuffer recvX{size_t{kExperts} * kMaxTokens * kHidden * 4}, recvScales{size_t{kExperts} * kMaxTokens * 4096};
  GuardedBuffer recvIdx{4 * 8 * 4}, recvWeights{4 * 8 * 4}, count{8}, expertCounts{4 * kExperts + 4},
    expertOffsets{4 * (kExperts + 1) + 4};
  GuardedBuffer out{kTokens * kHidden * 4}, gradTopkWeights{kTokens * kTopK * 4 + 4};

  ncclMoeDispatchArgs_t dispatch() const {
    ncclMoeDispatchArgs_t args = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
    args.x = x.data();
    args.hidden = kHidden;
    args.nTokens = kTokens;
    args.topkIdx = idx.data();
    args.topkWeights = weights.as<float>();
    args.recvX = recvX.data();
    args.recvCapacity = kRows;
    args.recvWeights = recvWeights.as<float>();
    args.recvCount = count.as<int>();
    args.expertCounts = expertCounts.as<int>();
    return args;
  }
  ncclMoeCombineArgs_t combine() const {
    ncclMoeCombineArgs_t args = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
    args.x = recvX.data();
    args.hidden = kHidden;
    args.out = out.data();
    return args;
  }
  bool untouched() const {
    return recvX.untouched() && recvScales.untouched() && recvIdx.untouched() && recvWeights.untouched() &&
           count.untouched() && expertCounts.untouched() && expertOffsets.untouched() && out.untouched() &&
           gradTopkWeights.untouched();
  }
};

template <class T> T* misaligned(const void* ptr, size_t by) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(ptr) + by);
}

using Args = ncclMoeDispatchArgs_t;
struct BadDispatch {
  const char* what;
  ncclMoeLayout_t layout;
  std::function<void(Args&, const Tensors&)> spoil;
  const char* mentions;
  ncclResult_t want = ncclInvalidArgument;
};

const ncclMoeLayout_t kRankMajor = ncclMoeLayoutRankMajor;
const ncclMoeLayout_t kExpertMajor = ncclMoeLayoutExpertMajor;
const ncclMoeLayout_t kPadded = ncclMoeLayoutExpertPadded;

void withScales(Args& a, const Tensors& t, int bytes) {
  a.scales = t.scales.data();
  a.scaleBytes = bytes;
  a.recvScales = t.recvScales.data();
}

void withQuant(Args& a, const Tensors& t) {
  a.quant = ncclMoeQuantFp8;
  a.recvScales = t.recvScales.data();
}

std::vector<BadDispatch> badDispatches() {
  std::vector<BadDispatch> all = {
    {"no magic", kRankMajor, [](Args& a, const Tensors&) { a.magic = 0; }, "args"},
    {"size 0", kRankMajor, [](Args& a, const Tensors&) { a.size = 0; }, "args"},
    {"size without the head", kRankMajor, [](Args& a, const Tensors&) { a.size = 12; }, "args"},
    {"absurd size", kRankMajor, [](Args& a, const Tensors&) { a.size = ~size_t{0}; }, "args"},
    {"x NULL", kRankMajor, [](Args& a, const Tensors&) { a.x = nullptr; }, "args.x "},
    {"x misaligned", kRankMajor, [](Args& a, const Tensors&) { a.x = misaligned<void>(a.x, 8); }, "args.x ,16"},
    {"type unknown", kRankMajor, [](Args& a, const Tensors&) { a.type = static_cast<ncclDataType_t>(99); },
     "args.type"},
    {"type int32", kRankMajor, [](Args& a, const Tensors&) { a.type = ncclInt32; }, "args.type"},
    {"hidden 0", kRankMajor, [](Args& a, const Tensors&) { a.hidden = 0; }, "args.hidden"},
    {"hidden negative", kRankMajor, [](Args& a, const Tensors&) { a.hidden = -16; }, "args.hidden,-16"},
    {"row of 8 bytes", kRankMajor, [](Args& a, const Tensors&) { a.hidden = 4; }, "args.hidden,16"},
    {"row too long", kRankMajor, [](Args& a, const Tensors&) { a.hidden = 40; }, "args.hidden,maxRowBytes"},
    {"row too long by overflow", kRankMajor, [](Args& a, const Tensors&) { a.hidden = 0x7ffffff0; }, "args.hidden"},
    {"nTokens negative", kRankMajor, [](Args& a, const Tensors&) { a.nTokens = -1; }, "args.nTokens,-1"},
    {"nTokens too large", kRankMajor, [](Args& a, const Tensors&) { a.nTokens = kMaxTokens + 1; }, "args.nTokens,8"},
    {"nTokensDev misaligned", kRankMajor,
     [](Args& a, const Tensors& t) { a.nTokensDev = misaligned<int>(t.weights.data(), 2); }, "args.nTokensDev"},
    {"topkIdx NULL", kRankMajor, [](Args& a, const Tensors&) { a.topkIdx = nullptr; }, "args.topkIdx "},
    {"topkIdx misaligned", kRankMajor, [](Args& a, const Tensors&) { a.topkIdx = misaligned<void>(a.topkIdx, 4); },
     "args.topkIdx "},
    {"topkIdxType float", kRankMajor, [](Args& a, const Tensors&) { a.topkIdxType = ncclFloat32; }, "args.topkIdxType"},
    {"topkWeights misaligned", kRankMajor,
     [](Args& a, const Tensors&) { a.topkWeights = misaligned<float>(a.topkWeights, 1); }, "args.topkWeights"},
    {"scales without scaleBytes", kRankMajor, [](Args& a, const Tensors& t) { withScales(a, t, 0); },
     "args.scaleBytes"},
    {"scaleBytes without scales", kRankMajor,
     [](Args& a, const Tensors& t) {
       withScales(a, t, 4);
       a.scales = nullptr;
     },
     "args.scales "},
    {"scaleBytes negative", kRankMajor, [](Args& a, const Tensors& t) { withScales(a, t, -4); }, "args.scaleBytes"},
    {"scaleBytes too large", kRankMajor, [](Args& a, const Tensors& t) { withScales(a, t, 4097); },
     "args.scaleBytes,4096"},
    {"recvScales NULL", kRankMajor,
     [](Args& a, const Tensors& t) {
       withScales(a, t, 4);
       a.recvScales = nullptr;
     },
     "args.recvScales"},
    {"quant unknown", kRankMajor,
     [](Args& a, const Tensors& t) {
       withQuant(a, t);
       a.quant = static_cast<ncclMoeQuant_t>(3);
     },
     "args.quant"},
    {"quant of FP16", kRankMajor,
     [](Args& a, const Tensors& t) {
       withQuant(a, t);
       a.type = ncclFloat16;
     },
     "args.type"},
    {"cast row of 8 bytes", kRankMajor,
     [](Args& a, const Tensors& t) {
       withQuant(a, t);
       a.hidden = 8;
     },
     "args.hidden,16"},
    {"quant with scales", kRankMajor,
     [](Args& a, const Tensors& t) {
       withQuant(a, t);
       a.scales = t.scales.data();
       a.scaleBytes = 4;
     },
     "args.scale"},
    {"quant without recvScales", kExpertMajor,
     [](Args& a, const Tensors& t) {
       withQuant(a, t);
       a.recvScales = nullptr;
     },
     "args.recvScales"},
    {"scaleLayout unknown", kRankMajor,
     [](Args& a, const Tensors& t) {
       withScales(a, t, 4);
       a.scaleLayout = static_cast<ncclMoeScaleLayout_t>(2);
     },
     "args.scaleLayout"},
    {"column-major scales of 6 bytes", kRankMajor,
     [](Args& a, const Tensors& t) {
       withScales(a, t, 6);
       a.scaleLayout = ncclMoeScaleColumnMajor;
     },
     "args.scaleBytes,4"},
    {"column-major scales, capacity 6", kExpertMajor,
     [](Args& a, const Tensors& t) {
       withScales(a, t, 4);
       a.scaleLayout = ncclMoeScaleColumnMajor;
       a.recvCapacity = 6;
     },
     "args.recvCapacity,4"},
    {"recvX NULL", kRankMajor, [](Args& a, const Tensors&) { a.recvX = nullptr; }, "args.recvX "},
    {"recvX NULL, padded", kPadded, [](Args& a, const Tensors&) { a.recvX = nullptr; }, "args.recvX "},
    {"recvX misaligned", kRankMajor, [](Args& a, const Tensors&) { a.recvX = misaligned<void>(a.recvX, 4); },
     "args.recvX ,16"},
    {"recvCapacity negative", kRankMajor, [](Args& a, const Tensors&) { a.recvCapacity = -1; }, "args.recvCapacity"},
    {"recvTopkIdx in EXPERT_MAJOR", kExpertMajor,
     [](Args& a, const Tensors& t) { a.recvTopkIdx = t.recvIdx.as<int>(); }, "args.recvTopkIdx"},
    {"recvTopkIdx in EXPERT_PADDED", kPadded, [](Args& a, const Tensors& t) { a.recvTopkIdx = t.recvIdx.as<int>(); },
     "args.recvTopkIdx"},
    {"recvTopkIdx misaligned", kRankMajor,
     [](Args& a, const Tensors& t) { a.recvTopkIdx = misaligned<int>(t.recvIdx.data(), 1); }, "args.recvTopkIdx"},
    {"recvWeights without topkWeights", kRankMajor, [](Args& a, const Tensors&) { a.topkWeights = nullptr; },
     "args.recvWeights,args.topkWeights"},
    {"recvWeights misaligned", kRankMajor,
     [](Args& a, const Tensors&) { a.recvWeights = misaligned<float>(a.recvWeights, 2); }, "args.recvWeights"},
    {"recvCount misaligned", kRankMajor, [](Args& a, const Tensors&) { a.recvCount = misaligned<int>(a.recvCount, 2); },
     "args.recvCount"},
    {"expertCounts misaligned", kRankMajor,
     [](Args& a, const Tensors&) { a.expertCounts = misaligned<int>(a.expertCounts, 2); }, "args.expertCounts"},
    {"expertOffsets in RANK_MAJOR", kRankMajor,
     [](Args& a, const Tensors& t) { a.expertOffsets = t.expertOffsets.as<int>(); }, "args.expertOffsets"},
    {"expertOffsets misaligned", kExpertMajor,
     [](Args& a, const Tensors& t) { a.expertOffsets = misaligned<int>(t.expertOffsets.data(), 2); },
     "args.expertOffsets"},
    {"unknown flag", kRankMajor, [](Args& a, const Tensors&) { a.flags = 8; }, "args.flags"},
    {"EXACT of a dispatch", kRankMajor, [](Args& a, const Tensors&) { a.flags = NCCL_MOE_EXACT; }, "args.flags"},
    {"numSms negative", kRankMajor, [](Args& a, const Tensors&) { a.numSms = -1; }, "args.numSms"},
    {"KEEP_ROUTING before any dispatch", kRankMajor, [](Args& a, const Tensors&) { a.flags = NCCL_MOE_KEEP_ROUTING; },
     "KEEP_ROUTING", ncclInvalidUsage},
  };
  // Selections: token 1's second is the bad one.
  static std::vector<std::vector<int64_t>> wrong64 = {{0, 3, 2, 4}, {0, 3, 2, -2}, {0, 3, 2, 2}, {0, 3, 2, 1ll << 32}};
  static std::vector<std::vector<int32_t>> wrong32 = {{0, 3, 2, 4}, {0, 3, 2, INT32_MIN}, {0, 3, 2, 2}};
  for (const std::vector<int64_t>& idx : wrong64) {
    all.push_back({"selection out of range or repeated, int64", kExpertMajor,
                   [&idx](Args& a, const Tensors&) { a.topkIdx = idx.data(); }, "topkIdx,token 1"});
  }
  for (const std::vector<int32_t>& idx : wrong32) {
    all.push_back({"selection out of range or repeated, int32", kRankMajor,
                   [&idx](Args& a, const Tensors&) {
                     a.topkIdx = idx.data();
                     a.topkIdxType = ncclInt32;
                   },
                   "topkIdx,token 1"});
  }
  return all;
}

// A good dispatch and combine through each of the three routings.
std::string exchange(ncclMoeComm_t comm, ncclMoeRouting_t routing, ncclMoeLayout_t layout) {
  Tensors t;
  ncclMoeDispatchArgs_t dispatch = t.dispatch();
  RANK_OK(ncclMoeDispatch(&dispatch, routing, comm, nullptr), comm);
  RANK_CHECK(t.count.as<int>()[0] == (layout == kRankMajor ? kTokens : kRows), "count %d", t.count.as<int>()[0]);
  ncclMoeCombineArgs_t combine = t.combine();
  RANK_OK(ncclMoeCombine(&combine, routing, comm, nullptr), comm);
  const uint16_t want = layout == kRankMajor ? 0x3f80 : 0x4000;
  for (int i = 0; i < kTokens * kHidden; i++) {
    RANK_CHECK(t.out.as<uint16_t>()[i] == want, "element %d: 0x%x", i, t.out.as<uint16_t>()[i]);
  }
  return "";
}

std::string runOne(const std::function<std::string(Rank&)>& body) {
  ClusterOptions options;
  return runRanks(options, body).failures();
}

TEST(Arguments, Dispatch) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              RANK_OK(rank.init(goodConfig()), nullptr);
              const ncclMoeComm_t comm = rank.comm();
              for (const BadDispatch& bad : badDispatches()) {
                const std::string where = std::string("dispatch with ") + bad.what;
                const ncclMoeRoutingConfig_t config = goodRouting(bad.layout);
                ncclMoeRouting_t routing = nullptr;
                RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
                const Tensors t;
                Args args = t.dispatch();
                bad.spoil(args, t);
                const ncclResult_t result = ncclMoeDispatch(&args, routing, comm, nullptr);
                std::string wrong = expectResult(where.c_str(), result, bad.want, comm, bad.mentions);
                if (!wrong.empty()) return wrong;
                RANK_CHECK(t.untouched(), "%s wrote something", where.c_str());
                wrong = exchange(comm, routing, bad.layout);
                if (!wrong.empty()) return "after " + where + ": " + wrong;
                RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
              }
              return "";
            }),
            "");
}

TEST(Arguments, DispatchHandlesAndState) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              RANK_OK(rank.init(goodConfig()), nullptr);
              const ncclMoeComm_t comm = rank.comm();
              const ncclMoeRoutingConfig_t config = goodRouting(kExpertMajor);
              ncclMoeRouting_t routing = nullptr;
              RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
              Tensors t;
              Args args = t.dispatch();
              RANK_RESULT(ncclMoeDispatch(nullptr, routing, comm, nullptr), ncclInvalidArgument, comm, "args");
              RANK_RESULT(ncclMoeDispatch(&args, nullptr, comm, nullptr), ncclInvalidArgument, comm, "routing");
              RANK_RESULT(ncclMoeDispatch(&args, routing, nullptr, nullptr), ncclInvalidArgument, nullptr, "moe");
              RANK_RESULT(ncclMoeComplete(nullptr, comm, nullptr), ncclInvalidArgument, comm, "routing");
              RANK_RESULT(ncclMoeComplete(routing, nullptr, nullptr), ncclInvalidArgument, nullptr, "moe");
              RANK_RESULT(ncclMoeComplete(routing, comm, nullptr), ncclInvalidUsage, comm, "complete");
              RANK_CHECK(t.untouched());
              // Another communicator's routing.
              ncclMoeComm_t other = nullptr;
              const ncclMoeConfig_t commConfig = goodConfig();
              RANK_OK(ncclMoeCommInitHost(&other, 1, 0, (rank.rendezvous() + "2").c_str(), &commConfig), nullptr);
              RANK_RESULT(ncclMoeDispatch(&args, routing, other, nullptr), ncclInvalidArgument, other, "routing");
              RANK_RESULT(ncclMoeRoutingDestroy(routing, other), ncclInvalidArgument, other, "routing");
              RANK_OK(ncclMoeCommDestroy(other), nullptr);
              // KEEP_ROUTING with another T.
              RANK_OK(ncclMoeDispatch(&args, routing, comm, nullptr), comm);
              args.flags = NCCL_MOE_KEEP_ROUTING;
              args.nTokens = 1;
              RANK_RESULT(ncclMoeDispatch(&args, routing, comm, nullptr), ncclInvalidArgument, comm, "args.nTokens");
              // A second dispatch before the first is complete.
              args = t.dispatch();
              args.flags = NCCL_MOE_SEND_ONLY;
              RANK_OK(ncclMoeDispatch(&args, routing, comm, nullptr), comm);
              RANK_RESULT(ncclMoeDispatch(&args, routing, comm, nullptr), ncclInvalidUsage, comm, "complete");
              ncclMoeCombineArgs_t combine = t.combine();
              RANK_RESULT(ncclMoeCombine(&combine, routing, comm, nullptr), ncclInvalidUsage, comm, "complete");
              RANK_OK(ncclMoeComplete(routing, comm, nullptr), comm);
              RANK_RESULT(ncclMoeComplete(routing, comm, nullptr), ncclInvalidUsage, comm, "complete");
              combine.flags = NCCL_MOE_SEND_ONLY;
              RANK_OK(ncclMoeCombine(&combine, routing, comm, nullptr), comm);
              RANK_RESULT(ncclMoeCombine(&combine, routing, comm, nullptr), ncclInvalidUsage, comm, "complete");
              args = t.dispatch();
              RANK_RESULT(ncclMoeDispatch(&args, routing, comm, nullptr), ncclInvalidUsage, comm, "complete");
              RANK_OK(ncclMoeComplete(routing, comm, nullptr), comm);
              return exchange(comm, routing, kExpertMajor);
            }),
            "");
}

using Combine = ncclMoeCombineArgs_t;
struct BadCombine {
  const char* what;
  ncclMoeLayout_t layout;
  std::function<void(Combine&, const Tensors&)> spoil;
  const char* mentions;
};

void withGradients(Combine& a, const Tensors& t) {
  a.withGradWeights = 1;
  a.gradWeights = t.recvIdx.as<float>();
  a.gradTopkWeights = t.gradTopkWeights.as<float>();
}

std::vector<BadCombine> badCombines() {
  return {
    {"no magic", kRankMajor, [](Combine& a, const Tensors&) { a.magic++; }, "args"},
    {"size 0", kRankMajor, [](Combine& a, const Tensors&) { a.size = 0; }, "args"},
    {"x NULL", kExpertMajor, [](Combine& a, const Tensors&) { a.x = nullptr; }, "args.x "},
    {"x NULL, padded", kPadded, [](Combine& a, const Tensors&) { a.x = nullptr; }, "args.x "},
    {"x NULL, by rank", kRankMajor, [](Combine& a, const Tensors&) { a.x = nullptr; }, "args.x "},
    {"x misaligned", kRankMajor, [](Combine& a, const Tensors&) { a.x = misaligned<void>(a.x, 2); }, "args.x "},
    {"type FP8", kRankMajor, [](Combine& a, const Tensors&) { a.type = ncclMoeFloat8e4m3; }, "args.type"},
    {"type unknown", kRankMajor, [](Combine& a, const Tensors&) { a.type = static_cast<ncclDataType_t>(-1); },
     "args.type"},
    {"hidden 0", kRankMajor, [](Combine& a, const Tensors&) { a.hidden = 0; }, "args.hidden"},
    {"row of 24 bytes", kRankMajor, [](Combine& a, const Tensors&) { a.hidden = 12; }, "args.hidden,16"},
    {"row too long", kRankMajor, [](Combine& a, const Tensors&) { a.hidden = 40; }, "args.hidden,maxRowBytes"},
    {"out NULL", kRankMajor, [](Combine& a, const Tensors&) { a.out = nullptr; }, "args.out"},
    {"out misaligned", kRankMajor, [](Combine& a, const Tensors&) { a.out = misaligned<void>(a.out, 8); }, "args.out"},
    {"weights in RANK_MAJOR", kRankMajor, [](Combine& a, const Tensors& t) { a.weights = t.weights.as<float>(); },
     "args.weights"},
    {"weights misaligned", kExpertMajor,
     [](Combine& a, const Tensors& t) { a.weights = misaligned<float>(t.weights.data(), 2); }, "args.weights"},
    {"EXACT in RANK_MAJOR", kRankMajor, [](Combine& a, const Tensors&) { a.flags = NCCL_MOE_EXACT; }, "EXACT"},
    {"KEEP_ROUTING of a combine", kRankMajor, [](Combine& a, const Tensors&) { a.flags = NCCL_MOE_KEEP_ROUTING; },
     "args.flags"},
    {"unknown flag", kExpertMajor, [](Combine& a, const Tensors&) { a.flags = 1u << 31; }, "args.flags"},
    {"numSms negative", kRankMajor, [](Combine& a, const Tensors&) { a.numSms = -1; }, "args.numSms"},
    {"withGradWeights 2", kRankMajor,
     [](Combine& a, const Tensors& t) {
       withGradients(a, t);
       a.withGradWeights = 2;
     },
     "args.withGradWeights"},
    {"gradients without withGradWeights", kRankMajor,
     [](Combine& a, const Tensors& t) {
       withGradients(a, t);
       a.withGradWeights = 0;
     },
     "withGradWeights"},
    {"gradWeights NULL", kRankMajor,
     [](Combine& a, const Tensors& t) {
       withGradients(a, t);
       a.gradWeights = nullptr;
     },
     "args.gradWeights"},
    {"gradWeights NULL, by expert", kExpertMajor,
     [](Combine& a, const Tensors& t) {
       withGradients(a, t);
       a.gradWeights = nullptr;
     },
     "args.gradWeights"},
    {"gradTopkWeights NULL", kRankMajor,
     [](Combine& a, const Tensors& t) {
       withGradients(a, t);
       a.gradTopkWeights = nullptr;
     },
     "args.gradTopkWeights"},
    {"gradWeights misaligned", kRankMajor,
     [](Combine& a, const Tensors& t) {
       withGradients(a, t);
       a.gradWeights = misaligned<float>(a.gradWeights, 1);
     },
     "args.gradWeights"},
    {"gradTopkWeights misaligned", kRankMajor,
     [](Combine& a, const Tensors& t) {
       withGradients(a, t);
       a.gradTopkWeights = misaligned<float>(a.gradTopkWeights, 2);
     },
     "args.gradTopkWeights"},
  };
}

TEST(Arguments, Combine) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              RANK_OK(rank.init(goodConfig()), nullptr);
              const ncclMoeComm_t comm = rank.comm();
              for (const BadCombine& bad : badCombines()) {
                const std::string where = std::string("combine with ") + bad.what;
                const ncclMoeRoutingConfig_t config = goodRouting(bad.layout);
                ncclMoeRouting_t routing = nullptr;
                RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
                const Tensors t;
                Combine args = t.combine();
                RANK_RESULT(ncclMoeCombine(&args, routing, comm, nullptr), ncclInvalidUsage, comm, "dispatch");
                RANK_TRY(exchange(comm, routing, bad.layout));
                bad.spoil(args, t);
                const ncclResult_t result = ncclMoeCombine(&args, routing, comm, nullptr);
                std::string wrong = expectResult(where.c_str(), result, ncclInvalidArgument, comm, bad.mentions);
                if (!wrong.empty()) return wrong;
                RANK_CHECK(t.untouched(), "%s wrote something", where.c_str());
                wrong = exchange(comm, routing, bad.layout);
                if (!wrong.empty()) return "after " + where + ": " + wrong;
                RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
              }
              Tensors t;
              const Combine args = t.combine();
              ncclMoeRouting_t routing = nullptr;
              const ncclMoeRoutingConfig_t config = goodRouting(kRankMajor);
              RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
              RANK_RESULT(ncclMoeCombine(nullptr, routing, comm, nullptr), ncclInvalidArgument, comm, "args");
              RANK_RESULT(ncclMoeCombine(&args, nullptr, comm, nullptr), ncclInvalidArgument, comm, "routing");
              RANK_RESULT(ncclMoeCombine(&args, routing, nullptr, nullptr), ncclInvalidArgument, nullptr, "moe");
              return "";
            }),
            "");
}

struct BadInit {
  const char* what;
  std::function<void(ncclMoeConfig_t&)> spoil;
  const char* mentions;
};

TEST(Arguments, Init) {
  static const int badMap[kExperts] = {0, 0, 1, 0};
  static const int negativeMap[kExperts] = {0, -1, 0, 0};
  static const std::string longToken(256, 'a');
  static const std::vector<BadInit> table = {
    {"no magic", [](ncclMoeConfig_t& c) { c.magic = 1; }, "config"},
    {"size 4", [](ncclMoeConfig_t& c) { c.size = 4; }, "config"},
    {"nExperts 0", [](ncclMoeConfig_t& c) { c.nExperts = 0; }, "config.nExperts"},
    {"nExperts too large", [](ncclMoeConfig_t& c) { c.nExperts = (1 << 20) + 1; }, "config.nExperts"},
    {"maxTokens negative", [](ncclMoeConfig_t& c) { c.maxTokens = -1; }, "config.maxTokens"},
    {"maxTokens too large", [](ncclMoeConfig_t& c) { c.maxTokens = (1 << 24) + 1; }, "config.maxTokens"},
    {"maxTopK 0", [](ncclMoeConfig_t& c) { c.maxTopK = 0; }, "config.maxTopK"},
    {"maxTopK 33", [](ncclMoeConfig_t& c) { c.maxTopK = 33; }, "config.maxTopK"},
    {"maxRowBytes 0", [](ncclMoeConfig_t& c) { c.maxRowBytes = 0; }, "config.maxRowBytes"},
    {"maxRowBytes 24", [](ncclMoeConfig_t& c) { c.maxRowBytes = 24; }, "config.maxRowBytes"},
    {"maxRowBytes too large", [](ncclMoeConfig_t& c) { c.maxRowBytes = (1 << 24) + 16; }, "config.maxRowBytes"},
    {"mode unknown", [](ncclMoeConfig_t& c) { c.mode = static_cast<ncclMoeMode_t>(9); }, "config.mode"},
    {"numSms negative", [](ncclMoeConfig_t& c) { c.numSms = -1; }, "config.numSms"},
    {"timeoutMs negative", [](ncclMoeConfig_t& c) { c.timeoutMs = -1; }, "config.timeoutMs"},
    {"expert on a rank that is not", [](ncclMoeConfig_t& c) { c.expertToRank = badMap; }, "config.expertToRank[2]"},
    {"expert on rank -1", [](ncclMoeConfig_t& c) { c.expertToRank = negativeMap; }, "config.expertToRank[1]"},
    {"jobToken too long", [](ncclMoeConfig_t& c) { c.jobToken = longToken.c_str(); }, "config.jobToken"},
  };
  EXPECT_EQ(
    runOne([&](Rank& rank) -> std::string {
      const char* url = rank.rendezvous().c_str();
      ncclMoeConfig_t good = goodConfig();
      for (const BadInit& bad : table) {
        ncclMoeConfig_t config = goodConfig();
        bad.spoil(config);
        ncclMoeComm_t comm = reinterpret_cast<ncclMoeComm_t>(8);
        const std::string where = std::string("init with ") + bad.what;
        const ncclResult_t result = ncclMoeCommInitHost(&comm, 1, 0, url, &config);
        const std::string wrong = expectResult(where.c_str(), result, ncclInvalidArgument, nullptr, bad.mentions);
        if (!wrong.empty()) return wrong;
        RANK_CHECK(comm == nullptr, "%s left a communicator", where.c_str());
        size_t bytes = 77;
        RANK_TRY(expectResult(where.c_str(), ncclMoeCommMemoryNeeded(&config, 1, &bytes), ncclInvalidArgument, nullptr,
                              bad.mentions));
        RANK_CHECK(bytes == 77);
      }
      size_t bytes = 0;
      RANK_RESULT(ncclMoeCommMemoryNeeded(nullptr, 2, &bytes), ncclInvalidArgument, nullptr, "config");
      RANK_RESULT(ncclMoeCommMemoryNeeded(&good, 0, &bytes), ncclInvalidArgument, nullptr, "nRanks");
      RANK_RESULT(ncclMoeCommMemoryNeeded(&good, 2, nullptr), ncclInvalidArgument, nullptr, "bytes");
#ifdef NCCL_MOE_NO_CUDA
      RANK_RESULT(ncclMoeCommMemoryNeeded(&good, 2, &bytes), ncclInvalidUsage, nullptr, "host memory only");
#else
      RANK_OK(ncclMoeCommMemoryNeeded(&good, 2, &bytes), nullptr);
      RANK_CHECK(bytes > 0);
#endif
      // Not in a process without NCCL, and not in a build without CUDA.
      ncclMoeComm_t onNccl = reinterpret_cast<ncclMoeComm_t>(8);
      const auto noNccl = reinterpret_cast<ncclComm_t>(&good);
      RANK_RESULT(ncclMoeCommInit(nullptr, noNccl, &good), ncclInvalidArgument, nullptr, "moe");
      RANK_RESULT(ncclMoeCommInit(&onNccl, nullptr, &good), ncclInvalidArgument, nullptr, "comm");
      RANK_CHECK(onNccl == nullptr);
      onNccl = reinterpret_cast<ncclMoeComm_t>(8);
      RANK_RESULT(ncclMoeCommInit(&onNccl, noNccl, &good), ncclInvalidUsage, nullptr, "ncclMoeCommInit");
      RANK_CHECK(onNccl == nullptr);
      ncclMoeComm_t comm = nullptr;
      RANK_RESULT(ncclMoeCommInitHost(nullptr, 1, 0, url, &good), ncclInvalidArgument, nullptr, "moe");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 1, 0, url, nullptr), ncclInvalidArgument, nullptr, "config");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 0, 0, url, &good), ncclInvalidArgument, nullptr, "nRanks");
      RANK_RESULT(ncclMoeCommInitHost(&comm, -1, 0, url, &good), ncclInvalidArgument, nullptr, "nRanks");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 1025, 0, url, &good), ncclInvalidArgument, nullptr, "nRanks");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 2, url, &good), ncclInvalidArgument, nullptr, "rank 2");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, -1, url, &good), ncclInvalidArgument, nullptr, "rank -1");
      for (const char* badUrl :
           {"", "file", "file:/", "file://", "file://relative/path", "tcp://", "tcp://localhost", "tcp://:1234",
            "tcp://localhost:", "tcp://localhost:0", "tcp://localhost:65536", "tcp://localhost:-1",
            "tcp://localhost:12x", "udp://localhost:1234", "/tmp/x", "TCP//localhost:1"}) {
        const std::string where = std::string("init with rendezvous \"") + badUrl + "\"";
        const ncclResult_t result = ncclMoeCommInitHost(&comm, 2, 0, badUrl, &good);
        const std::string wrong = expectResult(where.c_str(), result, ncclInvalidArgument, nullptr, "rendezvous");
        if (!wrong.empty()) return wrong;
      }
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 0, nullptr, &good), ncclInvalidArgument, nullptr, "rendezvous");
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 0, "file:///nonexistent-folder/x", &good), ncclSystemError, nullptr,
                  "/nonexistent-folder/x");
      good.jobToken = nullptr;
      const std::string tcp = "tcp://127.0.0.1:" + std::to_string(freePort());
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 0, tcp.c_str(), &good), ncclInvalidArgument, nullptr, "jobToken");
      RANK_CHECK(comm == nullptr);
      // The environment may give it.
      good = goodConfig();
      RANK_OK(ncclMoeCommInitHost(&comm, 1, 0, url, &good), nullptr);
      RANK_OK(ncclMoeCommDestroy(comm), nullptr);
      return "";
    }),
    "");
}

// Too little names what is needed; exactly that is enough, and no more is taken.
TEST(Arguments, MaxMemory) {
  ClusterOptions options;
  options.nRanks = 2;
  const ClusterResult result = runRanks(options, [](Rank& rank) -> std::string {
    ncclMoeConfig_t config = goodConfig();
    config.maxMemory = 1;
    ncclMoeComm_t comm = reinterpret_cast<ncclMoeComm_t>(8);
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2, rank.rank(), rank.rendezvous().c_str(), &config), ncclInvalidArgument,
                nullptr, "config.maxMemory 1 ");
    RANK_CHECK(comm == nullptr);
    const std::string sentence = ncclMoeGetLastError(nullptr);
    size_t needed = 0;
    RANK_CHECK(sscanf(sentence.c_str(), "%*[^:]: config.maxMemory 1 is less than the %zu bytes", &needed) == 1, "%s",
               sentence.c_str());
    config.maxMemory = needed - 1;
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2, rank.rank(), rank.rendezvous().c_str(), &config), ncclInvalidArgument,
                nullptr, "maxMemory," + std::to_string(needed));
    config.maxMemory = needed;
    RANK_OK(rank.init(config), nullptr);
    ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
    RANK_OK(ncclMoeCommGetInfo(rank.comm(), &info), rank.comm());
    RANK_CHECK(info.memoryBytes <= needed, "%zu bytes needed, but %zu are taken", needed, info.memoryBytes);
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

struct BadRouting {
  const char* what;
  std::function<void(ncclMoeRoutingConfig_t&)> spoil;
  const char* mentions;
};

TEST(Arguments, Routing) {
  static const std::vector<BadRouting> table = {
    {"no magic", [](ncclMoeRoutingConfig_t& c) { c.magic = 0; }, "config"},
    {"size 15", [](ncclMoeRoutingConfig_t& c) { c.size = 15; }, "config"},
    {"topK 0", [](ncclMoeRoutingConfig_t& c) { c.topK = 0; }, "config.topK"},
    {"topK beyond maxTopK", [](ncclMoeRoutingConfig_t& c) { c.topK = kTopK + 1; }, "config.topK"},
    {"maxTokens negative", [](ncclMoeRoutingConfig_t& c) { c.maxTokens = -1; }, "config.maxTokens"},
    {"maxTokens too large", [](ncclMoeRoutingConfig_t& c) { c.maxTokens = kMaxTokens + 1; }, "config.maxTokens"},
    {"layout unknown", [](ncclMoeRoutingConfig_t& c) { c.layout = static_cast<ncclMoeLayout_t>(3); }, "config.layout"},
    {"alignment negative", [](ncclMoeRoutingConfig_t& c) { c.expertAlignment = -1; }, "config.expertAlignment"},
    {"alignment too large", [](ncclMoeRoutingConfig_t& c) { c.expertAlignment = 65537; }, "config.expertAlignment"},
    {"alignment of RANK_MAJOR",
     [](ncclMoeRoutingConfig_t& c) {
       c.layout = kRankMajor;
       c.expertAlignment = 2;
     },
     "config.expertAlignment"},
    {"hostCounts 2", [](ncclMoeRoutingConfig_t& c) { c.hostCounts = 2; }, "config.hostCounts"},
  };
  EXPECT_EQ(
    runOne([&](Rank& rank) -> std::string {
      RANK_OK(rank.init(goodConfig()), nullptr);
      const ncclMoeComm_t comm = rank.comm();
      size_t bytes = 0;
      for (const BadRouting& bad : table) {
        ncclMoeRoutingConfig_t config = goodRouting(kExpertMajor);
        bad.spoil(config);
        const std::string where = std::string("routing with ") + bad.what;
        ncclMoeRouting_t routing = reinterpret_cast<ncclMoeRouting_t>(8);
        std::string wrong = expectResult(where.c_str(), ncclMoeRoutingCreate(&routing, comm, &config),
                                         ncclInvalidArgument, comm, bad.mentions);
        if (!wrong.empty()) return wrong;
        RANK_CHECK(routing == nullptr, "%s left a routing", where.c_str());
        wrong = expectResult(where.c_str(), ncclMoeRoutingMemoryNeeded(comm, &config, &bytes), ncclInvalidArgument,
                             comm, bad.mentions);
        if (!wrong.empty()) return wrong;
      }
      ncclMoeRoutingConfig_t config = goodRouting(kExpertMajor);
      ncclMoeRouting_t routing = nullptr;
      RANK_RESULT(ncclMoeRoutingCreate(nullptr, comm, &config), ncclInvalidArgument, comm, "routing");
      RANK_RESULT(ncclMoeRoutingCreate(&routing, nullptr, &config), ncclInvalidArgument, nullptr, "moe");
      RANK_RESULT(ncclMoeRoutingCreate(&routing, comm, nullptr), ncclInvalidArgument, comm, "config");
      RANK_RESULT(ncclMoeRoutingMemoryNeeded(comm, &config, nullptr), ncclInvalidArgument, comm, "bytes");
      RANK_OK(ncclMoeRoutingMemoryNeeded(comm, &config, &bytes), comm);
      int64_t nRows = 0;
      RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
      RANK_RESULT(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), ncclInvalidUsage, comm, "hostCounts");
      RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
      config.hostCounts = 1;
      RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
      RANK_RESULT(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), ncclInvalidUsage, comm, "dispatch");
      RANK_RESULT(ncclMoeRoutingGetCounts(routing, comm, nullptr, nullptr), ncclInvalidArgument, comm, "nRows");
      RANK_RESULT(ncclMoeRoutingGetCounts(nullptr, comm, &nRows, nullptr), ncclInvalidArgument, comm, "routing");
      RANK_RESULT(ncclMoeRoutingGetCounts(routing, nullptr, &nRows, nullptr), ncclInvalidArgument, nullptr, "moe");
      RANK_TRY(exchange(comm, routing, kExpertMajor));
      RANK_OK(ncclMoeRoutingGetCounts(routing, comm, &nRows, nullptr), comm);
      RANK_CHECK(nRows == kRows);
      RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
      RANK_OK(ncclMoeRoutingDestroy(nullptr, comm), comm);
      return "";
    }),
    "");
}

TEST(Arguments, CommunicatorAndMemory) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              int version = 0;
              RANK_RESULT(ncclMoeGetVersion(nullptr), ncclInvalidArgument, nullptr, "version");
              RANK_OK(ncclMoeGetVersion(&version), nullptr);
              RANK_CHECK(version == NCCL_MOE_VERSION_CODE, "%d", version);
              version = 0;
              RANK_OK(pncclMoeGetVersion(&version), nullptr);
              RANK_CHECK(version == NCCL_MOE_VERSION_CODE, "%d", version);
              RANK_OK(ncclMoeCommDestroy(nullptr), nullptr);
              RANK_RESULT(ncclMoeCommAbort(nullptr), ncclInvalidArgument, nullptr, "moe");

              RANK_OK(rank.init(goodConfig()), nullptr);
              const ncclMoeComm_t comm = rank.comm();
              ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
              RANK_RESULT(ncclMoeCommGetInfo(comm, nullptr), ncclInvalidArgument, nullptr, "info");
              RANK_RESULT(ncclMoeCommGetInfo(nullptr, &info), ncclInvalidArgument, nullptr, "moe");
              info.magic = 3;
              RANK_RESULT(ncclMoeCommGetInfo(comm, &info), ncclInvalidArgument, nullptr, "info");
              info.magic = NCCL_MOE_MAGIC;
              RANK_OK(ncclMoeCommGetInfo(comm, &info), comm);
              RANK_CHECK(info.rank == 0 && info.nRanks == 1 && info.nLocalExperts == kExperts && info.onHost == 1 &&
                         info.nScaleUpRanks == 1);
              ncclResult_t async = ncclInternalError;
              RANK_RESULT(ncclMoeCommGetAsyncError(comm, nullptr), ncclInvalidArgument, nullptr, "asyncError");
              RANK_RESULT(ncclMoeCommGetAsyncError(nullptr, &async), ncclInvalidArgument, nullptr, "moe");
              RANK_OK(ncclMoeCommGetAsyncError(comm, &async), comm);
              RANK_CHECK(async == ncclSuccess, "%s", resultName(async));
              void* memory = nullptr;
              RANK_RESULT(ncclMoeMemAlloc(nullptr, 64, comm), ncclInvalidArgument, comm, "ptr");
              RANK_RESULT(ncclMoeMemAlloc(&memory, 0, comm), ncclInvalidArgument, comm, "bytes");
              RANK_RESULT(ncclMoeMemAlloc(&memory, 64, nullptr), ncclInvalidArgument, nullptr, "moe");
              int local = 0;
              RANK_RESULT(ncclMoeMemFree(&local, comm), ncclInvalidArgument, comm, "ptr");
              RANK_OK(ncclMoeMemAlloc(&memory, 1, comm), comm);
              RANK_CHECK(memory != nullptr && reinterpret_cast<uintptr_t>(memory) % 128 == 0);
              RANK_RESULT(ncclMoeMemFree(memory, nullptr), ncclInvalidArgument, nullptr, "moe");
              RANK_RESULT(ncclMoeMemFree(static_cast<char*>(memory) + 16, comm), ncclInvalidArgument, comm, "ptr");
              RANK_OK(ncclMoeMemFree(memory, comm), comm);
              RANK_RESULT(ncclMoeMemFree(memory, comm), ncclInvalidArgument, comm, "ptr");
              return "";
            }),
            "");
}

TEST(Arguments, LastErrorIsPerThreadAndPerCommunicator) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              RANK_CHECK(std::string(ncclMoeGetLastError(nullptr)).empty(), "%s", ncclMoeGetLastError(nullptr));
              RANK_OK(rank.init(goodConfig()), nullptr);
              const ncclMoeComm_t comm = rank.comm();
              RANK_CHECK(std::string(ncclMoeGetLastError(comm)).empty());
              RANK_RESULT(ncclMoeMemAlloc(nullptr, 64, comm), ncclInvalidArgument, comm, "ptr");
              std::string ofThread = "not run";
              std::string ofComm;
              std::thread other([&] {
                ofThread = ncclMoeGetLastError(nullptr);
                ofComm = ncclMoeGetLastError(comm);
              });
              other.join();
              RANK_CHECK(ofThread.empty(), "%s", ofThread.c_str());
              RANK_CHECK(ofComm.find("ptr") != std::string::npos, "%s", ofComm.c_str());
              // One communicator's sentence outlives calls on another.
              ncclMoeComm_t second = nullptr;
              const ncclMoeConfig_t config = goodConfig();
              RANK_OK(ncclMoeCommInitHost(&second, 1, 0, (rank.rendezvous() + "2").c_str(), &config), nullptr);
              const char* sentence = ncclMoeGetLastError(comm);
              RANK_RESULT(ncclMoeMemAlloc(nullptr, 64, second), ncclInvalidArgument, second, "ptr");
              RANK_RESULT(ncclMoeComplete(nullptr, second, nullptr), ncclInvalidArgument, second, "routing");
              RANK_CHECK(std::string(sentence).find("ptr") != std::string::npos, "%s", sentence);
              RANK_OK(ncclMoeCommDestroy(second), nullptr);
              return "";
            }),
            "");
}

// A rank that is refused has sent nothing: its peers wait until it calls rightly.
TEST(Arguments, RefusedOnOneRankOnly) {
  ClusterOptions options;
  options.nRanks = 3;
  const ClusterResult result = runRanks(options, [](Rank& rank) -> std::string {
    RANK_OK(rank.init(goodConfig()), nullptr);
    const ncclMoeComm_t comm = rank.comm();
    const ncclMoeRoutingConfig_t config = goodRouting(kRankMajor);
    ncclMoeRouting_t routing = nullptr;
    RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
    Tensors t;
    Args args = t.dispatch();
    args.recvCapacity = 3 * kTokens;
    if (rank.rank() == 1) {
      args.hidden = 7;
      RANK_RESULT(ncclMoeDispatch(&args, routing, comm, nullptr), ncclInvalidArgument, comm, "args.hidden");
      args.hidden = kHidden;
    }
    RANK_OK(ncclMoeDispatch(&args, routing, comm, nullptr), comm);
    ncclMoeCombineArgs_t combine = t.combine();
    if (rank.rank() == 2) {
      combine.out = nullptr;
      RANK_RESULT(ncclMoeCombine(&combine, routing, comm, nullptr), ncclInvalidArgument, comm, "args.out");
      combine.out = t.out.data();
    }
    RANK_OK(ncclMoeCombine(&combine, routing, comm, nullptr), comm);
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

} // namespace
} // namespace moe::test
