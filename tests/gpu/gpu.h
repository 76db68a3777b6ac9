// Ranks on GPUs: threads of one process or processes, each with a stream, that share the GPUs there are.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <vector>

#include "common/cases.h"
#include "common/cluster.h"
#include "common/exchange.h"
#include "device/bootstrap.h"

namespace moe::test {

// How many CUDA devices there are, asked in a process of its own: a process that forks must not have touched CUDA.
int gpuCount();

#define NEED_GPUS(n)                                                                                                   \
  do {                                                                                                                 \
    if (gpuCount() < (n)) GTEST_SKIP() << "needs " << (n) << " CUDA device(s), found " << gpuCount();                  \
  } while (0)

class Meeting; // where the ranks exchange a few bytes
bool meet(Meeting& meeting, int rank, const void* mine, size_t bytes, void* all);

// Device memory handed out piece by piece, with poisoned zones between the pieces.
class Arena {
 public:
  Arena() = default;
  Arena(char* base, size_t bytes) : base_(base), bytes_(bytes) {}
  // NULL if it does not fit.  Pieces are at least minPiece bytes apart: those of the same calls have the same addresses
  // whatever their sizes.
  char* take(size_t bytes);
  void reset(size_t minPiece = 0) { used_ = 0, minPiece_ = minPiece; }

 private:
  char* base_ = nullptr;
  size_t bytes_ = 0, used_ = 0, minPiece_ = 0;
};

// A rank of a communicator of CUDA memory.
class GpuRank {
 public:
  GpuRank(int rank, int nRanks, int device) : rank_(rank), nRanks_(nRanks), device_(device) {}
  ~GpuRank();
  GpuRank(const GpuRank&) = delete;
  GpuRank& operator=(const GpuRank&) = delete;

  // Makes the communicator and 2 * arenaBytes of memory: one part that peers reach and one that they do not.
  std::string init(const ncclMoeConfig_t& config, std::shared_ptr<Meeting> meeting, size_t arenaBytes);
  // The same with a communicator made otherwise.
  using MakeComm = std::function<ncclResult_t(ncclMoeComm_t*)>;
  std::string init(const MakeComm& make, size_t arenaBytes);
  std::string destroy();

  int rank() const { return rank_; }
  ncclMoeComm_t comm() const { return comm_; }
  cudaStream_t stream() const { return stream_; }

  // Moves a call's tensors to the device (recvX into memory that peers reach where reachable), and its outputs back.
  template <class Call> std::string upload(Call& call, bool reachable);
  std::string download();
  void forget(size_t minPiece = 0); // the tensors of all calls

 private:
  struct Piece {
    GuardedBuffer* host;
    char* device;
    bool output;
  };
  std::string place(GuardedBuffer& buffer, void** argument, bool output, bool reachable);

  int rank_, nRanks_, device_;
  ncclMoeComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  char* plain_ = nullptr;
  Arena plainArena_, reachableArena_;
  std::vector<Piece> pieces_;
};

#define RANK_CUDA(call)                                                                                                \
  do {                                                                                                                 \
    const cudaError_t cuda_ = (call);                                                                                  \
    if (cuda_ != cudaSuccess) return std::string(MOE_TEST_HERE #call " returned ") + cudaGetErrorString(cuda_);        \
  } while (0)

template <class Call> std::string GpuRank::upload(Call& call, bool reachable) {
  std::string wrong;
  call.forEachTensor([&](GuardedBuffer& buffer, void** argument, bool output) {
    const bool isRows = output && buffer.size() > 0;
    if (wrong.empty()) wrong = place(buffer, argument, output, reachable && isRows);
  });
  return wrong;
}

// All ranks have come here.
std::string meetAll(GpuRank& rank, Meeting& meeting, int nRanks);

// Waits for the rank's stream, not for the device, where another rank's kernel may wait for this rank's next.
std::string asyncIs(GpuRank& rank, ncclResult_t want, const std::string& mentions = "");

// A rank's dispatch and combine of a case, which must outlive them.
struct CallPair {
  template <class Case>
  CallPair(const GpuRank& rank, const Case& e, const DispatchStyle& style = DispatchStyle())
    : dispatch(*e.reference, rank.rank(), style),
      combine(*e.reference, e.combine, rank.rank(), false, style.flags & NCCL_MOE_SEND_ONLY) {}
  std::string upload(GpuRank& rank, bool reachable); // dispatch's rows
  // One after the other, with their second halves where the style has halves.
  std::string enqueue(GpuRank& rank, ncclMoeRouting_t routing) const;
  std::string verify() const; // what has been downloaded

  DispatchCall dispatch;
  CombineCall combine;
};

// A dispatch and a combine, checked.
template <class Case> std::string exchangeOnce(GpuRank& rank, ncclMoeRouting_t routing, const Case& e) {
  CallPair calls(rank, e);
  RANK_TRY(calls.upload(rank, true));
  RANK_TRY(calls.enqueue(rank, routing));
  RANK_TRY(asyncIs(rank, ncclSuccess));
  RANK_TRY(rank.download());
  RANK_TRY(calls.verify());
  rank.forget();
  return "";
}

// What is enqueued on the rank's stream, as a graph.  mostBlocks: takes those of its largest kernel.
std::string capture(GpuRank& rank, cudaGraphExec_t* graph, const std::function<std::string()>& enqueue,
                    int* mostBlocks = nullptr);

// Makes selection 2 of a token, on the device, one that it cannot be where there are 16 experts.
enum class BadExpert : int64_t { repeated = INT64_MIN, past = 16, negative = -2, huge = int64_t{1} << 40 };
constexpr BadExpert kBadExperts[] = {BadExpert::past, BadExpert::negative, BadExpert::huge, BadExpert::repeated};
std::string spoilIndex(const DispatchCall& call, int topK, int token, BadExpert bad);

// After a communicator has failed: the context lives and calls are refused.
template <class Case> std::string refusesCalls(GpuRank& rank, ncclMoeRouting_t routing, const Case& e) {
  DispatchCall call(*e.reference, rank.rank(), DispatchStyle());
  rank.forget();
  RANK_TRY(rank.upload(call, true));
  RANK_CHECK(ncclMoeDispatch(&call.args(), routing, rank.comm(), rank.stream()) != ncclSuccess);
  RANK_CUDA(cudaStreamSynchronize(rank.stream()));
  RANK_CUDA(cudaGetLastError());
  return "";
}

// Runs the ranks in fresh processes; the time limit makes a hang a failure.  runGpu returns all the failures,
// runGpuRanks what each rank said.
enum class RanksAs { threads, processes };
using GpuBody = std::function<std::string(int rank, std::shared_ptr<Meeting> meeting)>;
std::vector<std::string> runGpuRanks(int nRanks, RanksAs as, int timeLimitMs, const GpuBody& body);
std::string runGpu(int nRanks, RanksAs as, int timeLimitMs, const GpuBody& body);

} // namespace moe::test
