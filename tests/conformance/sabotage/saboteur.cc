// A net plugin that is another one (SABOTAGE_PLUGIN) with one thing broken (SABOTAGE): net_conformance has to notice.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <unistd.h>

#include "plugin/nccl_net_abi.h"

namespace {

ncclNet_v11_t real;
std::string mode;

struct Receive {
  uint8_t* data;
  size_t size;
};
std::mutex mutex;
std::map<void*, Receive> receives;
int calls = 0;

ncclResult_t init(void** ctx, uint64_t id, ncclNetCommConfig_v10_t* config, ncclDebugLogger_t log,
                  ncclProfilerCallback_t profiler);

ncclResult_t getProperties(int dev, ncclNetProperties_v11_t* props) {
  ncclResult_t result = real.getProperties(mode == "range" && dev < 0 ? 0 : dev, props);
  if (mode == "speed") props->speed = 0;
  return result;
}

ncclResult_t listen(void* ctx, int dev, void* handle, void** comm) {
  ncclResult_t result = real.listen(ctx, dev, handle, comm);
  if (mode == "handle") static_cast<char*>(handle)[NCCL_NET_HANDLE_MAXSIZE] = 0;
  return result;
}

ncclResult_t connect(void* ctx, int dev, void* handle, void** comm, ncclNetDeviceHandle_v8_t** devComm) {
  if (mode == "descriptor" && open("/dev/null", O_RDONLY) == -1) return ncclSystemError;
  if (mode == "never") {
    *comm = nullptr;
    return ncclSuccess;
  }
  return real.connect(ctx, dev, handle, comm, devComm);
}

ncclResult_t accept(void* listenComm, void** comm, ncclNetDeviceHandle_v8_t** devComm) {
  if (mode == "wait") sleep(3);
  return real.accept(listenComm, comm, devComm);
}

ncclResult_t isend(void* comm, void* data, size_t size, int tag, void* mhandle, void* phandle, void** request) {
  ncclResult_t result = real.isend(comm, data, size, tag, mhandle, phandle, request);
  if (mode == "deaf" && result != ncclSuccess) return *request = nullptr, ncclSuccess;
  return mode == "full" && result == ncclSuccess && *request == nullptr && ++calls > 100 ? ncclInternalError : result;
}

ncclResult_t irecv(void* comm, int n, void** data, size_t* sizes, int* tags, void** mhandles, void** phandles,
                   void** request) {
  if (mode == "hint" && *request != nullptr) return ncclSuccess;
  int first = tags[0];
  if (mode == "tags" && n > 1) std::swap(tags[0], tags[n - 1]);
  ncclResult_t result = real.irecv(comm, n, data, sizes, tags, mhandles, phandles, request);
  if (mode == "tags" && n > 1) tags[n - 1] = tags[0], tags[0] = first;
  std::lock_guard<std::mutex> lock(mutex);
  if (result == ncclSuccess && *request != nullptr && n == 1)
    receives[*request] = {static_cast<uint8_t*>(data[0]), sizes[0]};
  return result;
}

ncclResult_t test(void* request, int* done, int* sizes) {
  std::unique_lock<std::mutex> lock(mutex);
  auto it = receives.find(request);
  bool receive = it != receives.end();
  Receive r = receive ? it->second : Receive();
  lock.unlock();
  if (mode == "early" && receive && r.size > 1000000) {
    *done = 1;
    if (sizes != nullptr) sizes[0] = int(r.size);
    return ncclSuccess;
  }
  int room[64] = {};
  int* out = sizes == nullptr ? room : sizes;
  ncclResult_t result = real.test(request, done, out);
  if (mode == "deaf" && result != ncclSuccess) {
    *done = 0;
    return ncclSuccess;
  }
  if (result != ncclSuccess || !*done || !receive) return result;
  if (mode == "flip" && out[0] > 0) r.data[out[0] / 2] ^= 1;
  if (mode == "size") out[0]++;
  if (mode == "past") r.data[out[0]] = 0;
  if (mode == "before") r.data[-1] = 0;
  lock.lock();
  receives.erase(request);
  return result;
}

ncclResult_t iflush(void* comm, int n, void** data, int* sizes, void** mhandles, void** request) {
  return mode == "flush" ? ncclInternalError : real.iflush(comm, n, data, sizes, mhandles, request);
}

ncclResult_t closeSend(void* comm) {
  if (mode == "crash") raise(SIGSEGV);
  if (mode == "leak") return ncclSuccess;
  return real.closeSend(comm);
}

} // namespace

extern "C" __attribute__((visibility("default"))) ncclNet_v11_t ncclNetPlugin_v11;
ncclNet_v11_t ncclNetPlugin_v11 = {};

namespace {

ncclResult_t init(void** ctx, uint64_t id, ncclNetCommConfig_v10_t* config, ncclDebugLogger_t log,
                  ncclProfilerCallback_t profiler) {
  if (mode == "name") ncclNetPlugin_v11.name = "another";
  if (mode == "thread") std::thread([] { pause(); }).detach();
  if (mode == "once" && calls++ > 0) return ncclInternalError;
  return real.init(ctx, id, config, log, profiler);
}

bool load() {
  const char* path = getenv("SABOTAGE_PLUGIN");
  const char* how = getenv("SABOTAGE");
  mode = how == nullptr ? "" : how;
  void* library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* table = library == nullptr ? nullptr : dlsym(library, "ncclNetPlugin_v11");
  if (table == nullptr) {
    fprintf(stderr, "saboteur: SABOTAGE_PLUGIN names no plugin of version 11\n");
    _exit(2);
  }
  real = *static_cast<ncclNet_v11_t*>(table);
  ncclNet_v11_t t = real;
  t.init = init;
  t.getProperties = getProperties;
  t.listen = listen;
  t.connect = connect;
  t.accept = accept;
  t.isend = isend;
  t.irecv = irecv;
  t.iflush = iflush;
  t.test = test;
  t.closeSend = closeSend;
  ncclNetPlugin_v11 = t;
  return true;
}

const bool loaded = load(); // after the objects above

} // namespace
