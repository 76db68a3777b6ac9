// Latency mode beside other work: both modes on one communicator and in one graph, two routings on two streams, the
// order of the caller's streams, memory.
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "gpu/latency_case.h"
#include "gpu/occupy.h"

namespace moe::test {
namespace {

DecodeShape prefillOf(int nRanks) {
  DecodeShape shape;
  shape.nRanks = nRanks;
  shape.nTokens = 600; // more than latency mode serves
  shape.hidden = 128;
  shape.layout = ncclMoeLayoutExpertMajor;
  shape.alignment = 16;
  return shape;
}
DecodeShape decodeOf(int nRanks) {
  DecodeShape shape;
  shape.nRanks = nRanks;
  shape.nTokens = 64;
  shape.quant = ncclMoeQuantFp8;
  shape.weighted = true;
  return shape;
}

// A routing for each mode, on one communicator in ncclMoeModeAuto.
struct BothModes {
  int nRanks;
  DecodeShape prefill, decode;
  ncclMoeRouting_t large = nullptr, small = nullptr;
};

// Over 2 and 3 ranks.
void runBothModes(uint64_t seed, bool hostCounts,
                  const std::function<std::string(GpuRank&, Meeting&, const BothModes&)>& body) {
  for (const int nRanks : {2, 3}) {
    DecodeRun run;
    run.nRanks = nRanks;
    run.mode = ncclMoeModeAuto;
    const std::string wrong =
      runDecode(prefillOf(nRanks).world(), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
        BothModes both{nRanks, prefillOf(nRanks), decodeOf(nRanks)};
        ncclMoeRoutingConfig_t large = both.prefill.routing(), small = both.decode.routing();
        large.hostCounts = small.hostCounts = hostCounts ? 1 : 0;
        RANK_OK(ncclMoeRoutingCreate(&both.large, rank.comm(), &large), rank.comm());
        RANK_OK(ncclMoeRoutingCreate(&both.small, rank.comm(), &small), rank.comm());
        return body(rank, meeting, both);
      });
    ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

// ncclMoeModeAuto serves prefill and decode from one communicator, their calls on one stream or on two.
TEST(GpuLatencyMode, BothModesAlternate) {
  NEED_GPUS(1);
  constexpr int kRounds = 10;
  const uint64_t seed = testSeed();
  runBothModes(seed, true, [&](GpuRank& rank, Meeting&, const BothModes& both) -> std::string {
    Stream other;
    Random order(seed);
    for (int round = 0; round < kRounds; round++) {
      const DecodeCase a = makeDecode(seed + static_cast<uint64_t>(round), both.prefill);
      const DecodeCase b = makeDecode(seed + 100 + static_cast<uint64_t>(round), both.decode);
      CallPair callsA(rank, a), callsB(rank, b);
      RANK_TRY(callsA.upload(rank, round % 3 == 0));
      RANK_TRY(callsB.upload(rank, round % 3 == 1));
      const cudaStream_t streamB = round % 2 == 0 ? rank.stream() : static_cast<cudaStream_t>(other);
      int nA = 0, nB = 0;
      while (nA + nB < 4) {
        const bool first = nB == 2 || (nA < 2 && chance(order, 0.5));
        int& n = first ? nA : nB;
        const ncclMoeRouting_t routing = first ? both.large : both.small;
        const cudaStream_t stream = first ? rank.stream() : streamB;
        const CallPair& calls = first ? callsA : callsB;
        if (n++ == 0) {
          RANK_OK(ncclMoeDispatch(&calls.dispatch.args(), routing, rank.comm(), stream), rank.comm());
        } else {
          RANK_OK(ncclMoeCombine(&calls.combine.args(), routing, rank.comm(), stream), rank.comm());
        }
      }
      RANK_CUDA(cudaStreamSynchronize(other));
      RANK_TRY(asyncIs(rank, ncclSuccess));
      RANK_TRY(rank.download());
      RANK_TRY(callsA.verify());
      RANK_TRY(callsB.verify());
      int64_t nRows = 0;
      RANK_OK(ncclMoeRoutingGetCounts(both.small, rank.comm(), &nRows, nullptr), rank.comm());
      RANK_CHECK(nRows == b.reference->delivery(rank.rank()).nRows);
      rank.forget();
    }
    return "";
  });
}

constexpr size_t kPiece = size_t{2} << 20; // more than any of their tensors: a graph finds them where they were

// All ranks' graphs are there before any of them runs, for a rank might wait for another's kernels to make its own.
std::string captureAll(GpuRank& rank, Meeting& meeting, int nRanks, cudaGraphExec_t* graph,
                       const std::function<std::string()>& enqueue) {
  RANK_TRY(capture(rank, graph, enqueue));
  RANK_CUDA(cudaGraphUpload(*graph, rank.stream()));
  RANK_CUDA(cudaStreamSynchronize(rank.stream()));
  return meetAll(rank, meeting, nRanks);
}

// Decode steps are replayed from a graph, on the stream on which prefills are enqueued: between a prefill's dispatch
// and its combine, or between two prefills.
TEST(GpuLatencyMode, GraphBetweenCallsOfThroughputMode) {
  NEED_GPUS(1);
  constexpr int kRounds = 10, kCalls = 4; // of the two prefills of a round
  const uint64_t seed = testSeed();
  runBothModes(seed, true, [&](GpuRank& rank, Meeting& meeting, const BothModes& both) -> std::string {
    cudaGraphExec_t graph = nullptr;
    Random order(seed);
    for (int round = 0; round < kRounds; round++) {
      const DecodeCase a = makeDecode(seed + static_cast<uint64_t>(round), both.prefill);
      const DecodeCase b = makeDecode(seed + 100 + static_cast<uint64_t>(round), both.prefill);
      const DecodeCase c = makeDecode(seed + 200 + static_cast<uint64_t>(round), both.decode);
      rank.forget(kPiece);
      CallPair callsA(rank, a), callsB(rank, b), callsC(rank, c, styleInGraph(both.decode, c, rank.rank()));
      RANK_TRY(callsC.upload(rank, true)); // before the others: always to the same addresses
      RANK_TRY(callsA.upload(rank, round % 3 == 0));
      RANK_TRY(callsB.upload(rank, round % 3 == 1));
      if (graph == nullptr) {
        RANK_TRY(captureAll(rank, meeting, both.nRanks, &graph, [&] { return callsC.enqueue(rank, both.small); }));
      }
      const int behind = pick(order, 1, kCalls - 1);
      for (int call = 0; call < kCalls; call++) {
        const CallPair& calls = call < 2 ? callsA : callsB;
        if (call == behind) RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
        if (call % 2 == 0) {
          RANK_OK(ncclMoeDispatch(&calls.dispatch.args(), both.large, rank.comm(), rank.stream()), rank.comm());
        } else {
          RANK_OK(ncclMoeCombine(&calls.combine.args(), both.large, rank.comm(), rank.stream()), rank.comm());
        }
      }
      RANK_TRY(asyncIs(rank, ncclSuccess));
      RANK_TRY(rank.download());
      const std::string where = format("in round %d, the graph behind %d calls: ", round, behind);
      for (const CallPair* calls : {&callsA, &callsB, &callsC}) {
        const std::string bad = calls->verify();
        if (!bad.empty()) return where + (calls == &callsC ? "decode: " : "prefill: ") + bad;
      }
      int64_t nRows = 0;
      RANK_OK(ncclMoeRoutingGetCounts(both.large, rank.comm(), &nRows, nullptr), rank.comm());
      RANK_CHECK(nRows == b.reference->delivery(rank.rank()).nRows);
    }
    RANK_CUDA(cudaGraphExecDestroy(graph));
    return "";
  });
}

// A graph that holds calls of either mode, a decode step between a prefill's dispatch and its combine.
TEST(GpuLatencyMode, GraphOfBothModes) {
  NEED_GPUS(1);
  constexpr int kReplays = 10;
  const uint64_t seed = testSeed();
  // No counts on the host, so that the kernels of the throughput dispatch overlap.
  runBothModes(seed, false, [&](GpuRank& rank, Meeting& meeting, const BothModes& both) -> std::string {
    cudaGraphExec_t graph = nullptr;
    for (int replay = 0; replay < kReplays; replay++) {
      const DecodeCase a = makeDecode(seed + static_cast<uint64_t>(replay), both.prefill);
      const DecodeCase b = makeDecode(seed + 100 + static_cast<uint64_t>(replay), both.decode);
      rank.forget(kPiece);
      CallPair callsA(rank, a, styleInGraph(both.prefill, a, rank.rank()));
      CallPair callsB(rank, b, styleInGraph(both.decode, b, rank.rank()));
      RANK_TRY(callsA.upload(rank, both.nRanks == 2)); // or else by way of the windows
      RANK_TRY(callsB.upload(rank, false));
      if (graph == nullptr) {
        RANK_TRY(captureAll(rank, meeting, both.nRanks, &graph, [&]() -> std::string {
          RANK_OK(ncclMoeDispatch(&callsA.dispatch.args(), both.large, rank.comm(), rank.stream()), rank.comm());
          RANK_TRY(callsB.enqueue(rank, both.small));
          RANK_OK(ncclMoeCombine(&callsA.combine.args(), both.large, rank.comm(), rank.stream()), rank.comm());
          return "";
        }));
      }
      RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
      RANK_TRY(asyncIs(rank, ncclSuccess));
      RANK_TRY(rank.download());
      for (const CallPair* calls : {&callsA, &callsB}) {
        const std::string bad = calls->verify();
        if (!bad.empty()) return format("in replay %d, %s: ", replay, calls == &callsA ? "prefill" : "decode") + bad;
      }
    }
    RANK_CUDA(cudaGraphExecDestroy(graph));
    return "";
  });
}

// A graph of calls on two streams that the caller forks and joins: each runs behind the one before it, on whichever
// stream.
TEST(GpuLatencyMode, GraphOfForkedStreams) {
  NEED_GPUS(1);
  constexpr int kRanks = 2, kReplays = 10;
  const uint64_t seed = testSeed();
  const DecodeShape shape = decodeOf(kRanks);
  for (const bool inPhases : {false, true}) {
    const std::string wrong =
      runDecode(shape.world(), DecodeRun(), [&](GpuRank& rank, Meeting& meeting) -> std::string {
        ncclMoeRouting_t routings[2] = {};
        const ncclMoeRoutingConfig_t config = shape.routing();
        for (ncclMoeRouting_t& routing : routings) {
          RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
        }
        Stream other;
        const cudaStream_t streams[2] = {rank.stream(), other};
        cudaEvent_t forked = nullptr, joined = nullptr;
        RANK_CUDA(cudaEventCreateWithFlags(&forked, cudaEventDisableTiming));
        RANK_CUDA(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming));
        cudaGraphExec_t graph = nullptr;
        for (int replay = 0; replay < kReplays; replay++) {
          std::vector<DecodeCase> cases; // calls refer to them
          std::vector<CallPair> calls;
          cases.reserve(2);
          calls.reserve(2);
          rank.forget(kPiece);
          for (int i = 0; i < 2; i++) {
            cases.push_back(makeDecode(seed + static_cast<uint64_t>(2 * replay + i), shape));
            DispatchStyle style = styleInGraph(shape, cases.back(), rank.rank());
            if (inPhases) style.flags = NCCL_MOE_SEND_ONLY;
            calls.emplace_back(rank, cases.back(), style);
          }
          for (CallPair& pair : calls) RANK_TRY(pair.upload(rank, false));
          const auto dispatch = [&](int i, int stream) {
            return ncclMoeDispatch(&calls[i].dispatch.args(), routings[i], rank.comm(), streams[stream]);
          };
          const auto combine = [&](int i, int stream) {
            return ncclMoeCombine(&calls[i].combine.args(), routings[i], rank.comm(), streams[stream]);
          };
          const auto complete = [&](int i, int stream) {
            return inPhases ? ncclMoeComplete(routings[i], rank.comm(), streams[stream]) : ncclSuccess;
          };
          const auto enqueue = [&]() -> std::string {
            RANK_CUDA(cudaEventRecord(forked, streams[0]));
            RANK_CUDA(cudaStreamWaitEvent(streams[1], forked, 0));
            RANK_OK(dispatch(0, 0), rank.comm());
            RANK_OK(dispatch(1, 1), rank.comm());
            RANK_OK(complete(0, 1), rank.comm());
            RANK_OK(complete(1, 0), rank.comm());
            RANK_OK(combine(1, 0), rank.comm());
            RANK_OK(combine(0, 1), rank.comm());
            RANK_OK(complete(1, 1), rank.comm());
            RANK_OK(complete(0, 0), rank.comm());
            RANK_CUDA(cudaEventRecord(joined, streams[1]));
            RANK_CUDA(cudaStreamWaitEvent(streams[0], joined, 0));
            return "";
          };
          if (graph == nullptr) RANK_TRY(captureAll(rank, meeting, kRanks, &graph, enqueue));
          RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
          RANK_TRY(asyncIs(rank, ncclSuccess));
          RANK_TRY(rank.download());
          for (const CallPair& pair : calls) {
            const std::string bad = pair.verify();
            if (!bad.empty()) return format("in replay %d, routing %d: ", replay, &pair == &calls[0] ? 0 : 1) + bad;
          }
        }
        RANK_CUDA(cudaGraphExecDestroy(graph));
        RANK_CUDA(cudaEventDestroy(forked));
        RANK_CUDA(cudaEventDestroy(joined));
        return "";
      });
    ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed << (inPhases ? ", in phases" : "");
  }
}

// Two routings of latency mode on two streams that the caller does not order, each call wanting all SMs.  Were they to
// run in different orders on the ranks, each would wait for a peer that waits for the other.
TEST(GpuLatencyMode, TwoRoutingsOnTwoStreams) {
  NEED_GPUS(1);
  constexpr int kRounds = 40;
  const uint64_t seed = testSeed();
  DecodeShape shape;
  shape.nTokens = 128;
  shape.hidden = 1024; // more blocks than SMs
  DecodeRun run;
  run.timeoutMs = 3000;
  run.numSms = gpuCount() >= 2 ? 0 : 16;
  const DecodeCase a = makeDecode(seed, shape), b = makeDecode(seed + 1, shape);
  const std::string wrong = runDecode(shape.world(), run, [&](GpuRank& rank, Meeting&) -> std::string {
    ncclMoeRouting_t routings[2] = {};
    const ncclMoeRoutingConfig_t config = shape.routing();
    for (ncclMoeRouting_t& routing : routings)
      RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
    Stream other;
    const auto nap = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(1)); };
    Random mine(seed + static_cast<uint64_t>(rank.rank()));
    for (int round = 0; round < kRounds; round++) {
      CallPair callsA(rank, a), callsB(rank, b);
      RANK_TRY(callsA.upload(rank, false));
      RANK_TRY(callsB.upload(rank, false));
      // One of the streams is held up for a while, by nothing that takes SMs.
      RANK_CUDA(cudaLaunchHostFunc(chance(mine, 0.5) ? rank.stream() : static_cast<cudaStream_t>(other), nap, nullptr));
      RANK_OK(ncclMoeDispatch(&callsA.dispatch.args(), routings[0], rank.comm(), rank.stream()), rank.comm());
      RANK_OK(ncclMoeDispatch(&callsB.dispatch.args(), routings[1], rank.comm(), other), rank.comm());
      RANK_OK(ncclMoeCombine(&callsA.combine.args(), routings[0], rank.comm(), rank.stream()), rank.comm());
      RANK_OK(ncclMoeCombine(&callsB.combine.args(), routings[1], rank.comm(), other), rank.comm());
      RANK_CUDA(cudaStreamSynchronize(other));
      RANK_TRY(asyncIs(rank, ncclSuccess));
      RANK_TRY(rank.download());
      RANK_TRY(callsA.verify());
      RANK_TRY(callsB.verify());
      rank.forget();
    }
    return "";
  });
  ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed;
}

