#include "host/channel.h"

#include <poll.h>
#include <sys/uio.h>

namespace moe {

Channel::~Channel() {
  if (!socket_) return;
  // Closing a socket with unread bytes would reset the connection, and with it destroy what the peer has still to read.
  // A peer may go on sending for ever, though.
  uint8_t sink[16384];
  for (int i = 0; i < 256 && recv(socket_.get(), sink, sizeof(sink), 0) > 0; i++) {
  }
}

// The lower rank writes ring 0 of a shared pair and reads ring 1, the higher the other way round.
void Channel::useRings(RingPair& pair, bool lower) {
  out_ = pair.writer(lower ? 0 : 1);
  in_ = pair.reader(lower ? 1 : 0);
  if (shared_) return;
  toSend_ = pair.reader(lower ? 0 : 1);
  received_ = pair.writer(lower ? 1 : 0);
}

ncclResult_t Channel::setUp(int myRank, bool* ready) {
  const bool lower = myRank < peer_;
  *ready = false;
  if (!setupBegun_) {
    setupBegun_ = true;
    setup_ = MessageSocket(std::move(socket_));
    if (lower || !sameHost_) MOECHECK(pair_.create(ringBytes_));
    if (lower && sameHost_) setup_.queue(MessageType::offer, encodeOffer(pair_.offer()));
  }
  if (sameHost_) {
    const MessageType expected = lower ? MessageType::answer : MessageType::offer;
    const bool alive = setup_.send();
    const MessageSocket::Got got = alive ? setup_.receive(expected, MessageType::bye) : MessageSocket::Got::closed;
    if (got == MessageSocket::Got::nothing) return ncclSuccess;
    Bye bye{ByeReason::left, ""};
    if (got == MessageSocket::Got::message && setup_.type() == MessageType::bye) {
      parseBye(setup_.body().data(), setup_.body().size(), &bye);
    }
    if (got != MessageSocket::Got::message || setup_.type() == MessageType::bye) {
      return fail(ncclRemoteError, "ncclMoeCommInitHost: rank %d left%s%s", peer_, bye.text.empty() ? "" : ": ",
                  bye.text.c_str());
    }
    if (lower) {
      shared_ = setup_.body()[0] == 1;
      pair_.closeFile();
    } else {
      ShmOffer offer{};
      shared_ = parseOffer(setup_.body().data(), setup_.body().size(), &offer) && pair_.open(offer, ringBytes_);
      if (!shared_) {
        pair_ = RingPair();
        MOECHECK(pair_.create(ringBytes_));
      }
      setup_.queue(MessageType::answer, {static_cast<uint8_t>(shared_ ? 1 : 0)});
      if (!setup_.send() || setup_.sending()) return fail(ncclRemoteError, "ncclMoeCommInitHost: rank %d left", peer_);
    }
    if (!shared_) MOE_INFO("rank %d shares this host but not its memory: TCP is used", peer_);
  }
  pair_.closeFile();
  useRings(pair_, lower);
  socket_ = setup_.release();
  *ready = true;
  return ncclSuccess;
}

void Channel::end(std::string epitaph, bool byItself) {
  gone_ = true;
  goneByItself_ = byItself;
  epitaph_ = std::move(epitaph);
}

void Channel::pump(bool* progress) {
  if (gone_) return;
  if (!shared_) send(progress);
  receive(progress);
}

void Channel::receive(bool* progress) {
  while (!gone_ && receiveSome(progress)) {
  }
}

// One recv(); false if there is nothing more to do now.
bool Channel::receiveSome(bool* progress) {
  uint8_t* to = header_ + headerHas_;
  size_t want = kMessageHeaderBytes - headerHas_;
  const bool inHeader = want > 0;
  const bool inData = !inHeader && message_.type == MessageType::data;
  if (inData) {
    size_t room = 0;
    to = received_.room(&room);
    want = std::min(bodyLeft_, room);
    inFull_ = want == 0;
    if (inFull_) return false;
  } else if (!inHeader) {
    to = bye_.data() + (bye_.size() - bodyLeft_);
    want = bodyLeft_;
  }
  const ssize_t n = recv(socket_.get(), to, want, 0);
  if (n < 0 && errno == EINTR) return true;
  if (n < 0 && errno == EAGAIN) return false;
  if (n <= 0) {
    end(n == 0 ? "died (its connection is closed)" : std::string("died (") + strerror(errno) + ")", true);
    return false;
  }
  if (!inHeader) {
    bodyLeft_ -= static_cast<size_t>(n);
    if (inData) {
      received_.commit(static_cast<size_t>(n));
      *progress = true;
    }
    if (bodyLeft_ == 0) messageDone();
    return true;
  }
  headerHas_ += static_cast<size_t>(n);
  if (headerHas_ < kMessageHeaderBytes) return true;
  const bool known = parseHeader(header_, kMessageHeaderBytes, &message_) == Parse::ok &&
                     (message_.type == MessageType::bye || (message_.type == MessageType::data && !shared_));
  if (!known) {
    end("sent something that is not of this protocol", true);
    return false;
  }
  bodyLeft_ = message_.length;
  if (message_.type == MessageType::bye) bye_.resize(bodyLeft_);
  return true;
}

void Channel::messageDone() {
  headerHas_ = 0;
  if (message_.type != MessageType::bye) return;
  Bye bye{};
  if (!parseBye(bye_.data(), bye_.size(), &bye)) return end("sent a malformed bye", true);
  switch (bye.reason) {
  case ByeReason::left:
    return end("has destroyed its communicator", true);
  case ByeReason::aborted:
    return end("has aborted", true);
  case ByeReason::failed:
    return end("has failed: " + bye.text, false);
  }
}

void Channel::send(bool* progress) {
  const std::lock_guard<std::mutex> lock(sendMutex_);
  while (!sendBroken_ && !left_) {
    if (sendHeaderLeft_ == 0 && sendLeft_ == 0) {
      sendLeft_ = std::min(toSend_.fill(), kMaxDataBytes);
      if (sendLeft_ == 0) return;
      encodeHeader(MessageHeader{MessageType::data, static_cast<uint32_t>(sendLeft_)}, sendHeader_);
      sendHeaderLeft_ = kMessageHeaderBytes;
    }
    iovec parts[2] = {{sendHeader_ + (kMessageHeaderBytes - sendHeaderLeft_), sendHeaderLeft_},
                      {const_cast<uint8_t*>(toSend_.peek(sendLeft_)), sendLeft_}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    const ssize_t n = sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) {
      sendBroken_ = true; // receive() finds out why
      return;
    }
    const size_t ofHeader = std::min(static_cast<size_t>(n), sendHeaderLeft_);
    sendHeaderLeft_ -= ofHeader;
    sendLeft_ -= static_cast<size_t>(n) - ofHeader;
    toSend_.consume(static_cast<size_t>(n) - ofHeader);
    *progress = true;
  }
}

bool Channel::flushed() { return shared_ || gone_ || sendBroken_ || (sendLeft_ == 0 && toSend_.fill() == 0); }

short Channel::wants() {
  if (gone_) return 0;
  int events = 0;
  if (shared_ || !inFull_) events |= POLLIN;
  if (!flushed()) events |= POLLOUT;
  return static_cast<short>(events);
}

void Channel::leave(const Bye& bye) {
  const std::lock_guard<std::mutex> lock(sendMutex_);
  const int fd = socket_ ? socket_.get() : setup_.fd();
  if (left_ || fd < 0) return;
  left_ = true;
  if (sendHeaderLeft_ == 0 && sendLeft_ == 0) { // or else the bye would land inside a message
    const std::vector<uint8_t> body = encodeBye(bye);
    std::vector<uint8_t> message(kMessageHeaderBytes);
    encodeHeader(MessageHeader{MessageType::bye, static_cast<uint32_t>(body.size())}, message.data());
    message.insert(message.end(), body.begin(), body.end());
    // If the socket is too full for it, the end of the connection has to do.
    (void)!::send(fd, message.data(), message.size(), MSG_NOSIGNAL);
  }
  shutdown(fd, SHUT_WR);
}

} // namespace moe
