// A pair of connections between the two processes, one each way, with registered buffers; and the transfers on them.
#pragma once

#include <functional>
#include <random>

#include "perf/net/control.h"
#include "perf/net/cuda_driver.h"
#include "perf/net/net_api.h"

namespace moe {
namespace netperf {

enum class MemoryKind { host, peermem, dmabuf };
const char* memoryName(MemoryKind kind);

// Memory of the host or of a GPU, page-aligned.
class Buffer {
 public:
  static ncclResult_t allocate(CudaDriver* cuda, MemoryKind kind, size_t bytes, Buffer* buffer);
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();
  char* data() const { return static_cast<char*>(data_); }
  size_t bytes() const { return bytes_; }
  MemoryKind kind() const { return kind_; }
  ncclResult_t write(size_t offset, const void* from, size_t bytes);
  ncclResult_t read(size_t offset, void* to, size_t bytes) const;
  ncclResult_t dmaBufFd(int* fd) const;

 private:
  CudaDriver* cuda_ = nullptr; // NULL: host memory
  MemoryKind kind_ = MemoryKind::host;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// What is waited for: polls, lets others run when nothing has happened for a while, and after `seconds` of nothing
// ends.
class Patience {
 public:
  explicit Patience(int seconds);
  ncclResult_t pause(const char* what); // an error once the time is over
  void reset() { idle_ = 0; }           // something has happened

 private:
  int seconds_;
  int64_t idleSince_ = 0; // ns
  int idle_ = 0;
};

int64_t nowNs();

class Link {
 public:
  Link() = default;
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;
  ~Link() { close(); }

  // Both processes call it; dev is this one's.
  ncclResult_t connect(NetApi* net, int dev, Control* control, int timeoutSeconds);
  ncclResult_t registerBuffers(CudaDriver* cuda, MemoryKind kind, size_t bytes, size_t room);
  void close();

  Buffer& sendBuffer() { return sendBuffer_; }
  Buffer& recvBuffer() { return recvBuffer_; }

  // Sends and receives count messages each (0: none), of which at most window are outstanding; message i begins at
  // i % slots * stride of the buffer.  received, if given, gets the size that test tells for each message.
  ncclResult_t transfer(size_t nSend, size_t nRecv, size_t bytes, size_t stride, int slots, int window,
                        std::vector<int>* received = nullptr);
  // One message there and one back, rounds times; ns gets the time of each round on the side that begins.
  ncclResult_t pingPong(bool begins, size_t bytes, int rounds, std::vector<int64_t>* ns);
  // Makes received GPU data visible.
  ncclResult_t flush(size_t offset, size_t bytes);

 private:
  ncclResult_t postSend(size_t offset, size_t bytes, void** request);
  ncclResult_t postRecv(size_t offset, size_t bytes, void** request);
  ncclResult_t registerOne(void* comm, Buffer& buffer, void** mr);

  NetApi* net_ = nullptr;
  int timeoutSeconds_ = 30;
  size_t room_ = 0; // the least that receives offer
  void *listen_ = nullptr, *send_ = nullptr, *recv_ = nullptr;
  Buffer sendBuffer_, recvBuffer_;
  void *sendMr_ = nullptr, *recvMr_ = nullptr;
};

} // namespace netperf
} // namespace moe
