#include "net/verbs_connection.h"

#include <arpa/inet.h>

#include <algorithm>

#include "base/error.h"
#include "base/param.h"
#include "net/socket.h"
#include "net/stripe.h"

namespace moe {
namespace net {
namespace {

IntParam adaptiveMinParam{"NCCL_MOE_NET_ADAPTIVE_MIN", 8192, 0, 1 << 30, "bytes from which adaptive routing counts"};

} // namespace

// ---- memory ----

ncclResult_t VerbsConnection::registerMemory(const Memory& memory, Region** region) {
  *region = nullptr;
  GroupRegion* fresh = nullptr;
  MOECHECK(group_.add(memory, &fresh));
  *region = fresh;
  return ncclSuccess;
}

ncclResult_t VerbsConnection::deregisterMemory(Region* region) { return group_.remove(region); }

ncclResult_t VerbsConnection::remoteRegion(const Region* region, RemoteRegion* remote) {
  if (region == nullptr) return fail(ncclInvalidArgument, "region is NULL");
  const auto* own = static_cast<const GroupRegion*>(region);
  remote->base = reinterpret_cast<uint64_t>(own->data);
  remote->bytes = own->bytes;
  remote->key = group_.ports().size();
  for (size_t i = 0; i < group_.ports().size(); i++) remote->portKeys[i] = own->held[i]->remoteKey;
  return ncclSuccess;
}

// ---- two-sided ----

int VerbsConnection::pieceWork(size_t bytes) const {
  const size_t writes = std::max<size_t>(1, (bytes + maxMessage_ - 1) / maxMessage_);
  return static_cast<int>(std::min<size_t>(writes + 2, sendDepth + 1));
}

ncclResult_t VerbsConnection::isend(const void* data, size_t bytes, int tag, Region* region, Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (!sender_) return fail(ncclInvalidUsage, "isend on a receiving connection");
  const auto* own = static_cast<const GroupRegion*>(region);
  if (bytes != 0 && (data == nullptr || own == nullptr)) {
    return fail(ncclInvalidArgument, "data or its memory handle is NULL with %zu bytes", bytes);
  }
  const auto slot = static_cast<uint32_t>(next_ % maxRequests);
  const auto sequence = static_cast<uint32_t>(next_ + 1);
  const CtsEntry* entries = control_->cts[slot];
  uint32_t members = 0, chosen = maxGroup;
  if (__atomic_load_n(&entries[0].sequence, __ATOMIC_ACQUIRE) == sequence) {
    members = entries[0].members;
    if (members < 1 || members > maxGroup)
      return broken(ncclRemoteError, "the peer posted a group of no possible size");
    for (uint32_t i = 0; i < members; i++) {
      if (__atomic_load_n(&entries[i].sequence, __ATOMIC_ACQUIRE) != sequence) members = 0; // not all there yet
    }
    for (uint32_t i = 0; i < members && chosen == maxGroup; i++) {
      if (entries[i].tag == tag && (usedMembers_ >> i & 1) == 0) chosen = i;
    }
  }
  if (chosen == maxGroup) {
    counters_.retries++;
    MOECHECK(poll());
    return (polls_++ & 255) == 0 ? checkPeer() : ncclSuccess;
  }
  const CtsEntry entry = entries[chosen];
  bytes = std::min<size_t>(bytes, entry.room);
  const auto nAlive = static_cast<uint32_t>(alive_.size());
  const uint32_t nPieces = bytes >= stripeMin_ ? nAlive : 1;
  const uint32_t first = nPieces > 1 ? 0 : nextQueue_ % nAlive;
  const int needed = pieceWork(stripe(bytes, static_cast<int>(nPieces), 0).bytes);
  if (needed > sendDepth) return fail(ncclInvalidArgument, "bytes: %zu are more than one message can have", bytes);
  for (uint32_t i = 0; i < nPieces; i++) {
    if (room(alive_[first + i], needed)) continue;
    counters_.retries++;
    return poll();
  }
  VerbsRequest* r = take(kindSend);
  if (r == nullptr) return poll();
  r->bytes = bytes;
  r->data = static_cast<const char*>(data);
  r->region = own;
  r->entry = entry;
  r->slot = slot;
  r->member = chosen;
  r->sequence = sequence;
  r->pieces = nPieces;
  r->left = UINT32_MAX >> (32 - nPieces);
  for (uint32_t i = 0; i < nPieces; i++) r->queueOf[i] = static_cast<uint8_t>(alive_[first + i]);
  if (nPieces == 1) nextQueue_++;
  usedMembers_ |= 1u << chosen;
  if (usedMembers_ == (1u << members) - 1) {
    usedMembers_ = 0;
    next_++;
  }
  counters_.sends++;
  counters_.sendBytes += bytes;
  for (uint32_t i = 0; i < nPieces; i++) MOECHECK(postPiece(*r, i));
  *request = r;
  return ncclSuccess;
}

ncclResult_t VerbsConnection::postPiece(VerbsRequest& r, uint32_t index) {
  const uint32_t queue = r.queueOf[index], path = queues_[queue].path;
  if (!paths_[path]->up) return ncclSuccess; // failed just now; the piece is among those that are sent again
  const Stripe piece = stripe(r.bytes, static_cast<int>(r.pieces), static_cast<int>(index));
  Immediate immediate;
  immediate.slot = r.slot;
  immediate.member = r.member;
  immediate.piece = index;
  immediate.pieces = r.pieces;
  immediate.size = static_cast<uint32_t>(std::min<size_t>(r.bytes, Immediate::sizeInRecord));
  const bool record = index == 0 && (r.pieces > 1 || immediate.size == Immediate::sizeInRecord);
  const bool apart = adaptive_ && r.bytes >= static_cast<size_t>(adaptiveMinParam.get());
  const auto needed = static_cast<size_t>(pieceWork(piece.bytes));
  work_.assign(needed, ibv_send_wr());
  pieces_.assign(needed, ibv_sge());
  int n = 0;
  if (record) {
    uint64_t* from = &control_->records[r.slot][r.member];
    *from = r.bytes;
    pieces_[n] = {reinterpret_cast<uint64_t>(from), sizeof(*from),
                  controlRegion_->held[paths_[path]->portIndex]->localKey};
    work_[n].opcode = IBV_WR_RDMA_WRITE;
    work_[n].num_sge = 1;
    work_[n].wr.rdma.remote_addr =
      peer_.base + offsetof(Control, records) + (r.slot * maxGroup + r.member) * sizeof(uint64_t);
    work_[n].wr.rdma.rkey = peer_.path[path].remoteKey;
    n++;
  }
  for (size_t done = 0; done < piece.bytes; n++) {
    const size_t step = std::min<size_t>(piece.bytes - done, maxMessage_);
    pieces_[n] = {reinterpret_cast<uint64_t>(r.data) + piece.offset + done, static_cast<uint32_t>(step),
                  r.region->held[paths_[path]->portIndex]->localKey};
    work_[n].opcode = IBV_WR_RDMA_WRITE;
    work_[n].num_sge = 1;
    if (step <= maxInline_ && r.region->kind == ptrHost) work_[n].send_flags = IBV_SEND_INLINE;
    work_[n].wr.rdma.remote_addr = r.entry.address + piece.offset + done;
    work_[n].wr.rdma.rkey = r.entry.keys[path];
    done += step;
  }
  if (apart || piece.bytes == 0) {
    // Nothing in it, but it comes after the data.
    work_[n].wr.rdma.remote_addr = r.entry.address;
    work_[n].wr.rdma.rkey = r.entry.keys[path];
    n++;
  }
  work_[n - 1].opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  work_[n - 1].imm_data = htonl(immediate.pack());
  for (int k = 0; k < n; k++) {
    work_[k].sg_list = &pieces_[k];
    work_[k].next = k + 1 < n ? &work_[k + 1] : nullptr;
  }
  return post(queue, work_.data(), n, Work::message, static_cast<uint32_t>(&r - requests_.data()) | index << 16, true);
}

ncclResult_t VerbsConnection::irecv(int n, void* const* data, const size_t* bytes, const int* tags,
                                    Region* const* regions, Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (sender_) return fail(ncclInvalidUsage, "irecv on a sending connection");
  if (n < 1 || n > maxGroup) return fail(ncclInvalidArgument, "n is %d, but a group has 1 to %d members", n, maxGroup);
  for (int i = 0; i < n; i++) {
    if (bytes[i] != 0 && (data[i] == nullptr || regions == nullptr || regions[i] == nullptr)) {
      return fail(ncclInvalidArgument, "data[%d] or its memory handle is NULL", i);
    }
  }
  const auto slot = static_cast<uint32_t>(next_ % maxRequests);
  const uint32_t queue = alive_[next_ % alive_.size()];
  VerbsRequest* r = &requests_[slot];
  // CTS entries that are on their way once more must not come behind those of the next group in the slot.
  if (r->kind != kindFree || r->rewriting || !room(queue, 1)) {
    counters_.retries++;
    return poll();
  }
  r->kind = kindReceive;
  r->n = r->open = r->nSizes = n;
  r->sequence = static_cast<uint32_t>(next_ + 1);
  r->rewrite = false;
  r->ctsQueue = queue;
  counters_.begin();
  if (timed_) r->begin = nowSeconds();
  for (int i = 0; i < n; i++) {
    r->members[i] = Member();
    r->members[i].room = bytes[i];
    const auto* own = bytes[i] != 0 ? static_cast<const GroupRegion*>(regions[i]) : controlRegion_;
    CtsEntry& entry = control_->cts[slot][i];
    // A write of nothing goes nowhere, but its address is checked by some devices.
    entry.address = bytes[i] != 0 ? reinterpret_cast<uint64_t>(data[i]) : reinterpret_cast<uint64_t>(control_.get());
    entry.room = bytes[i];
    for (size_t path = 0; path < paths_.size(); path++)
      entry.keys[path] = own->held[paths_[path]->portIndex]->remoteKey;
    entry.tag = tags[i];
    entry.members = static_cast<uint32_t>(n);
    entry.sequence = r->sequence;
  }
  next_++;
  MOECHECK(writeCts(slot, queue, Work::control));
  *request = r;
  return ncclSuccess;
}

ncclResult_t VerbsConnection::writeCts(uint32_t slot, uint32_t queue, Work work) {
  const uint32_t path = queues_[queue].path;
  ibv_sge piece = {reinterpret_cast<uint64_t>(control_->cts[slot]),
                   static_cast<uint32_t>(static_cast<size_t>(requests_[slot].n) * sizeof(CtsEntry)),
                   controlRegion_->held[paths_[path]->portIndex]->localKey};
  ibv_send_wr write = {};
  write.opcode = IBV_WR_RDMA_WRITE;
  write.sg_list = &piece;
  write.num_sge = 1;
  if (piece.length <= maxInline_) write.send_flags = IBV_SEND_INLINE;
  write.wr.rdma.remote_addr = peer_.base + offsetof(Control, cts) + slot * maxGroup * sizeof(CtsEntry);
  write.wr.rdma.rkey = peer_.path[path].remoteKey;
  return post(queue, &write, 1, work, slot, work == Work::rewrite);
}

// ---- flush ----

ncclResult_t VerbsConnection::postFlush(uint32_t index) {
  Path& path = *paths_[index];
  ibv_sge piece = {reinterpret_cast<uint64_t>(&control_->flushed), 1, controlRegion_->held[path.portIndex]->localKey};
  ibv_send_wr work = {};
  work.opcode = IBV_WR_RDMA_READ;
  work.sg_list = &piece;
  work.num_sge = 1;
  work.wr.rdma.remote_addr = flushAddress_;
  work.wr.rdma.rkey = path.flushKey;
  path.flushPosted++;
  return post(index, &work, 1, Work::flush, 0, true);
}

ncclResult_t VerbsConnection::iflush(int n, void* const* data, const int* bytes, Region* const* regions,
                                     Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (sender_) return fail(ncclInvalidUsage, "iflush on a sending connection");
  int last = -1;
  for (int i = 0; i < n; i++) {
    const auto* own = static_cast<const GroupRegion*>(regions[i]);
    if (bytes[i] > 0 && own != nullptr && own->kind != ptrHost) last = i;
  }
  if (last < 0) return ncclSuccess; // host memory is visible as soon as test says so
  if (freeFlushes_.empty()) {
    flushes_.push_back(std::make_unique<VerbsRequest>());
    flushes_.back()->connection = this;
    flushes_.back()->nSizes = 0;
    freeFlushes_.push_back(flushes_.back().get());
  }
  VerbsRequest* r = freeFlushes_.back();
  flushAddress_ = reinterpret_cast<uint64_t>(data[last]);
  // Every device makes visible what it wrote itself, also one whose port has failed since.
  for (uint32_t i = 0; i < paths_.size(); i++) {
    Path& path = *paths_[i];
    path.flushKey = static_cast<const GroupRegion*>(regions[last])->held[path.portIndex]->remoteKey;
    if (path.flushQueue.sendFree > 0) {
      MOECHECK(postFlush(i));
      path.flushWanted = path.flushPosted;
    } else {
      path.flushWanted = path.flushPosted + 1; // one READ, as soon as there is room, for all who come until then
    }
    r->flush[i] = path.flushWanted;
  }
  freeFlushes_.pop_back();
  r->kind = kindFlush;
  counters_.flushes++;
  counters_.begin();
  if (timed_) r->begin = nowSeconds();
  *request = r;
  return ncclSuccess;
}

// ---- one-sided ----

ncclResult_t VerbsConnection::put(const void* data, size_t bytes, Region* region, const RemoteRegion& remote,
                                  uint64_t offset, Request** request) {
  return putSignal(data, bytes, region, remote, offset, RemoteRegion(), 0, 0, request);
}

ncclResult_t VerbsConnection::putSignal(const void* data, size_t bytes, Region* region, const RemoteRegion& remote,
                                        uint64_t offset, const RemoteRegion& signal, uint64_t signalOffset,
                                        uint64_t value, Request** request) {
  *request = nullptr;
  MOECHECK(check());
  if (!sender_) return fail(ncclInvalidUsage, "put on a receiving connection");
  const auto* own = static_cast<const GroupRegion*>(region);
  if (bytes != 0 && (data == nullptr || own == nullptr)) {
    return fail(ncclInvalidArgument, "data or its region is NULL with %zu bytes", bytes);
  }
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
  if ((bytes != 0 && (remote.key < 1 || remote.key > maxPaths)) || signal.key > maxPaths) {
    return fail(ncclInvalidArgument, "remote or signal: not what remoteRegion gave");
  }
  const int needed = pieceWork(bytes);
  if (needed > sendDepth) return fail(ncclInvalidArgument, "bytes: %zu are more than one put can have", bytes);
  const uint32_t queue = alive_[0], path = queues_[queue].path;
  if (!room(queue, needed)) {
    counters_.retries++;
    return poll();
  }
  VerbsRequest* r = take(kindPut);
  if (r == nullptr) return poll();
  r->bytes = bytes;
  work_.assign(static_cast<size_t>(needed), ibv_send_wr());
  pieces_.assign(static_cast<size_t>(needed), ibv_sge());
  int n = 0;
  for (size_t done = 0; done < bytes; n++) {
    const size_t step = std::min<size_t>(bytes - done, maxMessage_);
    work_[n].opcode = IBV_WR_RDMA_WRITE;
    pieces_[n] = {reinterpret_cast<uint64_t>(data) + done, static_cast<uint32_t>(step),
                  own->held[paths_[path]->portIndex]->localKey};
    if (step <= maxInline_ && own->kind == ptrHost) work_[n].send_flags = IBV_SEND_INLINE;
    work_[n].wr.rdma.remote_addr = remote.base + offset + done;
    work_[n].wr.rdma.rkey = remote.portKeys[path % remote.key];
    done += step;
  }
  if (signals) {
    uint64_t* from = &control_->signals[signals_++ % maxSignals];
    *from = value;
    if (adaptive_) {
      // Packets may take several ways, and writes may be in memory before earlier ones.  A READ is not answered before
      // they are, and the signal waits for the answer, in the device.
      work_[n].opcode = IBV_WR_RDMA_READ;
      pieces_[n] = {reinterpret_cast<uint64_t>(&control_->flushed), sizeof(value),
                    controlRegion_->held[paths_[path]->portIndex]->localKey};
      work_[n].wr.rdma.remote_addr = signal.base + signalOffset;
      work_[n].wr.rdma.rkey = signal.portKeys[path % signal.key];
      n++;
      work_[n].send_flags = IBV_SEND_FENCE;
    }
    work_[n].opcode = IBV_WR_RDMA_WRITE;
    pieces_[n] = {reinterpret_cast<uint64_t>(from), sizeof(value),
                  controlRegion_->held[paths_[path]->portIndex]->localKey};
    if (sizeof(value) <= maxInline_) work_[n].send_flags |= IBV_SEND_INLINE;
    work_[n].wr.rdma.remote_addr = signal.base + signalOffset;
    work_[n].wr.rdma.rkey = signal.portKeys[path % signal.key];
    n++;
    counters_.signals++;
  }
  for (int k = 0; k < n; k++) {
    work_[k].sg_list = &pieces_[k];
    work_[k].num_sge = 1;
    work_[k].next = k + 1 < n ? &work_[k + 1] : nullptr;
  }
  if (n > 0) {
    r->left = 1;
    r->queueOf[0] = static_cast<uint8_t>(queue);
    MOECHECK(post(queue, work_.data(), n, Work::message, static_cast<uint32_t>(r - requests_.data()), true));
  }
  counters_.puts++;
  counters_.putBytes += bytes;
  *request = r;
  return ncclSuccess;
}

// ---- completion ----

ncclResult_t VerbsConnection::test(Request* request, bool* done, size_t* bytes) {
  *done = false;
  auto* r = static_cast<VerbsRequest*>(request);
  if (r->kind == kindFree) return fail(ncclInvalidArgument, "request: it has completed already");
  auto complete = [&] {
    if (r->kind == kindReceive) return r->open == 0;
    if (r->kind != kindFlush) return r->left == 0;
    for (size_t i = 0; i < paths_.size(); i++) {
      if (paths_[i]->flushDone < r->flush[i]) return false;
    }
    return true;
  };
  if (!complete()) {
    MOECHECK(check());
    MOECHECK(poll());
  }
  if (!complete()) return (polls_++ & 255) == 0 ? checkPeer() : ncclSuccess;
  if (r->kind == kindReceive) {
    for (int i = 0; i < r->n; i++) {
      if (bytes != nullptr) bytes[i] = r->members[i].received;
      counters_.receiveBytes += r->members[i].received;
    }
    counters_.receives += static_cast<uint64_t>(r->n);
  } else if (r->kind != kindFlush && bytes != nullptr) {
    *bytes = r->bytes;
  }
  *done = true;
  finish(r);
  return ncclSuccess;
}

ncclResult_t VerbsConnection::progress() {
  MOECHECK(check());
  MOECHECK(poll());
  return (polls_++ & 255) == 0 ? checkPeer() : ncclSuccess;
}

} // namespace net
} // namespace moe
