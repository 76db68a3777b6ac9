// The tensors of one rank, sized for the largest T of a run.
#pragma once

#include <vector>

#include "perf/moe/device.h"
#include "perf/moe/reference.h"

namespace moe::perf {

// Rows that receive no token, and memory past the end of a tensor, keep this byte.
constexpr int poisonByte = 0xcb;
// Bytes behind every output tensor that nobody may touch.
constexpr size_t guardBytes = 4096;

struct Buffers {
  int64_t maxSlots = 0; // rows of the receive tensors
  void* x = nullptr;    // [T, H]
  void* scales = nullptr;
  void* topkIdx = nullptr;
  void* topkWeights = nullptr;
  void* recvX = nullptr; // [slots, H]
  void* recvScales = nullptr;
  void* recvTopkIdx = nullptr;
  void* recvWeights = nullptr;
  void* recvCount = nullptr;
  void* expertCounts = nullptr;
  void* expertOffsets = nullptr;
  void* expertX = nullptr; // [slots, H] combine's input
  void* out = nullptr;     // [T, H]
};

// Owns them: taken by take, given back by release, or, where the run fails, with communicator and device.
class BufferSet {
 public:
  BufferSet(Device& device, ncclMoeComm_t comm, bool libraryMemory)
    : device_(device), comm_(comm), libraryMemory_(libraryMemory) {}
  // shape: of the largest T.  maxSlots: the most rows that any rank receives.
  ncclResult_t take(const Shape& shape, int rank, int64_t maxSlots);
  // Collective.
  ncclResult_t release();
  const Buffers& get() const { return b_; }

 private:
  ncclResult_t takeRows(void** ptr, size_t bytes);
  ncclResult_t takeOther(void** ptr, size_t bytes);

  Device& device_;
  ncclMoeComm_t comm_;
  bool libraryMemory_;
  Buffers b_;
  std::vector<void*> rows_;
  std::vector<void*> others_;
};

// Bytes that take will ask for.
size_t bufferBytes(const Shape& shape, int64_t maxSlots);

} // namespace moe::perf
