// Untrusted bytes of handles, handshakes, messages and chunks: what the parsers accept must be as they promise.
#include <cstdlib>
#include <cstring>

#include "net/wire.h"

using namespace moe::net;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  // A copy of exactly so many bytes, so that reading one more is found; the magic word is filled in most of the time.
  const int what = data[0] % 5;
  const bool withMagic = (data[0] & 0x80) == 0;
  const size_t n = size - 1;
  std::string bytes(reinterpret_cast<const char*>(data) + 1, n);
  if (withMagic && n >= sizeof(wireMagic)) memcpy(&bytes[0], &wireMagic, sizeof(wireMagic));
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
