// Memory that every rank of a communicator reaches.
#pragma once

#include <memory>
#include <vector>

#include "device/bootstrap.h"
#include "device/cuda_handle.h"

namespace moe {

// One allocation of each rank, all mapped here.  Ranks of the same process share ownership, and the driver keeps an
// allocation that another process has mapped: it stays valid until the last rank has let go of it, so a rank may leave
// at any time.
class Window {
 public:
  // Memory that a window of so many bytes takes.
  static size_t memoryOf(size_t bytes);
  // Collective.  Zeroes this rank's memory where zeroed.
  ncclResult_t create(DeviceBootstrap& bootstrap, int rank, int nRanks, size_t bytes, bool zeroed);
  char* self() const { return own_->get(); }
  size_t bytes() const { return bytes_; }
  const std::vector<char*>& bases() const { return bases_; }    // of every rank, as this rank reaches them
  bool ranksShareProcess() const { return ranksShareProcess_; } // any two; the same on every rank
  bool contains(const void* ptr) const {
    return own_ != nullptr && ptr >= own_->get() && ptr < static_cast<const void*>(own_->get() + bytes_);
  }

 private:
  struct IpcClose {
    void operator()(void* ptr) const { cudaIpcCloseMemHandle(ptr); }
  };
  size_t bytes_ = 0;
  bool ranksShareProcess_ = false;
  std::shared_ptr<DeviceMemory> own_;
  std::vector<std::shared_ptr<DeviceMemory>> shared_;     // of ranks in this process
  std::vector<std::unique_ptr<void, IpcClose>> imported_; // of ranks in others
  std::vector<char*> bases_;
};

} // namespace moe
