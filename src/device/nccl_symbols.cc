#include "device/nccl_symbols.h"

#include <dlfcn.h>
#include <link.h>

#include <string>

#include "base/error.h"

namespace moe {
namespace {

constexpr int kOldestNccl = 21900; // 2.19

// A framework may have loaded NCCL for itself alone (RTLD_LOCAL).
void* loadedNccl() {
  std::string path;
  dl_iterate_phdr(
    [](dl_phdr_info* info, size_t, void* found) {
      const std::string name = info->dlpi_name;
      const std::string file = name.substr(name.rfind('/') + 1);
      if (file.rfind("libnccl.so", 0) != 0) return 0;
      *static_cast<std::string*>(found) = name;
      return 1;
    },
    &path);
  return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

struct Lookup {
  NcclSymbols symbols{};
  std::string problem;

  Lookup() {
    void* handle = dlsym(RTLD_DEFAULT, "ncclAllGather") != nullptr ? RTLD_DEFAULT : loadedNccl();
    if (handle == nullptr && dlsym(RTLD_DEFAULT, "ncclAllGather") == nullptr) {
      problem = "there is no NCCL in this process (nothing named libnccl.so is loaded)";
      return;
    }
    find(handle, "ncclGetVersion", &symbols.getVersion);
    find(handle, "ncclGetErrorString", &symbols.getErrorString);
    find(handle, "ncclCommCount", &symbols.commCount);
    find(handle, "ncclCommUserRank", &symbols.commUserRank);
    find(handle, "ncclCommCuDevice", &symbols.commCuDevice);
    find(handle, "ncclCommGetAsyncError", &symbols.commGetAsyncError);
    find(handle, "ncclAllGather", &symbols.allGather);
    if (!problem.empty()) return;
    int version = 0;
    if (symbols.getVersion(&version) != ncclSuccess || version < kOldestNccl) {
      problem = "the process's NCCL has version code " + std::to_string(version) + ", older than 2.19";
      return;
    }
    MOE_INFO("using the process's NCCL, version code %d", version);
  }

  template <class F> void find(void* handle, const char* name, F* function) {
    *function = reinterpret_cast<F>(dlsym(handle, name));
    if (*function == nullptr && problem.empty()) problem = std::string("the process's NCCL lacks ") + name;
  }
};

} // namespace

ncclResult_t ncclSymbols(const NcclSymbols** symbols) {
  static const Lookup lookup;
  if (!lookup.problem.empty()) return fail(ncclInvalidUsage, "ncclMoeCommInit: %s", lookup.problem.c_str());
  *symbols = &lookup.symbols;
  return ncclSuccess;
}

} // namespace moe
