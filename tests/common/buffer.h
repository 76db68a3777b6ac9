// Memory that notices when it is touched where it should not be.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace moe::test {

// A buffer whose end (rounded up to 16 bytes) borders a page that faults, with a guard zone in front and behind.
// Content starts as poison that differs from byte to byte, so that a misplaced poison byte is seen too.
class GuardedBuffer {
 public:
  GuardedBuffer() = default;
  explicit GuardedBuffer(size_t bytes) : bytes_(bytes) {
    const size_t inner = (bytes + kFront + kPage - 1) / kPage * kPage;
    mapped_ = inner + kPage;
    void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = base != MAP_FAILED ? static_cast<uint8_t*>(base) : nullptr;
    mprotect(base_ + inner, kPage, PROT_NONE);
    data_ = base_ + inner - (bytes + 15) / 16 * 16;
    refill();
  }
  GuardedBuffer(GuardedBuffer&& other) noexcept { swap(other); }
  GuardedBuffer& operator=(GuardedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~GuardedBuffer() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }

  // Copies an input in and makes it read-only.
  template <class T> static GuardedBuffer input(const std::vector<T>& content) {
    GuardedBuffer buffer(content.size() * sizeof(T));
    if (!content.empty()) memcpy(buffer.data_, content.data(), buffer.bytes_);
    mprotect(buffer.base_, buffer.mapped_ - kPage, PROT_READ);
    return buffer;
  }

  uint8_t* data() const { return data_; }
  template <class T> T* as() const { return reinterpret_cast<T*>(data_); }
  size_t size() const { return bytes_; }
  bool given() const { return base_ != nullptr; }

  void refill() {
    for (uint8_t* p = base_; p < base_ + mapped_ - kPage; p++) *p = poison(static_cast<size_t>(p - base_));
  }
  static uint8_t poison(size_t i) { return static_cast<uint8_t>(0xa5 ^ (i * 37)); }

  bool guardsIntact() const {
    for (uint8_t* p = base_; p < base_ + mapped_ - kPage; p++) {
      if (p == data_) p += bytes_;
      if (p < base_ + mapped_ - kPage && *p != poison(static_cast<size_t>(p - base_))) return false;
    }
    return true;
  }
  bool untouched() const {
    for (uint8_t* p = base_; p < base_ + mapped_ - kPage; p++) {
      if (*p != poison(static_cast<size_t>(p - base_))) return false;
    }
    return true;
  }
  template <class T> std::vector<T> content() const {
    std::vector<T> copy(bytes_ / sizeof(T));
    if (!copy.empty()) memcpy(copy.data(), data_, copy.size() * sizeof(T));
    return copy;
  }

 private:
  static constexpr size_t kPage = 4096;
  static constexpr size_t kFront = 256;

  void swap(GuardedBuffer& other) {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
  }

  uint8_t* base_ = nullptr;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  size_t mapped_ = 0;
};

} // namespace moe::test
