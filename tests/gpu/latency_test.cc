// Latency mode: phases in every order, data that looks like nothing, one SM, graphs.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>

#include "gpu/latency_case.h"
#include "gpu/occupy.h"

namespace moe::test {
namespace {

int smCount() {
  int n = 0;
  cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0);
  return n;
}

// A routing with a dispatch and a combine whose halves are called one by one, on any streams.
class InPhases {
 public:
  enum Half { kSendDispatch, kCompleteDispatch, kSendCombine, kCompleteCombine, kHalves };

  std::string make(GpuRank& rank, const DecodeShape& shape) {
    const ncclMoeRoutingConfig_t config = shape.routing();
    RANK_OK(ncclMoeRoutingCreate(&routing_, rank.comm(), &config), rank.comm());
    return "";
  }
  std::string begin(GpuRank& rank, const DecodeCase& e) {
    DispatchStyle style;
    style.flags = NCCL_MOE_SEND_ONLY;
    dispatch_ = std::make_unique<DispatchCall>(*e.reference, rank.rank(), style);
    combine_ = std::make_unique<CombineCall>(*e.reference, e.combine, rank.rank(), false, NCCL_MOE_SEND_ONLY);
    RANK_TRY(rank.upload(*dispatch_, false));
    RANK_TRY(rank.upload(*combine_, false));
    next_ = kSendDispatch;
    return "";
  }
  // The next half, on this stream: the library orders it behind the half before.
  std::string advance(GpuRank& rank, cudaStream_t stream) {
    switch (next_++) {
    case kSendDispatch:
      RANK_OK(ncclMoeDispatch(&dispatch_->args(), routing_, rank.comm(), stream), rank.comm());
      return "";
    case kSendCombine:
      RANK_OK(ncclMoeCombine(&combine_->args(), routing_, rank.comm(), stream), rank.comm());
      return "";
    default:
      RANK_OK(ncclMoeComplete(routing_, rank.comm(), stream), rank.comm());
      return "";
    }
  }
  std::string verify() const {
    RANK_TRY(dispatch_->verify());
    return combine_->verify();
  }

