// The rendezvous argument and the file that a rank finds there.
#include <cstdlib>
#include <string>

#include "comm/rendezvous.h"

namespace {

void check(bool condition) {
  if (!condition) abort();
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data + 1), size - 1);
  if (data[0] % 2 == 0) {
    moe::Rendezvous rendezvous;
    const ncclResult_t result = moe::parseRendezvous(text.c_str(), &rendezvous);
    check(result == ncclSuccess || result == ncclInvalidArgument);
    if (result != ncclSuccess) return 0;
    if (rendezvous.path.empty()) {
      check(!rendezvous.host.empty() && rendezvous.port > 0 && rendezvous.port < 65536);
    } else {
      check(rendezvous.path[0] == '/' && rendezvous.host.empty());
    }
  } else {
    moe::RendezvousFile file;
    if (!moe::parseRendezvousFile(text, &file)) return 0;
    moe::RendezvousFile again;
    check(moe::parseRendezvousFile(moe::formatRendezvousFile(file), &again));
    check(again.token == file.token && again.bootId == file.bootId && again.addresses.size() == file.addresses.size());
  }
  return 0;
}
