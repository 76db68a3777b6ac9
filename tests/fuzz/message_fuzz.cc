// Messages between ranks and the rendezvous file: any bytes.
#include "comm/message.h"
#include "comm/rendezvous.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moe;
  MessageHeader header{};
  Hello hello{};
  RankTable table{};
  ShmOffer offer{};
  Bye bye{};
  RendezvousFile file;
  (void)parseHeader(data, size, &header);
  if (parseHello(data, size, &hello)) {
    const std::vector<uint8_t> again = encodeHello(hello);
    if (again.size() != size || memcmp(again.data(), data, size) != 0) __builtin_trap();
  }
  if (parseTable(data, size, &table) && (table.ranks.empty() || table.ranks.size() > NCCL_MOE_MAX_RANKS))
    __builtin_trap();
  (void)parseOffer(data, size, &offer);
  if (parseBye(data, size, &bye) && bye.text.size() > kMaxTextBytes) __builtin_trap();
  (void)parseRendezvousFile(std::string(reinterpret_cast<const char*>(data), size), &file);
  return 0;
}
