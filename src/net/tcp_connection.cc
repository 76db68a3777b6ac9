#include "net/tcp_connection.h"

#include <sys/socket.h>

#include <algorithm>

#include "base/error.h"
#include "net/socket.h"
#include "net/stripe.h"

namespace moe {
namespace net {
namespace {

constexpr size_t streamBuffer = 16384; // longer payloads are read straight to where they belong
constexpr size_t minChunk = 64 << 10;
constexpr double wantAfter = 200e-6;
constexpr double closeGrace = 5;

} // namespace

// ---- life ----

TcpConnection::TcpConnection(const TcpOptions& options, std::vector<UniqueFd> sockets,
                             const std::vector<Poller*>& pollers)
  : options_(options), stream_(std::move(sockets[0])), shared_(std::make_unique<TcpShared>()),
    requests_(options.sender ? maxRequests * maxGroup : maxRequests), timed_(Stats::enabled()), in_(streamBuffer) {
  for (TcpRequest& request : requests_) {
    request.connection = this;
    free_.push_back(&request);
  }
  std::reverse(free_.begin(), free_.end());
  if (!options_.sender) shared_->slots = std::vector<Slot>(maxRequests * maxGroup);
  shared_->openSockets.store(static_cast<int>(sockets.size()) - 1);
  lingerer_ = pollers[0];
  for (size_t i = 1; i < sockets.size(); i++) {
    data_.push_back(std::make_unique<DataSocket>());
    data_.back()->fd = std::move(sockets[i]);
    data_.back()->shared = shared_.get();
    pollers[(i - 1) % pollers.size()]->attach(data_.back().get());
  }
}

TcpConnection::~TcpConnection() {
  for (auto& socket : data_) socket->poller->detach(socket.get());
  data_.clear();
  if (failed_ == ncclSuccess && out_.empty()) {
    MessageHeader bye;
    bye.kind = MessageKind::bye;
    size_t moved = 0;
    (void)writeSome(stream_.get(), &bye, sizeof(bye), &moved);
  }
  shutdown(stream_.get(), SHUT_WR);
  // Closing with unread acks would reset the connection and lose what is still on its way.
  if (options_.sender && failed_ == ncclSuccess && !peerClosed_) lingerer_->linger(std::move(stream_));
  if (options_.stats != nullptr) {
    options_.stats->add(options_.device, options_.peer, options_.sender ? "send" : "receive", counters_);
  }
  for (auto& entry : regions_) delete entry.second;
}

ncclResult_t TcpConnection::broken(ncclResult_t code, const std::string& text) {
  if (failed_ == ncclSuccess) {
    failed_ = code;
    problem_ = text;
    counters_.errors++;
  }
  return check();
}

ncclResult_t TcpConnection::check() {
  if (failed_ == ncclSuccess && shared_->failed.load(std::memory_order_acquire)) {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    failed_ = ncclRemoteError;
    problem_ = shared_->problem;
    counters_.errors++;
  }
  if (failed_ == ncclSuccess) return ncclSuccess;
  return fail(failed_, "connection %s peer %s on device %s (tcp): %s", options_.sender ? "to" : "from",
              options_.peer.c_str(), options_.device.c_str(), problem_.c_str());
}

TcpConnection::TcpRequest* TcpConnection::take(int kind) {
  if (free_.empty()) {
    counters_.retries++;
    return nullptr;
  }
  TcpRequest* request = free_.back();
  free_.pop_back();
  request->kind = kind;
  request->n = request->open = 0;
  request->bytes = 0;
  request->queued = 0;
  request->remaining.store(0, std::memory_order_relaxed);
  counters_.begin();
  if (timed_) request->begin = nowSeconds();
  return request;
}

void TcpConnection::give(TcpRequest* request) {
  request->kind = kindFree;
  free_.push_back(request);
}

void TcpConnection::finish(TcpRequest* request) {
  if (request->kind == kindReceive) {
    for (int i = 0; i < request->n; i++) {
      counters_.receiveBytes += request->members[i].received;
      shared_->slots[(request - requests_.data()) * maxGroup + i].generation.store(0, std::memory_order_release);
    }
    counters_.receives += static_cast<uint64_t>(request->n);
  }
  counters_.end(timed_ ? nowSeconds() - request->begin : 0);
  give(request);
}

TcpConnection::Member& TcpConnection::member(uint32_t slot) {
  return requests_[slot / maxGroup].members[slot % maxGroup];
}

// ---- memory ----

ncclResult_t TcpConnection::registerMemory(const Memory& memory, Region** region) {
  if (memory.kind != ptrHost) {
    return fail(ncclInvalidArgument, "memory kind %d: the tcp transport takes host memory only", memory.kind);
  }
  if (memory.data == nullptr && memory.bytes != 0) return fail(ncclInvalidArgument, "memory.data is NULL");
  auto owner = std::make_unique<TcpRegion>();
  owner->data = static_cast<char*>(memory.data);
  owner->bytes = memory.bytes;
  std::lock_guard<std::mutex> lock(regionMutex_);
  owner->key = nextKey_++;
  regions_[owner->key] = owner.get();
  *region = owner.release();
  return ncclSuccess;
}

ncclResult_t TcpConnection::deregisterMemory(Region* region) {
  if (region == nullptr) return ncclSuccess;
  std::lock_guard<std::mutex> lock(regionMutex_);
  for (auto it = regions_.begin(); it != regions_.end(); ++it) {
    if (it->second != region) continue;
    regions_.erase(it);
    delete region;
    return ncclSuccess;
  }
  return fail(ncclInvalidArgument, "region %p is not registered on this connection", static_cast<void*>(region));
}

ncclResult_t TcpConnection::remoteRegion(const Region* region, RemoteRegion* remote) {
  if (region == nullptr) return fail(ncclInvalidArgument, "region is NULL");
  const auto* own = static_cast<const TcpRegion*>(region);
  remote->base = reinterpret_cast<uint64_t>(own->data);
  remote->bytes = own->bytes;
  remote->key = own->key;
  return ncclSuccess;
}

char* TcpConnection::target(uint64_t key, uint64_t offset, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(regionMutex_);
  auto it = regions_.find(key);
  if (it == regions_.end() || offset > it->second->bytes || bytes > it->second->bytes - offset) return nullptr;
  return it->second->data + offset;
}

// ---- two-sided ----

ncclResult_t TcpConnection::isend(const void* data, size_t bytes, int tag, Region*, Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (!options_.sender) return fail(ncclInvalidUsage, "isend on a receiving connection");
  if (data == nullptr && bytes != 0) return fail(ncclInvalidArgument, "data is NULL with %zu bytes", bytes);
  MOECHECK(flushOut());
  const uint64_t index = sendCounters_.next(tag);
  const Grants::Entry* grant = nullptr;
  if (bytes > options_.inlineMax) {
    grant = grants_.find(tag, index);
    if (grant == nullptr) {
      MOECHECK(readStream());
      grant = grants_.find(tag, index);
    }
    if (grant == nullptr) {
      counters_.retries++;
      if (peerClosed_) return broken(ncclRemoteError, "the peer has closed the connection");
      return want(tag, index);
    }
    bytes = std::min<size_t>(bytes, grant->room);
  }
  const bool small = bytes <= options_.inlineMax;
  if (small && smallSent_ - smallConsumed_ >= options_.window) {
    MOECHECK(readStream());
    if (peerClosed_) return broken(ncclRemoteError, "the peer has closed the connection");
    if (smallSent_ - smallConsumed_ >= options_.window) {
      counters_.retries++;
      return ncclSuccess;
    }
  }
  if (!small) {
    for (auto& socket : data_) {
      if (!socket->full()) continue;
      counters_.retries++;
      return ncclSuccess;
    }
  }
  TcpRequest* r = take(kindSend);
  if (r == nullptr) return ncclSuccess;
  r->bytes = bytes;
  sendCounters_.take(tag);
  counters_.sends++;
  counters_.sendBytes += bytes;
  ncclResult_t result;
  if (small) {
    MessageHeader header;
    header.kind = MessageKind::data;
    header.tag = tag;
    header.index = index;
    header.bytes = bytes;
    smallSent_++;
    smallInARow_ = std::min(smallInARow_ + 1, maxVainGrants);
    result = send(header, data, bytes, r);
  } else {
    smallInARow_ = 0;
    result = sendChunks(*grant, data, bytes, r);
  }
  wants_.erase(std::remove_if(wants_.begin(), wants_.end(), [tag](const Want& w) { return w.tag == tag; }),
               wants_.end());
  grants_.drop(tag, index);
  if (result != ncclSuccess) {
    give(r);
    return result;
  }
  *request = r;
  return ncclSuccess;
}

// Message (tag, index) has no grant.
ncclResult_t TcpConnection::want(int tag, uint64_t index) {
  auto item = std::find_if(wants_.begin(), wants_.end(), [tag](const Want& w) { return w.tag == tag; });
  if (item == wants_.end()) {
    if (wants_.size() == maxRequests * maxGroup) return ncclSuccess; // more tags than receives can have
    wants_.push_back({tag, index, nowSeconds(), false});
    item = wants_.end() - 1;
  }
  if (item->sent || (smallInARow_ < maxVainGrants && nowSeconds() - item->since < wantAfter)) return ncclSuccess;
  item->sent = true;
  MessageHeader header;
  header.kind = MessageKind::want;
  header.tag = tag;
  header.index = index;
  return send(header, nullptr, 0, nullptr);
}

ncclResult_t TcpConnection::sendChunks(const Grants::Entry& grant, const void* data, size_t bytes,
                                       TcpRequest* request) {
  const int n = stripeCount(bytes, static_cast<int>(data_.size()), minChunk);
  request->remaining.store(bytes, std::memory_order_relaxed);
  for (int i = 0; i < n; i++) {
    const Stripe piece = stripe(bytes, n, i);
    if (piece.bytes == 0) continue;
    ChunkJob job;
    job.header.slot = grant.slot;
    job.header.generation = grant.generation;
    job.header.offset = piece.offset;
    job.header.bytes = piece.bytes;
    job.header.total = bytes;
    job.data = static_cast<const char*>(data) + piece.offset;
    job.remaining = &request->remaining;
    data_[nextSocket_]->push(job);
    nextSocket_ = (nextSocket_ + 1) % data_.size();
  }
  return ncclSuccess;
}

ncclResult_t TcpConnection::irecv(int n, void* const* data, const size_t* bytes, const int* tags, Region* const*,
                                  Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (options_.sender) return fail(ncclInvalidUsage, "irecv on a sending connection");
  if (n < 1 || n > maxGroup) return fail(ncclInvalidArgument, "n is %d, but a group has 1 to %d members", n, maxGroup);
  for (int i = 0; i < n; i++) {
    if (data[i] == nullptr && bytes[i] != 0) return fail(ncclInvalidArgument, "data[%d] is NULL", i);
  }
  MOECHECK(flushOut());
  TcpRequest* r = take(kindReceive);
  if (r == nullptr) return ncclSuccess;
  r->n = r->open = r->nSizes = n;
  const uint32_t base = static_cast<uint32_t>(r - requests_.data()) * maxGroup;
  for (int i = 0; i < n; i++) {
    const uint32_t slot = base + static_cast<uint32_t>(i);
    Member& m = r->members[i];
    m = Member();
    m.data = static_cast<char*>(data[i]);
    m.room = bytes[i];
    m.tag = tags[i];
    m.index = posted_.post(tags[i], slot);
    auto item = std::find_if(unexpected_.begin(), unexpected_.end(),
                             [&m](const Unexpected& u) { return u.tag == m.tag && u.index == m.index; });
    if (item != unexpected_.end()) {
      if (item->complete) {
        const size_t got = std::min(item->payload.size(), m.room);
        if (got != 0) memcpy(m.data, item->payload.data(), got);
        deliver(slot, got);
        unexpected_.erase(item);
      } else {
        item->claimed = true;
        item->slot = slot;
      }
      continue;
    }
    auto want = std::find(wanted_.begin(), wanted_.end(), std::make_pair(m.tag, m.index));
    const bool wanted = want != wanted_.end();
    if (wanted) wanted_.erase(want);
    if (wanted || (m.room > options_.inlineMax && vainGrants_ < maxVainGrants)) MOECHECK(grant(slot));
  }
  *request = r;
  return acknowledge();
}

ncclResult_t TcpConnection::iflush(int, void* const*, const int*, Region* const*, Request** request) {
  *request = nullptr; // host memory is visible as soon as test says so
  return check();
}

// ---- one-sided ----

ncclResult_t TcpConnection::stream(const MessageHeader& header, const void* data, TcpRequest* request) {
  counters_.puts++;
  counters_.putBytes += header.bytes;
  return send(header, data, header.bytes, request);
}

ncclResult_t TcpConnection::put(const void* data, size_t bytes, Region* region, const RemoteRegion& remote,
                                uint64_t offset, Request** request) {
  return putSignal(data, bytes, region, remote, offset, RemoteRegion(), 0, 0, request);
}

ncclResult_t TcpConnection::putSignal(const void* data, size_t bytes, Region*, const RemoteRegion& remote,
                                      uint64_t offset, const RemoteRegion& signal, uint64_t signalOffset,
                                      uint64_t value, Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (!options_.sender) return fail(ncclInvalidUsage, "put on a receiving connection");
  if (data == nullptr && bytes != 0) return fail(ncclInvalidArgument, "data is NULL with %zu bytes", bytes);
  if (bytes != 0 && (offset > remote.bytes || bytes > remote.bytes - offset)) {
    return fail(ncclInvalidArgument, "offset %llu with %zu bytes is outside the remote region of %llu bytes",
                static_cast<unsigned long long>(offset), bytes, static_cast<unsigned long long>(remote.bytes));
  }
  const bool signals = signal.key != 0;
  if (signals && (signalOffset % 8 != 0 || (signal.base + signalOffset) % 8 != 0 || signal.bytes < sizeof(uint64_t) ||
                  signalOffset > signal.bytes - sizeof(uint64_t))) {
    return fail(ncclInvalidArgument, "signalOffset %llu is not a multiple of 8 inside the signal region",
                static_cast<unsigned long long>(signalOffset));
  }
  MOECHECK(flushOut());
  TcpRequest* r = take(kindSend);
  if (r == nullptr) return ncclSuccess;
  r->bytes = bytes;
  ncclResult_t result = ncclSuccess;
  if (bytes != 0) {
    MessageHeader header;
    header.kind = MessageKind::put;
    header.bytes = bytes;
    header.key = remote.key;
    header.offset = offset;
    result = stream(header, data, r);
  }
  if (result == ncclSuccess && signals) {
    MessageHeader header;
    header.kind = MessageKind::signal;
    header.key = signal.key;
    header.offset = signalOffset;
    header.value = value;
    counters_.signals++;
    result = send(header, nullptr, 0, r);
  }
  if (result != ncclSuccess) {
    give(r);
    return result;
  }
  *request = r;
  return ncclSuccess;
}

// ---- completion ----

ncclResult_t TcpConnection::test(Request* request, bool* done, size_t* bytes) {
  *done = false;
  auto* r = static_cast<TcpRequest*>(request);
  if (r->kind == kindFree) return fail(ncclInvalidArgument, "request: it has completed already");
  if (r->kind == kindSend) {
    if (r->queued != 0) MOECHECK(flushOut());
    if (r->queued == 0 && r->remaining.load(std::memory_order_acquire) == 0) {
      if (bytes != nullptr) *bytes = r->bytes;
      *done = true;
      finish(r);
      return ncclSuccess;
    }
    MOECHECK(check());
    // The peer may have got everything and closed before the poller has come to say so: it has, once it knows of the
    // end.
    const bool final = r->queued != 0 || shared_->openSockets.load(std::memory_order_acquire) == 0;
    MOECHECK(readStream());
    if (!peerClosed_ || (r->queued == 0 && r->remaining.load(std::memory_order_acquire) == 0)) return ncclSuccess;
    if (closedSince_ == 0) closedSince_ = nowSeconds();
    if (!final && nowSeconds() - closedSince_ < closeGrace) return ncclSuccess;
    return broken(ncclRemoteError, "the peer has closed the connection");
  }
  const uint32_t base = static_cast<uint32_t>(r - requests_.data()) * maxGroup;
  auto chunksDone = [&] {
    for (int i = 0; r->open != 0 && i < r->n; i++) {
      Member& m = r->members[i];
      if (m.done || !m.granted) continue;
      const Slot& slot = shared_->slots[base + static_cast<uint32_t>(i)];
      const uint64_t received = slot.received.load(std::memory_order_acquire);
      if (received == 0 || received < slot.total.load(std::memory_order_relaxed)) continue;
      m.received = received;
      m.done = true;
      vainGrants_ = 0;
      posted_.erase(base + static_cast<uint32_t>(i));
      r->open--;
    }
  };
  chunksDone();
  if (r->open != 0) {
    MOECHECK(check());
    if (!out_.empty()) MOECHECK(flushOut());
    // Read before the stream says that it has ended: chunks may still be on their way then.
    const bool quiet = peerClosed_ && shared_->openSockets.load(std::memory_order_acquire) == 0;
    MOECHECK(readStream());
    chunksDone();
    if (r->open != 0 && quiet) {
      return broken(ncclRemoteError, peerSaidBye_ ? "the peer closed the connection while a receive was posted"
                                                  : "the peer went away while a receive was posted");
    }
  }
  if (r->open != 0) return ncclSuccess;
  if (bytes != nullptr) {
    for (int i = 0; i < r->n; i++) bytes[i] = r->members[i].received;
  }
  *done = true;
  finish(r);
  return ncclSuccess;
}

ncclResult_t TcpConnection::progress() {
  MOECHECK(check());
  MOECHECK(flushOut());
  MOECHECK(readStream());
  if (peerClosed_ && !peerSaidBye_) return broken(ncclRemoteError, "the peer went away");
  return ncclSuccess;
}

} // namespace net
} // namespace moe
