// Messages of other ranks, or of whoever else connects: no bytes may make a parser read outside them, what it accepts
// keeps the promised bounds, and encodes to the same message again.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "comm/message.h"

namespace {

using namespace moe;

void check(bool condition) {
  if (!condition) abort();
}

void parseBody(MessageType type, const uint8_t* data, size_t size) {
  if (type == MessageType::hello) {
    Hello hello;
    if (!parseHello(data, size, &hello)) return;
    check(hello.token.size() <= kMaxTokenBytes && hello.hostId.size() <= kMaxHostIdBytes);
    const std::vector<uint8_t> again = encodeHello(hello);
    check(again.size() == size && memcmp(again.data(), data, size) == 0);
  } else if (type == MessageType::table) {
    RankTable table;
    if (!parseTable(data, size, &table)) return;
    check(!table.ranks.empty() && table.ranks.size() <= NCCL_MOE_MAX_RANKS);
    const std::vector<uint8_t> again = encodeTable(table);
    RankTable second;
    check(parseTable(again.data(), again.size(), &second) && second.ranks.size() == table.ranks.size());
  } else if (type == MessageType::offer) {
    ShmOffer offer;
    if (!parseOffer(data, size, &offer)) return;
    const std::vector<uint8_t> again = encodeOffer(offer);
    check(again.size() == size && memcmp(again.data(), data, size) == 0);
  } else if (type == MessageType::bye) {
    Bye bye;
    if (!parseBye(data, size, &bye)) return;
    for (const char c : bye.text) check(c >= ' ' && c <= '~');
  } else {
    for (const char c : parseText(data, size)) check(c >= ' ' && c <= '~');
  }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  MessageHeader header;
  if (parseHeader(data, size, &header) == Parse::ok) {
    check(header.length <= maxMessageBytes(header.type));
    uint8_t again[kMessageHeaderBytes];
    encodeHeader(header, again);
    check(memcmp(again, data, kMessageHeaderBytes) == 0);
  }
  // The first byte says which body the rest is, so that bodies are reached without guessing a header.
  if (size == 0) return 0;
  const MessageType type = static_cast<MessageType>(data[0] % 8);
  const std::vector<uint8_t> body(data + 1, data + size); // exactly as long as it is, so that ASan sees its end
  if (body.size() <= maxMessageBytes(type)) parseBody(type, body.data(), body.size());
  return 0;
}
