// Callers built against an older or a newer nccl_moe.h: structs of other sizes.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "api/one_rank.h"

namespace moe::test {
namespace {

// A struct of the first bytes of another, as an older header had it.  What follows is garbage up to the next multiple
// of 16 and a page that faults behind it.
template <class T> struct Older {
  Older(const T& full, size_t bytes) : buffer(bytes) {
    memcpy(buffer.data(), &full, bytes);
    get()->size = bytes;
    get()->version = 1;
  }
  T* get() const { return buffer.as<T>(); }
  GuardedBuffer buffer;
};

// The same of a newer header: extra bytes at the end.
template <class T> struct Newer {
  Newer(const T& full, uint8_t last) : bytes(sizeof(T) + 48, 0) {
    memcpy(bytes.data(), &full, sizeof(T));
    bytes.back() = last;
    get()->size = bytes.size();
    get()->version = NCCL_MOE_VERSION_CODE + 100;
  }
  T* get() { return reinterpret_cast<T*>(bytes.data()); }
  std::vector<uint8_t> bytes; // from operator new: aligned for any type
};

struct FewTensors {
  GuardedBuffer x = GuardedBuffer::input(std::vector<uint16_t>(32, 0x3f80));
  GuardedBuffer idx = GuardedBuffer::input(std::vector<int64_t>{0, 3, 2, 1});
  GuardedBuffer recvX{4 * 32}, count{4}, expertCounts{4 * kExperts}, expertOffsets{4 * (kExperts + 1)}, out{64};

