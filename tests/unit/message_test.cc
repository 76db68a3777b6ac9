// Messages between ranks: what was encoded is parsed, and nothing else is.
#include "comm/message.h"

#include <cstring>
#include <random>
#include <vector>

#include "comm/rendezvous.h"
#include "gtest/gtest.h"

namespace {

using namespace moe;
using Bytes = std::vector<uint8_t>;

Hello sampleHello() {
  Hello hello{};
  hello.token = "secret";
  for (size_t i = 0; i < kNonceBytes; i++) hello.nonce[i] = static_cast<uint8_t>(200 + i);
  hello.rank = 3;
  hello.nRanks = 5;
  hello.port = 54321;
  hello.hostId = "host boot";
  for (int i = 0; i < ConfigValues::count; i++) hello.config.value[i] = (uint64_t{1} << 60) + static_cast<uint64_t>(i);
  return hello;
}

RankTable sampleTable() {
  RankTable table{};
  memset(table.nonce, 7, sizeof(table.nonce));
  for (const char* literal : {"10.1.2.3", "fe00::17"}) {
    TableEntry entry;
    entry.hostId = literal;
    EXPECT_TRUE(SocketAddress::fromLiteral(literal, 1000, &entry.address));
    table.ranks.push_back(entry);
  }
  return table;
}

// Every truncation and every extension of a message must be refused.
template <class T> void expectExact(const Bytes& bytes, bool (*parse)(const uint8_t*, size_t, T*)) {
  T out;
  EXPECT_TRUE(parse(bytes.data(), bytes.size(), &out));
  for (size_t n = 0; n < bytes.size(); n++) {
    const Bytes shorter(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n)); // its own block, for ASan
    EXPECT_FALSE(parse(shorter.data(), shorter.size(), &out)) << n << " of " << bytes.size() << " bytes";
  }
  Bytes longer = bytes;
  longer.push_back(0);
  EXPECT_FALSE(parse(longer.data(), longer.size(), &out));
}

TEST(Message, HelloRoundTrip) {
  const Hello in = sampleHello();
  const Bytes bytes = encodeHello(in);
  EXPECT_LE(bytes.size(), kMaxHelloBytes);
  Hello out;
  ASSERT_TRUE(parseHello(bytes.data(), bytes.size(), &out));
  EXPECT_EQ(out.token, in.token);
  EXPECT_EQ(memcmp(out.nonce, in.nonce, kNonceBytes), 0);
  EXPECT_EQ(out.rank, in.rank);
  EXPECT_EQ(out.nRanks, in.nRanks);
  EXPECT_EQ(out.port, in.port);
  EXPECT_EQ(out.hostId, in.hostId);
  EXPECT_EQ(memcmp(out.config.value, in.config.value, sizeof(in.config.value)), 0);
  expectExact<Hello>(bytes, parseHello);
}

TEST(Message, HelloOfImpossibleRanksIsRefused) {
  for (const auto& [rank, nRanks] : std::vector<std::pair<int, int>>{{-1, 4}, {4, 4}, {0, 0}, {0, 1025}, {5, -6}}) {
    Hello hello = sampleHello();
    hello.rank = rank;
    hello.nRanks = nRanks;
    const Bytes bytes = encodeHello(hello);
    EXPECT_FALSE(parseHello(bytes.data(), bytes.size(), &hello)) << rank << " of " << nRanks;
  }
}

TEST(Message, TableRoundTrip) {
  const RankTable in = sampleTable();
  const Bytes bytes = encodeTable(in);
  RankTable out;
  ASSERT_TRUE(parseTable(bytes.data(), bytes.size(), &out));
  ASSERT_EQ(out.ranks.size(), in.ranks.size());
  for (size_t r = 0; r < in.ranks.size(); r++) {
    EXPECT_EQ(out.ranks[r].hostId, in.ranks[r].hostId);
    EXPECT_EQ(out.ranks[r].address.text(), in.ranks[r].address.text());
  }
  expectExact<RankTable>(bytes, parseTable);
}

TEST(Message, OfferAndByeRoundTrip) {
  ShmOffer offer{1234, 17, 1 << 20, {}};
  memset(offer.nonce, 9, sizeof(offer.nonce));
  expectExact<ShmOffer>(encodeOffer(offer), parseOffer);
  const Bytes bytes = encodeBye(Bye{ByeReason::failed, std::string(5000, 'x') + "\n"});
  EXPECT_LE(bytes.size(), maxMessageBytes(MessageType::bye));
  Bye bye{};
  ASSERT_TRUE(parseBye(bytes.data(), bytes.size(), &bye));
  EXPECT_EQ(bye.reason, ByeReason::failed);
  EXPECT_EQ(bye.text, std::string(kMaxTextBytes, 'x'));
  EXPECT_FALSE(parseBye(bytes.data(), 0, &bye));
  const uint8_t unknown[] = {3, 'a'};
  EXPECT_FALSE(parseBye(unknown, sizeof(unknown), &bye));
}

