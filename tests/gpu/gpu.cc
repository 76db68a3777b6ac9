#include "gpu/gpu.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

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

// Shared memory, so that threads and forked processes meet alike.  A rank cannot be two rounds ahead of another, so two
// copies of everything are enough.
class Meeting {
 public:
  Meeting(int nRanks, int timeLimitMs) : nRanks_(nRanks), timeLimitMs_(timeLimitMs) {
    void* base = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    slots_ = static_cast<Slot*>(base);
  }
  ~Meeting() { munmap(slots_, bytes()); }
  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;

  bool gather(int rank, const void* mine, size_t size, void* all) {
    if (size > sizeof(Slot::data[0])) return false;
    Slot& own = slots_[rank];
    const uint32_t round = own.round.load() + 1;
    memcpy(own.data[round % 2], mine, size);
    own.round.store(round);
    const auto limit = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeLimitMs_);
    for (int r = 0; r < nRanks_; r++) {
      while (slots_[r].round.load() < round) {
        if (std::chrono::steady_clock::now() > limit) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
      memcpy(static_cast<char*>(all) + size * static_cast<size_t>(r), slots_[r].data[round % 2], size);
    }
    return true;
  }

 private:
  struct Slot {
    std::atomic<uint32_t> round;
    char data[2][1024];
  };
  size_t bytes() const { return sizeof(Slot) * static_cast<size_t>(nRanks_); }
  const int nRanks_, timeLimitMs_;
  Slot* slots_;
};

bool meet(Meeting& meeting, int rank, const void* mine, size_t bytes, void* all) {
  return meeting.gather(rank, mine, bytes, all);
}

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

char* Arena::take(size_t bytes) {
  const size_t whole = std::max((bytes + kZone - 1) / kZone * kZone + 2 * kZone, minPiece_);
  if (used_ + whole > bytes_) return nullptr;
  char* piece = base_ + used_ + kZone;
  used_ += whole;
  return piece;
}

std::string GpuRank::init(const ncclMoeConfig_t& config, std::shared_ptr<Meeting> meeting, size_t arenaBytes) {
  return init(
    [&](ncclMoeComm_t* comm) {
      return commCreate(comm, nRanks_, rank_, &config, "test", [&](ncclMoeComm& made) {
        return deviceBackendCreate(made, std::make_unique<MeetingBootstrap>(meeting, rank_));
      });
    },
    arenaBytes);
}

