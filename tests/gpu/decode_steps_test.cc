// Latency mode, and graphs of throughput mode, without the host: thousands of decode steps, replayed from graphs or enqueued one behind the other, that the GPUs
// make up and check by themselves.  MOE_TEST_ITERATIONS says how many.
//
// This is also the stress test of what src/device/latency.cuh promises about packets: nothing but the calls themselves keeps
// the ranks in step, delays come at random, and one packet in eight looks empty.
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

// The steps of one routing.
struct Layer {
  Steps steps{};
  ncclMoeRouting_t routing = nullptr;
  ncclMoeDispatchArgs_t dispatch{};
  ncclMoeCombineArgs_t combine{};
};

struct StepShape {
  int nTokens = 40, hidden = 512;
  bool cast = false;
  ncclMoeLayout_t layout = ncclMoeLayoutExpertPadded;
  int maxDelayNs = 0;
};

World stepWorld(int nRanks, int maxTokens) {
  World w;
  w.nRanks = nRanks;
  w.nExperts = 8 * nRanks;
  w.maxTokens = maxTokens;
  w.maxTopK = kStepTopK;
  w.maxRowBytes = 4224;
  w.expertToRank = blockPlacement(w.nExperts, nRanks);
  return w;
}

// Device memory that ends with the rank's process: freeing it would wait for the other ranks' kernels.
std::string makeLayer(GpuRank& rank, int nRanks, const StepShape& shape, uint64_t seed, unsigned flags, Layer* layer) {
  Steps& s = layer->steps;
  s.seed = seed;
  s.rank = rank.rank();
  s.nRanks = nRanks;
  s.nLocal = 8;
  s.maxTokens = shape.nTokens;
  s.hidden = shape.hidden;
  s.cast = shape.cast;
  s.layout = shape.layout;
  s.alignment = shape.layout == ncclMoeLayoutExpertMajor ? 8 : 1;
  s.maxDelayNs = shape.maxDelayNs;
  char* memory = nullptr;
  const size_t bytes = s.place(nullptr);
  RANK_CUDA(cudaMalloc(&memory, bytes));
  RANK_CUDA(cudaMemset(memory, 0, bytes));
  RANK_CUDA(cudaDeviceSynchronize());
  s.place(memory);
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = kStepTopK;
  config.maxTokens = shape.nTokens;
  config.layout = shape.layout;
  config.expertAlignment = s.alignment;
  RANK_OK(ncclMoeRoutingCreate(&layer->routing, rank.comm(), &config), rank.comm());
  layer->dispatch = s.dispatchArgs();
  layer->dispatch.flags = flags;
  layer->combine = s.combineArgs();
  layer->combine.flags = flags;
  return "";
}

// One step of all layers: one after the other, or with both halves of all calls in flight together.
std::string enqueueStep(GpuRank& rank, const std::vector<Layer>& layers, bool inPhases) {
  const ncclMoeComm_t comm = rank.comm();
  const cudaStream_t stream = rank.stream();
  if (!inPhases) {
    for (const Layer& layer : layers) {
      RANK_CUDA(drawStep(layer.steps, stream));
      RANK_OK(ncclMoeDispatch(&layer.dispatch, layer.routing, comm, stream), comm);
      RANK_CUDA(checkDispatch(layer.steps, stream));
      RANK_OK(ncclMoeCombine(&layer.combine, layer.routing, comm, stream), comm);
      RANK_CUDA(checkCombine(layer.steps, stream));
    }
    return "";
  }
  for (const Layer& layer : layers) {
    RANK_CUDA(drawStep(layer.steps, stream));
    RANK_OK(ncclMoeDispatch(&layer.dispatch, layer.routing, comm, stream), comm);
  }
  for (const Layer& layer : layers) {
    RANK_OK(ncclMoeComplete(layer.routing, comm, stream), comm);
    RANK_CUDA(checkDispatch(layer.steps, stream));
    RANK_OK(ncclMoeCombine(&layer.combine, layer.routing, comm, stream), comm);
  }
  for (size_t i = layers.size(); i-- > 0;) {
    RANK_OK(ncclMoeComplete(layers[i].routing, comm, stream), comm);
    RANK_CUDA(checkCombine(layers[i].steps, stream));
  }
  return "";
}

std::string checkSteps(GpuRank& rank, const std::vector<Layer>& layers, unsigned nSteps) {
  RANK_TRY(asyncIs(rank, ncclSuccess));
  for (const Layer& layer : layers) {
    unsigned done = 0;
    StepFault fault{};
    RANK_CUDA(cudaMemcpyAsync(&done, layer.steps.step, sizeof(done), cudaMemcpyDeviceToHost, rank.stream()));
    RANK_CUDA(cudaMemcpyAsync(&fault, layer.steps.fault, sizeof(fault), cudaMemcpyDeviceToHost, rank.stream()));
    RANK_CUDA(cudaStreamSynchronize(rank.stream()));
    char text[200];
    RANK_CHECK(fault.count == 0, "%s, layout %d", describeFault(fault, text, sizeof(text)), layer.steps.layout);
    RANK_CHECK(done == nSteps, "%u steps ran instead of %u", done, nSteps);
  }
  return "";
}

struct StepRun {
  int nSteps = 0;
  bool graph = false, inPhases = false;
  std::vector<StepShape> shapes;
};
using Meanwhile = std::function<std::string(GpuRank& rank, int step)>;

