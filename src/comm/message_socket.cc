#include "comm/message_socket.h"

namespace moe {

void MessageSocket::queue(MessageType type, const std::vector<uint8_t>& body) {
  uint8_t header[kMessageHeaderBytes];
  encodeHeader(MessageHeader{type, static_cast<uint32_t>(body.size())}, header);
  out_.insert(out_.end(), header, header + sizeof(header));
  out_.insert(out_.end(), body.begin(), body.end());
}

bool MessageSocket::send() {
  size_t sent = 0;
  while (sent < out_.size()) {
    const ssize_t n = ::send(fd_.get(), out_.data() + sent, out_.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno != EAGAIN) return false;
    if (n < 0) break;
    sent += static_cast<size_t>(n);
  }
  out_.erase(out_.begin(), out_.begin() + static_cast<std::ptrdiff_t>(sent));
  return true;
}

MessageSocket::Got MessageSocket::receive(MessageType expected, MessageType orElse) {
  if (headerHas_ == kMessageHeaderBytes && bodyHas_ == header_.length) headerHas_ = bodyHas_ = 0; // the last one's
  for (;;) {
    const bool inHeader = headerHas_ < kMessageHeaderBytes;
    uint8_t* to = inHeader ? headerBytes_ + headerHas_ : body_.data() + bodyHas_;
    const size_t want = inHeader ? kMessageHeaderBytes - headerHas_ : header_.length - bodyHas_;
    const ssize_t n = recv(fd_.get(), to, want, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return Got::nothing;
    if (n <= 0) return Got::closed;
    (inHeader ? headerHas_ : bodyHas_) += static_cast<size_t>(n);
    if (inHeader && headerHas_ == kMessageHeaderBytes) {
      const Parse parsed = parseHeader(headerBytes_, kMessageHeaderBytes, &header_);
      reason_ =
        parsed == Parse::wrongVersion ? "speaks another version of the protocol" : "does not speak the protocol";
      if (parsed != Parse::ok || (header_.type != expected && header_.type != orElse)) return Got::garbage;
      body_.resize(header_.length);
    }
    if (!inHeader && bodyHas_ == header_.length) return Got::message;
  }
}

} // namespace moe
