// Bad arguments one by one: each is refused with the right code and a sentence that names the argument, writes nothing,
// and leaves the communicator as usable as before.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "api/one_rank.h"

namespace moe::test {
namespace {

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
     "args.scaleLayout,args.recvCapacity 6 ,multiple of 4"},
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
    {"EXACT of a dispatch", kRankMajor, [](Args& a, const Tensors&) { a.flags = NCCL_MOE_EXACT; },
     "args.flags,NCCL_MOE_EXACT,ncclMoeCombine"},
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
              // Or with the same, where nTokensDev said that fewer count; the sentence names the field that says it.
              int counting = 1;
              args = t.dispatch();
              args.nTokensDev = &counting;
              RANK_OK(ncclMoeDispatch(&args, routing, comm, nullptr), comm);
              args.flags = NCCL_MOE_KEEP_ROUTING;
              args.nTokensDev = nullptr;
              RANK_RESULT(ncclMoeDispatch(&args, routing, comm, nullptr), ncclInvalidArgument, comm,
                          "args.nTokens on rank 0 is 2,has 1");
              args.nTokensDev = &counting;
              counting = 2;
              RANK_RESULT(ncclMoeDispatch(&args, routing, comm, nullptr), ncclInvalidArgument, comm,
                          "args.nTokensDev on rank 0 holds 2,has 1");
              counting = 1;
              RANK_OK(ncclMoeDispatch(&args, routing, comm, nullptr), comm);
              // Column-major scales of a padded routing whose planes are no multiple of 4 rows.
              ncclMoeRoutingConfig_t oddConfig = goodRouting(kPadded);
              oddConfig.maxTokens = 6;
              ncclMoeRouting_t odd = nullptr;
              RANK_OK(ncclMoeRoutingCreate(&odd, comm, &oddConfig), comm);
              args = t.dispatch();
              args.scales = t.scales.data();
              args.scaleBytes = 4;
              args.scaleLayout = ncclMoeScaleColumnMajor;
              args.recvScales = t.recvScales.data();
              RANK_RESULT(ncclMoeDispatch(&args, odd, comm, nullptr), ncclInvalidArgument, comm,
                          "args.scaleLayout,1 ranks,config.maxTokens 6,multiple of 4");
              RANK_OK(ncclMoeRoutingDestroy(odd, comm), comm);
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
  ncclResult_t want = ncclInvalidArgument;
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
     "args.flags,NCCL_MOE_KEEP_ROUTING,ncclMoeDispatch"},
    {"unknown flag", kExpertMajor, [](Combine& a, const Tensors&) { a.flags = 1u << 31; }, "args.flags"},
    {"numSms negative", kRankMajor, [](Combine& a, const Tensors&) { a.numSms = -1; }, "args.numSms"},
    {"quant unknown", kRankMajor, [](Combine& a, const Tensors&) { a.quant = static_cast<ncclMoeQuant_t>(7); },
     "args.quant"},
    {"quant UE8M0", kRankMajor, [](Combine& a, const Tensors&) { a.quant = ncclMoeQuantFp8Ue8m0; }, "args.quant"},
    {"quant of FP32", kRankMajor,
     [](Combine& a, const Tensors&) {
       a.quant = ncclMoeQuantFp8;
       a.type = ncclFloat32;
       a.hidden = 4;
     },
     "args.quant,args.type,ncclBfloat16"},
    {"quant with EXACT", kExpertMajor,
     [](Combine& a, const Tensors&) {
       a.quant = ncclMoeQuantFp8;
       a.flags = NCCL_MOE_EXACT;
     },
     "args.quant,NCCL_MOE_EXACT"},
    {"quant of half a unit", kRankMajor,
     [](Combine& a, const Tensors&) {
       a.quant = ncclMoeQuantFp8;
       a.hidden = 8;
     },
     "args.hidden 8,16,FP8"},
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
                std::string wrong = expectResult(where.c_str(), result, bad.want, comm, bad.mentions);
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