// Either half runs in the order of the stream that it is given: the first behind what writes its input, the second
// behind what still reads its output, and what comes after the second finds the output there.
TEST(GpuLatencyMode, HalvesFollowTheCallersStreams) {
  NEED_GPUS(1);
  // A second half that did not wait would write when the input is there, long before the output is read.
  constexpr int kWriteMs = 20, kReadMs = 80;
  constexpr size_t kBytes = size_t{4} << 20; // the largest tensor has less
  const uint64_t seed = testSeed();
  for (const ncclMoeMode_t mode : {ncclMoeModeLatency, ncclMoeModeThroughput}) {
    DecodeRun run;
    run.mode = mode;
    const std::string wrong =
      runDecode(DecodeShape().world(), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
        Stream first, second;
        char *staged = nullptr, *seen = nullptr;
        RANK_CUDA(cudaMalloc(&staged, kBytes));
        RANK_CUDA(cudaMalloc(&seen, kBytes));
        RANK_CUDA(copyLate(seen, staged, 0, 0, first));
        // x: what is at input once that has been written.  unwritten: what is at output until the call writes there.
        const auto inHalves = [&](const std::vector<uint8_t>& x, const void* input,
                                  const std::vector<uint8_t>& unwritten, const void* output, ncclMoeRouting_t routing,
                                  const std::function<ncclResult_t()>& firstHalf) -> std::string {
          RANK_CHECK(x.size() <= kBytes && unwritten.size() <= kBytes);
          const std::vector<uint8_t> spoilt(x.size(), 0xff);
          void* at = const_cast<void*>(input);
          if (!x.empty()) {
            RANK_CUDA(cudaMemcpyAsync(staged, x.data(), x.size(), cudaMemcpyHostToDevice, rank.stream()));
            RANK_CUDA(cudaMemcpyAsync(at, spoilt.data(), x.size(), cudaMemcpyHostToDevice, rank.stream()));
            RANK_CUDA(cudaStreamSynchronize(rank.stream()));
          }
          RANK_CUDA(copyLate(at, staged, x.size(), kWriteMs, first));
          RANK_OK(firstHalf(), rank.comm());
          // Throughput mode's first half does the whole transfer, so nobody may read the output meanwhile.
          const bool reads = mode == ncclMoeModeLatency && !unwritten.empty();
          if (reads) RANK_CUDA(copyLate(seen, output, unwritten.size(), kReadMs, second));
          RANK_OK(ncclMoeComplete(routing, rank.comm(), second), rank.comm());
          RANK_CUDA(cudaStreamSynchronize(second));
          RANK_TRY(rank.download()); // the first stream has not been waited for
          RANK_TRY(asyncIs(rank, ncclSuccess));
          if (!reads) return "";
          std::vector<uint8_t> got(unwritten.size());
          RANK_CUDA(cudaMemcpyAsync(got.data(), seen, got.size(), cudaMemcpyDeviceToHost, rank.stream()));
          RANK_CUDA(cudaStreamSynchronize(rank.stream()));
          RANK_CHECK(got == unwritten,
                     "the output was written while the caller's kernel before ncclMoeComplete read it");
          return "";
        };
        for (const ncclMoeLayout_t layout :
             {ncclMoeLayoutRankMajor, ncclMoeLayoutExpertMajor, ncclMoeLayoutExpertPadded}) {
          DecodeShape shape;
          shape.layout = layout;
          ncclMoeRouting_t routing = nullptr;
          const ncclMoeRoutingConfig_t config = shape.routing();
          RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &config), rank.comm());
          const DecodeCase e = makeDecode(seed + static_cast<uint64_t>(layout), shape);
          DispatchStyle style;
          style.flags = NCCL_MOE_SEND_ONLY;
          CallPair calls(rank, e, style);
          RANK_TRY(calls.upload(rank, mode == ncclMoeModeThroughput)); // peers write to the output themselves
          RANK_TRY(meetAll(rank, meeting, run.nRanks));
          const size_t self = static_cast<size_t>(rank.rank());
          const ncclMoeDispatchArgs_t& dispatch = calls.dispatch.args();
          RANK_TRY(inHalves(e.reference->problem().sources[self].x, dispatch.x, calls.dispatch.image().x,
                            dispatch.recvX, routing,
                            [&] { return ncclMoeDispatch(&dispatch, routing, rank.comm(), first); }));
          RANK_TRY(calls.dispatch.verify());
          const ncclMoeCombineArgs_t& combine = calls.combine.args();
          RANK_TRY(inHalves(e.combine.x[self], combine.x, calls.combine.image().out, combine.out, routing,
                            [&] { return ncclMoeCombine(&combine, routing, rank.comm(), first); }));
          RANK_TRY(calls.combine.verify());
          rank.forget();
          RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
        }
        RANK_TRY(meetAll(rank, meeting, run.nRanks)); // cudaFree waits for kernels of all ranks of the GPU
        RANK_CUDA(cudaFree(staged));
        RANK_CUDA(cudaFree(seen));
        return "";
      });
    ASSERT_EQ(wrong, "") << "with MOE_TEST_SEED=" << seed << ", mode " << static_cast<int>(mode);
  }
}

