#include "host/job.h"

namespace moe::test {
namespace {

void append(std::string* outputs, const DispatchImage& image) {
  const auto add = [&](const auto& v) {
    outputs->append(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(v[0]));
  };
  add(image.x);
  add(image.scales);
  add(image.topkIdx);
  add(image.weights);
  add(image.count);
  add(image.expertCounts);
  add(image.expertOffsets);
}

std::string checkCounts(const Reference& reference, Rank& rank, ncclMoeRouting_t routing) {
  const Delivery& d = reference.delivery(rank.rank());
  int64_t nRows = -1;
  std::vector<int> counts(d.expertCounts.size() + 1, -7);
  RANK_OK(ncclMoeRoutingGetCounts(routing, rank.comm(), &nRows, counts.data()), rank.comm());
  RANK_CHECK(nRows == d.nRows, "GetCounts says %lld rows, expected %lld", static_cast<long long>(nRows),
             static_cast<long long>(d.nRows));
  for (size_t e = 0; e < d.expertCounts.size(); e++) {
    RANK_CHECK(counts[e] == d.expertCounts[e], "expert %zu: %d, expected %d", e, counts[e], d.expertCounts[e]);
  }
  RANK_CHECK(counts.back() == -7, "GetCounts wrote past expertCounts");
  nRows = -1;
  RANK_OK(ncclMoeRoutingGetCounts(routing, rank.comm(), &nRows, nullptr), rank.comm());
  RANK_CHECK(nRows == d.nRows);
  return "";
}

std::string runCombine(Rank& rank, ncclMoeRouting_t routing, const Round& round, const CombineRound& combine,
                       std::string* outputs) {
  const DispatchStyle& style = round.styles[rank.rank()];
  CombineCall call(*round.reference, combine.problem, rank.rank(), style.emptyNull,
                   combine.sendOnly ? NCCL_MOE_SEND_ONLY : 0u);
  for (int repeat = 0; repeat < combine.repeats; repeat++) {
    call.poison();
    rank.jitter();
    RANK_OK(ncclMoeCombine(&call.args(), routing, rank.comm(), nullptr), rank.comm());
    rank.jitter();
    if (combine.sendOnly) RANK_OK(ncclMoeComplete(routing, rank.comm(), nullptr), rank.comm());
    std::string wrong = call.verify();
    if (!wrong.empty())
      return wrong + " in " + describe(combine.problem) + " after " + describe(round.reference->problem());
    if (outputs != nullptr) {
      const CombineImage image = call.image();
      outputs->append(reinterpret_cast<const char*>(image.out.data()), image.out.size());
      outputs->append(reinterpret_cast<const char*>(image.gradTopkWeights.data()), image.gradTopkWeights.size() * 4);
    }
  }
  return "";
}

} // namespace

std::string Job::describe() const { return world.describe() + (latency ? ", latency mode" : ""); }

ncclMoeConfig_t Job::config() const {
  ncclMoeConfig_t config = world.config();
  config.mode = latency ? ncclMoeModeLatency : ncclMoeModeThroughput;
  return config;
}

ncclMoeRoutingConfig_t routingConfig(const World& world, const DispatchProblem& problem, bool hostCounts) {
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = problem.topK;
  config.maxTokens = problem.maxTokens == world.maxTokens ? 0 : problem.maxTokens;
  config.layout = problem.layout;
  config.expertAlignment = problem.expertAlignment == 1 ? 0 : problem.expertAlignment;
  config.hostCounts = hostCounts ? 1 : 0;
  return config;
}

Job randomJob(uint64_t seed, int nRoutings, int nRounds, const WorldLimits& limits) {
  Random random(seed);
  Job job;
  job.world = randomWorld(random, limits);
  job.latency = chance(random, 0.4);
  for (int i = 0; i < nRoutings; i++) {
    RoutingJob routing;
    for (int j = 0; j < nRounds; j++) {
      Round round;
      const Round* last = routing.rounds.empty() ? nullptr : &routing.rounds.back();
      const bool keep = last != nullptr && chance(random, 0.6);
      DispatchProblem problem = randomDispatch(random, job.world, keep ? &last->reference->problem() : nullptr);
      if (last != nullptr && !keep) {
        // The routing fixes these; draw until they agree by making a kept one with new selections.
        problem = randomDispatch(random, job.world, &last->reference->problem());
        for (Source& source : problem.sources) {
          fillSelections(random, job.world, chance(random, 0.5) ? Selections::uniform : Selections::sparse,
                         problem.topK, &source);
        }
      }
      const bool sendOnly = chance(random, 0.3);
      for (int rank = 0; rank < job.world.nRanks; rank++) {
        DispatchStyle style = randomStyle(random);
        if (keep) style.tokensDev = last->styles[rank].tokensDev;
        if (style.tokensDev) style.emptyNull = false; // the host cannot see that T is 0
        style.flags = (sendOnly ? NCCL_MOE_SEND_ONLY : 0u) | (keep ? NCCL_MOE_KEEP_ROUTING : 0u);
        round.styles.push_back(style);
      }
      round.reference = std::make_unique<Reference>(problem);
      for (int n = pick(random, 1, 2); n > 0; n--) {
        CombineRound combine;
        combine.problem = randomCombine(random, job.world, *round.reference);
        combine.problem.cast = job.latency && mayBeCast(combine.problem) && chance(random, 0.7);
        combine.sendOnly = chance(random, 0.3);
        combine.repeats = chance(random, 0.2) ? 2 : 1;
        round.combines.push_back(std::move(combine));
      }
      routing.rounds.push_back(std::move(round));
    }
    routing.config = routingConfig(job.world, routing.rounds[0].reference->problem(), chance(random, 0.5));
    job.routings.push_back(std::move(routing));
  }
  return job;
}

std::string runRouting(Rank& rank, const RoutingJob& job, bool latency, std::string* outputs) {
  ncclMoeRouting_t routing = nullptr;
  RANK_OK(ncclMoeRoutingCreate(&routing, rank.comm(), &job.config), rank.comm());
  for (const Round& round : job.rounds) {
    const DispatchStyle& style = round.styles[rank.rank()];
    DispatchCall call(*round.reference, rank.rank(), style);
    rank.jitter();
    RANK_OK(ncclMoeDispatch(&call.args(), routing, rank.comm(), nullptr), rank.comm());
    rank.jitter();
    if ((style.flags & NCCL_MOE_SEND_ONLY) != 0) {
      // The counts may be asked for before the rows are there, but in latency mode.
      if (job.config.hostCounts == 1 && latency) {
        int64_t nRows = 0;
        RANK_TRY(expectResult("counts between the halves",
                              ncclMoeRoutingGetCounts(routing, rank.comm(), &nRows, nullptr), ncclInvalidUsage,
                              rank.comm(), "ncclMoeComplete"));
      } else if (job.config.hostCounts == 1) {
        RANK_TRY(checkCounts(*round.reference, rank, routing));
      }
      RANK_OK(ncclMoeComplete(routing, rank.comm(), nullptr), rank.comm());
    }
    std::string wrong = call.verify();
    if (!wrong.empty()) return wrong + " in " + describe(round.reference->problem());
    if (outputs != nullptr) append(outputs, call.image());
    if (job.config.hostCounts == 1) RANK_TRY(checkCounts(*round.reference, rank, routing));
    for (const CombineRound& combine : round.combines) RANK_TRY(runCombine(rank, routing, round, combine, outputs));
  }
  RANK_OK(ncclMoeRoutingDestroy(routing, rank.comm()), rank.comm());
  return "";
}

std::string runJob(Rank& rank, const Job& job, std::string* outputs) {
  RANK_OK(rank.init(job.config()), nullptr);
  for (const RoutingJob& routing : job.routings) RANK_TRY(runRouting(rank, routing, job.latency, outputs));
  RANK_OK(rank.destroy(), nullptr);
  return "";
}

std::string runSmoke(Rank& rank, ncclMoeComm_t comm, int nExperts) {
  // Every rank sends one token to expert rank % E and gets it back doubled by weight 2.
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = 1;
  config.maxTokens = 1;
  config.layout = ncclMoeLayoutExpertMajor;
  ncclMoeRouting_t routing = nullptr;
  RANK_OK(ncclMoeRoutingCreate(&routing, comm, &config), comm);
  alignas(16) float x[4] = {1.0f * static_cast<float>(rank.rank() + 1), -2, 3, 0.5f};
  const int64_t expert = rank.rank() % nExperts;
  int count = -1;
  std::vector<float> received(static_cast<size_t>(rank.nRanks()) * 4 + 4);
  float* rows = received.data();
  while (reinterpret_cast<uintptr_t>(rows) % 16 != 0) rows++;
  ncclMoeDispatchArgs_t dispatch = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  dispatch.x = x;
  dispatch.type = ncclFloat32;
  dispatch.hidden = 4;
  dispatch.nTokens = 1;
  dispatch.topkIdx = &expert;
  dispatch.recvX = rows;
  dispatch.recvCapacity = rank.nRanks();
  dispatch.recvCount = &count;
  RANK_OK(ncclMoeDispatch(&dispatch, routing, comm, nullptr), comm);
  RANK_CHECK(count >= 0 && count <= rank.nRanks(), "count %d", count);
  std::vector<float> weights(static_cast<size_t>(count), 2.0f);
  alignas(16) float out[4] = {};
  ncclMoeCombineArgs_t combine = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
  combine.x = rows;
  combine.type = ncclFloat32;
  combine.hidden = 4;
  combine.weights = weights.data();
  float dummy = 2.0f;
  if (count == 0) combine.weights = &dummy;
  combine.out = out;
  RANK_OK(ncclMoeCombine(&combine, routing, comm, nullptr), comm);
  for (int i = 0; i < 4; i++) RANK_CHECK(out[i] == 2 * x[i], "element %d is %g, expected %g", i, out[i], 2 * x[i]);
  RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
  return "";
}

} // namespace moe::test