std::string runSteps(GpuRank& rank, Meeting& meeting, int nRanks, uint64_t seed, const StepRun& r,
                     const Meanwhile& meanwhile) {
  std::vector<Layer> layers(r.shapes.size());
  for (size_t i = 0; i < layers.size(); i++) {
    RANK_TRY(makeLayer(rank, nRanks, r.shapes[i], seed + i, r.inPhases ? NCCL_MOE_SEND_ONLY : 0u, &layers[i]));
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
    if (meanwhile) RANK_TRY(meanwhile(rank, step));
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

// One after the other, by the same ranks.
std::string runAll(int nRanks, int numSms, uint64_t seed, const std::vector<StepRun>& runs,
                   const Meanwhile& meanwhile = nullptr, ncclMoeMode_t mode = ncclMoeModeLatency) {
  int maxTokens = 0;
  DecodeRun run;
  run.nRanks = nRanks;
  run.mode = mode;
  run.numSms = numSms;
  for (const StepRun& r : runs) {
    for (const StepShape& shape : r.shapes) maxTokens = std::max(maxTokens, shape.nTokens);
    run.timeLimitMs += 20 * r.nSteps;
  }
  return runDecode(stepWorld(nRanks, maxTokens), run, [&](GpuRank& rank, Meeting& meeting) -> std::string {
    for (size_t i = 0; i < runs.size(); i++) {
      const std::string wrong = runSteps(rank, meeting, nRanks, seed, runs[i], meanwhile);
      if (!wrong.empty()) return format("run %zu: ", i) + wrong;
    }
    return "";
  });
}

const ncclMoeLayout_t kLayouts[] = {ncclMoeLayoutExpertPadded, ncclMoeLayoutExpertMajor, ncclMoeLayoutRankMajor};

// All ranks on GPUs of their own take all SMs there.
int smsFor(int nRanks) { return nRanks <= gpuCount() ? 0 : 8; }

// A graph of one step in every layout, with the cast and without, replayed so many times.
void graphReplays(ncclMoeMode_t mode, int nSteps) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  for (const int nRanks : {2, 4}) {
    std::vector<StepRun> runs;
    for (const ncclMoeLayout_t layout : kLayouts) {
      for (const bool cast : {false, true}) {
        StepRun r;
        r.nSteps = nSteps;
        r.graph = true;
        r.shapes = {StepShape()};
        r.shapes[0].layout = layout;
        r.shapes[0].cast = cast;
        // Rows of several pieces, also after the cast, of which the first brings the map.
        if (mode == ncclMoeModeThroughput) r.shapes[0].hidden = 2064;
        runs.push_back(r);
      }
    }
    ASSERT_EQ(runAll(nRanks, smsFor(nRanks), seed, runs, nullptr, mode), "")
      << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}
TEST(GpuDecodeSteps, GraphReplays) { graphReplays(ncclMoeModeLatency, iterations(900)); }
TEST(GpuDecodeSteps, GraphReplaysInThroughputMode) { graphReplays(ncclMoeModeThroughput, iterations(300)); }

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
    r.shapes[1].cast = true;
    r.shapes[1].hidden = 2064;
    r.shapes[2].hidden = 1304; // more than a segment, and not a whole number of them
    ASSERT_EQ(runAll(nRanks, smsFor(nRanks), seed, {r}), "")
      << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

TEST(GpuDecodeSteps, BackToBackCalls) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  for (const int nRanks : {1, 2, 3, 4}) {
    std::vector<StepRun> runs;
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
      r.shapes[1].cast = nRanks % 2 == 0;
      for (StepShape& shape : r.shapes) shape.maxDelayNs = 20000;
      runs.push_back(r);
    }
    ASSERT_EQ(runAll(nRanks, smsFor(nRanks), seed, runs), "")
      << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

// Hosts that sleep, kernels before a call, and kernels that keep most SMs, so that some blocks of a call start late, or all
// of them: nothing but time changes.
TEST(GpuDecodeSteps, SlowRanks) {
  NEED_GPUS(1);
  const uint64_t seed = testSeed();
  for (const int nRanks : {2, 4}) {
    StepRun r;
    const int numSms = nRanks == 2 && gpuCount() == 1 ? 32 : smsFor(nRanks);
    r.nSteps = std::min(iterations(120), 3000);
    r.inPhases = nRanks == 4;
    r.shapes.resize(2);
    r.shapes[1].layout = ncclMoeLayoutRankMajor;
    r.shapes[1].nTokens = 100;
    for (StepShape& shape : r.shapes) shape.maxDelayNs = 300000;
    std::vector<Random> randoms;
    for (int rank = 0; rank < nRanks; rank++) randoms.emplace_back(seed + static_cast<uint64_t>(rank));
    std::vector<cudaStream_t> others(static_cast<size_t>(nRanks), nullptr); // each rank sets its own
    const auto disturb = [&](GpuRank& rank, int step) -> std::string {
      Random& random = randoms[static_cast<size_t>(rank.rank())];
      cudaStream_t& other = others[static_cast<size_t>(rank.rank())];
      int nSms = 0;
      RANK_CUDA(cudaDeviceGetAttribute(&nSms, cudaDevAttrMultiProcessorCount, 0));
      if (step == 0) RANK_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
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
    ASSERT_EQ(runAll(nRanks, numSms, seed, {r}, disturb), "")
      << "with MOE_TEST_SEED=" << seed << ", " << nRanks << " ranks";
  }
}

} // namespace
} // namespace moe::test