 private:
  ncclMoeRouting_t routing_ = nullptr;
  std::unique_ptr<DispatchCall> dispatch_;
  std::unique_ptr<CombineCall> combine_;
  int next_ = kSendDispatch;
};

// Two routings in flight on one communicator, their halves in every order that there is, the same on every rank, on
// streams that differ.  With two ranks the halves of a third routing come anywhere in between.
TEST(GpuLatencyMode, PhasesInEveryOrder) {
  NEED_GPUS(1);
  constexpr int kStreams = 3, kDraws = 5, kTurns = 2 * InPhases::kHalves;
  const uint64_t seed = testSeed();
  std::vector<std::vector<int>> orders; // whose turn it is
  for (unsigned turns = 0; turns < 1u << kTurns; turns++) {
    std::vector<int> order;
    for (int i = 0; i < kTurns; i++) order.push_back(static_cast<int>(turns >> i & 1));
    if (std::count(order.begin(), order.end(), 1) == InPhases::kHalves) orders.push_back(order);
  }
  ASSERT_EQ(orders.size(), 70u); // 8 over 4
  for (const int nRanks : {2, 3}) {
    const int nRoutings = nRanks == 2 ? 3 : 2;
    std::vector<DecodeShape> shapes;
    std::vector<std::vector<DecodeCase>> draws(kDraws); // one case for each routing
    for (int i = 0; i < nRoutings; i++) {
      DecodeShape shape = randomShape(seed + static_cast<uint64_t>(i), nRanks);
      shape.nTokens = 8;
      shape.layout = static_cast<ncclMoeLayout_t>((i + nRanks - 2) % 3);
      shape.alignment = shape.layout == ncclMoeLayoutExpertMajor ? 4 : 1;
      if (shape.layout == ncclMoeLayoutRankMajor) shape.exact = shape.weighted = false;
      shapes.push_back(shape);
      for (size_t draw = 0; draw < kDraws; draw++) {
        draws[draw].push_back(makeDecode(seed + 1000 * draw + static_cast<uint64_t>(i), shape));
      }
    }
    DecodeShape most;
    most.nRanks = nRanks;
    most.nTokens = 64;
    most.topK = 8;
    DecodeRun run;
    run.nRanks = nRanks;
    const std::string wrong = runDecode(most.world(), run, [&](GpuRank& rank, Meeting&) -> std::string {
      std::vector<InPhases> routings(static_cast<size_t>(nRoutings));
      std::array<Stream, kStreams> streams;
      for (int i = 0; i < nRoutings; i++) RANK_TRY(routings[i].make(rank, shapes[i]));
      Random third(seed + 77), mine(seed + 78 + static_cast<uint64_t>(rank.rank()));
      for (size_t round = 0; round < orders.size(); round++) {
        const std::vector<DecodeCase>& cases = draws[round % kDraws];
        for (int i = 0; i < nRoutings; i++) RANK_TRY(routings[i].begin(rank, cases[static_cast<size_t>(i)]));
        std::vector<int> order = orders[round];
        for (int half = 0; nRoutings == 3 && half < InPhases::kHalves; half++) {
          order.insert(order.begin() + pick(third, 0, static_cast<int>(order.size())), 2);
        }
        const bool oneStream = round % 4 == 0;
        for (const int i : order) {
          RANK_TRY(routings[i].advance(rank, oneStream ? streams[0] : streams[pick(mine, 0, kStreams - 1)]));
        }
        for (const Stream& stream : streams) RANK_CUDA(cudaStreamSynchronize(stream));
        RANK_TRY(asyncIs(rank, ncclSuccess));
        RANK_TRY(rank.download());
        for (int i = 0; i < nRoutings; i++) {
          const std::string bad = routings[i].verify();
          if (!bad.empty()) {
            std::string turns;
            for (const int turn : order) turns += std::to_string(turn);
            return format("order %s, routing %d, %s, %s: ", turns.c_str(), i,
                          describe(cases[i].reference->problem()).c_str(), describe(cases[i].combine).c_str()) +
                   bad;
          }
        }
        rank.forget();
      }
      return "";
    });
    ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

// A sending half ends though no other rank has called anything yet.  Between the halves the GPU is free: rank 0 fills
// its own with another kernel, and the other ranks complete meanwhile.
TEST(GpuLatencyMode, BetweenTheHalvesTheGpuIsFree) {
  NEED_GPUS(1);
  constexpr int kRanks = 2, kRoutings = 3, kOccupiedMs = 700;
  const uint64_t seed = testSeed();
  DecodeShape shape;
  shape.nRanks = kRanks;
  DecodeRun run;
  run.nRanks = kRanks;
  run.numSms = gpuCount() >= kRanks ? 0 : 8;
  const std::string wrong = runDecode(shape.world(), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
    std::vector<InPhases> routings(kRoutings);
    std::vector<DecodeCase> cases;
    cases.reserve(kRoutings); // the calls refer to them
    Stream other;
    RANK_CUDA(occupySms(0, 0, other));
    for (int i = 0; i < kRoutings; i++) {
      cases.push_back(makeDecode(seed + static_cast<uint64_t>(i), shape));
      RANK_TRY(routings[i].make(rank, shape));
      RANK_TRY(routings[i].begin(rank, cases.back()));
    }
    for (int half = InPhases::kSendDispatch; half < InPhases::kHalves; half += 2) {
      for (int turn = 0; turn < kRanks; turn++) {
        RANK_TRY(meetAll(rank, meeting, kRanks));
        if (turn != rank.rank()) continue;
        for (InPhases& routing : routings) RANK_TRY(routing.advance(rank, rank.stream()));
        RANK_TRY(asyncIs(rank, ncclSuccess)); // it has ended
      }
      RANK_TRY(meetAll(rank, meeting, kRanks));
      if (rank.rank() == 0) {
        // On one GPU the other ranks need some SMs.
        RANK_CUDA(occupySms(gpuCount() >= kRanks ? smCount() : smCount() - 16, kOccupiedMs, other));
        std::this_thread::sleep_for(std::chrono::milliseconds(50)); // it runs
      }
      RANK_TRY(meetAll(rank, meeting, kRanks));
      if (rank.rank() != 0) {
        for (int i = kRoutings; i-- > 0;) RANK_TRY(routings[i].advance(rank, rank.stream()));
        RANK_TRY(asyncIs(rank, ncclSuccess));
      }
      RANK_TRY(meetAll(rank, meeting, kRanks));
      if (rank.rank() != 0) continue;
      RANK_CHECK(cudaStreamQuery(other) == cudaErrorNotReady, "the other ranks ended only after %d ms", kOccupiedMs);
      (void)cudaGetLastError();
      for (int i = kRoutings; i-- > 0;) RANK_TRY(routings[i].advance(rank, rank.stream()));
      RANK_TRY(asyncIs(rank, ncclSuccess));
      RANK_CUDA(cudaStreamSynchronize(other));
    }
    RANK_TRY(rank.download());
    for (const InPhases& routing : routings) RANK_TRY(routing.verify());
    return "";
  });
  ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

// Rank 0 has one SM, where its blocks run one after the other: the first ones do what its peer needs, of a dispatch
// either by sending alone or, where there are three blocks that do everything, by sending what the others would have
// sent.
TEST(GpuLatencyMode, OneSmIsEnough) {
  NEED_GPUS(2);
  constexpr int kCalls = 3, kOccupiedMs = 800;
  const uint64_t seed = testSeed();
  std::vector<DecodeShape> shapes;
  for (const ncclMoeLayout_t layout : {ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded}) {
    for (const bool cast : {false, true}) {
      DecodeShape shape;
      shape.nTokens = 100;
      shape.hidden = 1024;
      shape.topK = 2;
      shape.layout = layout;
      shape.quant = cast ? ncclMoeQuantFp8 : ncclMoeQuantNone;
      shape.combineCast = cast;
      shapes.push_back(shape);
    }
  }
  DecodeRun run;
  run.numSms = 0;
  const std::string wrong = runDecode(shapes[0].world(), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
    Stream other;
    RANK_CUDA(occupySms(0, 0, other));
    for (const DecodeShape& shape : shapes) {
      ncclMoeRouting_t routing = nullptr;
      const ncclMoeRoutingConfig_t config = shape.routing();
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
      std::vector<DecodeCase> cases;
      std::vector<std::unique_ptr<DispatchCall>> dispatches;
      std::vector<std::unique_ptr<CombineCall>> combines;
      for (int i = 0; i < kCalls; i++) cases.push_back(makeDecode(seed + static_cast<uint64_t>(i), shape));
      for (const DecodeCase& e : cases) {
        dispatches.push_back(std::make_unique<DispatchCall>(*e.reference, rank.rank(), DispatchStyle()));
        combines.push_back(std::make_unique<CombineCall>(*e.reference, e.combine, rank.rank(), false, 0));
        dispatches.back()->args().numSms = dispatches.size() == 2 ? 3 : 0;
        RANK_TRY(rank.upload(*dispatches.back(), false));
        RANK_TRY(rank.upload(*combines.back(), false));
      }
      const std::string where =
        format("layout %d, quant %d", static_cast<int>(shape.layout), static_cast<int>(shape.quant));
      RANK_TRY(meetAll(rank, meeting, 2));
      if (rank.rank() == 0) {
        RANK_CUDA(occupySms(smCount() - 1, kOccupiedMs, other));
        std::this_thread::sleep_for(std::chrono::milliseconds(50)); // it runs
      }
      RANK_TRY(meetAll(rank, meeting, 2));
      for (int i = 0; i < kCalls; i++) {
        RANK_OK(ncclMoeDispatch(&dispatches[i]->args(), routing, rank.comm(), rank.stream()), rank.comm());
        RANK_OK(ncclMoeCombine(&combines[i]->args(), routing, rank.comm(), rank.stream()), rank.comm());
      }
      RANK_TRY(asyncIs(rank, ncclSuccess));
      if (rank.rank() == 0) {
        RANK_CHECK(cudaStreamQuery(other) == cudaErrorNotReady, "in %s it took until the SMs were free, after %d ms",
                   where.c_str(), kOccupiedMs);
        (void)cudaGetLastError();
        RANK_CUDA(cudaStreamSynchronize(other));
      }
      RANK_TRY(rank.download());
      std::string bad;
      for (int i = 0; i < kCalls && bad.empty(); i++) {
        bad = dispatches[i]->verify();
        if (bad.empty()) bad = combines[i]->verify();
      }
      if (!bad.empty()) return bad + " in " + where;
      rank.forget();
      RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
    }
    return "";
  });
  ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

// Rows, scales, weights, sums and gradients that look like empty packets arrive as they are.
TEST(GpuLatencyMode, DataThatLooksLikeNothing) {
  NEED_GPUS(1);
  constexpr int kRounds = 4;
  const uint64_t seed = testSeed();
  std::vector<DecodeShape> shapes;
  for (int i = 0; i < 18; i++) {
    DecodeShape s;
    s.nTokens = 12;
    s.hidden = 320;
    s.topK = i % 2 == 0 ? 4 : 8;
    s.likeEmpty = true;
    s.layout = static_cast<ncclMoeLayout_t>(i % 3);
    const ncclDataType_t types[] = {ncclBfloat16, ncclMoeFloat8e4m3, ncclFloat32};
    s.quant = static_cast<ncclMoeQuant_t>(i / 3 % 3);
    if (s.quant == ncclMoeQuantNone) s.type = types[i / 9 + i % 2], s.scaleBytes = 32;
    if (i % 4 == 0) s.scaleLayout = ncclMoeScaleColumnMajor;
    const ncclDataType_t sums[] = {ncclBfloat16, ncclFloat16, ncclFloat32};
    s.combineType = sums[i / 2 % 3];
    s.combineCast = s.combineType == ncclBfloat16 && i < 9;
    s.sparse = i % 2 == 1; // sums of one row
    s.weighted = s.layout != ncclMoeLayoutRankMajor && i % 4 < 2;
    s.exact = s.layout != ncclMoeLayoutRankMajor && i >= 9;
    s.withGrads = true;
    shapes.push_back(s);
  }
  DecodeShape most;
  most.topK = 8;
  const std::string wrong = runDecode(most.world(), DecodeRun(), [&](GpuRank& rank, Meeting&) -> std::string {
    for (const DecodeShape& shape : shapes) {
      ncclMoeRouting_t routing = nullptr;
      const ncclMoeRoutingConfig_t config = shape.routing();
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
      for (int round = 0; round < kRounds; round++) {
        DecodeShape now = shape;
        now.likeEmpty = round != 2; // what was said of a record's last user does not hold for the next
        const DecodeCase e = makeDecode(seed + static_cast<uint64_t>(round), now);
        const std::string bad = exchangeOnce(rank, routing, e);
        if (!bad.empty()) {
          return bad + format(" in round %d of %s, %s", round, describe(e.reference->problem()).c_str(),
                              describe(e.combine).c_str());
        }
      }
      RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
    }
    return "";
  });
  ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

// A graph, in phases or not, replayed with other tokens, counts and selections, checked against the reference.
TEST(GpuLatencyMode, GraphReplaysWithChangingRoutings) {
  NEED_GPUS(1);
  constexpr int kRanks = 3, kReplays = 12;
  constexpr size_t kPiece = size_t{4} << 20;
  const uint64_t seed = testSeed();
  std::vector<DecodeShape> shapes;
  for (int i = 0; i < 6; i++) {
    DecodeShape s = randomShape(seed + static_cast<uint64_t>(i), kRanks);
    s.layout = static_cast<ncclMoeLayout_t>(i % 3);
    s.alignment = s.layout == ncclMoeLayoutExpertMajor ? 8 : 1;
    s.quant = i < 3 ? ncclMoeQuantFp8Ue8m0 : ncclMoeQuantFp8;
    s.type = ncclBfloat16, s.scaleBytes = 0;
    s.weighted = s.layout != ncclMoeLayoutRankMajor;
    s.exact = s.weighted && !s.combineCast && i >= 3;
    shapes.push_back(s);
  }
  DecodeShape most;
  most.nRanks = kRanks;
  most.nTokens = 64;
  most.topK = 8;
  DecodeRun run;
  run.nRanks = kRanks;
  const std::string wrong = runDecode(most.world(), run, [&](GpuRank& rank, Meeting&) -> std::string {
    for (size_t i = 0; i < shapes.size(); i++) {
      const DecodeShape& shape = shapes[i];
      const bool inPhases = i % 2 == 1;
      ncclMoeRouting_t routing = nullptr;
      const ncclMoeRoutingConfig_t config = shape.routing();
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
      cudaGraphExec_t graph = nullptr;
      for (int replay = 0; replay < kReplays; replay++) {
        const DecodeCase e = makeDecode(seed + 31 * static_cast<uint64_t>(replay), shape);
        DispatchStyle style = styleInGraph(shape, e, rank.rank());
        style.flags = inPhases ? NCCL_MOE_SEND_ONLY : 0u;
        rank.forget(kPiece);
        CallPair calls(rank, e, style);
        RANK_TRY(calls.upload(rank, true));
        if (graph == nullptr) RANK_TRY(capture(rank, &graph, [&] { return calls.enqueue(rank, routing); }));
        RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
        RANK_TRY(asyncIs(rank, ncclSuccess));
        RANK_TRY(rank.download());
        const std::string bad = calls.verify();
        if (!bad.empty()) {
          return bad + format(" in replay %d of %s, %s", replay, describe(e.reference->problem()).c_str(),
                              describe(e.combine).c_str());
        }
      }
      RANK_CUDA(cudaGraphExecDestroy(graph));
      RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
      rank.forget();
    }
    return "";
  });
  ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

} // namespace
} // namespace moe::test
