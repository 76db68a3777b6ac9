#include "comm/message.h"

#include <algorithm>
#include <cstring>

namespace moe {
namespace {

class Writer {
 public:
  template <class T> void number(T value) {
    for (size_t i = 0; i < sizeof(T); i++)
      bytes_.push_back(static_cast<uint8_t>(static_cast<uint64_t>(value) >> (8 * i)));
  }
  void bytes(const void* data, size_t size) {
    const auto* from = static_cast<const uint8_t*>(data);
    bytes_.insert(bytes_.end(), from, from + size);
  }
  void string(const std::string& text, size_t most) {
    const size_t size = std::min(text.size(), most);
    number(static_cast<uint16_t>(size));
    bytes(text.data(), size);
  }
  std::vector<uint8_t> take() { return std::move(bytes_); }

 private:
  std::vector<uint8_t> bytes_;
};

// After a read past the end everything reads as zero and done() is false.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  template <class T> T number() {
    uint64_t value = 0;
    const uint8_t* from = take(sizeof(T));
    for (size_t i = 0; from != nullptr && i < sizeof(T); i++) value |= static_cast<uint64_t>(from[i]) << (8 * i);
    return static_cast<T>(value);
  }
  void bytes(void* out, size_t size) {
    const uint8_t* from = take(size);
    if (from != nullptr) {
      memcpy(out, from, size);
    } else {
      memset(out, 0, size);
    }
  }
  std::string string(size_t most) {
    const size_t size = number<uint16_t>();
    if (size > most) bad_ = true;
    const uint8_t* from = take(size);
    return from != nullptr ? std::string(reinterpret_cast<const char*>(from), size) : std::string();
  }
  void require(bool condition) { bad_ |= !condition; }
  bool done() const { return !bad_ && left_ == 0; }

 private:
  const uint8_t* take(size_t size) {
    if (bad_ || size > left_) {
      bad_ = true;
      return nullptr;
    }
    const uint8_t* at = data_;
    data_ += size;
    left_ -= size;
    return at;
  }

  const uint8_t* data_;
  size_t left_;
  bool bad_ = false;
};

constexpr int kMaxRanks = NCCL_MOE_MAX_RANKS;

} // namespace

size_t maxMessageBytes(MessageType type) {
  switch (type) {
  case MessageType::hello:
    return kMaxHelloBytes;
  case MessageType::table:
    return kMaxTableBytes;
  case MessageType::refuse:
  case MessageType::bye:
    return kMaxTextBytes + 1;
  case MessageType::offer:
    return 4 + 4 + 8 + kNonceBytes;
  case MessageType::answer:
    return 1;
  case MessageType::data:
    return kMaxDataBytes;
  }
  return 0;
}

Parse parseHeader(const uint8_t* data, size_t size, MessageHeader* header) {
  Reader in(data, size);
  if (in.number<uint32_t>() != kMessageMagic) return Parse::wrongMagic;
  if (in.number<uint16_t>() != kMessageVersion) return Parse::wrongVersion;
  header->type = static_cast<MessageType>(in.number<uint16_t>());
  header->length = in.number<uint32_t>();
  const size_t most = maxMessageBytes(header->type);
  return in.done() && header->length > 0 && header->length <= most ? Parse::ok : Parse::bad;
}

void encodeHeader(const MessageHeader& header, uint8_t out[kMessageHeaderBytes]) {
  Writer w;
  w.number(kMessageMagic);
  w.number(kMessageVersion);
  w.number(static_cast<uint16_t>(header.type));
  w.number(header.length);
  const std::vector<uint8_t> bytes = w.take();
  memcpy(out, bytes.data(), kMessageHeaderBytes);
}

const char* ConfigValues::name(int field) {
  static const char* const names[count] = {"nExperts", "maxTokens", "maxTopK",     "maxRowBytes",
                                           "mode",     "maxMemory", "expertToRank"};
  return field >= 0 && field < count ? names[field] : "?";
}

