// The host-memory backend: ordinary memory, the host's clock, and memcpy as the roofline.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "perf/moe/device.h"
#include "perf/moe/perf_error.h"

namespace moe::perf {

namespace {

class HostDevice : public Device {
 public:
  HostDevice(Group& group, std::string rendezvous) : group_(group), rendezvous_(std::move(rendezvous)) {}
  ~HostDevice() override {
    for (const auto& [ptr, bytes] : blocks_) munmap(ptr, bytes);
  }
  HostDevice(const HostDevice&) = delete;
  HostDevice& operator=(const HostDevice&) = delete;

  std::string describe() const override { return "host memory"; }

  ncclResult_t commInit(ncclMoeComm_t* comm, const ncclMoeConfig_t& config) override {
    const ncclResult_t result = ncclMoeCommInitHost(comm, group_.nRanks(), group_.rank(), rendezvous_.c_str(), &config);
    if (result != ncclSuccess) return perfFail(result, "%s", ncclMoeGetLastError(nullptr));
    return ncclSuccess;
  }

  cudaStream_t stream() const override { return nullptr; }

  ncclResult_t alloc(void** ptr, size_t bytes) override {
    const size_t page = size_t{2} << 20;
    const size_t rounded = (bytes + page - 1) / page * page;
    void* p = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return perfFail(ncclSystemError, "%zu bytes of memory cannot be had: %m", bytes);
    madvise(p, rounded, MADV_HUGEPAGE);
    blocks_[p] = rounded;
    *ptr = p;
    return ncclSuccess;
  }

  void free(void* ptr) override {
    const auto block = blocks_.find(ptr);
    if (block == blocks_.end()) return;
    munmap(ptr, block->second);
    blocks_.erase(block);
  }

  // All ranks are on this machine: each may take its share of nine tenths.
  size_t freeMemory() const override {
    const std::unique_ptr<FILE, int (*)(FILE*)> file(fopen("/proc/meminfo", "r"), fclose);
    char line[256];
    unsigned long long kib = 0;
    while (file != nullptr && fgets(line, sizeof(line), file.get()) != nullptr) {
      if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) return kib * 1024 / 10 * 9 / group_.nRanks();
    }
    return SIZE_MAX;
  }

  ncclResult_t copyIn(void* to, const void* fromHost, size_t bytes) override {
    if (bytes > 0) memcpy(to, fromHost, bytes);
    return ncclSuccess;
  }
  ncclResult_t copyOut(void* toHost, const void* from, size_t bytes) override {
    if (bytes > 0) memcpy(toHost, from, bytes);
    return ncclSuccess;
  }
  ncclResult_t fill(void* to, int byte, size_t bytes) override {
    if (bytes > 0) memset(to, byte, bytes);
    return ncclSuccess;
  }
  ncclResult_t synchronize() override { return ncclSuccess; }

  ncclResult_t run(const Call& call, int graphCalls) override {
    for (int c = 0; c < std::max(1, graphCalls); c++) PERFCHECK(call(nullptr));
    return ncclSuccess;
  }
  ncclResult_t time(const Call& call, const Series& series, double* us) override {
    for (int i = -series.warmup; i < series.n; i++) {
      PERFCHECK(group_.barrier());
      beLate(group_, series.lateUs);
      const Clock::time_point start = Clock::now();
      PERFCHECK(run(call, series.graphCalls));
      const std::chrono::duration<double, std::micro> elapsed = Clock::now() - start;
      if (i >= 0) us[i] = elapsed.count() / std::max(1, series.graphCalls);
    }
    return ncclSuccess;
  }

  // Buffers that no cache holds, all ranks at once, row by row; the median of several passes.  A pass lasts from the
  // first rank's start to the last one's end: where ranks share cores, they may well run one after the other.
  ncclResult_t roofline(size_t rowBytes, double* gbPerSecond) override {
    const size_t all = size_t{512} << 20; // of all ranks: beyond any cache
    const size_t budget = std::min(all / static_cast<size_t>(group_.nRanks()), freeMemory() / 8);
    const size_t nRows = std::max<size_t>(1, budget / rowBytes);
    const size_t bytes = nRows * rowBytes;
    void* from = nullptr;
    void* to = nullptr;
    PERFCHECK(alloc(&from, bytes));
    PERFCHECK(alloc(&to, bytes));
    memset(from, 1, bytes);
    memset(to, 2, bytes);
    constexpr int nPasses = 7;
    std::vector<int64_t> ns;
    for (int pass = -1; pass < nPasses; pass++) {
      PERFCHECK(group_.barrier());
      Interval mine{nowNs(), 0};
      for (size_t i = 0; i < nRows; i++)
        memcpy(static_cast<char*>(to) + i * rowBytes, static_cast<char*>(from) + i * rowBytes, rowBytes);
      mine.end = nowNs();
      std::vector<Interval> all(group_.nRanks());
      PERFCHECK(group_.allGather(&mine, all.data(), sizeof(mine)));
      Interval whole = mine;
      for (const Interval& other : all) {
        whole.begin = std::min(whole.begin, other.begin);
        whole.end = std::max(whole.end, other.end);
      }
      if (pass >= 0) ns.push_back(whole.end - whole.begin); // the first warms up
    }
    free(from);
    free(to);
    std::sort(ns.begin(), ns.end());
    *gbPerSecond = static_cast<double>(bytes) / static_cast<double>(ns[nPasses / 2]);
    return ncclSuccess;
  }

  ncclResult_t exchange(const void* /*send*/, const std::vector<size_t>& /*sendBytes*/, void* /*recv*/,
                        const std::vector<size_t>& /*recvBytes*/, cudaStream_t /*stream*/) override {
    return perfFail(ncclInvalidUsage, "--rival nccl is for --device cuda");
  }

 private:
  // Times of the monotonic clock, which all processes of a machine share.
  struct Interval {
    int64_t begin;
    int64_t end;
  };
  static int64_t nowNs() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
  }

  using Clock = std::chrono::steady_clock;

  Group& group_;
  std::string rendezvous_;
  std::map<void*, size_t> blocks_;
};

} // namespace

ncclResult_t makeHostDevice(Group& group, const std::string& rendezvous, std::unique_ptr<Device>* device) {
  *device = std::make_unique<HostDevice>(group, rendezvous);
  return ncclSuccess;
}

} // namespace moe::perf
