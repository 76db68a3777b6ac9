#include "gpu/gpu.h"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "api/entry.h"

namespace moe::test {

int gpuCount() {
  static const int count = [] {
    const pid_t child = fork();
    if (child == 0) {
      int n = 0;
      _exit(cudaGetDeviceCount(&n) == cudaSuccess ? n : 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
  }();
  return count;
}

class Meeting {
 public:
  Meeting(int nRanks, int timeLimitMs) : nRanks_(nRanks), timeLimitMs_(timeLimitMs) {}
  bool gather(int rank, const void* mine, size_t bytes, void* all) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto limit = std::chrono::milliseconds(timeLimitMs_);
    // Nobody writes for the next gathering before all have read this one.
    if (!changed_.wait_for(lock, limit, [&] { return reading_ == 0; })) return false;
    data_.resize(bytes * static_cast<size_t>(nRanks_));
    memcpy(&data_[bytes * static_cast<size_t>(rank)], mine, bytes);
    const int round = round_;
    if (++arrived_ == nRanks_) {
      arrived_ = 0;
      reading_ = nRanks_;
      round_++;
      changed_.notify_all();
    } else if (!changed_.wait_for(lock, limit, [&] { return round_ != round; })) {
      return false;
    }
    memcpy(all, data_.data(), data_.size());
    if (--reading_ == 0) changed_.notify_all();
    return true;
  }

 private:
  const int nRanks_, timeLimitMs_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<char> data_;
  int arrived_ = 0, reading_ = 0, round_ = 0;
};

namespace {

class MeetingBootstrap : public DeviceBootstrap {
 public:
  MeetingBootstrap(std::shared_ptr<Meeting> meeting, int rank) : meeting_(std::move(meeting)), rank_(rank) {}
  ncclResult_t allGather(const void* mine, size_t bytes, void* all) override {
    return meeting_->gather(rank_, mine, bytes, all) ? ncclSuccess : fail(ncclRemoteError, "a rank did not come");
  }

 private:
  std::shared_ptr<Meeting> meeting_;
  int rank_;
};

constexpr size_t kZone = 256;

std::vector<uint8_t> zonePoison() {
  std::vector<uint8_t> zone(kZone);
  for (size_t i = 0; i < kZone; i++) zone[i] = GuardedBuffer::poison(i);
  return zone;
}

} // namespace

std::shared_ptr<Meeting> makeMeeting(int nRanks, int timeLimitMs) {
  return std::make_shared<Meeting>(nRanks, timeLimitMs);
}
std::unique_ptr<DeviceBootstrap> makeBootstrap(std::shared_ptr<Meeting> meeting, int rank) {
  return std::make_unique<MeetingBootstrap>(std::move(meeting), rank);
}

char* Arena::take(size_t bytes) {
  const size_t whole = (bytes + kZone - 1) / kZone * kZone + 2 * kZone;
  if (used_ + whole > bytes_) return nullptr;
  char* piece = base_ + used_ + kZone;
  used_ += whole;
  return piece;
}

std::string GpuRank::init(const ncclMoeConfig_t& config, std::shared_ptr<Meeting> meeting, size_t arenaBytes) {
  RANK_CUDA(cudaSetDevice(device_));
  RANK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  RANK_OK(commCreate(&comm_, nRanks_, rank_, &config, "test",
                     [&](ncclMoeComm& made) { return deviceBackendCreate(made, makeBootstrap(meeting, rank_)); }),
          nullptr);
  if (arenaBytes > 0) {
    RANK_CUDA(cudaMalloc(&plain_, arenaBytes));
    void* reachable = nullptr;
    RANK_OK(ncclMoeMemAlloc(&reachable, arenaBytes, comm_), comm_);
    plainArena_ = Arena(plain_, arenaBytes);
    reachableArena_ = Arena(static_cast<char*>(reachable), arenaBytes);
  }
  return "";
}

std::string GpuRank::destroy() {
  ncclMoeComm_t comm = comm_;
  comm_ = nullptr;
  RANK_OK(ncclMoeCommDestroy(comm), nullptr);
  RANK_CUDA(cudaDeviceSynchronize());
  return "";
}

GpuRank::~GpuRank() {
  if (comm_ != nullptr) ncclMoeCommDestroy(comm_);
  if (plain_ != nullptr) cudaFree(plain_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

std::string GpuRank::place(GuardedBuffer& buffer, void** argument, bool output, bool reachable) {
  static const std::vector<uint8_t> zone = zonePoison();
  char* piece = reachable ? reachableArena_.take(buffer.size()) : plainArena_.take(buffer.size());
  RANK_CHECK(piece != nullptr, "the test's arena is too small for %zu bytes", buffer.size());
  const size_t whole = (buffer.size() + kZone - 1) / kZone * kZone;
  RANK_CUDA(cudaMemcpyAsync(piece - kZone, zone.data(), kZone, cudaMemcpyHostToDevice, stream_));
  RANK_CUDA(cudaMemcpyAsync(piece + whole, zone.data(), kZone, cudaMemcpyHostToDevice, stream_));
  // No memset: that may load a kernel, which may wait for another rank's that runs.
  static const std::vector<uint8_t> rest(kZone, 0x5b);
  RANK_CUDA(
    cudaMemcpyAsync(piece + buffer.size(), rest.data(), whole - buffer.size(), cudaMemcpyHostToDevice, stream_));
  if (buffer.size() > 0)
    RANK_CUDA(cudaMemcpyAsync(piece, buffer.data(), buffer.size(), cudaMemcpyHostToDevice, stream_));
  RANK_CUDA(cudaStreamSynchronize(stream_));
  *argument = piece;
  pieces_.push_back(Piece{&buffer, piece, output});
  return "";
}

std::string GpuRank::download() {
  static const std::vector<uint8_t> zone = zonePoison();
  std::vector<uint8_t> got(3 * kZone);
  for (const Piece& piece : pieces_) {
    const size_t size = piece.host->size();
    const size_t whole = (size + kZone - 1) / kZone * kZone;
    if (piece.output && size > 0) {
      RANK_CUDA(cudaMemcpyAsync(piece.host->data(), piece.device, size, cudaMemcpyDeviceToHost, stream_));
    }
    RANK_CUDA(cudaMemcpyAsync(&got[0], piece.device - kZone, kZone, cudaMemcpyDeviceToHost, stream_));
    RANK_CUDA(cudaMemcpyAsync(&got[kZone], piece.device + whole, kZone, cudaMemcpyDeviceToHost, stream_));
    RANK_CUDA(cudaMemcpyAsync(&got[2 * kZone], piece.device + size, whole - size, cudaMemcpyDeviceToHost, stream_));
    RANK_CUDA(cudaStreamSynchronize(stream_));
    RANK_CHECK(memcmp(&got[0], zone.data(), kZone) == 0, "bytes before a tensor of %zu bytes were written", size);
    RANK_CHECK(memcmp(&got[kZone], zone.data(), kZone) == 0, "bytes behind a tensor of %zu bytes were written", size);
    for (size_t i = 0; i < whole - size; i++) {
      RANK_CHECK(got[2 * kZone + i] == 0x5b, "byte %zu behind a tensor of %zu bytes was written", i, size);
    }
  }
  return "";
}

void GpuRank::forget() {
  pieces_.clear();
  plainArena_.reset();
  reachableArena_.reset();
}

std::string runGpuThreads(int nRanks, int timeLimitMs, const GpuBody& body) {
  ClusterOptions options;
  options.nRanks = nRanks;
  options.timeLimitMs = timeLimitMs;
  // Every rank of a GPU needs a hardware queue of its own, or one rank's kernel may wait behind another's that waits for it.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  const auto meeting = makeMeeting(nRanks, timeLimitMs);
  return runRanks(options, [&](Rank& rank) { return body(rank.rank(), meeting); }).failures();
}

} // namespace moe::test
