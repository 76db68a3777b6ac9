// The parsers of what peers send, the matching of sends and receives, and how messages are cut.
#include "net/wire.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "net/match.h"
#include "net/socket.h"
#include "net/stats.h"
#include "net/stripe.h"

using namespace moe::net;

TEST(Wire, SipHashMatchesItsPublishedVectors) {
  Secret key;
  unsigned char bytes[64];
  for (int i = 0; i < 64; i++) bytes[i] = static_cast<unsigned char>(i);
  memcpy(&key, bytes, 16);
  EXPECT_EQ(sipHash(key, bytes, 0), 0x726fdb47dd0e0e31ull);
  EXPECT_EQ(sipHash(key, bytes, 15), 0xa129ca6149be45e5ull);
  EXPECT_EQ(sipHash(key, bytes, 63), 0x958a324ceb064572ull);
}

TEST(Wire, ProofDependsOnSecretTokenHeaderAndBody) {
  Secret secret{{1, 2}}, other{{1, 3}};
  Hello hello;
  hello.connectionId = 42;
  hello.bodyBytes = 20;
  unsigned char body[20] = {7, 8, 9};
  const uint64_t proof = helloProof(secret, "token", hello, body);
  EXPECT_NE(proof, helloProof(other, "token", hello, body));
  EXPECT_NE(proof, helloProof(secret, "tokem", hello, body));
  hello.proof = proof;
  EXPECT_EQ(proof, helloProof(secret, "token", hello, body));
  for (unsigned char& byte : body) {
    byte ^= 0x10;
    EXPECT_NE(proof, helloProof(secret, "token", hello, body));
    byte ^= 0x10;
  }
  hello.connectionId++;
  EXPECT_NE(proof, helloProof(secret, "token", hello, body));
  hello.bodyBytes = 0; // there is none then
  EXPECT_NE(proof, helloProof(secret, "token", hello, nullptr));
}

TEST(Wire, HandleParses) {
  Handle handle, out;
  handle.port = 1234;
  EXPECT_EQ(parseHandle(&handle, 128, &out), ParseResult::ok);
  EXPECT_EQ(out.port, 1234);
  EXPECT_EQ(parseHandle(&handle, 127, &out), ParseResult::badLength);
  std::vector<unsigned char> bytes(128, 0);
  EXPECT_EQ(parseHandle(bytes.data(), 128, &out), ParseResult::badMagic);
  bytes.assign(128, 0xff);
  EXPECT_EQ(parseHandle(bytes.data(), 128, &out), ParseResult::badMagic);
  Handle bad = handle;
  bad.version = wireVersion + 1;
  EXPECT_EQ(parseHandle(&bad, 128, &out), ParseResult::badVersion);
  bad = handle;
  bad.family = 5;
  EXPECT_EQ(parseHandle(&bad, 128, &out), ParseResult::badField);
  bad = handle;
  bad.port = 0;
  EXPECT_EQ(parseHandle(&bad, 128, &out), ParseResult::badField);
}

TEST(Wire, HelloTakesALongerHeaderAndRefusesTheRest) {
  Hello hello, out;
  hello.headerBytes = 96;
  EXPECT_EQ(parseHello(&hello, 64, &out), ParseResult::ok);
  Hello bad = hello;
  bad.headerBytes = 63;
  EXPECT_EQ(parseHello(&bad, 64, &out), ParseResult::badLength);
  bad = hello;
  bad.bodyBytes = maxBodyBytes + 1;
  EXPECT_EQ(parseHello(&bad, 64, &out), ParseResult::badLength);
  bad = hello;
  bad.version = 99;
  EXPECT_EQ(parseHello(&bad, 64, &out), ParseResult::badVersion);
  bad = hello;
  bad.nSockets = 0;
  EXPECT_EQ(parseHello(&bad, 64, &out), ParseResult::badField);
  bad = hello;
  bad.nSockets = maxSockets + 1;
  EXPECT_EQ(parseHello(&bad, 64, &out), ParseResult::badField);
  bad = hello;
  bad.socketIndex = 1;
  EXPECT_EQ(parseHello(&bad, 64, &out), ParseResult::badField);
  bad = hello;
  bad.transport = static_cast<TransportKind>(9);
  EXPECT_EQ(parseHello(&bad, 64, &out), ParseResult::badTransport);
  bad = hello;
  bad.kind = static_cast<HelloKind>(0);
  EXPECT_EQ(parseHello(&bad, 64, &out), ParseResult::badField);
}

