// Latency mode, and graphs of throughput mode, without the host: thousands of decode steps, replayed from graphs or
// enqueued one behind the other, that the GPUs make up and check by themselves.  MOE_TEST_ITERATIONS says how many.
//
// This is also the stress test of what src/device/latency.cuh promises about packets: nothing but the calls themselves
// keeps the ranks in step, delays come at random, and one packet in eight looks empty.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "gpu/decode_steps.h"
#include "gpu/latency_case.h"
#include "gpu/occupy.h"

namespace moe::test {
namespace {

int iterations(int otherwise) {
  const char* wanted = getenv("MOE_TEST_ITERATIONS");
  return wanted != nullptr ? atoi(wanted) : otherwise;
}

// The steps of one routing: the calls of each of their rounds.
struct Round {
  Steps steps{};
  ncclMoeDispatchArgs_t dispatch{};
  ncclMoeCombineArgs_t combine{};
};
struct Layer {
  std::vector<Round> rounds;
  ncclMoeRouting_t routing = nullptr;
};

struct StepShape {
  int nTokens = 40, hidden = 512, topK = 4;
  StepFormat format;
  bool twice = false; // each step has a second round, which keeps the routing; not in phases
  ncclMoeLayout_t layout = ncclMoeLayoutExpertPadded;
  int maxDelayNs = 0;
};

// Device memory that ends with the rank's process: freeing it would wait for the other ranks' kernels.
std::string makeLayer(GpuRank& rank, const World& world, const StepShape& shape, uint64_t seed, unsigned flags,
                      Layer* layer) {
  Steps s{};
  s.seed = seed;
  s.rank = rank.rank();
  s.nRanks = world.nRanks;
  s.nExperts = world.nExperts;
  s.topK = shape.topK;
  s.maxTokens = shape.nTokens;
  s.hidden = shape.hidden;
  s.format = shape.format;
  s.layout = shape.layout;
  s.alignment = shape.layout == ncclMoeLayoutExpertMajor ? 8 : 1;
  s.maxDelayNs = shape.maxDelayNs;
  std::vector<int2> experts;
  std::vector<int> nLocal(static_cast<size_t>(world.nRanks), 0);
  for (const int home : world.expertToRank) experts.push_back(make_int2(home, nLocal[static_cast<size_t>(home)]++));
  s.nLocal = nLocal[static_cast<size_t>(s.rank)];
  char* memory = nullptr;
  const size_t bytes = s.place(nullptr);
  RANK_CUDA(cudaMalloc(&memory, bytes));
  RANK_CUDA(cudaMemset(memory, 0, bytes));
  s.place(memory);
  RANK_CUDA(cudaMemcpy(s.experts, experts.data(), experts.size() * sizeof(int2), cudaMemcpyHostToDevice));
  RANK_CUDA(cudaDeviceSynchronize());
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = shape.topK;
  config.maxTokens = shape.nTokens;
  config.layout = shape.layout;
  config.expertAlignment = s.alignment;
  RANK_OK(ncclMoeRoutingCreate(&layer->routing, rank.comm(), &config), rank.comm());
  for (s.round = 0; s.round < (shape.twice ? 2 : 1); s.round++) {
    Round round{s, s.dispatchArgs(), s.combineArgs()};
    round.dispatch.flags |= flags;
    round.combine.flags |= flags;
    layer->rounds.push_back(round);
  }
  return "";
}

// One step of all layers: one after the other, or with both halves of all calls in flight together.
std::string enqueueStep(GpuRank& rank, const std::vector<Layer>& layers, bool inPhases) {
  const ncclMoeComm_t comm = rank.comm();
  const cudaStream_t stream = rank.stream();
  if (!inPhases) {
    for (const Layer& layer : layers) {
      for (const Round& round : layer.rounds) {
        RANK_CUDA(drawStep(round.steps, stream));
        RANK_OK(ncclMoeDispatch(&round.dispatch, layer.routing, comm, stream), comm);
        RANK_CUDA(checkDispatch(round.steps, stream));
        RANK_OK(ncclMoeCombine(&round.combine, layer.routing, comm, stream), comm);
        RANK_CUDA(checkCombine(round.steps, stream));
      }
    }
    return "";
  }
  for (const Layer& layer : layers) {
    RANK_CUDA(drawStep(layer.rounds[0].steps, stream));
    RANK_OK(ncclMoeDispatch(&layer.rounds[0].dispatch, layer.routing, comm, stream), comm);
  }
  for (const Layer& layer : layers) {
    RANK_OK(ncclMoeComplete(layer.routing, comm, stream), comm);
    RANK_CUDA(checkDispatch(layer.rounds[0].steps, stream));
    RANK_OK(ncclMoeCombine(&layer.rounds[0].combine, layer.routing, comm, stream), comm);
  }
  for (size_t i = layers.size(); i-- > 0;) {
    RANK_OK(ncclMoeComplete(layers[i].routing, comm, stream), comm);
    RANK_CUDA(checkCombine(layers[i].rounds[0].steps, stream));
  }
  return "";
}

std::string checkSteps(GpuRank& rank, const std::vector<Layer>& layers, unsigned nSteps) {
  RANK_TRY(asyncIs(rank, ncclSuccess));
  for (const Layer& layer : layers) {
    const Steps& steps = layer.rounds[0].steps; // rounds share the memory
    unsigned done = 0;
    StepFault fault{};
    RANK_CUDA(cudaMemcpyAsync(&done, steps.step, sizeof(done), cudaMemcpyDeviceToHost, rank.stream()));
    RANK_CUDA(cudaMemcpyAsync(&fault, steps.fault, sizeof(fault), cudaMemcpyDeviceToHost, rank.stream()));
    RANK_CUDA(cudaStreamSynchronize(rank.stream()));
    char text[200];
    RANK_CHECK(fault.count == 0, "%s, layout %d, type %d, quant %d, scale layout %d, sums %s",
               describeFault(fault, text, sizeof(text)), steps.layout, steps.format.type, steps.format.quant,
               steps.format.scaleLayout, steps.format.castSums ? "cast" : "as they are");
    RANK_CHECK(done == nSteps, "%u steps ran instead of %u", done, nSteps);
  }
  return "";
}

struct StepRun {
  int nSteps = 0;
  bool graph = false, inPhases = false;
  std::vector<StepShape> shapes;
};
using Meanwhile = std::function<std::string(GpuRank& rank)>;

// Runs that the same ranks do one after the other.
struct StepJob {
  int nRanks = 2, numSms = 0;
  uint64_t seed = 0;
  ncclMoeMode_t mode = ncclMoeModeLatency;
  std::vector<int> expertToRank; // empty: eight experts for each rank
  std::vector<StepRun> runs;
  Meanwhile meanwhile;

