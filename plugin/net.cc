#include "net.h"

#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "net/engine.h"

namespace moe {
namespace plugin {

// The name of the table, which NCCL_NET selects.
const char pluginName[] = "MOE";

namespace {

using net::Connection;
using net::Connector;
using net::Engine;
using net::Listener;
using net::Request;

// Where connect keeps, in the handle's memory, which of its connectors the calls belong to.
constexpr size_t connectorIdOffset = NCCL_NET_HANDLE_MAXSIZE - sizeof(uint64_t);

// What a process has made is its own: a child of fork has the parent's objects, but none of its threads, so it neither
// uses nor destroys them, also after it has begun anew.
struct Owned {
  const pid_t pid = getpid();
  bool inherited() const { return pid != getpid(); }
};

// One per communicator.
struct Context : Owned {
  std::shared_ptr<Engine> engine;
  net::CommConfig config;
  std::mutex mutex;
  std::map<uint64_t, std::unique_ptr<Connector>> connectors; // connections under way
  uint64_t nextId = 1;
};

// The engine goes with the last of those who use it, whatever the order in which NCCL lets go of them.
struct Comm : Owned {
  std::shared_ptr<Engine> engine;
  std::unique_ptr<Connection> connection;
  int maxRecvs = 1; // what the device's properties say
};

struct ListenComm : Owned {
  std::shared_ptr<Engine> engine;
  std::unique_ptr<Listener> listener;
  int maxRecvs = 1;
};

struct Global {
  std::mutex mutex;
  std::shared_ptr<Engine> engine;
  pid_t pid = 0;
  int nContexts = 0;
  std::unique_ptr<Context> unversioned;   // of the versions without a ctx
  std::set<std::string> names;            // what properties point to: NCCL may keep those pointers
  std::map<int, std::vector<int>> merged; // the members of every merged device
  bool mergeAgain = false;                // the engine is a new one and does not have them yet
  ncclDebugLogger_t logger = nullptr;
};

// Never destroyed: NCCL's threads may still be at work when a process exits.
Global& global() {
  static Global* const state = new Global();
  return *state;
}

void toNcclLog(LogLevel level, const char* file, int line, const char* text) {
  if (ncclDebugLogger_t logger = global().logger) {
    logger(static_cast<int>(level), NCCL_LOG_INIT | NCCL_LOG_NET, file, line, "%s", text);
  }
}

// The engine is that of the process's parent.
bool inherited() { return global().pid != 0 && global().pid != getpid(); }

// No exception may reach NCCL.
template <class F> ncclResult_t guarded(F&& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    return fail(ncclSystemError, "network plugin: %s", error.what());
  }
}

// Callers hold the mutex.  What was inherited by fork is left alone: its threads are not there.
void dropInherited() {
  Global& g = global();
  if (!inherited()) return;
  new std::shared_ptr<Engine>(std::move(g.engine)); // kept for good
  (void)g.unversioned.release();
  g.engine = nullptr;
  g.nContexts = 0;
  g.pid = 0;
}

ncclResult_t makeContext(uint64_t commId, int trafficClass, std::unique_ptr<Context>* context) {
  Global& g = global();
  dropInherited();
  if (g.engine == nullptr) {
    std::unique_ptr<Engine> engine;
    MOECHECK(Engine::create(&engine));
    g.engine = std::move(engine);
    g.pid = getpid();
    g.mergeAgain = !g.merged.empty();
  }
  auto fresh = std::make_unique<Context>();
  fresh->engine = g.engine;
  fresh->config.commId = commId;
  fresh->config.trafficClass = trafficClass;
  g.nContexts++;
  *context = std::move(fresh);
  return ncclSuccess;
}

// As long as NCCL (2.28.7 and later) keeps a plugin loaded it counts and merges devices once, and goes on using their
// numbers after it has finalized the last communicator and made another one: so the next engine gets the same ones.
// Callers hold the mutex.
ncclResult_t mergeAgain() {
  Global& g = global();
  if (!g.mergeAgain) return ncclSuccess;
  const int nDevices = g.engine->nDevices();
  for (const auto& [number, members] : g.merged) {
    int dev = -1;
    MOECHECK(g.engine->merge(members, &dev));
    if (dev == number) continue;
    return fail(
      ncclSystemError,
      "network plugin: there were %d devices when NCCL merged some of them, now there are %d; the process has "
      "to start again",
      g.merged.begin()->first, nDevices);
  }
  g.mergeAgain = false;
  return ncclSuccess;
}

ncclResult_t contextOf(void* ctx, Context** context) {
  *context = ctx != nullptr ? static_cast<Context*>(ctx) : global().unversioned.get();
  if (*context == nullptr) return fail(ncclInvalidUsage, "network plugin: init was not called");
  if ((*context)->inherited()) return fail(ncclInvalidUsage, "network plugin: init was called before fork");
  return ncclSuccess;
}

ncclResult_t connectionOf(void* comm, Connection** connection) {
  if (comm == nullptr) return fail(ncclInvalidArgument, "comm is NULL");
  *connection = static_cast<Comm*>(comm)->connection.get();
  return ncclSuccess;
}

char* keepName(const std::string& name) {
  // NCCL's struct has char*, and NCCL does not write there.
  return const_cast<char*>(global().names.insert(name).first->c_str());
}

// Programs that never finalize (and versions that cannot) get the counters of their closed connections too.
struct AtExit {
  ~AtExit() {
    Global& g = global();
    if (g.engine != nullptr && !inherited()) g.engine->writeStats();
  }
} atExit;

} // namespace

ncclResult_t init(void** ctx, uint64_t commId, int trafficClass, ncclDebugLogger_t logger) {
  return guarded([&] {
    Global& g = global();
    std::lock_guard<std::mutex> lock(g.mutex);
    if (logger != nullptr) {
      g.logger = logger;
      setLogSink(toNcclLog);
    }
    std::unique_ptr<Context> context;
    if (ctx != nullptr) *ctx = nullptr;
    MOECHECK(makeContext(commId, trafficClass, &context));
    if (ctx != nullptr) {
      *ctx = context.release();
    } else {
      g.unversioned = std::move(context);
    }
    return ncclSuccess;
  });
}

ncclResult_t finalize(void* ctx) {
  return guarded([&] {
    if (ctx == nullptr) return ncclSuccess;
    Global& g = global();
    if (static_cast<Context*>(ctx)->inherited()) return ncclSuccess;
    std::unique_ptr<Context> context(static_cast<Context*>(ctx));
    std::shared_ptr<Engine> last;
    {
      std::lock_guard<std::mutex> lock(g.mutex);
      if (--g.nContexts == 0) last = std::move(g.engine);
      if (last != nullptr) setLogSink(nullptr);
    }
    context.reset();
    return ncclSuccess; // last goes here, outside the lock
  });
}

ncclResult_t devices(int* ndev) {
  return guarded([&] {
    Global& g = global();
    std::lock_guard<std::mutex> lock(g.mutex);
    *ndev = 0;
    if (g.engine == nullptr) return fail(ncclInvalidUsage, "network plugin: init was not called");
    // An NCCL that counts again (it has loaded the plugin anew, or is older) will merge again too.
    if (g.mergeAgain) g.merged.clear();
    g.mergeAgain = false;
    *ndev = g.engine->nDevices();
    return ncclSuccess;
  });
}

ncclResult_t getProperties(int dev, ncclNetProperties_v12_t* props) {
  return guarded([&] {
    Global& g = global();
    std::lock_guard<std::mutex> lock(g.mutex);
    if (g.engine == nullptr) return fail(ncclInvalidUsage, "network plugin: init was not called");
    MOECHECK(mergeAgain());
    if (dev < 0 || dev >= g.engine->nDevices()) {
      return fail(ncclInvalidArgument, "dev is %d, but there are devices 0 to %d", dev, g.engine->nDevices() - 1);
    }
    const net::DeviceInfo& info = g.engine->device(dev);
    *props = ncclNetProperties_v12_t();
    props->name = keepName(info.name);
    props->pciPath = info.pciPath.empty() ? nullptr : keepName(info.pciPath);
    props->guid = info.guid;
    props->ptrSupport = info.ptrKinds;
    props->regIsGlobal = info.regIsGlobal ? 1 : 0;
    props->forceFlush = info.forceFlush ? 1 : 0;
    props->speed = info.speedMbps;
    props->port = info.port;
    props->latency = info.latencyUs;
    props->maxComms = info.maxConnections;
    props->maxRecvs = info.maxRecvs;
    props->netDeviceType = NCCL_NET_DEVICE_HOST;
    props->netDeviceVersion = NCCL_NET_DEVICE_INVALID_VERSION;
    props->vProps.ndevs = 1;
    props->vProps.devs[0] = dev;
    for (size_t i = 0; i < info.members.size(); i++) {
      props->vProps.ndevs = static_cast<int>(i) + 1;
      props->vProps.devs[i] = info.members[i];
    }
    props->maxP2pBytes = NCCL_MAX_NET_SIZE_BYTES;
    props->maxCollBytes = NCCL_MAX_NET_SIZE_BYTES;
    props->maxMultiRequestSize = 1;
    props->railId = NCCL_NET_ID_UNDEF;
    props->planeId = NCCL_NET_ID_UNDEF;
    return ncclSuccess;
  });
}

ncclResult_t makeVDevice(int* dev, int nMembers, const int* members) {
  return guarded([&] {
    Global& g = global();
    std::lock_guard<std::mutex> lock(g.mutex);
    if (g.engine == nullptr) return fail(ncclInvalidUsage, "network plugin: init was not called");
    MOECHECK(mergeAgain());
    const std::vector<int> all(members, members + nMembers);
    MOECHECK(g.engine->merge(all, dev));
    if (nMembers > 1) g.merged[*dev] = all;
    return ncclSuccess;
  });
}

ncclResult_t listen(void* ctx, int dev, void* handle, void** listenComm) {
  return guarded([&] {
    *listenComm = nullptr;
    Context* context = nullptr;
    MOECHECK(contextOf(ctx, &context));
    auto comm = std::make_unique<ListenComm>();
    comm->engine = context->engine;
    MOECHECK(context->engine->listen(dev, context->config, handle, &comm->listener));
    comm->maxRecvs = context->engine->device(dev).maxRecvs;
    *listenComm = comm.release();
    return ncclSuccess;
  });
}

ncclResult_t connect(void* ctx, int dev, int trafficClass, void* handle, void** sendComm) {
  return guarded([&] {
    *sendComm = nullptr;
    Context* context = nullptr;
    MOECHECK(contextOf(ctx, &context));
    uint64_t id = 0;
    char* const idAt = static_cast<char*>(handle) + connectorIdOffset;
    memcpy(&id, idAt, sizeof(id));
    Connector* connector = nullptr;
    {
      std::lock_guard<std::mutex> lock(context->mutex);
      auto it = context->connectors.find(id);
      if (it != context->connectors.end()) connector = it->second.get();
    }
    if (connector == nullptr) {
      if (id != 0) return fail(ncclInvalidArgument, "handle: not one of this plugin's, or its connect has failed");
      net::CommConfig config = context->config;
      if (trafficClass != NCCL_NET_TRAFFIC_CLASS_UNDEF) config.trafficClass = trafficClass;
      std::unique_ptr<Connector> fresh;
      MOECHECK(context->engine->connector(dev, config, handle, &fresh));
      connector = fresh.get();
      std::lock_guard<std::mutex> lock(context->mutex);
      id = context->nextId++;
      context->connectors[id] = std::move(fresh);
      memcpy(idAt, &id, sizeof(id));
    }
    auto comm = std::make_unique<Comm>();
    comm->engine = context->engine;
    comm->maxRecvs = context->engine->device(dev).maxRecvs;
    const ncclResult_t result = connector->connect(&comm->connection);
    if (result == ncclSuccess && comm->connection == nullptr) return ncclSuccess;
    const uint64_t over = result == ncclSuccess ? 0 : UINT64_MAX; // a failed handle stays failed
    memcpy(idAt, &over, sizeof(over));
    {
      std::lock_guard<std::mutex> lock(context->mutex);
      context->connectors.erase(id);
    }
    MOECHECK(result);
    *sendComm = comm.release();
    return ncclSuccess;
  });
}

ncclResult_t accept(void* listenComm, void** recvComm) {
  return guarded([&] {
    *recvComm = nullptr;
    if (listenComm == nullptr) return fail(ncclInvalidArgument, "listenComm is NULL");
    auto* listening = static_cast<ListenComm*>(listenComm);
    if (listening->inherited()) return fail(ncclInvalidUsage, "network plugin: init was called before fork");
    auto comm = std::make_unique<Comm>();
    comm->engine = listening->engine;
    comm->maxRecvs = listening->maxRecvs;
    MOECHECK(listening->listener->accept(&comm->connection));
    if (comm->connection != nullptr) *recvComm = comm.release();
    return ncclSuccess;
  });
}

namespace {

ncclResult_t registerMemory(void* comm, const net::Memory& memory, void** mhandle) {
  return guarded([&] {
    *mhandle = nullptr;
    Connection* connection = nullptr;
    MOECHECK(connectionOf(comm, &connection));
    net::Region* region = nullptr;
    MOECHECK(connection->registerMemory(memory, &region));
    *mhandle = region;
    return ncclSuccess;
  });
}

} // namespace

ncclResult_t regMr(void* comm, void* data, size_t size, int type, void** mhandle) {
  net::Memory memory;
  memory.data = data;
  memory.bytes = size;
  memory.kind = static_cast<net::PtrKind>(type);
  if (type != NCCL_PTR_HOST && type != NCCL_PTR_CUDA) {
    return fail(ncclInvalidArgument, "type is %d, which is neither host nor CUDA memory", type);
  }
  return registerMemory(comm, memory, mhandle);
}

ncclResult_t regMrDmaBuf(void* comm, void* data, size_t size, int, uint64_t offset, int fd, void** mhandle) {
  net::Memory memory;
  memory.data = data;
  memory.bytes = size;
  memory.kind = net::ptrDmabuf;
  memory.dmabufFd = fd;
  memory.dmabufOffset = offset;
  return registerMemory(comm, memory, mhandle);
}

ncclResult_t deregMr(void* comm, void* mhandle) {
  return guarded([&] {
    Connection* connection = nullptr;
    MOECHECK(connectionOf(comm, &connection));
    return connection->deregisterMemory(static_cast<net::Region*>(mhandle));
  });
}

ncclResult_t isend(void* sendComm, void* data, size_t size, int tag, void* mhandle, void** request) {
  return guarded([&] {
    *request = nullptr;
    Connection* connection = nullptr;
    MOECHECK(connectionOf(sendComm, &connection));
    Request* made = nullptr;
    MOECHECK(connection->isend(data, size, tag, static_cast<net::Region*>(mhandle), &made));
    *request = made;
    return ncclSuccess;
  });
}

ncclResult_t irecv(void* recvComm, int n, void** data, size_t* sizes, int* tags, void** mhandles, void** request) {
  return guarded([&] {
    *request = nullptr; // also where it came in as a hint
    Connection* connection = nullptr;
    MOECHECK(connectionOf(recvComm, &connection));
    const int most = static_cast<Comm*>(recvComm)->maxRecvs;
    if (n < 1 || n > most) return fail(ncclInvalidArgument, "n is %d, but a group has 1 to %d members", n, most);
    Request* made = nullptr;
    MOECHECK(connection->irecv(n, data, sizes, tags, reinterpret_cast<net::Region**>(mhandles), &made));
    *request = made;
    return ncclSuccess;
  });
}

ncclResult_t iflush(void* recvComm, int n, void** data, int* sizes, void** mhandles, void** request) {
  return guarded([&] {
    *request = nullptr;
    Connection* connection = nullptr;
    MOECHECK(connectionOf(recvComm, &connection));
    Request* made = nullptr;
    MOECHECK(connection->iflush(n, data, sizes, reinterpret_cast<net::Region**>(mhandles), &made));
    *request = made;
    return ncclSuccess;
  });
}

ncclResult_t test(void* request, int* done, int* sizes) {
  return guarded([&] {
    *done = 0;
    if (request == nullptr) return fail(ncclInvalidArgument, "request is NULL");
    auto* made = static_cast<Request*>(request);
    size_t bytes[net::maxGroup] = {};
    const int nSizes = made->nSizes;
    bool finished = false;
    MOECHECK(made->connection->test(made, &finished, bytes));
    if (!finished) return ncclSuccess;
    *done = 1;
    // The interface has ints; what is longer reads as INT_MAX.
    for (int i = 0; sizes != nullptr && i < nSizes; i++)
      sizes[i] = static_cast<int>(std::min<size_t>(bytes[i], INT_MAX));
    return ncclSuccess;
  });
}

namespace {

template <class T> ncclResult_t closeOwn(T* comm) {
  if (comm != nullptr && !comm->inherited()) delete comm;
  return ncclSuccess;
}

} // namespace

ncclResult_t closeComm(void* comm) {
  return guarded([&] { return closeOwn(static_cast<Comm*>(comm)); });
}

ncclResult_t closeListen(void* listenComm) {
  return guarded([&] { return closeOwn(static_cast<ListenComm*>(listenComm)); });
}

} // namespace plugin
} // namespace moe
