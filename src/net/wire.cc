#include "net/wire.h"

#include <cstring>

namespace moe {
namespace net {
namespace {

uint64_t rotl(uint64_t x, int b) { return (x << b) | (x >> (64 - b)); }

struct SipState {
  uint64_t v0, v1, v2, v3;
  void round() {
    v0 += v1;
    v1 = rotl(v1, 13) ^ v0;
    v0 = rotl(v0, 32);
    v2 += v3;
    v3 = rotl(v3, 16) ^ v2;
    v0 += v3;
    v3 = rotl(v3, 21) ^ v0;
    v2 += v1;
    v1 = rotl(v1, 17) ^ v2;
    v2 = rotl(v2, 32);
  }
  void word(uint64_t m) {
    v3 ^= m;
    round();
    round();
    v0 ^= m;
  }
};

bool knownTransport(TransportKind kind) { return kind == TransportKind::tcp || kind == TransportKind::verbs; }

} // namespace

const char* parseResultText(ParseResult result) {
  switch (result) {
  case ParseResult::ok:
    return "ok";
  case ParseResult::badMagic:
    return "it does not begin with this protocol's magic number";
  case ParseResult::badVersion:
    return "it speaks another version of the protocol";
  case ParseResult::badLength:
    return "its length is wrong";
  case ParseResult::badTransport:
    return "it uses another transport";
  case ParseResult::badField:
    return "a field is out of range";
  }
  return "unknown";
}

const char* rejectStatusText(RejectStatus status) {
  switch (status) {
  case RejectStatus::none:
    return "no reason given";
  case RejectStatus::version:
    return "it speaks another version of the protocol";
  case RejectStatus::proof:
    return "the job token does not match (NCCL_MOE_JOB_TOKEN must be the same on all ranks of a job)";
  case RejectStatus::transport:
    return "it uses another transport (see NCCL_MOE_NET_TRANSPORT)";
  case RejectStatus::parameters:
    return "the connection's parameters do not fit";
  case RejectStatus::resources:
    return "it has no resources left";
  }
  return "unknown reason";
}

uint64_t sipHash(const Secret& key, const void* data, size_t n) {
  SipState s{key.word[0] ^ 0x736f6d6570736575ull, key.word[1] ^ 0x646f72616e646f6dull,
             key.word[0] ^ 0x6c7967656e657261ull, key.word[1] ^ 0x7465646279746573ull};
  const auto* bytes = static_cast<const unsigned char*>(data);
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t m;
    memcpy(&m, bytes + i, 8);
    s.word(m);
  }
  uint64_t last = static_cast<uint64_t>(n) << 56;
  for (size_t j = 0; i + j < n; j++) last |= static_cast<uint64_t>(bytes[i + j]) << (8 * j);
  s.word(last);
  s.v2 ^= 0xff;
  for (int r = 0; r < 4; r++) s.round();
  return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}

uint64_t helloProof(const Secret& secret, const std::string& token, const Hello& hello, const void* body) {
  Hello bare = hello;
  bare.proof = 0;
  std::string text(sizeof(bare), '\0');
  memcpy(&text[0], &bare, sizeof(bare));
  if (hello.bodyBytes != 0) text.append(static_cast<const char*>(body), hello.bodyBytes);
  text += token;
  return sipHash(secret, text.data(), text.size());
}

ParseResult parseHandle(const void* bytes, size_t n, Handle* handle) {
  if (n < sizeof(Handle)) return ParseResult::badLength;
  Handle h;
  memcpy(&h, bytes, sizeof(h));
  if (h.magic != wireMagic) return ParseResult::badMagic;
  if (h.version != wireVersion) return ParseResult::badVersion;
  if (h.bytes != sizeof(Handle)) return ParseResult::badLength;
  if (!knownTransport(h.transport)) return ParseResult::badTransport;
  if ((h.family != 4 && h.family != 6) || h.port == 0) return ParseResult::badField;
  *handle = h;
  return ParseResult::ok;
}

ParseResult parseHello(const void* bytes, size_t n, Hello* hello) {
  if (n < sizeof(Hello)) return ParseResult::badLength;
  Hello h;
  memcpy(&h, bytes, sizeof(h));
  if (h.magic != wireMagic) return ParseResult::badMagic;
  if (h.version != wireVersion) return ParseResult::badVersion;
  if (h.headerBytes < sizeof(Hello) || h.headerBytes > maxBodyBytes || h.bodyBytes > maxBodyBytes) {
    return ParseResult::badLength;
  }
  if (!knownTransport(h.transport)) return ParseResult::badTransport;
  if (h.kind < HelloKind::hello || h.kind > HelloKind::reject) return ParseResult::badField;
  if (h.nSockets < 1 || h.nSockets > maxSockets || h.socketIndex >= h.nSockets) return ParseResult::badField;
  *hello = h;
  return ParseResult::ok;
}

ParseResult parseTcpBody(const void* bytes, size_t n, TcpBody* body) {
  if (n < sizeof(TcpBody)) return ParseResult::badLength;
  memcpy(body, bytes, sizeof(TcpBody));
  body->device[sizeof(body->device) - 1] = '\0';
  return body->window >= 1 && body->window <= 65536 ? ParseResult::ok : ParseResult::badField;
}

ParseResult parseVerbsBody(const void* bytes, size_t n, VerbsBody* body) {
  if (n < sizeof(VerbsBody)) return ParseResult::badLength;
  memcpy(body, bytes, sizeof(VerbsBody));
  body->device[sizeof(body->device) - 1] = '\0';
  if (body->nPaths < 1 || body->nPaths > maxPaths || body->nQueues < body->nPaths || body->nQueues > maxQueues ||
      body->nQueues % body->nPaths != 0) {
    return ParseResult::badField;
  }
  for (uint32_t i = 0; i < body->nPaths; i++) {
    if (body->path[i].mtu < 1 || body->path[i].mtu > 5) return ParseResult::badField;
  }
  for (uint32_t i = 0; i < body->nQueues; i++) {
    if (body->queueNumber[i] >= (1u << 24)) return ParseResult::badField;
  }
  return ParseResult::ok;
}

ParseResult parsePathDown(const void* bytes, size_t n, uint32_t nPaths, PathDown* message) {
  if (n < sizeof(PathDown)) return ParseResult::badLength;
  memcpy(message, bytes, sizeof(PathDown));
  if (message->magic != wireMagic) return ParseResult::badMagic;
  if (message->bytes != sizeof(PathDown)) return ParseResult::badLength;
  return message->path < nPaths ? ParseResult::ok : ParseResult::badField;
}

ParseResult parseMessage(const void* bytes, size_t n, bool toReceiver, uint64_t inlineMax, MessageHeader* header) {
  if (n < sizeof(MessageHeader)) return ParseResult::badLength;
  MessageHeader h;
  memcpy(&h, bytes, sizeof(h));
  if (h.magic != wireMagic) return ParseResult::badMagic;
  switch (h.kind) {
  case MessageKind::data:
    if (!toReceiver || h.bytes > inlineMax) return ParseResult::badField;
    break;
  case MessageKind::put:
  case MessageKind::signal:
  case MessageKind::want:
    if (!toReceiver) return ParseResult::badField;
    break;
  case MessageKind::grant:
  case MessageKind::ack:
    if (toReceiver) return ParseResult::badField;
    break;
  case MessageKind::bye:
    break;
  default:
    return ParseResult::badField;
  }
  *header = h;
  return ParseResult::ok;
}

ParseResult parseChunk(const void* bytes, size_t n, uint32_t nSlots, ChunkHeader* header) {
  if (n < sizeof(ChunkHeader)) return ParseResult::badLength;
  ChunkHeader h;
  memcpy(&h, bytes, sizeof(h));
  if (h.magic != wireMagic) return ParseResult::badMagic;
  if (h.slot >= nSlots || h.bytes == 0 || h.offset > h.total || h.bytes > h.total - h.offset) {
    return ParseResult::badField;
  }
  *header = h;
  return ParseResult::ok;
}

} // namespace net
} // namespace moe
