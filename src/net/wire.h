// What goes over the wire: the connection handle, the handshake, and the headers of the TCP transport.
//
// Everything is little-endian and of fixed layout.  The parse functions take untrusted bytes, touch nothing else, and
// say in a word what is wrong; nothing that they accept can make later code leave its buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace moe {
namespace net {

constexpr uint32_t wireMagic = 0x4e454f4d; // "MOEN"
constexpr uint16_t wireVersion = 3;
constexpr uint32_t maxBodyBytes = 4096;
constexpr int maxSockets = 64;

enum class TransportKind : uint8_t { tcp = 1, verbs = 2 };

// 128 bits that key the proof in every handshake message: only who holds the handle knows them.
struct Secret {
  uint64_t word[2] = {0, 0};
};

// Given out by listen.  The last word belongs to the connecting side, which keeps the state of its calls there.
struct Handle {
  uint32_t magic = wireMagic;
  uint16_t version = wireVersion;
  uint16_t bytes = 128;
  TransportKind transport = TransportKind::tcp;
  uint8_t family = 4; // 4 or 6
  uint16_t port = 0;  // host byte order
  uint32_t scope = 0; // of an IPv6 link-local address
  uint8_t address[16] = {};
  Secret secret;
  uint8_t reserved[72] = {};
  uint64_t connectorId = 0; // 0 in what listen writes
};
static_assert(sizeof(Handle) == 128 && std::is_trivially_copyable<Handle>::value, "what ncclNet hands around");

enum class HelloKind : uint8_t {
  hello = 1, // connector to listener, on every socket
  reply = 2, // listener to connector, on socket 0, once all sockets are there
  ready = 3, // connector to listener, on socket 0, where the transport asks for it
  reject = 4 // listener to connector instead of a reply; status says why
};

enum class RejectStatus : uint16_t { none = 0, version = 1, proof = 2, transport = 3, parameters = 4, resources = 5 };

// Every handshake message: this header, then bodyBytes of what the transport has to say.
struct Hello {
  uint32_t magic = wireMagic;
  uint16_t version = wireVersion;
  uint16_t headerBytes = 64; // a newer peer may send more, which is skipped
  uint32_t bodyBytes = 0;
  uint32_t capabilities = 0;
  TransportKind transport = TransportKind::tcp;
  HelloKind kind = HelloKind::hello;
  RejectStatus status = RejectStatus::none;
  uint16_t socketIndex = 0;
  uint16_t nSockets = 1;
  uint64_t connectionId = 0; // drawn by the connector; the same on all its sockets
  uint64_t proof = 0;        // keyed hash of this header with proof 0, of the body, and of the job token
  uint64_t reserved[3] = {0, 0, 0};
};
static_assert(sizeof(Hello) == 64 && std::is_trivially_copyable<Hello>::value, "wire format");

enum class ParseResult { ok, badMagic, badVersion, badLength, badTransport, badField };
const char* parseResultText(ParseResult result);
const char* rejectStatusText(RejectStatus status);

ParseResult parseHandle(const void* bytes, size_t n, Handle* handle);
// bytes: the first 64 bytes of a handshake message.
ParseResult parseHello(const void* bytes, size_t n, Hello* hello);

uint64_t sipHash(const Secret& key, const void* data, size_t n); // SipHash-2-4
// body: hello.bodyBytes of it.
uint64_t helloProof(const Secret& secret, const std::string& token, const Hello& hello, const void* body);

// What the transports add to hello and reply.  A newer peer may say more after it.
struct TcpBody {
  uint64_t inlineMax = 0;
  uint64_t window = 0; // in a reply
  char device[48] = {};
};
static_assert(sizeof(TcpBody) == 64, "wire format");

constexpr uint32_t maxQueues = 32;
constexpr uint32_t maxPaths = 4;
// A path is a port of this side with a port of the other; queue pair i belongs to path i modulo nPaths.
struct VerbsPathBody {
  uint32_t remoteKey = 0; // of the control memory
  uint16_t lid = 0;
  uint8_t mtu = 0; // ibv_mtu
  uint8_t infiniband = 0;
  uint8_t gid[16] = {};
};
struct VerbsBody {
  uint32_t nQueues = 0;
  uint32_t nPaths = 0;
  uint32_t queueNumber[maxQueues] = {};
  VerbsPathBody path[maxPaths];
  uint64_t base = 0; // of the control memory
  char device[64] = {};
};
static_assert(sizeof(VerbsBody) == 304 && std::is_trivially_copyable<VerbsBody>::value, "wire format");

// Over the socket of a verbs connection: this side's queue pairs of a path are in the error state, and none of its
// writes will come any more.  From a receiver it tells what has come: the group that a slot had last (its number plus
// one, 0: none), and the pieces of each of its members (all ones: the whole message).
constexpr uint32_t pathDownSlots = 32, pathDownMembers = 8;
struct PathDown {
  uint32_t magic = wireMagic;
  uint32_t bytes = 16 + pathDownSlots * (4 + pathDownMembers * 4);
  uint32_t path = 0;
  uint32_t reserved = 0;
  uint32_t sequence[pathDownSlots] = {};
  uint32_t arrived[pathDownSlots][pathDownMembers] = {};
};
static_assert(sizeof(PathDown) == 1168 && std::is_trivially_copyable<PathDown>::value, "wire format");

ParseResult parseTcpBody(const void* bytes, size_t n, TcpBody* body);
ParseResult parseVerbsBody(const void* bytes, size_t n, VerbsBody* body);
ParseResult parsePathDown(const void* bytes, size_t n, uint32_t nPaths, PathDown* message);

// ---- the TCP transport ----

enum class MessageKind : uint8_t {
  data = 1,   // to the receiver: tag, bytes; the payload follows
  put = 2,    // to the receiver: key, offset, bytes; the payload follows
  signal = 3, // to the receiver: key, offset, value
  want = 4,   // to the receiver: the sender of message (tag, index) waits for its grant
  grant = 5,  // to the sender: message (tag, index) may be sent in chunks that name slot key; bytes is the room there
  ack = 6,    // to the sender: value messages were consumed so far
  bye = 7     // either way: this side closes in good order
};

struct MessageHeader {
  uint32_t magic = wireMagic;
  MessageKind kind = MessageKind::data;
  uint8_t reserved[3] = {};
  int32_t tag = 0;
  uint32_t reserved1 = 0;
  uint64_t index = 0; // which message with this tag
  uint64_t bytes = 0;
  uint64_t key = 0;
  uint64_t offset = 0;
  uint64_t value = 0;
};
static_assert(sizeof(MessageHeader) == 56 && std::is_trivially_copyable<MessageHeader>::value, "wire format");

// In front of each chunk on a data socket.
struct ChunkHeader {
  uint32_t magic = wireMagic;
  uint32_t slot = 0;
  uint64_t generation = 0; // which use of the slot
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t total = 0; // of the message
};
static_assert(sizeof(ChunkHeader) == 40 && std::is_trivially_copyable<ChunkHeader>::value, "wire format");

// toReceiver: which direction the message came.  inlineMax bounds the payload of data and put.
ParseResult parseMessage(const void* bytes, size_t n, bool toReceiver, uint64_t inlineMax, MessageHeader* header);
ParseResult parseChunk(const void* bytes, size_t n, uint32_t nSlots, ChunkHeader* header);

} // namespace net
} // namespace moe
