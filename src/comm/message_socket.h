// A connection that carries whole messages while a communicator forms.  Never reads beyond the message at hand, so
// that the connection can be handed on between two messages.
#pragma once

#include <vector>

#include "base/handle.h"
#include "comm/message.h"

namespace moe {

class MessageSocket {
 public:
  enum class Got { nothing, message, closed, garbage };

  MessageSocket() = default;
  explicit MessageSocket(UniqueFd fd) : fd_(std::move(fd)) {}
  int fd() const { return fd_.get(); }
  explicit operator bool() const { return static_cast<bool>(fd_); }
  UniqueFd release() { return std::move(fd_); }

  void queue(MessageType type, const std::vector<uint8_t>& body);
  bool sending() const { return !out_.empty(); }
  // Sends what the socket takes; false if the connection is broken.
  bool send();
  // Reads what is there of the next message; a message of a type other than those two is garbage.
  Got receive(MessageType expected, MessageType orElse);
  MessageType type() const { return header_.type; }
  const std::vector<uint8_t>& body() const { return body_; }
  // Why receive() said garbage.
  const char* reason() const { return reason_; }

 private:
  UniqueFd fd_;
  std::vector<uint8_t> out_;
  uint8_t headerBytes_[kMessageHeaderBytes] = {};
  size_t headerHas_ = 0;
  MessageHeader header_{};
  std::vector<uint8_t> body_;
  size_t bodyHas_ = 0;
  const char* reason_ = "";
};

} // namespace moe
