// Entry points of communicators and their memory.
#include <pthread.h>

#include <atomic>
#include <limits>
#include <string>
#include <unordered_map>

#include "api/entry.h"
#include "base/param.h"
#include "comm/limits.h"
#include "device/backend.h"
#include "host/backend.h"

namespace moe {
namespace {

IntParam timeoutParam{"NCCL_MOE_TIMEOUT_MS", 100000, 1, std::numeric_limits<int>::max(),
                      "milliseconds until a wait on a peer ends"};
StringParam jobTokenParam{"NCCL_MOE_JOB_TOKEN", "", "secret that the ranks of a job share", StringParam::nameAlone};

// How many forks lie behind this process, counted from the first call.  To compare process ids would be a system call
// in every collective.
int forksBehind() {
  static std::atomic<int> forks{0};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}

constexpr int kMaxExperts = 1 << 20;
constexpr int kMaxTokens = 1 << 24;
constexpr size_t kMaxRowBytes = size_t{1} << 24;
constexpr size_t kMaxJobTokenBytes = 255;

ncclResult_t loadConfig(const ncclMoeConfig_t* from, int nRanks, const char* function, CommConfig* config) {
  ncclMoeConfig_t c;
  MOECHECK(loadStruct(from, &c, function, "config"));
  if (nRanks < 1 || nRanks > NCCL_MOE_MAX_RANKS) {
    return fail(ncclInvalidArgument, "%s: nRanks %d is not in 1..%d", function, nRanks, NCCL_MOE_MAX_RANKS);
  }
  if (c.nExperts < 1 || c.nExperts > kMaxExperts) {
    return fail(ncclInvalidArgument, "%s: config.nExperts %d is not in 1..%d", function, c.nExperts, kMaxExperts);
  }
  if (c.maxTokens < 0 || c.maxTokens > kMaxTokens) {
    return fail(ncclInvalidArgument, "%s: config.maxTokens %d is not in 0..%d", function, c.maxTokens, kMaxTokens);
  }
  if (c.maxTopK < 1 || c.maxTopK > NCCL_MOE_MAX_TOPK) {
    return fail(ncclInvalidArgument, "%s: config.maxTopK %d is not in 1..%d", function, c.maxTopK, NCCL_MOE_MAX_TOPK);
  }
  if (c.maxRowBytes == 0 || c.maxRowBytes % 16 != 0 || c.maxRowBytes > kMaxRowBytes) {
    return fail(ncclInvalidArgument, "%s: config.maxRowBytes %zu is not a multiple of 16 in 16..%zu", function,
                c.maxRowBytes, kMaxRowBytes);
  }
  const int mode = enumValue(c.mode);
  if (mode != ncclMoeModeAuto && mode != ncclMoeModeThroughput && mode != ncclMoeModeLatency) {
    return fail(ncclInvalidArgument, "%s: config.mode %d is unknown", function, mode);
  }
  if (c.numSms < 0) return fail(ncclInvalidArgument, "%s: config.numSms %d is negative", function, c.numSms);
  if (c.timeoutMs < 0) return fail(ncclInvalidArgument, "%s: config.timeoutMs %d is negative", function, c.timeoutMs);
  config->jobToken = c.jobToken != nullptr ? c.jobToken : jobTokenParam.get();
  if (config->jobToken.size() > kMaxJobTokenBytes) {
    return fail(ncclInvalidArgument, "%s: %s has %zu characters, more than %zu", function,
                c.jobToken != nullptr ? "config.jobToken" : "NCCL_MOE_JOB_TOKEN", config->jobToken.size(),
                kMaxJobTokenBytes);
  }
  config->nExperts = c.nExperts;
  config->maxTokens = c.maxTokens;
  config->maxTopK = c.maxTopK;
  config->maxRowBytes = c.maxRowBytes;
  config->mode = c.mode;
  config->numSms = c.numSms;
  config->timeoutMs = c.timeoutMs != 0 ? c.timeoutMs : static_cast<int>(timeoutParam.get());
  config->maxMemory = c.maxMemory;
  config->home.resize(c.nExperts);
  config->nLocal.assign(nRanks, 0);
  for (int e = 0; e < c.nExperts; e++) {
    const int rank = c.expertToRank != nullptr ? c.expertToRank[e] : blockHome(e, c.nExperts, nRanks).rank;
    if (rank < 0 || rank >= nRanks) {
      return fail(ncclInvalidArgument, "%s: config.expertToRank[%d] is %d, not in 0..%d", function, e, rank,
                  nRanks - 1);
    }
    config->home[e] = ExpertHome{rank, config->nLocal[rank]++};
  }
  return ncclSuccess;
}

} // namespace

ncclResult_t commCreate(ncclMoeComm_t* moe, int nRanks, int rank, const ncclMoeConfig_t* config, const char* function,
                        const std::function<ncclResult_t(ncclMoeComm&)>& makeBackend) {
  auto made = std::make_unique<ncclMoeComm>();
  MOECHECK(loadConfig(config, nRanks, function, &made->config));
  if (rank < 0 || rank >= nRanks) {
    return fail(ncclInvalidArgument, "%s: rank %d is not in 0..%d", function, rank, nRanks - 1);
  }
  made->nRanks = nRanks;
  made->rank = rank;
  made->forks = forksBehind();
  MOECHECK(makeBackend(*made));
  made->magic = kCommMagic;
  MOE_INFO("MoE communicator of nccl_moe.h version %d: rank %d of %d, %d experts, %s", NCCL_MOE_VERSION_CODE, rank,
           nRanks, made->config.nExperts, made->backend->onHost() ? "host memory" : "CUDA memory");
  *moe = made.release();
  return ncclSuccess;
}

ncclResult_t checkComm(const ncclMoeComm* comm, const char* function) {
  if (comm == nullptr) return fail(ncclInvalidArgument, "%s: moe is NULL", function);
  if (comm->magic != kCommMagic)
    return fail(ncclInvalidArgument, "%s: moe is not a communicator; was it destroyed?", function);
  if (comm->forks != forksBehind()) {
    return fail(ncclInvalidUsage, "%s: this process is a child of the one that made moe", function);
  }
  return ncclSuccess;
}

} // namespace moe

