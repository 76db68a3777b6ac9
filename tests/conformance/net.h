// Any net plugin behind one interface: the newest table it exports, or the one asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "plugin/nccl_net_abi.h"

namespace conformance {

struct Properties {
  std::string name, pciPath;
  bool hasPciPath = false;
  uint64_t guid = 0;
  int ptrSupport = 0, regIsGlobal = 0, speed = 0, port = 0, maxComms = 0, maxRecvs = 0;
  float latency = 0;
  int netDeviceType = 0, nVirtual = 0, virtualDev0 = 0;
  size_t maxP2pBytes = 0, maxCollBytes = 0;
};

class Net {
 public:
  // version 0: the newest.  Empty on success, else what is wrong.
  std::string load(const std::string& path, int version);
  void unload();
  int version() const { return version_; }
  std::string name() const;
  bool hasVDevice() const;
  bool hasFinalize() const { return version_ >= 11; }
  void* library() const { return library_; }
  // What the table of a version holds in place of a function it must have: nullptr names.
  std::vector<std::string> missing() const;

  // As the plugin returned it.  From version 11 on, every init makes a context, and finalize takes the newest back.
  ncclResult_t init();
  ncclResult_t finalize();
  ncclResult_t finalizeNull(); // what NCCL does after a failed init
  size_t contexts() const { return contexts_.size(); }
  ncclResult_t devices(int* n);
  ncclResult_t properties(int dev, Properties* props);
  ncclResult_t makeVDevice(int* dev, const std::vector<int>& members);
  ncclResult_t listen(int dev, void* handle, void** comm);
  ncclResult_t connect(int dev, void* handle, void** comm);
  ncclResult_t accept(void* listenComm, void** comm);
  ncclResult_t regMr(void* comm, void* data, size_t bytes, void** mhandle);
  bool hasDmaBuf() const;
  ncclResult_t regMrDmaBuf(void* comm, void* data, size_t bytes, uint64_t offset, int fd, void** mhandle); // of a GPU
  ncclResult_t deregMr(void* comm, void* mhandle);
  ncclResult_t isend(void* comm, void* data, size_t bytes, int tag, void* mhandle, void** request);
  ncclResult_t irecv(void* comm, int n, void** data, size_t* sizes, int* tags, void** mhandles, void** request);
  ncclResult_t iflush(void* comm, int n, void** data, int* sizes, void** mhandles, void** request);
  ncclResult_t test(void* request, int* done, int* sizes);
  ncclResult_t closeSend(void* comm);
  ncclResult_t closeRecv(void* comm);
  ncclResult_t closeListen(void* comm);

 private:
  template <class F> auto table(F&& f) const;

  void* library_ = nullptr;
  const void* table_ = nullptr;
  int version_ = 0;
  std::vector<void*> contexts_;
};

// The lines that the plugin logged with level WARN, the newest last, and whether to print everything.
const std::vector<std::string>& warnings();
void printLog(bool on);

// Names of the symbols that a shared object exports; empty if it cannot be read.
std::vector<std::string> exportedSymbols(const std::string& path);

} // namespace conformance
