#include "perf/net/link.h"

#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <deque>

namespace moe {
namespace netperf {
namespace {

constexpr int tag = 0x6d6f65;

// Turns the plugin's bare code into a sentence that says what was called.
ncclResult_t named(ncclResult_t result, const char* call) {
  return result == ncclSuccess ? result : fail(result, "the plugin's %s returned error %d", call, int(result));
}

} // namespace

const char* memoryName(MemoryKind kind) {
  switch (kind) {
  case MemoryKind::peermem:
    return "GPU memory by regMr (nvidia_peermem)";
  case MemoryKind::dmabuf:
    return "GPU memory by regMrDmaBuf";
  case MemoryKind::host:
    break;
  }
  return "host memory";
}

int64_t nowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

ncclResult_t Buffer::allocate(CudaDriver* cuda, MemoryKind kind, size_t bytes, Buffer* buffer) {
  Buffer made;
  made.kind_ = kind;
  made.bytes_ = (bytes + 65535) / 65536 * 65536;
  if (kind == MemoryKind::host) {
    made.data_ = mmap(nullptr, made.bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (made.data_ == MAP_FAILED) {
      made.data_ = nullptr;
      return fail(ncclSystemError, "no %zu bytes of host memory: %s", made.bytes_, strerror(errno));
    }
  } else {
    if (cuda == nullptr) return fail(ncclInvalidUsage, "GPU memory needs a CUDA driver and a GPU");
    MOECHECK(cuda->allocate(made.bytes_, &made.data_));
    made.cuda_ = cuda;
  }
  *buffer = std::move(made);
  return ncclSuccess;
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(cuda_, other.cuda_);
  std::swap(kind_, other.kind_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (cuda_ != nullptr) {
    cuda_->release(data_);
  } else {
    munmap(data_, bytes_);
  }
}

ncclResult_t Buffer::write(size_t offset, const void* from, size_t bytes) {
  if (cuda_ != nullptr) return cuda_->write(data() + offset, from, bytes);
  memcpy(data() + offset, from, bytes);
  return ncclSuccess;
}

ncclResult_t Buffer::read(size_t offset, void* to, size_t bytes) const {
  if (cuda_ != nullptr) return cuda_->read(to, data() + offset, bytes);
  memcpy(to, data() + offset, bytes);
  return ncclSuccess;
}

ncclResult_t Buffer::dmaBufFd(int* fd) const { return cuda_->dmaBufFd(data_, bytes_, fd); }

Patience::Patience(int seconds) : seconds_(seconds) {}

ncclResult_t Patience::pause(const char* what) {
  if (++idle_ < 64) return ncclSuccess;
  sched_yield();
  if (idle_ == 64) idleSince_ = nowNs();
  if (idle_ % 64 == 0 && nowNs() - idleSince_ > int64_t(seconds_) * 1000000000)
    return fail(ncclRemoteError, "%s made no progress for %d s", what, seconds_);
  return ncclSuccess;
}

ncclResult_t Link::connect(NetApi* net, int dev, Control* control, int timeoutSeconds) {
  close();
  net_ = net;
  timeoutSeconds_ = timeoutSeconds;
  struct Handle {
    char bytes[NCCL_NET_HANDLE_MAXSIZE] = {};
  } mine, peers;
  MOECHECK(named(net_->listen(dev, mine.bytes, &listen_), "listen"));
  MOECHECK(control->exchange(mine, &peers));
  Patience patience(timeoutSeconds);
  while (send_ == nullptr || recv_ == nullptr) {
    if (send_ == nullptr) MOECHECK(named(net_->connect(dev, peers.bytes, &send_), "connect"));
    if (recv_ == nullptr) MOECHECK(named(net_->accept(listen_, &recv_), "accept"));
    MOECHECK(patience.pause("connect and accept"));
  }
  void* listener = std::exchange(listen_, nullptr);
  MOECHECK(named(net_->closeListen(listener), "closeListen"));
  return control->barrier();
}

ncclResult_t Link::registerOne(void* comm, Buffer& buffer, void** mr) {
  if (buffer.kind() != MemoryKind::dmabuf) {
    const int type = buffer.kind() == MemoryKind::host ? NCCL_PTR_HOST : NCCL_PTR_CUDA;
    return named(net_->regMr(comm, buffer.data(), buffer.bytes(), type, mr), "regMr");
  }
  int fd = -1;
  MOECHECK(buffer.dmaBufFd(&fd));
  const UniqueFd owner(fd);
  return named(net_->regMrDmaBuf(comm, buffer.data(), buffer.bytes(), 0, fd, mr), "regMrDmaBuf");
}

ncclResult_t Link::registerBuffers(CudaDriver* cuda, MemoryKind kind, size_t bytes, size_t room) {
  room_ = room;
  MOECHECK(Buffer::allocate(cuda, kind, bytes, &sendBuffer_));
  MOECHECK(Buffer::allocate(cuda, kind, bytes + room, &recvBuffer_));
  MOECHECK(registerOne(send_, sendBuffer_, &sendMr_));
  return registerOne(recv_, recvBuffer_, &recvMr_);
}

void Link::close() {
  if (sendMr_ != nullptr) net_->deregMr(send_, sendMr_);
  if (recvMr_ != nullptr) net_->deregMr(recv_, recvMr_);
  if (send_ != nullptr) net_->closeSend(send_);
  if (recv_ != nullptr) net_->closeRecv(recv_);
  if (listen_ != nullptr) net_->closeListen(listen_);
  sendMr_ = recvMr_ = send_ = recv_ = listen_ = nullptr;
}

ncclResult_t Link::postSend(size_t offset, size_t bytes, void** request) {
  return named(net_->isend(send_, sendBuffer_.data() + offset, bytes, tag, sendMr_, request), "isend");
}

ncclResult_t Link::postRecv(size_t offset, size_t bytes, void** request) {
  *request = nullptr;
  return named(net_->irecv(recv_, recvBuffer_.data() + offset, std::max(bytes, room_), tag, recvMr_, request), "irecv");
}

ncclResult_t Link::transfer(size_t nSend, size_t nRecv, size_t bytes, size_t stride, int slots, int window,
                            std::vector<int>* received) {
  std::deque<void*> sends, recvs;
  size_t sent = 0, posted = 0;
  Patience patience(timeoutSeconds_);
  while (sent < nSend || posted < nRecv || !sends.empty() || !recvs.empty()) {
    bool worked = false;
    if (posted < nRecv && recvs.size() < size_t(window)) {
      void* request = nullptr;
      MOECHECK(postRecv(posted % size_t(slots) * stride, bytes, &request));
      if (request != nullptr) {
        recvs.push_back(request);
        posted++;
        worked = true;
      }
    }
    if (sent < nSend && sends.size() < size_t(window)) {
      void* request = nullptr;
      MOECHECK(postSend(sent % size_t(slots) * stride, bytes, &request));
      if (request != nullptr) {
        sends.push_back(request);
        sent++;
        worked = true;
      }
    }
    for (auto* queue : {&recvs, &sends}) {
      if (queue->empty()) continue;
      int done = 0, size = -1;
      MOECHECK(named(net_->test(queue->front(), &done, &size), "test"));
      if (done == 0) continue;
      queue->pop_front();
      worked = true;
      if (queue == &recvs && received != nullptr) received->push_back(size);
    }
    if (worked) {
      patience.reset();
    } else {
      MOECHECK(patience.pause("a transfer"));
    }
  }
  return ncclSuccess;
}

ncclResult_t Link::pingPong(bool begins, size_t bytes, int rounds, std::vector<int64_t>* ns) {
  Patience patience(timeoutSeconds_);
  int64_t last = nowNs();
  void* ahead = nullptr; // the receive of the next round is posted before the send of this one
  for (int i = 0; i < rounds; i++) {
    void *send = nullptr, *recv = std::exchange(ahead, nullptr);
    bool sent = false, received = false;
    while (!sent || !received) {
      if (recv == nullptr && !received) MOECHECK(postRecv(0, bytes, &recv));
      if (send == nullptr && !sent && (begins || received)) MOECHECK(postSend(0, bytes, &send));
      int done = 0, size = 0;
      if (recv != nullptr) {
        MOECHECK(named(net_->test(recv, &done, &size), "test"));
        if (done != 0) {
          recv = nullptr;
          received = true;
          patience.reset();
          continue; // answer at once
        }
      }
      if (send != nullptr) {
        MOECHECK(named(net_->test(send, &done, nullptr), "test"));
        if (done != 0) {
          send = nullptr;
          sent = true;
        }
      }
      if (received && ahead == nullptr && i + 1 < rounds) MOECHECK(postRecv(0, bytes, &ahead));
      if (!sent || !received) MOECHECK(patience.pause("a ping-pong"));
    }
    const int64_t now = nowNs();
    if (ns != nullptr) ns->push_back(now - last);
    last = now;
  }
  return ncclSuccess;
}

ncclResult_t Link::flush(size_t offset, size_t bytes) {
  void* request = nullptr;
  MOECHECK(named(net_->iflush(recv_, recvBuffer_.data() + offset, int(bytes), recvMr_, &request), "iflush"));
  Patience patience(timeoutSeconds_);
  while (request != nullptr) {
    int done = 0;
    MOECHECK(named(net_->test(request, &done, nullptr), "test of a flush"));
    if (done != 0) return ncclSuccess;
    MOECHECK(patience.pause("a flush"));
  }
  return ncclSuccess; // no request: nothing to wait for
}

} // namespace netperf
} // namespace moe
