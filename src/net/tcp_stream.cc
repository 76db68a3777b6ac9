// The stream of a TCP connection: what goes over socket 0, and what its messages do.
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>

#include "base/error.h"
#include "net/socket.h"
#include "net/tcp_connection.h"

namespace moe {
namespace net {
namespace {

constexpr int readsAtOnce = 16;
constexpr uint32_t quietCheck = 256; // so rarely that it costs nothing
constexpr size_t copyMax = 512;      // up to here a copy is cheaper than a list of two pieces

} // namespace

// ---- outgoing ----

ncclResult_t TcpConnection::flushOut() {
  while (!out_.empty()) {
    iovec parts[32];
    int n = 0;
    for (auto item = out_.begin(); item != out_.end() && n + 2 <= 32; ++item) {
      const size_t header = sizeof(item->header);
      if (item->moved < header) {
        parts[n++] = {reinterpret_cast<char*>(&item->header) + item->moved, header - item->moved};
      }
      const size_t done = item->moved > header ? item->moved - header : 0;
      if (item->bytes > done) parts[n++] = {const_cast<char*>(item->payload) + done, item->bytes - done};
    }
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<size_t>(n);
    const ssize_t sent = sendmsg(stream_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return ncclSuccess;
      return broken(ncclRemoteError, std::string("sending failed: ") + strerror(errno));
    }
    size_t left = static_cast<size_t>(sent);
    while (!out_.empty() && left > 0) {
      OutItem& item = out_.front();
      const size_t step = std::min(left, sizeof(item.header) + item.bytes - item.moved);
      item.moved += step;
      left -= step;
      if (item.moved < sizeof(item.header) + item.bytes) break;
      if (item.request != nullptr) item.request->queued--;
      out_.pop_front();
    }
  }
  return ncclSuccess;
}

ncclResult_t TcpConnection::send(const MessageHeader& header, const void* payload, size_t bytes, TcpRequest* request) {
  OutItem item;
  item.header = header;
  item.payload = static_cast<const char*>(payload);
  item.bytes = bytes;
  item.request = request;
  if (out_.empty()) {
    ssize_t sent;
    if (bytes <= copyMax) {
      char packed[sizeof(header) + copyMax];
      memcpy(packed, &header, sizeof(header));
      if (bytes != 0) memcpy(packed + sizeof(header), payload, bytes);
      sent = ::send(stream_.get(), packed, sizeof(header) + bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    } else {
      iovec parts[2] = {{&item.header, sizeof(item.header)}, {const_cast<char*>(item.payload), bytes}};
      msghdr message = {};
      message.msg_iov = parts;
      message.msg_iovlen = 2;
      sent = sendmsg(stream_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
      return broken(ncclRemoteError, std::string("sending failed: ") + strerror(errno));
    }
    if (sent > 0) item.moved = static_cast<size_t>(sent);
    if (item.moved == sizeof(item.header) + bytes) return ncclSuccess;
  }
  if (request != nullptr) request->queued++;
  out_.push_back(item);
  return out_.size() > 1 ? flushOut() : ncclSuccess;
}

// ---- incoming ----

ncclResult_t TcpConnection::readStream() {
  bool drained = false;
  for (int reads = 0;;) {
    // What is in the buffer.
    while (inEnd_ > inBegin_ || inPayload_) {
      if (inPayload_) {
        const size_t have = inEnd_ - inBegin_;
        const size_t wanted = std::min(have, sinkLeft_);
        if (wanted != 0) memcpy(sink_, in_.data() + inBegin_, wanted);
        sink_ += wanted;
        sinkLeft_ -= wanted;
        inBegin_ += wanted;
        const size_t dropped = std::min(inEnd_ - inBegin_, discardLeft_);
        if (sinkLeft_ == 0) {
          discardLeft_ -= dropped;
          inBegin_ += dropped;
        }
        if (sinkLeft_ != 0 || discardLeft_ != 0) break;
        inPayload_ = false;
        MOECHECK(payloadDone());
        continue;
      }
      if (inEnd_ - inBegin_ < sizeof(MessageHeader)) break;
      const ParseResult parsed =
        parseMessage(in_.data() + inBegin_, inEnd_ - inBegin_, !options_.sender, options_.inlineMax, &inHeader_);
      if (parsed != ParseResult::ok) {
        return broken(ncclRemoteError, std::string("the peer sent a message that is none: ") + parseResultText(parsed));
      }
      inBegin_ += sizeof(MessageHeader);
      MOECHECK(onHeader(inHeader_));
    }
    if (inBegin_ == inEnd_) {
      inBegin_ = inEnd_ = 0;
    } else if (inBegin_ != 0) {
      memmove(in_.data(), in_.data() + inBegin_, inEnd_ - inBegin_);
      inEnd_ -= inBegin_;
      inBegin_ = 0;
    }
    if (drained || peerClosed_ || reads++ == readsAtOnce) break;
    iovec parts[2];
    int n = 0;
    if (inPayload_ && sinkLeft_ != 0) parts[n++] = {sink_, sinkLeft_};
    parts[n++] = {in_.data() + inEnd_, in_.size() - inEnd_};
    ssize_t got;
    if (n == 1) {
      got = recv(stream_.get(), parts[0].iov_base, parts[0].iov_len, MSG_DONTWAIT);
    } else {
      msghdr message = {};
      message.msg_iov = parts;
      message.msg_iovlen = static_cast<size_t>(n);
      got = recvmsg(stream_.get(), &message, MSG_DONTWAIT);
    }
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        if (++quietReads_ % quietCheck == 0 && peerSilent(stream_.get())) {
          return broken(ncclRemoteError, "the peer's machine does not answer any more (NCCL_MOE_NET_TCP_TIMEOUT_MS)");
        }
        break;
      }
      return broken(ncclRemoteError, std::string("receiving failed: ") + strerror(errno));
    }
    if (got == 0) {
      if (inPayload_ || inEnd_ != 0) return broken(ncclRemoteError, "the peer closed the connection inside a message");
      peerClosed_ = true;
      break;
    }
    // The socket had no more than that: asking again would cost a system call on the way of every small message.
    drained = static_cast<size_t>(got) < parts[0].iov_len + (n == 2 ? parts[1].iov_len : 0);
    size_t direct = 0;
    if (n == 2) {
      direct = std::min(static_cast<size_t>(got), sinkLeft_);
      sink_ += direct;
      sinkLeft_ -= direct;
    }
    inEnd_ += static_cast<size_t>(got) - direct;
  }
  return options_.sender ? ncclSuccess : acknowledge();
}

ncclResult_t TcpConnection::onHeader(const MessageHeader& header) {
  inPayload_ = false;
  sinkUnexpected_ = nullptr;
  switch (header.kind) {
  case MessageKind::bye:
    peerSaidBye_ = true;
    return ncclSuccess;
  case MessageKind::ack:
    if (header.value > smallSent_ || header.value < smallConsumed_) {
      return broken(ncclRemoteError, "the peer acknowledged messages that were not sent");
    }
    smallConsumed_ = header.value;
    return ncclSuccess;
  case MessageKind::grant:
    return onGrant(header);
  case MessageKind::want:
    return onWant(header);
  case MessageKind::signal:
    return onSignal(header);
  case MessageKind::put:
    sink_ = target(header.key, header.offset, header.bytes);
    if (sink_ == nullptr) {
      return broken(ncclRemoteError, "the peer put " + std::to_string(header.bytes) + " bytes at offset " +
                                       std::to_string(header.offset) + " of memory that is not registered there");
    }
    sinkLeft_ = header.bytes;
    discardLeft_ = 0;
    inPayload_ = true;
    return ncclSuccess;
  case MessageKind::data:
    break;
  }
  inPayload_ = true;
  if (PostedReceives::Entry* entry = posted_.find(header.tag, header.index)) {
    Member& m = member(entry->slot);
    uint64_t claimed = 0;
    if (m.granted && !shared_->slots[entry->slot].claimed.compare_exchange_strong(claimed, Slot::cameWhole)) {
      return broken(ncclRemoteError, "the peer sent a message in chunks and whole");
    }
    sink_ = m.data;
    sinkLeft_ = std::min<size_t>(header.bytes, m.room);
    discardLeft_ = header.bytes - sinkLeft_;
    return ncclSuccess;
  }
  if (posted_.isPast(header.tag, header.index) || unexpected_.size() > options_.window) {
    return broken(ncclRemoteError, "the peer sent a message that no receive can take");
  }
  unexpected_.emplace_back();
  sinkUnexpected_ = &unexpected_.back();
  sinkUnexpected_->tag = header.tag;
  sinkUnexpected_->index = header.index;
  sinkUnexpected_->payload.resize(header.bytes);
  sink_ = sinkUnexpected_->payload.data();
  sinkLeft_ = header.bytes;
  discardLeft_ = 0;
  return ncclSuccess;
}

ncclResult_t TcpConnection::payloadDone() {
  if (inHeader_.kind != MessageKind::data) return ncclSuccess;
  if (Unexpected* item = sinkUnexpected_) {
    sinkUnexpected_ = nullptr;
    item->complete = true;
    if (!item->claimed) return ncclSuccess;
    Member& m = member(item->slot);
    const size_t bytes = std::min(item->payload.size(), m.room);
    if (bytes != 0) memcpy(m.data, item->payload.data(), bytes);
    deliver(item->slot, bytes);
    unexpected_.remove_if([item](const Unexpected& other) { return &other == item; });
    return ncclSuccess;
  }
  PostedReceives::Entry* entry = posted_.find(inHeader_.tag, inHeader_.index);
  if (entry == nullptr) return broken(ncclInternalError, "a receive went away while its message came in");
  const uint32_t slot = entry->slot;
  deliver(slot, std::min<size_t>(inHeader_.bytes, member(slot).room));
  return ncclSuccess;
}

// A small message is in its place.
void TcpConnection::deliver(uint32_t slot, size_t bytes) {
  Member& m = member(slot);
  m.received = bytes;
  m.done = true;
  if (m.granted) vainGrants_++;
  consumed_++;
  posted_.erase(slot);
  shared_->slots[slot].generation.store(0, std::memory_order_release);
  requests_[slot / maxGroup].open--;
}

ncclResult_t TcpConnection::acknowledge() {
  if (consumed_ - acknowledged_ < std::max<uint64_t>(1, options_.window / 4)) return ncclSuccess;
  acknowledged_ = consumed_;
  MessageHeader ack;
  ack.kind = MessageKind::ack;
  ack.value = consumed_;
  return send(ack, nullptr, 0, nullptr);
}

ncclResult_t TcpConnection::grant(uint32_t slot) {
  Member& m = member(slot);
  m.granted = true;
  Slot& s = shared_->slots[slot];
  s.data = m.data;
  s.room = m.room;
  s.total.store(0, std::memory_order_relaxed);
  s.received.store(0, std::memory_order_relaxed);
  s.claimed.store(0, std::memory_order_relaxed);
  s.generation.store(++generation_, std::memory_order_release);
  MessageHeader header;
  header.kind = MessageKind::grant;
  header.tag = m.tag;
  header.index = m.index;
  header.bytes = m.room;
  header.key = slot;
  header.value = generation_;
  return send(header, nullptr, 0, nullptr);
}

ncclResult_t TcpConnection::onWant(const MessageHeader& header) {
  if (PostedReceives::Entry* entry = posted_.find(header.tag, header.index)) {
    if (!member(entry->slot).granted) return grant(entry->slot);
    return ncclSuccess;
  }
  if (posted_.isPast(header.tag, header.index)) return ncclSuccess;
  if (wanted_.size() > maxRequests * maxGroup) return broken(ncclRemoteError, "the peer wants too many messages");
  wanted_.emplace_back(header.tag, header.index);
  return ncclSuccess;
}

ncclResult_t TcpConnection::onGrant(const MessageHeader& header) {
  if (header.index < sendCounters_.next(header.tag)) return ncclSuccess; // went as a small message
  if (header.key >= maxRequests * maxGroup || grants_.size() > 2 * maxRequests * maxGroup) {
    return broken(ncclRemoteError, "the peer granted what it cannot have");
  }
  grants_.add({header.tag, header.index, header.bytes, static_cast<uint32_t>(header.key), header.value});
  return ncclSuccess;
}

ncclResult_t TcpConnection::onSignal(const MessageHeader& header) {
  char* where = header.offset % 8 == 0 ? target(header.key, header.offset, sizeof(uint64_t)) : nullptr;
  if (where == nullptr || reinterpret_cast<uintptr_t>(where) % 8 != 0) {
    return broken(ncclRemoteError, "the peer signalled to memory that is not registered or not aligned");
  }
  __atomic_store_n(reinterpret_cast<uint64_t*>(where), header.value, __ATOMIC_RELEASE);
  return ncclSuccess;
}

} // namespace net
} // namespace moe
