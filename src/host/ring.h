// A ring of bytes between one writer and one reader, in memory that may be shared between processes.
//
// The data is mapped twice, back to back, so that whatever is reserved or read is contiguous.  The writer owns `head`
// (bytes ever committed), the reader owns `tail` (bytes ever consumed); each is stored with release after the bytes
// before it are written (or read), and loaded with acquire by the other side.  Nobody waits in here.
//
// The other side may be broken: positions that make no sense count as "no space" and "no data", and never lead to an
// access outside the ring.  What the bytes say is the reader's to check, on a copy where it may change meanwhile.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "base/error.h"
#include "base/handle.h"
#include "comm/message.h"

namespace moe {

struct RingPositions {
  alignas(64) std::atomic<uint64_t> head;
  alignas(64) std::atomic<uint64_t> tail;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "positions are shared between processes");

class RingWriter {
 public:
  RingWriter() = default;
  RingWriter(RingPositions* positions, uint8_t* data, size_t size) : positions_(positions), data_(data), size_(size) {}
  // Room for n bytes, or nullptr.
  uint8_t* reserve(size_t n) {
    if (n > space()) {
      tail_ = positions_->tail.load(std::memory_order_acquire);
      if (n > space()) return nullptr;
    }
    return data_ + (head_ & (size_ - 1));
  }
  void commit(size_t n) {
    head_ += n;
    positions_->head.store(head_, std::memory_order_release);
  }
  // Copies as much as fits; returns how much that was.
  size_t write(const void* from, size_t n) {
    reserve(size_); // brings the view of the tail up to date
    const size_t fits = std::min(n, space());
    if (fits > 0) {
      memcpy(data_ + (head_ & (size_ - 1)), from, fits);
      commit(fits);
    }
    return fits;
  }
  // Contiguous room and its size, for a caller that fills as much as it has.
  uint8_t* room(size_t* n) {
    reserve(size_);
    *n = space();
    return data_ + (head_ & (size_ - 1));
  }

 private:
  size_t space() const {
    const uint64_t used = head_ - tail_;
    return used <= size_ ? size_ - used : 0;
  }

  RingPositions* positions_ = nullptr;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  uint64_t head_ = 0;
  uint64_t tail_ = 0; // as last seen
};

class RingReader {
 public:
  RingReader() = default;
  RingReader(RingPositions* positions, const uint8_t* data, size_t size)
    : positions_(positions), data_(data), size_(size) {}
  // The next n bytes, or nullptr while there are fewer.
  const uint8_t* peek(size_t n) {
    if (n > available()) {
      head_ = positions_->head.load(std::memory_order_acquire);
      if (n > available()) return nullptr;
    }
    return data_ + (tail_ & (size_ - 1));
  }
  void consume(size_t n) {
    tail_ += n;
    positions_->tail.store(tail_, std::memory_order_release);
  }
  // Bytes there now.
  size_t fill() {
    head_ = positions_->head.load(std::memory_order_acquire);
    return available();
  }
  // Copies as much of n bytes as is there; returns how much that was.
  size_t read(void* to, size_t n) {
    const size_t there = std::min(n, fill());
    if (there > 0) {
      memcpy(to, data_ + (tail_ & (size_ - 1)), there);
      consume(there);
    }
    return there;
  }

 private:
  size_t available() const {
    const uint64_t there = head_ - tail_;
    return there <= size_ ? there : 0;
  }

  RingPositions* positions_ = nullptr;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  uint64_t tail_ = 0;
  uint64_t head_ = 0; // as last seen
};

// The memory of the two rings of a pair of ranks: a memfd that one of them makes and the other opens.
class RingPair {
 public:
  // ringBytes: a power of two and a multiple of the page size.
  ncclResult_t create(size_t ringBytes);
  ShmOffer offer() const;
  // Maps what another process of this machine made.  False if that cannot be reached or is not what was offered.
  bool open(const ShmOffer& offer, size_t ringBytes);
  // No other process needs to open the memory any more.
  void closeFile() { fd_.reset(); }
  size_t bytes() const { return data_[0].size(); } // both rings, each counted once

  RingWriter writer(int ring) { return {positions(ring), data(ring), ringBytes_}; }
  RingReader reader(int ring) { return {positions(ring), data(ring), ringBytes_}; }

 private:
  ncclResult_t map();
  RingPositions* positions(int ring) const;
  uint8_t* data(int ring) const { return static_cast<uint8_t*>(data_[ring].get()); }

  size_t ringBytes_ = 0;
  UniqueFd fd_;
  UniqueMap head_;
  std::array<UniqueMap, 2> data_;
};

} // namespace moe