TEST(Wire, MessagesHaveADirection) {
  MessageHeader header, out;
  header.kind = MessageKind::data;
  header.bytes = 100;
  EXPECT_EQ(parseMessage(&header, sizeof(header), true, 100, &out), ParseResult::ok);
  EXPECT_EQ(parseMessage(&header, sizeof(header), true, 99, &out), ParseResult::badField);
  EXPECT_EQ(parseMessage(&header, sizeof(header), false, 100, &out), ParseResult::badField);
  header.kind = MessageKind::grant;
  EXPECT_EQ(parseMessage(&header, sizeof(header), true, 100, &out), ParseResult::badField);
  EXPECT_EQ(parseMessage(&header, sizeof(header), false, 100, &out), ParseResult::ok);
  header.kind = static_cast<MessageKind>(77);
  EXPECT_EQ(parseMessage(&header, sizeof(header), true, 100, &out), ParseResult::badField);
}

TEST(Wire, ChunksStayInsideTheirMessage) {
  ChunkHeader header, out;
  header.slot = 3;
  header.offset = 10;
  header.bytes = 20;
  header.total = 30;
  EXPECT_EQ(parseChunk(&header, sizeof(header), 4, &out), ParseResult::ok);
  EXPECT_EQ(parseChunk(&header, sizeof(header), 3, &out), ParseResult::badField);
  header.total = 29;
  EXPECT_EQ(parseChunk(&header, sizeof(header), 4, &out), ParseResult::badField);
  header.offset = UINT64_MAX - 5; // offset + bytes wraps round
  header.total = 30;
  EXPECT_EQ(parseChunk(&header, sizeof(header), 4, &out), ParseResult::badField);
  header.offset = 0;
  header.bytes = 0;
  EXPECT_EQ(parseChunk(&header, sizeof(header), 4, &out), ParseResult::badField);
}

TEST(Match, EachTagIsAQueueOfItsOwn) {
  PostedReceives posted;
  EXPECT_EQ(posted.post(7, 0), 0u);
  EXPECT_EQ(posted.post(8, 1), 0u);
  EXPECT_EQ(posted.post(7, 2), 1u);
  EXPECT_EQ(posted.find(7, 1)->slot, 2u);
  EXPECT_EQ(posted.find(7, 0)->slot, 0u);
  EXPECT_EQ(posted.find(8, 1), nullptr);
  EXPECT_FALSE(posted.isPast(8, 1));
  posted.erase(0);
  EXPECT_EQ(posted.find(7, 0), nullptr);
  EXPECT_TRUE(posted.isPast(7, 0));
  EXPECT_EQ(posted.find(7, 1)->slot, 2u);
}

TEST(Match, GrantsGoWithTheirMessage) {
  Grants grants;
  grants.add({5, 0, 100, 1, 1});
  grants.add({5, 2, 300, 3, 3});
  grants.add({6, 0, 600, 6, 6});
  EXPECT_EQ(grants.find(5, 1), nullptr);
  EXPECT_EQ(grants.find(5, 2)->room, 300u);
  grants.drop(5, 1); // sent as a small message: older grants of the tag are void, later ones stay
  EXPECT_EQ(grants.find(5, 0), nullptr);
  EXPECT_NE(grants.find(5, 2), nullptr);
  EXPECT_NE(grants.find(6, 0), nullptr);
}

TEST(Stripe, PiecesCoverTheMessageOnce) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 2000; round++) {
    const size_t bytes = random() % (size_t{1} << (1 + random() % 33)) + 1;
    const int n = stripeCount(bytes, static_cast<int>(1 + random() % 32), 65536);
    ASSERT_GE(n, 1);
    if (n > 1) {
      ASSERT_GE(bytes / static_cast<size_t>(n), 65536u);
    }
    size_t next = 0;
    for (int i = 0; i < n; i++) {
      const Stripe piece = stripe(bytes, n, i);
      ASSERT_EQ(piece.offset, next);
      ASSERT_EQ(piece.offset % 128, 0u);
      ASSERT_GT(piece.bytes, 0u);
      next += piece.bytes;
    }
    ASSERT_EQ(next, bytes);
  }
}

TEST(Interfaces, FilterForms) {
  EXPECT_TRUE(interfaceMatches("eth0", ""));
  EXPECT_FALSE(interfaceMatches("docker0", ""));
  EXPECT_TRUE(interfaceMatches("lo", "")); // left out later if there is anything else
  EXPECT_TRUE(interfaceMatches("eth10", "eth1"));
  EXPECT_FALSE(interfaceMatches("eth10", "=eth1"));
  EXPECT_TRUE(interfaceMatches("eth1", "=ib0,eth1"));
  EXPECT_FALSE(interfaceMatches("eth1", "^eth,lo"));
  EXPECT_TRUE(interfaceMatches("ib0", "^eth,lo"));
  EXPECT_TRUE(interfaceMatches("eth10", "^=eth1"));
}

TEST(Counters, HistogramBuckets) {
  Counters counters;
  counters.begin();
  counters.begin();
  counters.end(0.5e-6);
  counters.end(3e-6);
  EXPECT_EQ(counters.latencyUs[0], 1u); // below 1 us
  EXPECT_EQ(counters.latencyUs[2], 1u); // below 4 us
  EXPECT_EQ(counters.depth, 0u);
  EXPECT_EQ(counters.maxDepth, 2u);
}