  World world() const {
    World w;
    w.nRanks = nRanks;
    w.explicitMap = !expertToRank.empty();
    w.expertToRank = w.explicitMap ? expertToRank : blockPlacement(8 * nRanks, nRanks);
    w.nExperts = static_cast<int>(w.expertToRank.size());
    w.maxRowBytes = 4224;
    for (const StepRun& r : runs) {
      for (const StepShape& shape : r.shapes) {
        w.maxTokens = std::max(w.maxTokens, shape.nTokens);
        w.maxTopK = std::max(w.maxTopK, shape.topK);
        w.maxRowBytes = std::max(w.maxRowBytes, 2 * static_cast<size_t>(shape.hidden));
      }
    }
    return w;
  }
};

std::string runSteps(GpuRank& rank, Meeting& meeting, const World& world, uint64_t seed, const StepRun& r,
                     const Meanwhile& meanwhile) {
  const int nRanks = world.nRanks;
  std::vector<Layer> layers(r.shapes.size());
  for (size_t i = 0; i < layers.size(); i++) {
    RANK_TRY(makeLayer(rank, world, r.shapes[i], seed + i, r.inPhases ? NCCL_MOE_SEND_ONLY : 0u, &layers[i]));
  }
  RANK_CUDA(loadStepKernels());
  RANK_CUDA(occupySms(0, 0, rank.stream()));
  RANK_TRY(meetAll(rank, meeting, nRanks)); // nothing is loaded or set to zero any more
  cudaGraphExec_t graph = nullptr;
  if (r.graph) {
    RANK_TRY(capture(rank, &graph, [&] { return enqueueStep(rank, layers, r.inPhases); }));
    RANK_CUDA(cudaGraphUpload(graph, rank.stream()));
    RANK_CUDA(cudaStreamSynchronize(rank.stream()));
    RANK_TRY(meetAll(rank, meeting, nRanks));
  }
  for (int step = 0; step < r.nSteps; step++) {
    if (meanwhile) RANK_TRY(meanwhile(rank));
    if (r.graph) {
      RANK_CUDA(cudaGraphLaunch(graph, rank.stream()));
    } else {
      RANK_TRY(enqueueStep(rank, layers, r.inPhases));
    }
  }
  RANK_TRY(checkSteps(rank, layers, static_cast<unsigned>(r.nSteps)));
  RANK_TRY(meetAll(rank, meeting, nRanks));
  if (r.graph) RANK_CUDA(cudaGraphExecDestroy(graph));
  for (const Layer& layer : layers) RANK_OK(ncclMoeRoutingDestroy(layer.routing, rank.comm()), rank.comm());
  return "";
}

std::string runAll(const StepJob& job) {
  DecodeRun run;
  run.nRanks = job.nRanks;
  run.mode = job.mode;
  run.numSms = job.numSms;
  for (const StepRun& r : job.runs) run.timeLimitMs += 20 * r.nSteps;
  const World world = job.world();
  return runDecode(world, run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
    for (size_t i = 0; i < job.runs.size(); i++) {
      const std::string wrong = runSteps(rank, meeting, world, job.seed, job.runs[i], job.meanwhile);
      if (!wrong.empty()) return format("run %zu: ", i) + wrong;
    }
    return "";
  });
}

const ncclMoeLayout_t kLayouts[] = {ncclMoeLayoutExpertPadded, ncclMoeLayoutExpertMajor, ncclMoeLayoutRankMajor};

// All ranks on GPUs of their own take all SMs there.
int smsFor(int nRanks) { return nRanks <= gpuCount() ? 0 : 8; }

StepJob jobOf(int nRanks, uint64_t seed) {
  StepJob job;
  job.nRanks = nRanks;
  job.numSms = smsFor(nRanks);
  job.seed = seed;
  return job;
}

// Rank 1 has none, and the last ones have most, here and there.
std::vector<int> unevenPlacement(uint64_t seed, int nRanks) {
  Random random(seed);
  std::vector<int> expertToRank(static_cast<size_t>(8 * nRanks + 5));
  for (int& rank : expertToRank) {
    rank = std::max(pick(random, 0, nRanks - 1), pick(random, 0, nRanks - 1));
    if (rank == 1) rank = nRanks - 1;
  }
  return expertToRank;
}

const StepFormat kPlain{}, kCast{ncclBfloat16, ncclMoeQuantFp8, ncclMoeScaleRowMajor};

// A graph of one step in every layout and each of the formats, replayed so many times.
void graphReplays(const std::vector<int>& sizes, ncclMoeMode_t mode, int nSteps, StepShape shape = StepShape(),
                  bool uneven = false, const std::vector<StepFormat>& formats = {kPlain, kCast}) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  // Rows of several pieces, also after the cast, of which the first brings the map.
  if (mode == ncclMoeModeThroughput) shape.hidden = 2064;
  for (const int nRanks : sizes) {
    StepJob job = jobOf(nRanks, seed);
    job.mode = mode;
    if (uneven) job.expertToRank = unevenPlacement(seed, nRanks);
    for (const ncclMoeLayout_t layout : kLayouts) {
      for (const StepFormat& format : formats) {
        StepRun r;
        r.nSteps = nSteps;
        r.graph = true;
        shape.layout = layout;
        shape.format = format;
        r.shapes = {shape};
        job.runs.push_back(r);
      }
    }
    ASSERT_EQ(runAll(job), "") << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}
TEST(GpuDecodeSteps, GraphReplays) { graphReplays({2, 4}, ncclMoeModeLatency, iterations(700)); }
TEST(GpuDecodeSteps, GraphReplaysInThroughputMode) { graphReplays({2, 4}, ncclMoeModeThroughput, iterations(240)); }

// What the ones above leave out, in fewer steps.  The delays are short: just so long that a call which did not wait for
// its inputs would be wrong.
StepShape delayedShape() {
  StepShape shape;
  shape.maxDelayNs = 4000;
  return shape;
}

// The scales of a last block that is not a whole one, and exponents that do not fill their words.
StepShape raggedRows() {
  StepShape shape = delayedShape();
  shape.hidden = 688;
  return shape;
}
std::vector<StepFormat> otherFormats(ncclMoeMode_t mode) {
  StepFormat half, sums = kCast;
  half.type = ncclFloat16;
  half.withGrads = true;
  sums.castSums = true;
  std::vector<StepFormat> formats = {
    half,
    {ncclBfloat16, ncclMoeQuantFp8, ncclMoeScaleColumnMajor},
    {ncclBfloat16, ncclMoeQuantFp8Ue8m0, ncclMoeScaleRowMajor},
    {ncclBfloat16, ncclMoeQuantFp8Ue8m0, ncclMoeScaleColumnMajor},
  };
  if (mode == ncclMoeModeLatency) formats.push_back(sums);
  return formats;
}
TEST(GpuDecodeSteps, GraphReplaysOfOtherFormats) {
  graphReplays({2, 4}, ncclMoeModeLatency, std::min(iterations(80), 2400), raggedRows(), false,
               otherFormats(ncclMoeModeLatency));
}
TEST(GpuDecodeSteps, GraphReplaysOfOtherFormatsInThroughputMode) {
  graphReplays({3}, ncclMoeModeThroughput, std::min(iterations(60), 3000), raggedRows(), false,
               otherFormats(ncclMoeModeThroughput));
}

// In latency mode the selections of a token take two packets.
StepShape manySelections() {
  StepShape shape = delayedShape();
  shape.topK = 12;
  return shape;
}
TEST(GpuDecodeSteps, GraphReplaysOfManySelections) {
  graphReplays({2, 4}, ncclMoeModeLatency, std::min(iterations(300), 3000), manySelections());
}
TEST(GpuDecodeSteps, GraphReplaysOfManySelectionsInThroughputMode) {
  graphReplays({3}, ncclMoeModeThroughput, std::min(iterations(100), 3000), manySelections());
}

StepShape keptRouting() {
  StepShape shape = delayedShape();
  shape.twice = true;
  return shape;
}
TEST(GpuDecodeSteps, GraphReplaysOfKeptRoutings) {
  graphReplays({2, 4}, ncclMoeModeLatency, std::min(iterations(200), 3000), keptRouting());
}
TEST(GpuDecodeSteps, GraphReplaysOfKeptRoutingsInThroughputMode) {
  graphReplays({3}, ncclMoeModeThroughput, std::min(iterations(100), 3000), keptRouting());
}

TEST(GpuDecodeSteps, GraphReplaysOfUnevenExperts) {
  graphReplays({4}, ncclMoeModeLatency, std::min(iterations(200), 3000), delayedShape(), true);
}
TEST(GpuDecodeSteps, GraphReplaysOfUnevenExpertsInThroughputMode) {
  graphReplays({3}, ncclMoeModeThroughput, std::min(iterations(100), 3000), delayedShape(), true);
}

// As many tokens as AUTO leaves to latency mode, as long as those of a large model.  EXPERT_PADDED, which takes most
// memory (1 GB a rank), for few ranks only.
TEST(GpuDecodeSteps, FullSizeRows) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  for (const int nRanks : {2, 4}) {
    StepJob job = jobOf(nRanks, seed);
    job.expertToRank = blockPlacement(64 * nRanks, nRanks);
    for (size_t i = nRanks == 2 ? 0 : 1; i < 3; i++) {
      StepShape shape;
      shape.nTokens = 512;
      shape.hidden = 7168;
      shape.topK = 8;
      shape.layout = kLayouts[i];
      if (i == (nRanks == 2 ? 1 : 2)) shape.format = kCast;
      StepRun r;
      r.nSteps = std::min(iterations(20), 200);
      r.graph = true;
      r.shapes = {shape};
      job.runs.push_back(r);
    }
    ASSERT_EQ(runAll(job), "") << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

// Three layers whose dispatches are all sent before any is completed, and so are their combines.
TEST(GpuDecodeSteps, GraphReplaysOfPhases) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  for (const int nRanks : {2, 3}) {
    StepRun r;
    r.nSteps = iterations(400);
    r.graph = r.inPhases = true;
    r.shapes.resize(3);
    for (int i = 0; i < 3; i++) r.shapes[i].layout = kLayouts[i];
    r.shapes[1].nTokens = 9;
    r.shapes[1].format = kCast;
    r.shapes[1].hidden = 2064;
    r.shapes[2].hidden = 1304; // more than a segment, and not a whole number of them
    StepJob job = jobOf(nRanks, seed);
    job.runs = {r};
    ASSERT_EQ(runAll(job), "") << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

TEST(GpuDecodeSteps, BackToBackCalls) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  for (const int nRanks : {1, 2, 3, 4}) {
    StepJob job = jobOf(nRanks, seed);
    for (const bool inPhases : {false, true}) {
      StepRun r;
      r.nSteps = iterations(600);
      r.inPhases = inPhases;
      r.shapes.resize(2);
      r.shapes[0].nTokens = 3; // the shortest calls
      r.shapes[0].hidden = 64;
      r.shapes[0].layout = kLayouts[nRanks % 3];
      r.shapes[1].hidden = 2048;
      r.shapes[1].layout = kLayouts[(nRanks + 1) % 3];
      if (nRanks % 2 == 0) r.shapes[1].format = kCast;
      for (StepShape& shape : r.shapes) shape.maxDelayNs = 20000;
      job.runs.push_back(r);
    }
    ASSERT_EQ(runAll(job), "") << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

// Hosts that sleep, kernels before a call, and kernels that keep most SMs, so that some blocks of a call start late, or
// all of them: nothing but time changes.
TEST(GpuDecodeSteps, SlowRanks) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  for (const int nRanks : {2, 4}) {
    StepJob job = jobOf(nRanks, seed);
    if (nRanks == 2 && gpuCount() == 1) job.numSms = 32;
    for (const bool cast : {false, true}) {
      StepRun r;
      r.nSteps = std::min(iterations(80), 2000);
      r.inPhases = nRanks == 4;
      r.shapes.resize(3);
      for (int i = 0; i < 3; i++) {
        StepShape& shape = r.shapes[i];
        shape.layout = kLayouts[i];
        if (cast) shape.format = kCast;
        shape.topK = (i == 1) == cast ? 4 : 12;
        shape.maxDelayNs = 300000;
      }
      r.shapes[2].nTokens = 100;
      job.runs.push_back(r);
    }
    std::vector<Random> randoms;
    for (int rank = 0; rank < nRanks; rank++) randoms.emplace_back(seed + static_cast<uint64_t>(rank));
    std::vector<cudaStream_t> others(static_cast<size_t>(nRanks), nullptr); // each rank sets its own
    job.meanwhile = [&](GpuRank& rank) -> std::string {
      Random& random = randoms[static_cast<size_t>(rank.rank())];
      cudaStream_t& other = others[static_cast<size_t>(rank.rank())];
      int nSms = 0;
      RANK_CUDA(cudaDeviceGetAttribute(&nSms, cudaDevAttrMultiProcessorCount, 0));
      if (other == nullptr) RANK_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
      switch (pick(random, 0, 7)) {
      case 0:
        std::this_thread::sleep_for(std::chrono::microseconds(pick(random, 1, 3000)));
        return "";
      case 1: // in the rank's way
        RANK_CUDA(occupySms(pick(random, 1, nSms), 1, rank.stream()));
        return "";
      case 2:
      case 3: // beside it
        RANK_CUDA(cudaStreamSynchronize(other));
        RANK_CUDA(occupySms(nSms - pick(random, 0, 3), pick(random, 1, 3), other));
        return "";
      case 4: // now and then the ranks' hosts come close to each other
        RANK_CUDA(cudaStreamSynchronize(rank.stream()));
        return "";
      default:
        return "";
      }
    };
    ASSERT_EQ(runAll(job), "") << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

} // namespace
} // namespace moe::test
