// What the verbs transport is made of and needs no device: registrations, immediate values, the choice of a GID.
#include <gtest/gtest.h>
#include <infiniband/verbs.h>

#include <map>
#include <random>

#include "base/error.h"
#include "net/regcache.h"
#include "net/topology.h"
#include "net/verbs_connection.h"

using namespace moe;
using namespace moe::net;

namespace {

// Counts, and fails when told to.
class FakeRegistrar : public Registrar {
 public:
  int add(const Memory& memory, int access, DeviceMr* out) override {
    if (failNext != 0) return std::exchange(failNext, 0);
    const uint32_t key = ++lastKey;
    live[key] = {memory, access};
    *out = {reinterpret_cast<void*>(static_cast<uintptr_t>(key)), key, key + 1000};
    return 0;
  }
  int remove(const DeviceMr& mr) override {
    EXPECT_EQ(live.erase(mr.localKey), 1u) << "given back twice";
    return std::exchange(failRemove, 0);
  }
  struct Registered {
    Memory memory;
    int access;
  };
  std::map<uint32_t, Registered> live;
  uint32_t lastKey = 0;
  int failNext = 0, failRemove = 0;
};

Memory range(uintptr_t begin, size_t bytes, PtrKind kind = ptrHost) {
  Memory memory;
  memory.data = reinterpret_cast<void*>(begin);
  memory.bytes = bytes;
  memory.kind = kind;
  return memory;
}

constexpr uintptr_t base = 0x10000000;

} // namespace

TEST(RegistrationCache, CoveredRangesShareAndTheLastUserEndsIt) {
  FakeRegistrar registrar;
  RegistrationCache cache(&registrar);
  RegistrationCache::Held *outer, *inner, *same;
  ASSERT_EQ(cache.add(range(base, 100000), 7, &outer), 0);
  ASSERT_EQ(cache.add(range(base + 5000, 10), 7, &inner), 0);
  ASSERT_EQ(cache.add(range(base, 100000), 7, &same), 0);
  EXPECT_EQ(registrar.live.size(), 1u);
  EXPECT_EQ(inner->localKey, outer->localKey);
  EXPECT_EQ(inner->bytes, 10u); // what it was asked for, not what was registered
  EXPECT_EQ(cache.remove(outer), 0);
  EXPECT_EQ(cache.remove(same), 0);
  EXPECT_EQ(registrar.live.size(), 1u);
  EXPECT_EQ(cache.remove(inner), 0);
  EXPECT_EQ(registrar.live.size(), 0u);
}

TEST(RegistrationCache, OtherAccessFlagsAreAnotherRegistration) {
  FakeRegistrar registrar;
  RegistrationCache cache(&registrar);
  RegistrationCache::Held *relaxed, *strict;
  ASSERT_EQ(cache.add(range(base, 4096), IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING, &relaxed), 0);
  ASSERT_EQ(cache.add(range(base, 4096), IBV_ACCESS_LOCAL_WRITE, &strict), 0);
  EXPECT_NE(relaxed->localKey, strict->localKey);
  EXPECT_EQ(registrar.live[strict->localKey].access, IBV_ACCESS_LOCAL_WRITE);
  EXPECT_EQ(cache.remove(relaxed), 0);
  EXPECT_EQ(cache.remove(strict), 0);
}

TEST(RegistrationCache, DmabufsAreNeverShared) {
  FakeRegistrar registrar;
  RegistrationCache cache(&registrar);
  RegistrationCache::Held *a, *b;
  Memory memory = range(base, 65536, ptrDmabuf);
  memory.dmabufFd = 5;
  ASSERT_EQ(cache.add(memory, 1, &a), 0);
  ASSERT_EQ(cache.add(memory, 1, &b), 0); // the same number may be another buffer by now
  EXPECT_EQ(registrar.live.size(), 2u);
  EXPECT_EQ(cache.remove(a), 0);
  EXPECT_EQ(cache.remove(b), 0);
}

