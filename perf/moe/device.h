// What differs between the backends that moe_perf measures.  Everything else is shared: options, data, checks,
// printing.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "perf/moe/group.h"
#include "perf/moe/options.h"

namespace moe::perf {

using Call = std::function<ncclResult_t(cudaStream_t)>;

// n measurements of a call, after some that do not count.
struct Series {
  int warmup, n;
  int graphCalls = 0; // > 0: a measurement is so many calls in a row, and what is noted is the time of one
  int lateUs = 0;     // with graphCalls: so much later than the others rank 0 begins
};

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string describe() const = 0; // for the list of ranks
  virtual ncclResult_t commInit(ncclMoeComm_t* comm, const ncclMoeConfig_t& config) = 0;
  virtual cudaStream_t stream() const = 0;
  // Memory of the backend, apart from ncclMoeMemAlloc's.  free takes NULL.
  virtual ncclResult_t alloc(void** ptr, size_t bytes) = 0;
  virtual void free(void* ptr) = 0;
  virtual size_t freeMemory() const = 0; // bytes that this rank may still take
  virtual ncclResult_t copyIn(void* to, const void* fromHost, size_t bytes) = 0;
  virtual ncclResult_t copyOut(void* toHost, const void* from, size_t bytes) = 0;
  virtual ncclResult_t fill(void* to, int byte, size_t bytes) = 0;
  virtual ncclResult_t synchronize() = 0;
  // A call, or as many in a row as are timed with graphCalls, to their end.
  virtual ncclResult_t run(const Call& call, int graphCalls) = 0;
  // Aligns the ranks before each measurement, and times it.
  virtual ncclResult_t time(const Call& call, const Series& series, double* us) = 0;
  // GB/s at which each rank moves rows of that size, as fast as a plain copy can, all ranks at once: the slowest
  // rank's.  0 where it cannot be measured.
  virtual ncclResult_t roofline(size_t rowBytes, double* gbPerSecond) = 0;
  // One group of plain ncclSend and ncclRecv: sendBytes[r] to rank r and recvBytes[r] from it, in the order of the
  // ranks.
  virtual ncclResult_t exchange(const void* send, const std::vector<size_t>& sendBytes, void* recv,
                                const std::vector<size_t>& recvBytes, cudaStream_t stream) = 0;
};

// rendezvous: the file:// address of the host backend.
ncclResult_t makeHostDevice(Group& group, const std::string& rendezvous, std::unique_ptr<Device>* device);

// GPUs that this process sees; 0 also where there is no driver or no CUDA part in this build.  Initialises CUDA, so
// that a process which is going to fork must leave it to a child.
int countGpus();
ncclResult_t makeCudaDevice(Group& group, int gpu, std::unique_ptr<Device>* device);

} // namespace moe::perf