TEST(Message, TextIsPrintable) {
  const char text[] = "a\x1b[31m\xff\n";
  EXPECT_EQ(parseText(reinterpret_cast<const uint8_t*>(text), sizeof(text) - 1), "a?[31m??");
}

TEST(Message, Headers) {
  uint8_t bytes[kMessageHeaderBytes];
  encodeHeader(MessageHeader{MessageType::table, 77}, bytes);
  MessageHeader header{};
  ASSERT_EQ(parseHeader(bytes, sizeof(bytes), &header), Parse::ok);
  EXPECT_EQ(header.type, MessageType::table);
  EXPECT_EQ(header.length, 77U);
  for (size_t n = 0; n < sizeof(bytes); n++) EXPECT_NE(parseHeader(bytes, n, &header), Parse::ok);
  bytes[4]++;
  EXPECT_EQ(parseHeader(bytes, sizeof(bytes), &header), Parse::wrongVersion);
  bytes[0]++;
  EXPECT_EQ(parseHeader(bytes, sizeof(bytes), &header), Parse::wrongMagic);
  for (const auto& bad :
       {MessageHeader{MessageType::hello, kMaxHelloBytes + 1}, MessageHeader{MessageType::hello, 0},
        MessageHeader{static_cast<MessageType>(0), 1}, MessageHeader{static_cast<MessageType>(99), 1}}) {
    encodeHeader(bad, bytes);
    EXPECT_EQ(parseHeader(bytes, sizeof(bytes), &header), Parse::bad);
  }
}

TEST(Message, RandomBytesAreHarmless) {
  std::mt19937 random(5);
  for (int round = 0; round < 4000; round++) {
    Bytes bytes = round % 2 == 0 ? encodeHello(sampleHello()) : encodeTable(sampleTable());
    for (int i = 0; i < 3; i++) bytes[random() % bytes.size()] = static_cast<uint8_t>(random());
    Hello hello;
    if (parseHello(bytes.data(), bytes.size(), &hello)) {
      EXPECT_LT(hello.rank, hello.nRanks);
    }
    RankTable table;
    if (parseTable(bytes.data(), bytes.size(), &table)) {
      EXPECT_LE(table.ranks.size(), static_cast<size_t>(NCCL_MOE_MAX_RANKS));
    }
  }
}

TEST(Message, SecretsAreCompared) {
  EXPECT_TRUE(equalSecret("", ""));
  EXPECT_TRUE(equalSecret("abc", "abc"));
  EXPECT_FALSE(equalSecret("abc", "abd"));
  EXPECT_FALSE(equalSecret("abc", "abcd"));
}

TEST(Rendezvous, Urls) {
  Rendezvous at;
  ASSERT_EQ(parseRendezvous("tcp://node7:29500", &at), ncclSuccess);
  EXPECT_EQ(at.host, "node7");
  EXPECT_EQ(at.port, 29500);
  ASSERT_EQ(parseRendezvous("tcp://[::1]:1", &at), ncclSuccess);
  EXPECT_EQ(at.host, "::1");
  Rendezvous file;
  ASSERT_EQ(parseRendezvous("file:///tmp/job", &file), ncclSuccess);
  EXPECT_EQ(file.path, "/tmp/job");
  for (const char* bad : {"", "tcp://", "tcp://host", "tcp://host:", "tcp://:80", "tcp://host:0", "tcp://host:65536",
                          "tcp://host:80x", "tcp://::1:80", "tcp://[::1]", "tcp://[]:80", "file://", "file:///",
                          "file://tmp/x", "file:///tmp/", "udp://h:1"}) {
    EXPECT_EQ(parseRendezvous(bad, &at), ncclInvalidArgument) << bad;
  }
}

TEST(Rendezvous, FileRoundTrip) {
  RendezvousFile in;
  in.token = "0123abcd";
  in.bootId = "boot";
  for (const char* literal : {"192.168.0.9", "::1"}) {
    SocketAddress address;
    ASSERT_TRUE(SocketAddress::fromLiteral(literal, 4242, &address));
    in.addresses.push_back(address);
  }
  const std::string text = formatRendezvousFile(in);
  RendezvousFile out;
  ASSERT_TRUE(parseRendezvousFile(text, &out));
  EXPECT_EQ(out.token, in.token);
  EXPECT_EQ(out.bootId, in.bootId);
  ASSERT_EQ(out.addresses.size(), 2U);
  EXPECT_EQ(out.addresses[0].text(), "192.168.0.9:4242");
  EXPECT_EQ(out.addresses[1].text(), "[::1]:4242");
  for (size_t n = 0; n + 1 < text.size(); n++) EXPECT_FALSE(parseRendezvousFile(text.substr(0, n), &out)) << n;
  EXPECT_FALSE(parseRendezvousFile("nccl-moe-rendezvous 1\ntoken a\naddress example.org:1\nend\n", &out))
    << "names are not looked up";
}

} // namespace
