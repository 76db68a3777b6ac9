// A peer that passed the handshake and then sends what it likes: the stream and the chunks of a TCP connection, on the
// receiving and on the sending side.  Only memory that was offered may change.
#include <fuzzer/FuzzedDataProvider.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "net/tcp_connection.h"

using namespace moe;
using namespace moe::net;

namespace {

constexpr size_t part = 4096;
constexpr char poison = char(0xA5);

// Buffers between guards.
struct Guarded {
  Guarded() : bytes(3 * part, poison) {}
  char* data() { return bytes.data() + part; }
  bool intact(size_t used) const {
    for (size_t i = 0; i < bytes.size(); i++) {
      if ((i < part || i >= part + used) && bytes[i] != poison) return false;
    }
    return true;
  }
  std::vector<char> bytes;
};

Poller* poller() {
  static Poller one;
  static const ncclResult_t started = one.start();
  if (started != ncclSuccess) abort();
  return &one;
}

void append(std::string* to, const void* data, size_t bytes) { to->append(static_cast<const char*>(data), bytes); }

uint64_t number(FuzzedDataProvider* in) {
  switch (in->ConsumeIntegral<uint8_t>() % 4) {
  case 0:
    return in->ConsumeIntegralInRange<uint64_t>(0, 4);
  case 1:
    return in->ConsumeIntegralInRange<uint64_t>(0, 2 * part);
  case 2:
    return uint64_t(0) - in->ConsumeIntegralInRange<uint64_t>(0, 64);
  default:
    return in->ConsumeIntegral<uint64_t>();
  }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 4096) return 0;
  FuzzedDataProvider in(data, size);
  int stream[2], chunks[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, stream) != 0) return 0;
  UniqueFd peerStream(stream[1]);
  std::vector<UniqueFd> sockets;
  sockets.emplace_back(stream[0]);
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, chunks) != 0) return 0;
  UniqueFd peerChunks(chunks[1]);
  sockets.emplace_back(chunks[0]);

  TcpOptions options;
  options.sender = in.ConsumeBool();
  options.inlineMax = 256;
  options.window = 8;
  options.device = "fuzz";
  options.peer = "fuzz";
  Guarded exported, small, large;
  {
    TcpConnection connection(options, std::move(sockets), {poller()});
    Memory memory;
    memory.data = exported.data();
    memory.bytes = part;
    Region* region = nullptr;
    RemoteRegion remote;
    if (connection.registerMemory(memory, &region) != ncclSuccess) abort();
    if (connection.remoteRegion(region, &remote) != ncclSuccess) abort();
    std::vector<Request*> requests;
    const auto keep = [&](Request* request) {
      if (request != nullptr) requests.push_back(request);
    };
    Request* request = nullptr;
    if (!options.sender) {
      void* buffers[2] = {small.data(), large.data()};
      const size_t rooms[2] = {64, part};
      const int tags[2] = {1, 2};
      Region* regions[2] = {region, region};
      if (connection.irecv(2, buffers, rooms, tags, regions, &request) != ncclSuccess) abort();
      keep(request);
    } else {
      if (connection.isend(small.data(), 64, 1, region, &request) == ncclSuccess) keep(request);
      if (connection.isend(large.data(), part, 2, region, &request) == ncclSuccess) keep(request);
    }
    std::string onStream, onChunks;
    for (int i = 0; i < 32 && in.remaining_bytes() > 0; i++) {
      const int kind = in.ConsumeIntegralInRange<int>(0, 9);
      if (kind <= 7) {
        MessageHeader header;
        header.kind = MessageKind(kind);
        header.tag = in.ConsumeIntegralInRange<int>(0, 3);
        header.index = in.ConsumeBool() ? 0 : number(&in);
        header.bytes = number(&in);
        header.key = in.ConsumeBool() ? remote.key : number(&in);
        header.offset = number(&in);
        header.value = number(&in);
        append(&onStream, &header, sizeof(header));
        if (in.ConsumeBool()) onStream += in.ConsumeRandomLengthString(300);
      } else if (kind == 8) {
        ChunkHeader header;
        header.slot = in.ConsumeBool() ? in.ConsumeIntegralInRange<uint32_t>(0, 2) : in.ConsumeIntegral<uint32_t>();
        header.generation = number(&in);
        header.offset = number(&in);
        header.bytes = number(&in);
        header.total = number(&in);
        append(&onChunks, &header, sizeof(header));
        onChunks += in.ConsumeRandomLengthString(300);
      } else {
        onStream += in.ConsumeRandomLengthString(100);
      }
    }
    if (send(peerStream.get(), onStream.data(), onStream.size(), MSG_NOSIGNAL) < 0 && !onStream.empty()) return 0;
    if (send(peerChunks.get(), onChunks.data(), onChunks.size(), MSG_NOSIGNAL) < 0 && !onChunks.empty()) return 0;
    if (in.ConsumeBool()) shutdown(peerStream.get(), SHUT_WR);
    shutdown(peerChunks.get(), SHUT_WR);
    for (int i = 0; i < (onChunks.empty() ? 4 : 20); i++) {
      if (connection.progress() != ncclSuccess) break;
      for (size_t k = 0; k < requests.size(); k++) {
        bool done = false;
        size_t bytes[maxGroup] = {};
        if (connection.test(requests[k], &done, bytes) != ncclSuccess) break;
        if (!done) continue;
        if (!options.sender && (bytes[0] > 64 || bytes[1] > part)) abort();
        requests.erase(requests.begin() + long(k));
        break;
      }
      if (!onChunks.empty()) usleep(50);
    }
  }
  const bool receiver = !options.sender;
  if (!exported.intact(receiver ? part : 0) || !small.intact(receiver ? 64 : 0) || !large.intact(receiver ? part : 0))
    abort();
  return 0;
}