  ncclMoeDispatchArgs_t dispatch() const {
    ncclMoeDispatchArgs_t args = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
    args.x = x.data();
    args.hidden = 16;
    args.nTokens = 2;
    args.topkIdx = idx.data();
    args.recvX = recvX.data();
    args.recvCapacity = 4;
    args.recvCount = count.as<int>();
    args.expertCounts = expertCounts.as<int>();
    args.expertOffsets = expertOffsets.as<int>();
    args.flags = NCCL_MOE_KEEP_ROUTING; // an error if it were read
    return args;
  }
  ncclMoeCombineArgs_t combine() const {
    ncclMoeCombineArgs_t args = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
    args.x = recvX.data();
    args.hidden = 16;
    args.out = out.data();
    args.flags = 1u << 30;    // an error if it were read
    args.withGradWeights = 1; // likewise
    return args;
  }
};

std::string exchangeOldAndNew(ncclMoeComm_t comm, const ncclMoeRoutingConfig_t* config) {
  ncclMoeRouting_t routing = nullptr;
  RANK_OK(ncclMoeRoutingCreate(&routing, comm, config), comm);
  const FewTensors t;
  // Every header that had the required fields, from the one without optional outputs on.
  const struct {
    size_t bytes;
    bool count, counts, offsets;
  } olds[] = {
    {offsetof(ncclMoeDispatchArgs_t, recvScales), false, false, false},
    {offsetof(ncclMoeDispatchArgs_t, recvTopkIdx), false, false, false},
    {offsetof(ncclMoeDispatchArgs_t, recvCount), false, false, false},
    {offsetof(ncclMoeDispatchArgs_t, expertCounts), true, false, false},
    {offsetof(ncclMoeDispatchArgs_t, expertOffsets), true, true, false},
    {offsetof(ncclMoeDispatchArgs_t, flags), true, true, true},
  };
  for (const auto& old : olds) {
    FewTensors fresh;
    const Older<ncclMoeDispatchArgs_t> dispatch(fresh.dispatch(), old.bytes);
    RANK_OK(ncclMoeDispatch(dispatch.get(), routing, comm, nullptr), comm);
    RANK_CHECK(fresh.count.untouched() != old.count, "size %zu", old.bytes);
    RANK_CHECK(fresh.expertCounts.untouched() != old.counts, "size %zu", old.bytes);
    RANK_CHECK(fresh.expertOffsets.untouched() != old.offsets, "size %zu", old.bytes);
    RANK_CHECK(dispatch.buffer.guardsIntact());
    const Older<ncclMoeCombineArgs_t> combine(fresh.combine(), offsetof(ncclMoeCombineArgs_t, flags));
    RANK_OK(ncclMoeCombine(combine.get(), routing, comm, nullptr), comm);
    for (int i = 0; i < 32; i++) RANK_CHECK(fresh.out.as<uint16_t>()[i] == 0x4000, "element %d", i);
    RANK_CHECK(combine.buffer.guardsIntact());
  }
  FewTensors fresh;
  ncclMoeDispatchArgs_t args = fresh.dispatch();
  args.flags = 0;
  Newer<ncclMoeDispatchArgs_t> fits(args, 0);
  Newer<ncclMoeDispatchArgs_t> usesMore(args, 1);
  RANK_RESULT(ncclMoeDispatch(usesMore.get(), routing, comm, nullptr), ncclInvalidUsage, comm, "args,newer");
  RANK_CHECK(fresh.recvX.untouched());
  RANK_OK(ncclMoeDispatch(fits.get(), routing, comm, nullptr), comm);
  ncclMoeCombineArgs_t combine = fresh.combine();
  combine.flags = 0;
  combine.withGradWeights = 0;
  Newer<ncclMoeCombineArgs_t> combineFits(combine, 0);
  Newer<ncclMoeCombineArgs_t> combineUsesMore(combine, 1);
  RANK_RESULT(ncclMoeCombine(combineUsesMore.get(), routing, comm, nullptr), ncclInvalidUsage, comm, "args,newer");
  RANK_OK(ncclMoeCombine(combineFits.get(), routing, comm, nullptr), comm);
  for (int i = 0; i < 32; i++) RANK_CHECK(fresh.out.as<uint16_t>()[i] == 0x4000, "element %d", i);
  RANK_OK(ncclMoeRoutingDestroy(routing, comm), comm);
  return "";
}

TEST(Versions, OlderCaller) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              // Without mode and what follows; a wrong mode would be an error if it were read.
              ncclMoeConfig_t full = goodConfig();
              full.mode = static_cast<ncclMoeMode_t>(77);
              full.jobToken = reinterpret_cast<const char*>(1);
              const Older<ncclMoeConfig_t> config(full, offsetof(ncclMoeConfig_t, mode));
              ncclMoeComm_t comm = nullptr;
              RANK_OK(ncclMoeCommInitHost(&comm, 1, 0, rank.rendezvous().c_str(), config.get()), nullptr);
              ncclMoeRoutingConfig_t routing = goodRouting(kExpertMajor);
              routing.expertAlignment = -1;
              routing.hostCounts = 55;
              const Older<ncclMoeRoutingConfig_t> old(routing, offsetof(ncclMoeRoutingConfig_t, expertAlignment));
              RANK_TRY(exchangeOldAndNew(comm, old.get()));
              ncclMoeCommInfo_t info = NCCL_MOE_COMM_INFO_INITIALIZER;
              const size_t infoBytes = offsetof(ncclMoeCommInfo_t, memoryBytes);
              const Older<ncclMoeCommInfo_t> oldInfo(info, infoBytes);
              RANK_OK(ncclMoeCommGetInfo(comm, oldInfo.get()), comm);
              RANK_CHECK(oldInfo.get()->nRanks == 1 && oldInfo.get()->nLocalExperts == kExperts);
              RANK_CHECK(oldInfo.get()->size == infoBytes, "size is now %zu", oldInfo.get()->size);
              RANK_CHECK(oldInfo.buffer.guardsIntact(), "GetInfo wrote past the caller's struct");
              RANK_OK(ncclMoeCommDestroy(comm), nullptr);
              return "";
            }),
            "");
}

TEST(Versions, NewerCaller) {
  EXPECT_EQ(runOne([](Rank& rank) -> std::string {
              Newer<ncclMoeConfig_t> usesMore(goodConfig(), 1);
              Newer<ncclMoeConfig_t> fits(goodConfig(), 0);
              ncclMoeComm_t comm = nullptr;
              const char* url = rank.rendezvous().c_str();
              RANK_RESULT(ncclMoeCommInitHost(&comm, 1, 0, url, usesMore.get()), ncclInvalidUsage, nullptr,
                          "config,newer");
              RANK_CHECK(comm == nullptr);
              RANK_OK(ncclMoeCommInitHost(&comm, 1, 0, url, fits.get()), nullptr);
              Newer<ncclMoeRoutingConfig_t> routing(goodRouting(kExpertMajor), 0);
              RANK_TRY(exchangeOldAndNew(comm, routing.get()));
              Newer<ncclMoeCommInfo_t> info(NCCL_MOE_COMM_INFO_INITIALIZER, 0);
              RANK_OK(ncclMoeCommGetInfo(comm, info.get()), comm);
              RANK_CHECK(info.get()->nRanks == 1 && info.get()->size == info.bytes.size());
              RANK_OK(ncclMoeCommDestroy(comm), nullptr);
              return "";
            }),
            "");
}

} // namespace
} // namespace moe::test
