// What the API tests share: a small job of one rank, its tensors, and a good exchange.
#pragma once

#include <functional>
#include <string>

#include "common/buffer.h"
#include "common/cluster.h"

namespace moe::test {

constexpr int kExperts = 4;
constexpr int kMaxTokens = 8;
constexpr int kTopK = 2;
constexpr int kHidden = 16; // BF16: 32 bytes
constexpr int kTokens = 2;
constexpr int kRows = 4; // received by the only rank, in expert layouts

const ncclMoeLayout_t kRankMajor = ncclMoeLayoutRankMajor;
const ncclMoeLayout_t kExpertMajor = ncclMoeLayoutExpertMajor;
const ncclMoeLayout_t kPadded = ncclMoeLayoutExpertPadded;

inline ncclMoeConfig_t goodConfig() { return makeConfig(kExperts, kMaxTokens, kTopK, 64, 5000 * kSlow); }
ncclMoeRoutingConfig_t goodRouting(ncclMoeLayout_t layout);

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

// A good dispatch and combine through a routing.
std::string exchange(ncclMoeComm_t comm, ncclMoeRouting_t routing, ncclMoeLayout_t layout);

// Runs body as the only rank of a job; returns what went wrong.
std::string runOne(const std::function<std::string(Rank&)>& body);

} // namespace moe::test