TEST(RegistrationCache, FailuresLeaveNothingAndWrongHandlesAreRefused) {
  FakeRegistrar registrar;
  RegistrationCache cache(&registrar);
  RegistrationCache::Held* held;
  registrar.failNext = ENOMEM;
  EXPECT_EQ(cache.add(range(base, 10), 1, &held), ENOMEM);
  EXPECT_EQ(held, nullptr);
  EXPECT_EQ(cache.entries(), 0u);
  EXPECT_EQ(cache.add(range(UINTPTR_MAX - 5, 100), 1, &held), EINVAL); // wraps round
  ASSERT_EQ(cache.add(range(base, 10), 1, &held), 0);
  EXPECT_EQ(cache.remove(held), 0);
  EXPECT_EQ(cache.remove(held), EINVAL);
  EXPECT_EQ(cache.remove(nullptr), EINVAL);
  ASSERT_EQ(cache.add(range(base, 10), 1, &held), 0);
  registrar.failRemove = EBUSY;
  EXPECT_EQ(cache.remove(held), EBUSY);
  EXPECT_EQ(cache.entries(), 0u); // never found again, whatever the device thinks
}

TEST(RegistrationCache, RandomOrderNeitherLeaksNorMixesUp) {
  FakeRegistrar registrar;
  RegistrationCache cache(&registrar);
  std::mt19937_64 random(3);
  std::vector<RegistrationCache::Held*> held;
  for (int step = 0; step < 5000; step++) {
    if (held.empty() || random() % 2 == 0) {
      RegistrationCache::Held* fresh;
      const uintptr_t begin = base + random() % 100000;
      ASSERT_EQ(cache.add(range(begin, 1 + random() % 20000), static_cast<int>(random() % 2), &fresh), 0);
      held.push_back(fresh);
    } else {
      const size_t i = random() % held.size();
      ASSERT_EQ(cache.remove(held[i]), 0);
      held.erase(held.begin() + static_cast<ptrdiff_t>(i));
    }
    for (auto* h : held) { // what each holds is still registered, and covers it
      auto it = registrar.live.find(h->localKey);
      ASSERT_NE(it, registrar.live.end());
      const auto begin = reinterpret_cast<uintptr_t>(it->second.memory.data);
      ASSERT_LE(begin, reinterpret_cast<uintptr_t>(h->data));
      ASSERT_GE(begin + it->second.memory.bytes, reinterpret_cast<uintptr_t>(h->data) + h->bytes);
    }
  }
  for (auto* h : held) ASSERT_EQ(cache.remove(h), 0);
  EXPECT_TRUE(registrar.live.empty());
}

TEST(Immediate, RoundTrip) {
  for (uint32_t slot : {0u, 1u, 31u}) {
    for (uint32_t member : {0u, 7u}) {
      for (uint32_t size : {0u, 1u, Immediate::sizeInRecord - 1, Immediate::sizeInRecord}) {
        const Immediate out = Immediate::unpack(Immediate{slot, member, 0, 1, size}.pack());
        EXPECT_EQ(out.slot, slot);
        EXPECT_EQ(out.member, member);
        EXPECT_EQ(out.pieces, 1u);
        EXPECT_EQ(out.piece, 0u);
        EXPECT_EQ(out.size, size);
      }
      for (uint32_t pieces = 2; pieces <= maxQueues; pieces++) {
        for (uint32_t piece = 0; piece < pieces; piece++) {
          const Immediate out = Immediate::unpack(Immediate{slot, member, piece, pieces, 12345}.pack());
          EXPECT_EQ(out.slot, slot);
          EXPECT_EQ(out.member, member);
          EXPECT_EQ(out.pieces, pieces);
          EXPECT_EQ(out.piece, piece);
          EXPECT_EQ(out.size, Immediate::sizeInRecord); // has no room in it
        }
      }
    }
  }
}

TEST(Gid, RoceV2AndIpv4ComeFirst) {
  uint8_t zero[16] = {}, ipv4[16] = {}, local[16] = {0xfe, 0x80}, global[16] = {0x20, 0x01};
  ipv4[10] = ipv4[11] = 0xff;
  ipv4[12] = 10;
  local[15] = global[15] = 1;
  EXPECT_LT(gidPreference(zero, true), 0);
  EXPECT_GT(gidPreference(ipv4, true), gidPreference(global, true));
  EXPECT_GT(gidPreference(global, true), gidPreference(local, true));
  EXPECT_GT(gidPreference(local, true), gidPreference(ipv4, false)); // RoCE v1 last
  EXPECT_GE(gidPreference(local, false), 0);
}

