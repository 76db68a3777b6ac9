// One table per version of the interface.  NCCL takes the newest that it knows.
#include "net.h"

using namespace moe::plugin;

namespace {

constexpr int noClass = NCCL_NET_TRAFFIC_CLASS_UNDEF;

// ---- properties: each version has a prefix of the next one's fields, but for the place of forceFlush ----

template <class P> void commonProperties(const ncclNetProperties_v12_t& from, P* props) {
  props->name = from.name;
  props->pciPath = from.pciPath;
  props->guid = from.guid;
  props->ptrSupport = from.ptrSupport;
  props->regIsGlobal = from.regIsGlobal;
  props->speed = from.speed;
  props->port = from.port;
  props->latency = from.latency;
  props->maxComms = from.maxComms;
  props->maxRecvs = from.maxRecvs;
  props->netDeviceType = from.netDeviceType;
  props->netDeviceVersion = from.netDeviceVersion;
}

template <class P> void laterProperties(const ncclNetProperties_v12_t& from, P* props) {
  props->forceFlush = from.forceFlush;
  props->vProps.ndevs = from.vProps.ndevs;
  for (int i = 0; i < from.vProps.ndevs; i++) props->vProps.devs[i] = from.vProps.devs[i];
  props->maxP2pBytes = from.maxP2pBytes;
  props->maxCollBytes = from.maxCollBytes;
}

ncclResult_t getProperties8(int dev, ncclNetProperties_v8_t* props) {
  ncclNetProperties_v12_t all;
  const ncclResult_t result = getProperties(dev, &all);
  if (result == ncclSuccess) commonProperties(all, props);
  return result;
}

ncclResult_t getProperties9(int dev, ncclNetProperties_v9_t* props) {
  ncclNetProperties_v12_t all;
  const ncclResult_t result = getProperties(dev, &all);
  if (result != ncclSuccess) return result;
  commonProperties(all, props);
  laterProperties(all, props);
  return ncclSuccess;
}

ncclResult_t getProperties11(int dev, ncclNetProperties_v11_t* props) {
  ncclNetProperties_v12_t all;
  const ncclResult_t result = getProperties(dev, &all);
  if (result != ncclSuccess) return result;
  commonProperties(all, props);
  laterProperties(all, props);
  props->maxMultiRequestSize = all.maxMultiRequestSize;
  return ncclSuccess;
}

// ---- v8 to v10: no ctx ----

ncclResult_t init8(ncclDebugLogger_t logger) { return init(nullptr, 0, noClass, logger); }
ncclResult_t init10(ncclDebugLogger_t logger, ncclProfilerCallback_t) { return init(nullptr, 0, noClass, logger); }
ncclResult_t listen8(int dev, void* handle, void** listenComm) { return listen(nullptr, dev, handle, listenComm); }

ncclResult_t connect8(int dev, void* handle, void** sendComm, ncclNetDeviceHandle_v8_t**) {
  return connect(nullptr, dev, noClass, handle, sendComm);
}

ncclResult_t connect10(int dev, ncclNetCommConfig_v10_t* config, void* handle, void** sendComm,
                       ncclNetDeviceHandle_v8_t**) {
  return connect(nullptr, dev, config != nullptr ? config->trafficClass : noClass, handle, sendComm);
}

ncclResult_t accept8(void* listenComm, void** recvComm, ncclNetDeviceHandle_v8_t**) {
  return accept(listenComm, recvComm);
}

ncclResult_t isend8(void* sendComm, void* data, int size, int tag, void* mhandle, void** request) {
  if (size < 0) return ncclInvalidArgument;
  return isend(sendComm, data, static_cast<size_t>(size), tag, mhandle, request);
}

ncclResult_t irecv8(void* recvComm, int n, void** data, int* sizes, int* tags, void** mhandles, void** request) {
  constexpr int most = 8;
  size_t bytes[most];
  for (int i = 0; i < n && i < most; i++) {
    if (sizes[i] < 0) return ncclInvalidArgument;
    bytes[i] = static_cast<size_t>(sizes[i]);
  }
  return irecv(recvComm, n, data, bytes, tags, mhandles, request);
}

// ---- v9 and later: devices that are several ----

template <class P> ncclResult_t makeVDevice9(int* dev, P* props) {
  constexpr int most = sizeof(props->devs) / sizeof(props->devs[0]);
  if (dev == nullptr || props == nullptr || props->ndevs < 0 || props->ndevs > most) return ncclInvalidArgument;
  return makeVDevice(dev, props->ndevs, props->devs);
}

// ---- v10 and later: handles for the profiler ----

ncclResult_t isend10(void* sendComm, void* data, size_t size, int tag, void* mhandle, void*, void** request) {
  return isend(sendComm, data, size, tag, mhandle, request);
}

ncclResult_t irecv10(void* recvComm, int n, void** data, size_t* sizes, int* tags, void** mhandles, void**,
                     void** request) {
  return irecv(recvComm, n, data, sizes, tags, mhandles, request);
}

// ---- v11 and later: a ctx per communicator ----

ncclResult_t init11(void** ctx, uint64_t commId, ncclNetCommConfig_v10_t* config, ncclDebugLogger_t logger,
                    ncclProfilerCallback_t) {
  return init(ctx, commId, config != nullptr ? config->trafficClass : noClass, logger);
}

ncclResult_t connect11(void* ctx, int dev, void* handle, void** sendComm, ncclNetDeviceHandle_v8_t**) {
  return connect(ctx, dev, noClass, handle, sendComm);
}

} // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const ncclNet_v8_t ncclNetPlugin_v8 = {
  pluginName, init8,  devices, getProperties8, listen8,   connect8,  accept8,     regMr,   regMrDmaBuf, deregMr,
  isend8,     irecv8, iflush,  test,           closeComm, closeComm, closeListen, nullptr, nullptr};

EXPORTED const ncclNet_v9_t ncclNetPlugin_v9 = {
  pluginName, init8, devices, getProperties9, listen8,   connect8,  accept8,     regMr,   regMrDmaBuf, deregMr,
  isend,      irecv, iflush,  test,           closeComm, closeComm, closeListen, nullptr, nullptr,     makeVDevice9};

EXPORTED const ncclNet_v10_t ncclNetPlugin_v10 = {
  pluginName, init10,  devices, getProperties9, listen8,   connect10, accept8,     regMr,   regMrDmaBuf, deregMr,
  isend10,    irecv10, iflush,  test,           closeComm, closeComm, closeListen, nullptr, nullptr,     makeVDevice9};

EXPORTED const ncclNet_v11_t ncclNetPlugin_v11 = {
  pluginName,  init11,  devices, getProperties11, listen,   connect11, accept8,   regMr,
  regMrDmaBuf, deregMr, isend10, irecv10,         iflush,   test,      closeComm, closeComm,
  closeListen, nullptr, nullptr, makeVDevice9,    finalize, nullptr};

EXPORTED const ncclNet_v12_t ncclNetPlugin_v12 = {
  pluginName,  init11,  devices, getProperties, listen,   connect11, accept8,   regMr,
  regMrDmaBuf, deregMr, isend10, irecv10,       iflush,   test,      closeComm, closeComm,
  closeListen, nullptr, nullptr, makeVDevice9,  finalize, nullptr};