bool parseHello(const uint8_t* data, size_t size, Hello* hello) {
  Reader in(data, size);
  hello->token = in.string(kMaxTokenBytes);
  in.bytes(hello->nonce, kNonceBytes);
  hello->rank = in.number<int32_t>();
  hello->nRanks = in.number<int32_t>();
  hello->port = in.number<uint16_t>();
  hello->hostId = in.string(kMaxHostIdBytes);
  for (uint64_t& value : hello->config.value) value = in.number<uint64_t>();
  in.require(hello->nRanks >= 1 && hello->nRanks <= kMaxRanks && hello->rank >= 0 && hello->rank < hello->nRanks);
  return in.done();
}

std::vector<uint8_t> encodeHello(const Hello& hello) {
  Writer w;
  w.string(hello.token, kMaxTokenBytes);
  w.bytes(hello.nonce, kNonceBytes);
  w.number(hello.rank);
  w.number(hello.nRanks);
  w.number(hello.port);
  w.string(hello.hostId, kMaxHostIdBytes);
  for (const uint64_t value : hello.config.value) w.number(value);
  return w.take();
}

bool parseTable(const uint8_t* data, size_t size, RankTable* table) {
  Reader in(data, size);
  in.bytes(table->nonce, kNonceBytes);
  const int n = in.number<uint16_t>();
  in.require(n >= 1 && n <= kMaxRanks);
  table->ranks.clear();
  for (int r = 0; r < n && r < kMaxRanks; r++) {
    TableEntry entry;
    uint8_t address[16];
    entry.hostId = in.string(kMaxHostIdBytes);
    in.bytes(address, sizeof(address));
    entry.address = SocketAddress::fromBytes(address, in.number<uint16_t>());
    table->ranks.push_back(std::move(entry));
  }
  return in.done();
}

std::vector<uint8_t> encodeTable(const RankTable& table) {
  Writer w;
  w.bytes(table.nonce, kNonceBytes);
  w.number(static_cast<uint16_t>(table.ranks.size()));
  for (const TableEntry& entry : table.ranks) {
    uint8_t address[16];
    entry.address.toBytes(address);
    w.string(entry.hostId, kMaxHostIdBytes);
    w.bytes(address, sizeof(address));
    w.number(static_cast<uint16_t>(entry.address.port()));
  }
  return w.take();
}

bool parseOffer(const uint8_t* data, size_t size, ShmOffer* offer) {
  Reader in(data, size);
  offer->pid = in.number<int32_t>();
  offer->fd = in.number<int32_t>();
  offer->ringBytes = in.number<uint64_t>();
  in.bytes(offer->nonce, kNonceBytes);
  return in.done();
}

std::vector<uint8_t> encodeOffer(const ShmOffer& offer) {
  Writer w;
  w.number(offer.pid);
  w.number(offer.fd);
  w.number(offer.ringBytes);
  w.bytes(offer.nonce, kNonceBytes);
  return w.take();
}

bool parseBye(const uint8_t* data, size_t size, Bye* bye) {
  if (size < 1 || data[0] > static_cast<uint8_t>(ByeReason::failed)) return false;
  bye->reason = static_cast<ByeReason>(data[0]);
  bye->text = parseText(data + 1, size - 1);
  return true;
}

std::vector<uint8_t> encodeBye(const Bye& bye) {
  std::vector<uint8_t> out = {static_cast<uint8_t>(bye.reason)};
  const std::vector<uint8_t> text = encodeText(bye.text);
  out.insert(out.end(), text.begin(), text.end());
  return out;
}

std::string parseText(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), std::min(size, kMaxTextBytes));
  for (char& c : text) {
    if (c < ' ' || c > '~') c = '?';
  }
  return text;
}

std::vector<uint8_t> encodeText(const std::string& text) {
  const size_t size = std::min(text.size(), kMaxTextBytes);
  return {text.begin(), text.begin() + static_cast<std::ptrdiff_t>(size)};
}

bool equalSecret(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return false;
  unsigned char difference = 0;
  for (size_t i = 0; i < a.size(); i++) difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  return difference == 0;
}

} // namespace moe
