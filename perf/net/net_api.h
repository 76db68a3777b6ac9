// Any net plugin behind one interface, whichever version of NCCL's table it exports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "plugin/nccl_net_abi.h"

namespace moe {
namespace netperf {

struct Properties {
  std::string name, pciPath;
  uint64_t guid = 0;
  int ptrSupport = 0;
  int regIsGlobal = 0;
  int forceFlush = 0;
  int speedMbps = 0;
  int port = 0;
  float latencyUs = 0;
  int maxComms = 0;
  int maxRecvs = 0;
  size_t maxP2pBytes = 0; // 0: the table does not tell
  int physicalDevices = 1;
  int railId = NCCL_NET_ID_UNDEF;
  int planeId = NCCL_NET_ID_UNDEF;
};

// As NCCL calls it; the comments of nccl_net_abi.h hold.
class NetApi {
 public:
  virtual ~NetApi() = default; // finalizes
  virtual int version() const = 0;
  virtual const char* name() const = 0;
  virtual ncclResult_t init(ncclDebugLogger_t logger) = 0;
  virtual ncclResult_t devices(int* n) = 0;
  virtual ncclResult_t properties(int dev, Properties* properties) = 0;
  virtual ncclResult_t listen(int dev, void* handle, void** comm) = 0;
  virtual ncclResult_t connect(int dev, void* handle, void** comm) = 0;
  virtual ncclResult_t accept(void* listenComm, void** comm) = 0;
  virtual ncclResult_t regMr(void* comm, void* data, size_t bytes, int type, void** mr) = 0;
  virtual bool hasDmaBuf() const = 0;
  virtual ncclResult_t regMrDmaBuf(void* comm, void* data, size_t bytes, uint64_t offset, int fd, void** mr) = 0;
  virtual ncclResult_t deregMr(void* comm, void* mr) = 0;
  virtual ncclResult_t isend(void* comm, void* data, size_t bytes, int tag, void* mr, void** request) = 0;
  virtual ncclResult_t irecv(void* comm, void* data, size_t bytes, int tag, void* mr, void** request) = 0;
  virtual ncclResult_t iflush(void* comm, void* data, int bytes, void* mr, void** request) = 0;
  virtual ncclResult_t test(void* request, int* done, int* bytes) = 0;
  virtual ncclResult_t closeSend(void* comm) = 0;
  virtual ncclResult_t closeRecv(void* comm) = 0;
  virtual ncclResult_t closeListen(void* comm) = 0;
};

// Loads the file and takes the newest table; versions lists all that it exports.
ncclResult_t loadNet(const std::string& file, std::unique_ptr<NetApi>* net, std::vector<int>* versions);

} // namespace netperf
} // namespace moe
