// Untrusted bytes of handles, handshakes with what transports add, messages, chunks and notices of failed paths: what
// the parsers accept must be as they promise.
#include <cstdlib>
#include <cstring>

#include "net/wire.h"

using namespace moe::net;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  // A copy of exactly so many bytes, so that reading one more is found; the magic word is filled in most of the time.
  const int what = data[0] % 8;
  const bool withMagic = (data[0] & 0x80) == 0;
  const size_t n = size - 1;
  std::string bytes(reinterpret_cast<const char*>(data) + 1, n);
  const bool hasMagic = what != 5 && what != 6;
  if (withMagic && hasMagic && n >= sizeof(wireMagic)) memcpy(&bytes[0], &wireMagic, sizeof(wireMagic));
  const uint64_t inlineMax = 1024;
  switch (what) {
  case 0: {
    Handle handle;
    if (parseHandle(bytes.data(), n, &handle) != ParseResult::ok) return 0;
    if (n < sizeof(Handle) || handle.magic != wireMagic || (handle.family != 4 && handle.family != 6)) abort();
    break;
  }
  case 1: {
    Hello hello;
    if (parseHello(bytes.data(), n, &hello) != ParseResult::ok) return 0;
    if (n < sizeof(Hello) || hello.magic != wireMagic || hello.bodyBytes > maxBodyBytes) abort();
    if (hello.headerBytes < sizeof(Hello) || hello.nSockets < 1 || hello.nSockets > maxSockets) abort();
    if (hello.socketIndex >= hello.nSockets) abort();
    break;
  }
  case 2:
  case 3: {
    MessageHeader header;
    if (parseMessage(bytes.data(), n, what == 2, inlineMax, &header) != ParseResult::ok) return 0;
    if (n < sizeof(MessageHeader) || header.magic != wireMagic) abort();
    if (header.kind == MessageKind::data && header.bytes > inlineMax) abort();
    const bool down = header.kind == MessageKind::data || header.kind == MessageKind::put ||
                      header.kind == MessageKind::signal || header.kind == MessageKind::want;
    if (header.kind != MessageKind::bye && down != (what == 2)) abort();
    break;
  }
  case 5: {
    TcpBody body;
    if (parseTcpBody(bytes.data(), n, &body) != ParseResult::ok) return 0;
    if (n < sizeof(TcpBody) || body.window < 1 || strnlen(body.device, sizeof(body.device)) == sizeof(body.device))
      abort();
    break;
  }
  case 6: {
    VerbsBody body;
    if (parseVerbsBody(bytes.data(), n, &body) != ParseResult::ok) return 0;
    if (n < sizeof(VerbsBody) || strnlen(body.device, sizeof(body.device)) == sizeof(body.device)) abort();
    if (body.nPaths < 1 || body.nPaths > maxPaths || body.nQueues < 1 || body.nQueues > maxQueues) abort();
    if (body.nQueues % body.nPaths != 0) abort();
    for (uint32_t i = 0; i < body.nQueues; i++) {
      if (body.queueNumber[i] >= 1u << 24) abort();
    }
    for (uint32_t i = 0; i < body.nPaths; i++) {
      if (body.path[i].mtu < 1 || body.path[i].mtu > 5) abort();
    }
    break;
  }
  case 7: {
    PathDown message;
    const uint32_t nPaths = 2;
    if (parsePathDown(bytes.data(), n, nPaths, &message) != ParseResult::ok) return 0;
    if (n < sizeof(PathDown) || message.magic != wireMagic || message.path >= nPaths) abort();
    break;
  }
  default: {
    ChunkHeader header;
    const uint32_t nSlots = 256;
    if (parseChunk(bytes.data(), n, nSlots, &header) != ParseResult::ok) return 0;
    if (n < sizeof(ChunkHeader) || header.slot >= nSlots) abort();
    if (header.offset > header.total || header.bytes > header.total - header.offset) abort();
  }
  }
  return 0;
}
