// The messages that ranks exchange over TCP: while a communicator forms, and afterwards between each pair of ranks.
// Pure functions over bytes; whatever arrives is untrusted.  Numbers are little-endian.
//
//   header   magic u32, version u16, type u16, length u32 of what follows
//   hello    a rank's first message on every connection: who it is, the job token, its host, and its config
//   table    rank 0 to each rank, when all have joined: the job's nonce, and host and address of every rank
//   refuse   rank 0 to a rank that cannot join: a sentence
//   bye      the last message of a rank that leaves: why, and a sentence
//   offer    shared memory that the receiver may open
//   answer   1 byte.  From rank 0 to a hello that may join: 1.  To an offer: whether the memory was opened
//   data     bytes of a channel between ranks of different hosts
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/socket.h"

namespace moe {

constexpr uint32_t kMessageMagic = 0x4d6f6552; // also tells the byte order
constexpr uint16_t kMessageVersion = 1;
constexpr size_t kMessageHeaderBytes = 12;
constexpr size_t kNonceBytes = 16;
constexpr size_t kMaxTokenBytes = 512;
constexpr size_t kMaxHostIdBytes = 255;
constexpr size_t kMaxTextBytes = 600;
constexpr size_t kMaxHelloBytes = 2048;
constexpr size_t kMaxTableBytes = 1 << 20;
constexpr size_t kMaxDataBytes = 1 << 18;

enum class MessageType : uint16_t { hello = 1, table, refuse, bye, offer, answer, data };

// The most that a message of this type may carry; 0 for a type that does not exist.
size_t maxMessageBytes(MessageType type);

struct MessageHeader {
  MessageType type;
  uint32_t length;
};

enum class Parse { ok, wrongMagic, wrongVersion, bad };

Parse parseHeader(const uint8_t* data, size_t size, MessageHeader* header);
void encodeHeader(const MessageHeader& header, uint8_t out[kMessageHeaderBytes]);

// What the ranks of a communicator must agree on.
struct ConfigValues {
  enum { nExperts, maxTokens, maxTopK, maxRowBytes, mode, maxMemory, expertToRank, count };
  uint64_t value[count]; // expertToRank: a digest

  static const char* name(int field);
};

struct Hello {
  std::string token;
  uint8_t nonce[kNonceBytes]; // zeros to rank 0; the job's between other ranks
  int32_t rank;
  int32_t nRanks;
  uint16_t port; // where the rank listens for higher ranks
  std::string hostId;
  ConfigValues config;
};

struct TableEntry {
  std::string hostId;
  SocketAddress address;
};

struct RankTable {
  uint8_t nonce[kNonceBytes];
  std::vector<TableEntry> ranks;
};

// Memory that another process may map through /proc/<pid>/fd/<fd>.  fd -1: none.
struct ShmOffer {
  int32_t pid;
  int32_t fd;
  uint64_t ringBytes;
  uint8_t nonce[kNonceBytes];
};

enum class ByeReason : uint8_t { left, aborted, failed };
struct Bye {
  ByeReason reason;
  std::string text;
};

// Bodies, without header.  False if the bytes are not exactly such a message.
bool parseHello(const uint8_t* data, size_t size, Hello* hello);
bool parseTable(const uint8_t* data, size_t size, RankTable* table);
bool parseOffer(const uint8_t* data, size_t size, ShmOffer* offer);
bool parseBye(const uint8_t* data, size_t size, Bye* bye);
// A sentence from the network: what is not printable becomes '?'.
std::string parseText(const uint8_t* data, size_t size);

std::vector<uint8_t> encodeHello(const Hello& hello);
std::vector<uint8_t> encodeTable(const RankTable& table);
std::vector<uint8_t> encodeOffer(const ShmOffer& offer);
std::vector<uint8_t> encodeBye(const Bye& bye);
std::vector<uint8_t> encodeText(const std::string& text);

// Takes as long for any two strings of the same length.
bool equalSecret(const std::string& a, const std::string& b);

} // namespace moe