using namespace moe;

MOE_API ncclResult_t ncclMoeGetVersion(int* version) {
  const char* function = __func__;
  return enter(nullptr, function, [&]() -> ncclResult_t {
    if (version == nullptr) return fail(ncclInvalidArgument, "%s: version is NULL", function);
    *version = NCCL_MOE_VERSION_CODE;
    return ncclSuccess;
  });
}
MOE_API_ALIAS(ncclMoeGetVersion);

MOE_API ncclResult_t ncclMoeCommMemoryNeeded(const ncclMoeConfig_t* config, int nRanks, size_t* bytes) {
  const char* function = __func__;
  return enter(nullptr, function, [&]() -> ncclResult_t {
    if (bytes == nullptr) return fail(ncclInvalidArgument, "%s: bytes is NULL", function);
    CommConfig loaded;
    MOECHECK(loadConfig(config, nRanks, function, &loaded));
    MOECHECK(deviceRefusal(loaded, nRanks, function));
    return deviceMemoryNeeded(loaded, nRanks, bytes);
  });
}
MOE_API_ALIAS(ncclMoeCommMemoryNeeded);

MOE_API ncclResult_t ncclMoeCommInit(ncclMoeComm_t* moe, ncclComm_t comm, const ncclMoeConfig_t* config) {
  const char* function = __func__;
  return enter(nullptr, function, [&]() -> ncclResult_t {
    if (moe == nullptr) return fail(ncclInvalidArgument, "%s: moe is NULL", function);
    *moe = nullptr;
    if (comm == nullptr) return fail(ncclInvalidArgument, "%s: comm is NULL", function);
    int nRanks = 0, rank = 0;
    MOECHECK(deviceQueryComm(comm, &nRanks, &rank));
    return commCreate(moe, nRanks, rank, config, function,
                      [&](ncclMoeComm& made) { return deviceBackendCreate(made, comm); });
  });
}
MOE_API_ALIAS(ncclMoeCommInit);

MOE_API ncclResult_t ncclMoeCommInitHost(ncclMoeComm_t* moe, int nRanks, int rank, const char* rendezvous,
                                         const ncclMoeConfig_t* config) {
  const char* function = __func__;
  return enter(nullptr, function, [&]() -> ncclResult_t {
    if (moe == nullptr) return fail(ncclInvalidArgument, "%s: moe is NULL", function);
    *moe = nullptr;
    if (rendezvous == nullptr) return fail(ncclInvalidArgument, "%s: rendezvous is NULL", function);
    return commCreate(moe, nRanks, rank, config, function,
                      [&](ncclMoeComm& made) { return hostBackendCreate(made, rendezvous); });
  });
}
MOE_API_ALIAS(ncclMoeCommInitHost);

MOE_API ncclResult_t ncclMoeCommGetInfo(ncclMoeComm_t moe, ncclMoeCommInfo_t* info) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    ncclMoeCommInfo_t known;
    MOECHECK(loadStruct(info, &known, function, "info"));
    const size_t callerSize = info->size;
    known.rank = moe->rank;
    known.nRanks = moe->nRanks;
    known.nLocalExperts = moe->config.nLocal[moe->rank];
    known.onHost = moe->backend->onHost() ? 1 : 0;
    known.memoryBytes = moe->backend->memoryBytes();
    known.nScaleUpRanks = moe->backend->nScaleUpRanks();
    memcpy(info, &known, callerSize < sizeof(known) ? callerSize : sizeof(known));
    info->size = callerSize;
    return ncclSuccess;
  });
}
MOE_API_ALIAS(ncclMoeCommGetInfo);