// What AUTO takes is what the mode that it chooses takes, and all is given back.
TEST(GpuLatencyMode, MemoryIsAsStatedAndComesBack) {
  NEED_GPUS(1);
  constexpr int kRanks = 2;
  DecodeShape small, large; // each takes more than the 2 MiB that memory comes in
  small.nTokens = 512;
  large.nTokens = 600;
  const std::string wrong =
    runGpu(kRanks, RanksAs::threads, 60000, [&](int r, std::shared_ptr<Meeting> meeting) -> std::string {
      const ncclMoeMode_t modes[] = {ncclMoeModeAuto, ncclMoeModeLatency, ncclMoeModeThroughput};
      const DecodeShape* const shapes[] = {&small, &large};
      size_t comm[2][3] = {},
             routing[2][3] = {}; // of the communicator for either shape; of the routings on the larger one
      for (int mode = 0; mode < 3; mode++) {
        for (int shape = 0; shape < 2; shape++) {
          const World world = shapes[shape]->world();
          ncclMoeConfig_t config = world.config();
          config.mode = modes[mode];
          RANK_OK(ncclMoeCommMemoryNeeded(&config, kRanks, &comm[shape][mode]), nullptr);
          GpuRank rank(r, kRanks, r % gpuCount());
          RANK_TRY(rank.init(config, meeting, 0));
          size_t routings = 0;
          for (int n = 0; n <= shape; n++) {
            const ncclMoeRoutingConfig_t want = shapes[n]->routing();
            RANK_OK(ncclMoeRoutingMemoryNeeded(rank.comm(), &want, &routing[n][mode]), rank.comm());
            ncclMoeRouting_t made = nullptr;
            RANK_OK(ncclMoeRoutingCreate(&made, rank.comm(), &want), rank.comm());
            routings += routing[n][mode];
          }
          ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
          RANK_OK(ncclMoeCommGetInfo(rank.comm(), &info), rank.comm());
          RANK_CHECK(info.memoryBytes == comm[shape][mode] + routings, "%zu bytes, stated %zu + %zu", info.memoryBytes,
                     comm[shape][mode], routings);
          RANK_TRY(rank.destroy());
        }
      }
      RANK_CHECK(routing[0][0] == routing[0][1] && routing[0][0] != routing[0][2]);
      RANK_CHECK(routing[1][0] == routing[1][2] && routing[1][0] != routing[1][1]);
      RANK_CHECK(comm[0][0] == comm[0][1] && comm[0][0] < comm[0][2]);
      RANK_CHECK(comm[1][0] == comm[1][2] && comm[1][1] < comm[1][2]);
      const World world = large.world();
      ncclMoeConfig_t config = world.config();
      size_t before = 0, after = 0, total = 0;
      for (int cycle = 0; cycle < 20; cycle++) {
        GpuRank rank(r, kRanks, r % gpuCount());
        RANK_TRY(rank.init(config, meeting, 0));
        for (const DecodeShape* shape : shapes) {
          const ncclMoeRoutingConfig_t want = shape->routing();
          ncclMoeRouting_t made = nullptr;
          RANK_OK(ncclMoeRoutingCreate(&made, rank.comm(), &want), rank.comm());
          if (cycle % 2 == 0) RANK_OK(ncclMoeRoutingDestroy(made, rank.comm()), rank.comm());
        }
        RANK_TRY(rank.destroy());
        RANK_TRY(meetAll(rank, *meeting, kRanks)); // both have destroyed
        RANK_CUDA(cudaMemGetInfo(cycle == 2 ? &before : &after, &total));
        RANK_TRY(meetAll(rank, *meeting, kRanks));
      }
      RANK_CHECK(after + (size_t{4} << 20) >= before, "%zu bytes were free, now %zu", before, after);
      return "";
    });
  EXPECT_EQ(wrong, "");
}

} // namespace
} // namespace moe::test
