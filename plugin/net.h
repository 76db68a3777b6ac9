// The plugin's one implementation; tables.cc adapts it to each version of the interface.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nccl_net_abi.h"

namespace moe {
namespace plugin {

extern const char pluginName[];

// A NULL ctx stands for the one of the versions that have none (up to v10).  Every init that succeeded is balanced by a
// finalize of its ctx; finalize(NULL) does nothing, since NCCL calls it so after an init that failed.
ncclResult_t init(void** ctx, uint64_t commId, int trafficClass, ncclDebugLogger_t logger);
ncclResult_t finalize(void* ctx);
ncclResult_t devices(int* ndev);
ncclResult_t getProperties(int dev, ncclNetProperties_v12_t* props);
ncclResult_t makeVDevice(int* dev, int nMembers, const int* members);
ncclResult_t listen(void* ctx, int dev, void* handle, void** listenComm);
// trafficClass: NCCL_NET_TRAFFIC_CLASS_UNDEF leaves the ctx's.
ncclResult_t connect(void* ctx, int dev, int trafficClass, void* handle, void** sendComm);
ncclResult_t accept(void* listenComm, void** recvComm);
ncclResult_t regMr(void* comm, void* data, size_t size, int type, void** mhandle);
ncclResult_t regMrDmaBuf(void* comm, void* data, size_t size, int type, uint64_t offset, int fd, void** mhandle);
ncclResult_t deregMr(void* comm, void* mhandle);
ncclResult_t isend(void* sendComm, void* data, size_t size, int tag, void* mhandle, void** request);
ncclResult_t irecv(void* recvComm, int n, void** data, size_t* sizes, int* tags, void** mhandles, void** request);
ncclResult_t iflush(void* recvComm, int n, void** data, int* sizes, void** mhandles, void** request);
ncclResult_t test(void* request, int* done, int* sizes);
ncclResult_t closeComm(void* comm);
ncclResult_t closeListen(void* listenComm);

} // namespace plugin
} // namespace moe
