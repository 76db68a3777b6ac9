// What every entry point shares: the exported name pair, versioned structs, handle checks, the last error.
#pragma once

#include <cstddef>
#include <cstring>
#include <exception>
#include <functional>
#include <new>

#include "base/error.h"
#include "comm/comm.h"

// Exports a function under its name and, as NCCL does for profilers that interpose, under p<name>.
#define MOE_API __attribute__((visibility("default")))
#define MOE_API_ALIAS(name) extern "C" decltype(name) p##name __attribute__((visibility("default"), alias(#name)))

namespace moe {

constexpr uint64_t kCommMagic = 0x6d6f65436f6d6d31;

// A communicator of this config on the backend that makeBackend sets.
ncclResult_t commCreate(ncclMoeComm_t* moe, int nRanks, int rank, const ncclMoeConfig_t* config, const char* function,
                        const std::function<ncclResult_t(ncclMoeComm&)>& makeBackend);

ncclResult_t checkComm(const ncclMoeComm* comm, const char* function);
ncclResult_t checkRouting(const ncclMoeRouting* routing, const ncclMoeComm* comm, const char* function);

// Runs an entry point's body; no exception leaves it, and an error's sentence becomes the communicator's last error.
template <class Body> ncclResult_t enter(ncclMoeComm* comm, const char* function, Body&& body) noexcept {
  clearLastError();
  ncclResult_t result = ncclSuccess;
  try {
    result = body();
  } catch (const std::bad_alloc&) {
    result = fail(ncclSystemError, "%s: out of host memory", function);
  } catch (const std::exception& error) {
    result = fail(ncclInternalError, "%s: %s", function, error.what());
  }
  if (result != ncclSuccess && comm != nullptr && comm->magic == kCommMagic) {
    std::lock_guard<std::mutex> lock(comm->errorMutex);
    comm->lastError = lastError();
  }
  return result;
}

// The number that a caller put where an enumerator belongs: loading one that is none is undefined in C++.
template <class Enum> int enumValue(const Enum& from) {
  int value = 0;
  static_assert(sizeof(from) == sizeof(value), "enumerations of the C interface are ints");
  memcpy(&value, &from, sizeof(value));
  return value;
}

// Copies a caller's struct, which may be of an older header (then the missing fields are zero) or of a newer one (then
// the fields unknown here must be zero).
template <class T> ncclResult_t loadStruct(const T* from, T* to, const char* function, const char* argument) {
  constexpr size_t kHead = offsetof(T, version) + sizeof(from->version);
  constexpr size_t kMaxSize = 65536;
  if (from == nullptr) return fail(ncclInvalidArgument, "%s: %s is NULL", function, argument);
  if (from->magic != NCCL_MOE_MAGIC || from->size < kHead || from->size > kMaxSize) {
    return fail(ncclInvalidArgument, "%s: %s was not filled from its _INITIALIZER", function, argument);
  }
  memset(static_cast<void*>(to), 0, sizeof(T));
  memcpy(static_cast<void*>(to), from, from->size < sizeof(T) ? from->size : sizeof(T));
  const char* bytes = reinterpret_cast<const char*>(from);
  for (size_t i = sizeof(T); i < from->size; i++) {
    if (bytes[i] != 0) {
      return fail(
        ncclInvalidUsage,
        "%s: %s.size is %zu, and not all is zero behind the %zu bytes that this library (version %d) knows: it "
        "uses fields of a newer nccl_moe.h, or the size is wrong",
        function, argument, from->size, sizeof(T), NCCL_MOE_VERSION_CODE);
    }
  }
  to->size = sizeof(T);
  to->version = NCCL_MOE_VERSION_CODE;
  return ncclSuccess;
}

} // namespace moe