MOE_API ncclResult_t ncclMoeCommDestroy(ncclMoeComm_t moe) {
  const char* function = __func__;
  if (moe == nullptr) return ncclSuccess;
  return enter(nullptr, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    std::unique_ptr<ncclMoeComm> owned(moe);
    const ncclResult_t result = owned->backend->shutdown();
    owned->magic = 0;
    return result;
  });
}
MOE_API_ALIAS(ncclMoeCommDestroy);

MOE_API ncclResult_t ncclMoeCommAbort(ncclMoeComm_t moe) {
  const char* function = __func__;
  return enter(nullptr, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    moe->backend->abort();
    return ncclSuccess;
  });
}
MOE_API_ALIAS(ncclMoeCommAbort);

MOE_API ncclResult_t ncclMoeCommGetAsyncError(ncclMoeComm_t moe, ncclResult_t* asyncError) {
  const char* function = __func__;
  return enter(nullptr, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    if (asyncError == nullptr) return fail(ncclInvalidArgument, "%s: asyncError is NULL", function);
    std::string sentence;
    *asyncError = moe->backend->asyncError(&sentence);
    if (*asyncError != ncclSuccess) {
      std::lock_guard<std::mutex> lock(moe->errorMutex);
      moe->lastError = sentence;
    }
    return ncclSuccess;
  });
}
MOE_API_ALIAS(ncclMoeCommGetAsyncError);

MOE_API ncclResult_t ncclMoeCommMaskRanks(ncclMoeComm_t moe, const int* masked, uint64_t generation) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    if (masked == nullptr) return fail(ncclInvalidArgument, "%s: masked is NULL", function);
    for (int r = 0; r < moe->nRanks; r++) {
      if (masked[r] != 0 && masked[r] != 1) {
        return fail(ncclInvalidArgument, "%s: masked[%d] %d is not 0 or 1", function, r, masked[r]);
      }
    }
    if (masked[moe->rank] != 0)
      return fail(ncclInvalidArgument, "%s: masked[%d] is this rank's own", function, moe->rank);
    const ncclResult_t result = moe->backend->maskRanks(masked, generation);
    if (result == ncclInvalidArgument || result == ncclInvalidUsage) return result; // nothing was done
    for (const auto& routing : moe->routings) routing->phase = ncclMoeRouting::Phase::empty;
    return result;
  });
}
MOE_API_ALIAS(ncclMoeCommMaskRanks);

MOE_API ncclResult_t ncclMoeCommGetStats(ncclMoeComm_t moe, ncclMoeCommStats_t* stats) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    ncclMoeCommStats_t known;
    MOECHECK(loadStruct(stats, &known, function, "stats"));
    const size_t callerSize = stats->size;
    MOECHECK(moe->backend->stats(&known));
    memcpy(stats, &known, callerSize < sizeof(known) ? callerSize : sizeof(known));
    stats->size = callerSize;
    return ncclSuccess;
  });
}
MOE_API_ALIAS(ncclMoeCommGetStats);

MOE_API const char* ncclMoeGetLastError(ncclMoeComm_t moe) try {
  if (moe == nullptr) return lastError();
  // Copies, for another thread may be changing the communicator's; one each, for the caller may hold several.
  static thread_local std::unordered_map<ncclMoeComm_t, std::string> copies;
  if (moe->magic != kCommMagic) return "moe is not a communicator; was it destroyed?";
  std::lock_guard<std::mutex> lock(moe->errorMutex);
  std::string& copy = copies[moe];
  copy = moe->lastError;
  return copy.c_str();
} catch (const std::exception&) {
  return "out of host memory";
}
MOE_API_ALIAS(ncclMoeGetLastError);

MOE_API ncclResult_t ncclMoeMemAlloc(void** ptr, size_t bytes, ncclMoeComm_t moe) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    if (ptr == nullptr) return fail(ncclInvalidArgument, "%s: ptr is NULL", function);
    *ptr = nullptr;
    if (bytes == 0) return fail(ncclInvalidArgument, "%s: bytes is 0", function);
    return moe->backend->memAlloc(ptr, bytes);
  });
}
MOE_API_ALIAS(ncclMoeMemAlloc);

MOE_API ncclResult_t ncclMoeMemFree(void* ptr, ncclMoeComm_t moe) {
  const char* function = __func__;
  return enter(moe, function, [&]() -> ncclResult_t {
    MOECHECK(checkComm(moe, function));
    if (ptr == nullptr) return fail(ncclInvalidArgument, "%s: ptr is NULL", function);
    return moe->backend->memFree(ptr);
  });
}
MOE_API_ALIAS(ncclMoeMemFree);
