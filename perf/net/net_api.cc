#include "perf/net/net_api.h"

#include <dlfcn.h>

#include <type_traits>

#include "base/error.h"

namespace moe {
namespace netperf {
namespace {

template <typename Table> struct Version;
template <> struct Version<ncclNet_v8_t> {
  static constexpr int number = 8;
  using Properties = ncclNetProperties_v8_t;
};
template <> struct Version<ncclNet_v9_t> {
  static constexpr int number = 9;
  using Properties = ncclNetProperties_v9_t;
};
template <> struct Version<ncclNet_v10_t> {
  static constexpr int number = 10;
  using Properties = ncclNetProperties_v10_t;
};
template <> struct Version<ncclNet_v11_t> {
  static constexpr int number = 11;
  using Properties = ncclNetProperties_v11_t;
};
template <> struct Version<ncclNet_v12_t> {
  static constexpr int number = 12;
  using Properties = ncclNetProperties_v12_t;
};

template <typename Table> class NetOf : public NetApi {
  static constexpr int number = Version<Table>::number;
  static constexpr uint64_t commId = 0x6e65745f70657266; // any, the same on both sides

 public:
  explicit NetOf(const Table* table) : table_(table) {}
  ~NetOf() override {
    if constexpr (number >= 11) {
      if (initialized_) table_->finalize(context_);
    }
  }
  int version() const override { return number; }
  const char* name() const override { return table_->name; }
  ncclResult_t init(ncclDebugLogger_t logger) override {
    initialized_ = true;
    if constexpr (number >= 11) {
      return table_->init(&context_, commId, &config_, logger, nullptr);
    } else if constexpr (number == 10) {
      return table_->init(logger, nullptr);
    } else {
      return table_->init(logger);
    }
  }
  ncclResult_t devices(int* n) override { return table_->devices(n); }
  ncclResult_t properties(int dev, Properties* out) override {
    typename Version<Table>::Properties in{};
    MOECHECK(table_->getProperties(dev, &in));
    out->name = in.name != nullptr ? in.name : "";
    out->pciPath = in.pciPath != nullptr ? in.pciPath : "";
    out->guid = in.guid;
    out->ptrSupport = in.ptrSupport;
    out->regIsGlobal = in.regIsGlobal;
    out->speedMbps = in.speed;
    out->port = in.port;
    out->latencyUs = in.latency;
    out->maxComms = in.maxComms;
    out->maxRecvs = in.maxRecvs;
    if constexpr (number >= 9) {
      out->forceFlush = in.forceFlush;
      out->maxP2pBytes = in.maxP2pBytes;
      out->physicalDevices = in.vProps.ndevs;
    }
    if constexpr (number >= 12) {
      out->railId = in.railId;
      out->planeId = in.planeId;
    }
    return ncclSuccess;
  }
  ncclResult_t listen(int dev, void* handle, void** comm) override {
    if constexpr (number >= 11)
      return table_->listen(context_, dev, handle, comm);
    else
      return table_->listen(dev, handle, comm);
  }
  ncclResult_t connect(int dev, void* handle, void** comm) override {
    ncclNetDeviceHandle_v8_t* device = nullptr;
    if constexpr (number >= 11)
      return table_->connect(context_, dev, handle, comm, &device);
    else if constexpr (number == 10)
      return table_->connect(dev, &config_, handle, comm, &device);
    else
      return table_->connect(dev, handle, comm, &device);
  }
  ncclResult_t accept(void* listenComm, void** comm) override {
    ncclNetDeviceHandle_v8_t* device = nullptr;
    return table_->accept(listenComm, comm, &device);
  }
  ncclResult_t regMr(void* comm, void* data, size_t bytes, int type, void** mr) override {
    return table_->regMr(comm, data, bytes, type, mr);
  }
  bool hasDmaBuf() const override { return table_->regMrDmaBuf != nullptr; }
  ncclResult_t regMrDmaBuf(void* comm, void* data, size_t bytes, uint64_t offset, int fd, void** mr) override {
    return table_->regMrDmaBuf(comm, data, bytes, NCCL_PTR_CUDA, offset, fd, mr);
  }
  ncclResult_t deregMr(void* comm, void* mr) override { return table_->deregMr(comm, mr); }
  ncclResult_t isend(void* comm, void* data, size_t bytes, int tag, void* mr, void** request) override {
    if constexpr (number >= 10)
      return table_->isend(comm, data, bytes, tag, mr, nullptr, request);
    else
      return table_->isend(comm, data, Size(bytes), tag, mr, request);
  }
  ncclResult_t irecv(void* comm, void* data, size_t bytes, int tag, void* mr, void** request) override {
    Size size = Size(bytes);
    if constexpr (number >= 10) {
      void* profiler = nullptr;
      return table_->irecv(comm, 1, &data, &size, &tag, &mr, &profiler, request);
    } else {
      return table_->irecv(comm, 1, &data, &size, &tag, &mr, request);
    }
  }
  ncclResult_t iflush(void* comm, void* data, int bytes, void* mr, void** request) override {
    return table_->iflush(comm, 1, &data, &bytes, &mr, request);
  }
  ncclResult_t test(void* request, int* done, int* bytes) override { return table_->test(request, done, bytes); }
  ncclResult_t closeSend(void* comm) override { return table_->closeSend(comm); }
  ncclResult_t closeRecv(void* comm) override { return table_->closeRecv(comm); }
  ncclResult_t closeListen(void* comm) override { return table_->closeListen(comm); }

 private:
  using Size = std::conditional_t<(number >= 9), size_t, int>;
  const Table* table_;
  bool initialized_ = false;
  void* context_ = nullptr;
  ncclNetCommConfig_v10_t config_{NCCL_NET_TRAFFIC_CLASS_UNDEF};
};

template <typename Table> void tryTable(void* library, std::unique_ptr<NetApi>* net, std::vector<int>* versions) {
  const std::string symbol = "ncclNetPlugin_v" + std::to_string(Version<Table>::number);
  const auto* table = static_cast<const Table*>(dlsym(library, symbol.c_str()));
  if (table == nullptr) return;
  versions->push_back(Version<Table>::number);
  if (*net == nullptr) *net = std::make_unique<NetOf<Table>>(table);
}

} // namespace

ncclResult_t loadNet(const std::string& file, std::unique_ptr<NetApi>* net, std::vector<int>* versions) {
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL); // stays loaded, as its threads may
  if (library == nullptr) return fail(ncclSystemError, "cannot load the plugin: %s", dlerror());
  versions->clear();
  tryTable<ncclNet_v12_t>(library, net, versions);
  tryTable<ncclNet_v11_t>(library, net, versions);
  tryTable<ncclNet_v10_t>(library, net, versions);
  tryTable<ncclNet_v9_t>(library, net, versions);
  tryTable<ncclNet_v8_t>(library, net, versions);
  if (*net == nullptr)
    return fail(ncclInvalidArgument, "%s exports no ncclNetPlugin_v8 to _v12: not an NCCL net plugin", file.c_str());
  return ncclSuccess;
}

} // namespace netperf
} // namespace moe
