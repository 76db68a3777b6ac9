// A stranger on the listening socket: handshake bytes that arrive in any pieces.
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "net/handshake.h"

using namespace moe;
using namespace moe::net;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2 || size > 8192) return 0;
  int raw[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, raw) != 0) return 0;
  const UniqueFd mine(raw[0]), theirs(raw[1]);
  const size_t piece = size_t(data[0]) + 1;
  std::string bytes(reinterpret_cast<const char*>(data) + 2, size - 2);
  if ((data[1] & 1) == 0) { // most of the time a good beginning
    const Hello good;
    if (bytes.size() < sizeof(Hello)) bytes.resize(sizeof(Hello));
    memcpy(&bytes[0], &good, 8); // magic, version, headerBytes
    if ((data[1] & 2) != 0) bytes[6] = char(data[1]);
  }
  HelloReader reader;
  for (size_t at = 0;; at += piece) {
    if (at < bytes.size() && write(theirs.get(), &bytes[at], std::min(piece, bytes.size() - at)) < 0) abort();
    if (at >= bytes.size()) shutdown(theirs.get(), SHUT_WR);
    const IoStatus status = reader.poll(mine.get());
    if (status == IoStatus::done) {
      if (reader.parseResult() != ParseResult::ok || reader.body().size() != reader.hello().bodyBytes) abort();
      if (reader.body().size() > maxBodyBytes) abort();
      return 0;
    }
    if (status == IoStatus::error || status == IoStatus::closed) {
      if (reader.problem()[0] == 0) abort(); // a refusal says why
      return 0;
    }
    if (at >= bytes.size() + piece) abort(); // closed, and still waiting
  }
}