std::string GpuRank::init(const MakeComm& make, size_t arenaBytes) {
  RANK_CUDA(cudaSetDevice(device_));
  RANK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  RANK_OK(make(&comm_), nullptr);
  if (arenaBytes == 0) return "";
  RANK_CUDA(cudaMalloc(&plain_, arenaBytes));
  void* reachable = nullptr;
  RANK_OK(ncclMoeMemAlloc(&reachable, arenaBytes, comm_), comm_);
  plainArena_ = Arena(plain_, arenaBytes);
  reachableArena_ = Arena(static_cast<char*>(reachable), arenaBytes);
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

void GpuRank::forget(size_t minPiece) {
  pieces_.clear();
  plainArena_.reset(minPiece);
  reachableArena_.reset(minPiece);
}

std::string asyncIs(GpuRank& rank, ncclResult_t want, const std::string& mentions) {
  RANK_CUDA(cudaStreamSynchronize(rank.stream()));
  ncclResult_t async = ncclSuccess;
  RANK_OK(ncclMoeCommGetAsyncError(rank.comm(), &async), rank.comm());
  return expectResult("async error", async, want, rank.comm(), mentions);
}

std::string CallPair::upload(GpuRank& rank, bool reachable) {
  RANK_TRY(rank.upload(dispatch, reachable));
  return rank.upload(combine, false);
}

std::string CallPair::enqueue(GpuRank& rank, ncclMoeRouting_t routing) const {
  const bool inPhases = (dispatch.args().flags & NCCL_MOE_SEND_ONLY) != 0;
  RANK_OK(ncclMoeDispatch(&dispatch.args(), routing, rank.comm(), rank.stream()), rank.comm());
  if (inPhases) RANK_OK(ncclMoeComplete(routing, rank.comm(), rank.stream()), rank.comm());
  RANK_OK(ncclMoeCombine(&combine.args(), routing, rank.comm(), rank.stream()), rank.comm());
  if (inPhases) RANK_OK(ncclMoeComplete(routing, rank.comm(), rank.stream()), rank.comm());
  return "";
}

std::string CallPair::verify() const {
  RANK_TRY(dispatch.verify());
  return combine.verify();
}

std::string capture(GpuRank& rank, cudaGraphExec_t* graph, const std::function<std::string()>& enqueue,
                    int* mostBlocks) {
  cudaGraph_t captured = nullptr;
  RANK_CUDA(cudaStreamBeginCapture(rank.stream(), cudaStreamCaptureModeThreadLocal));
  RANK_TRY(enqueue());
  RANK_CUDA(cudaStreamEndCapture(rank.stream(), &captured));
  if (mostBlocks != nullptr) {
    size_t nNodes = 0;
    RANK_CUDA(cudaGraphGetNodes(captured, nullptr, &nNodes));
    std::vector<cudaGraphNode_t> nodes(nNodes);
    RANK_CUDA(cudaGraphGetNodes(captured, nodes.data(), &nNodes));
    *mostBlocks = 0;
    for (cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type{};
      RANK_CUDA(cudaGraphNodeGetType(node, &type));
      if (type != cudaGraphNodeTypeKernel) continue;
      cudaKernelNodeParams kernel{};
      RANK_CUDA(cudaGraphKernelNodeGetParams(node, &kernel));
      *mostBlocks = std::max(*mostBlocks, static_cast<int>(kernel.gridDim.x * kernel.gridDim.y * kernel.gridDim.z));
    }
  }
  RANK_CUDA(cudaGraphInstantiate(graph, captured, 0));
  RANK_CUDA(cudaGraphDestroy(captured));
  return "";
}

std::string spoilIndex(const DispatchCall& call, int topK, int token, BadExpert bad) {
  int64_t* idx = static_cast<int64_t*>(const_cast<void*>(call.args().topkIdx)) + token * topK;
  int64_t value = static_cast<int64_t>(bad);
  if (bad == BadExpert::repeated) RANK_CUDA(cudaMemcpy(&value, idx + 1, sizeof(value), cudaMemcpyDeviceToHost));
  RANK_CUDA(cudaMemcpy(idx + 2, &value, sizeof(value), cudaMemcpyHostToDevice));
  return "";
}

std::string meetAll(GpuRank& rank, Meeting& meeting, int nRanks) {
  const int one = 1;
  std::vector<int> all(static_cast<size_t>(nRanks));
  RANK_CHECK(meet(meeting, rank.rank(), &one, sizeof(one), all.data()));
  return "";
}

std::vector<std::string> runGpuRanks(int nRanks, RanksAs as, int timeLimitMs, const GpuBody& body) {
  ClusterOptions options;
  options.nRanks = nRanks;
  options.ranksPerProcess = as == RanksAs::threads ? 0 : 1;
  options.timeLimitMs = timeLimitMs;
  // Every rank of a GPU needs a hardware queue of its own, or one rank's kernel may wait behind another's that waits
  // for it.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  const auto meeting = std::make_shared<Meeting>(nRanks, timeLimitMs);
  return runRanks(options, [&](Rank& rank) { return body(rank.rank(), meeting); }).ranks;
}

std::string runGpu(int nRanks, RanksAs as, int timeLimitMs, const GpuBody& body) {
  std::string failures;
  const std::vector<std::string> ranks = runGpuRanks(nRanks, as, timeLimitMs, body);
  for (int r = 0; r < nRanks; r++) {
    if (!ranks[r].empty()) failures += format("rank %d: %s\n", r, ranks[r].c_str());
  }
  return failures;
}

} // namespace moe::test