TEST(UsableNics, ListsAndExclusions) {
  std::vector<NicInfo> nics(3);
  nics[0].name = nics[1].name = "mlx5_0";
  nics[1].port = 2;
  nics[2].name = "mlx5_10";
  auto with = [&](const std::string& user) {
    std::vector<bool> usable;
    bool maps = false;
    EXPECT_EQ(usableNics(nics, user, &usable, &maps), ncclSuccess);
    EXPECT_EQ(maps, user.find('=') != std::string::npos);
    return usable;
  };
  EXPECT_EQ(with(""), (std::vector<bool>{true, true, true}));
  EXPECT_EQ(with("mlx5_0:2"), (std::vector<bool>{false, true, false}));
  EXPECT_EQ(with("mlx5_0"), (std::vector<bool>{true, true, false}));
  EXPECT_EQ(with("^mlx5_0:1,mlx5_10"), (std::vector<bool>{false, true, false}));
  EXPECT_EQ(with("0=mlx5_10"), (std::vector<bool>{true, true, true}));
  EXPECT_EQ(with("0=mlx5_10;0000:0e:00.0=mlx5_0:2,mlx5_10"), (std::vector<bool>{true, true, true}));
  std::vector<bool> usable;
  bool maps = false;
  for (const std::string wrong : {"mlx5_7", "0=mlx5_7", "^0=mlx5_0", "x=mlx5_0", "=mlx5_0", "0=", "0=mlx5_0,",
                                  "0=mlx5_0;mlx5_10", "0=mlx5_0;0=mlx5_10", "mlx5_0=mlx5_10", "="}) {
    EXPECT_EQ(usableNics(nics, wrong, &usable, &maps), ncclInvalidArgument) << wrong;
    EXPECT_NE(std::string(lastError()).find("NCCL_MOE_NET_NIC"), std::string::npos) << lastError();
  }
}

TEST(VerbsBody, Parses) {
  VerbsBody body, out;
  body.nQueues = 4;
  body.nPaths = 2;
  body.path[0].mtu = body.path[1].mtu = 5;
  EXPECT_EQ(parseVerbsBody(&body, sizeof(body), &out), ParseResult::ok);
  EXPECT_EQ(parseVerbsBody(&body, sizeof(body) - 1, &out), ParseResult::badLength);
  const auto bad = [&](auto change) {
    VerbsBody changed = body;
    change(&changed);
    return parseVerbsBody(&changed, sizeof(changed), &out) == ParseResult::badField;
  };
  EXPECT_TRUE(bad([](VerbsBody* b) { b->nQueues = maxQueues + 2; }));
  EXPECT_TRUE(bad([](VerbsBody* b) { b->nQueues = 0; }));
  EXPECT_TRUE(bad([](VerbsBody* b) { b->nQueues = 3; })); // not the same for each path
  EXPECT_TRUE(bad([](VerbsBody* b) { b->nPaths = 0; }));
  EXPECT_TRUE(bad([](VerbsBody* b) { b->nPaths = maxPaths + 1; }));
  EXPECT_TRUE(bad([](VerbsBody* b) { b->queueNumber[3] = 1u << 24; }));
  EXPECT_TRUE(bad([](VerbsBody* b) { b->path[1].mtu = 6; }));
}

TEST(PathDown, Parses) {
  PathDown message, out;
  message.path = 1;
  message.arrived[31][7] = 77;
  EXPECT_EQ(parsePathDown(&message, sizeof(message), 2, &out), ParseResult::ok);
  EXPECT_EQ(out.arrived[31][7], 77u);
  EXPECT_EQ(parsePathDown(&message, sizeof(message), 1, &out), ParseResult::badField);
  EXPECT_EQ(parsePathDown(&message, sizeof(message) - 1, 2, &out), ParseResult::badLength);
  message.bytes++;
  EXPECT_EQ(parsePathDown(&message, sizeof(message), 2, &out), ParseResult::badLength);
  message.magic++;
  EXPECT_EQ(parsePathDown(&message, sizeof(message), 2, &out), ParseResult::badMagic);
}
