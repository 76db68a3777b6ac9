#include "api/one_rank.h"

namespace moe::test {

ncclMoeRoutingConfig_t goodRouting(ncclMoeLayout_t layout) {
  ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  config.topK = kTopK;
  config.layout = layout;
  return config;
}

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

} // namespace moe::test
