// Rings, within one process.
#include "host/ring.h"

#include <random>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace {

using namespace moe;

constexpr size_t kBytes = 1 << 16;

TEST(Ring, SpansAreContiguousAcrossTheEnd) {
  RingPair pair;
  ASSERT_EQ(pair.create(kBytes), ncclSuccess);
  RingWriter out = pair.writer(0);
  RingReader in = pair.reader(0);
  constexpr size_t kSpan = 5000; // does not divide the ring
  for (int i = 0; i < 100; i++) {
    uint8_t* to = out.reserve(kSpan);
    ASSERT_NE(to, nullptr);
    for (size_t b = 0; b < kSpan; b++) to[b] = static_cast<uint8_t>(b * 7 + static_cast<size_t>(i));
    ASSERT_EQ(in.peek(1), nullptr) << "not committed yet";
    out.commit(kSpan);
    const uint8_t* from = in.peek(kSpan);
    ASSERT_NE(from, nullptr);
    for (size_t b = 0; b < kSpan; b++) ASSERT_EQ(from[b], static_cast<uint8_t>(b * 7 + static_cast<size_t>(i)));
    ASSERT_EQ(in.peek(kSpan + 1), nullptr);
    in.consume(kSpan);
  }
}

TEST(Ring, FullAndEmpty) {
  RingPair pair;
  ASSERT_EQ(pair.create(kBytes), ncclSuccess);
  RingWriter out = pair.writer(1);
  RingReader in = pair.reader(1);
  EXPECT_EQ(out.reserve(kBytes + 1), nullptr);
  ASSERT_NE(out.reserve(kBytes), nullptr);
  out.commit(kBytes);
  EXPECT_EQ(out.reserve(1), nullptr);
  EXPECT_EQ(in.fill(), kBytes);
  in.consume(1);
  EXPECT_NE(out.reserve(1), nullptr);
  EXPECT_EQ(out.reserve(2), nullptr);
}

TEST(Ring, OpenedByAnother) {
  RingPair mine, theirs;
  ASSERT_EQ(mine.create(kBytes), ncclSuccess);
  ShmOffer wrong = mine.offer();
  wrong.nonce[3] ^= 1;
  EXPECT_FALSE(RingPair().open(wrong, kBytes)) << "not the file that was offered";
  wrong = mine.offer();
  wrong.fd = 0;
  EXPECT_FALSE(RingPair().open(wrong, kBytes)) << "not a ring";
  EXPECT_FALSE(RingPair().open(mine.offer(), kBytes / 2));
  ASSERT_TRUE(theirs.open(mine.offer(), kBytes));
  RingWriter out = mine.writer(0);
  RingReader in = theirs.reader(0);
  EXPECT_EQ(out.write("hello", 5), 5U);
  char text[6] = "";
  EXPECT_EQ(in.read(text, 5), 5U);
  EXPECT_STREQ(text, "hello");
}

// A broken peer may store any position.
TEST(Ring, ImpossiblePositionsGiveNothing) {
  RingPositions positions{};
  std::vector<uint8_t> data(kBytes);
  RingReader in(&positions, data.data(), kBytes);
  positions.head.store(kBytes + 1);
  EXPECT_EQ(in.fill(), 0U);
  EXPECT_EQ(in.peek(1), nullptr);
  positions.head.store(~uint64_t{0});
  EXPECT_EQ(in.fill(), 0U);
  RingWriter out(&positions, data.data(), kBytes);
  positions.tail.store(5); // more was consumed than ever written
  EXPECT_EQ(out.write("x", 1), 1U) << "the tail seen at first is still good";
  EXPECT_EQ(out.reserve(kBytes), nullptr);
  EXPECT_EQ(out.write("x", 1), 0U);
}

TEST(Ring, TwoThreads) {
  RingPair pair;
  ASSERT_EQ(pair.create(kBytes), ncclSuccess);
  constexpr uint64_t kNumbers = 200000;
  std::thread writer([&] {
    RingWriter out = pair.writer(0);
    std::mt19937 random(1);
    for (uint64_t next = 0; next < kNumbers;) {
      const uint64_t n = std::min<uint64_t>(1 + random() % 1000, kNumbers - next);
      auto* to = reinterpret_cast<uint64_t*>(out.reserve(n * sizeof(uint64_t)));
      if (to == nullptr) {
        std::this_thread::yield();
        continue;
      }
      for (uint64_t i = 0; i < n; i++) to[i] = next++;
      out.commit(n * sizeof(uint64_t));
    }
  });
  RingReader in = pair.reader(0);
  uint64_t expected = 0, wrong = 0;
  while (expected < kNumbers) {
    const auto* from = reinterpret_cast<const uint64_t*>(in.peek(sizeof(uint64_t)));
    if (from == nullptr) {
      std::this_thread::yield();
      continue;
    }
    wrong += *from != expected++ ? 1 : 0;
    in.consume(sizeof(uint64_t));
  }
  writer.join();
  EXPECT_EQ(wrong, 0U);
}

} // namespace
