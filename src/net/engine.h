// The network engine: connections between two processes, over verbs or over TCP.
//
// A connection carries data one way, from the side that connected to the side that accepted.  It has
//  - two-sided operations: isend meets irecv by tag.  A receive is a group of 1 to maxGroup members, each with its own
//    buffer and tag; sends with equal tags arrive in the order in which they were posted;
//  - one-sided operations: put writes into memory that the receiver registered and described to the sender
//    (remoteRegion), putSignal does so and then stores a 64-bit value.
//
// Nothing here blocks.  An operation that has no room sets *request to nullptr and is to be tried again; iflush alone
// means "nothing to wait for" by it.  test drives the connection and, once it says done, has taken the request back.
// On the receiving side of puts somebody has to call progress.  After an error every call on the connection returns an
// error again; other connections are not affected.
//
// Who may call what: one connection is used by one thread at a time, but registerMemory and deregisterMemory may run
// beside it; different connections, listeners and connectors are independent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "nccl_moe.h"

namespace moe {
namespace net {

constexpr int maxGroup = 8;
constexpr int maxRequests = 32; // groups outstanding on the receiving side; sends: maxRequests * maxGroup
constexpr size_t handleBytes = 128;

enum PtrKind { ptrHost = 1, ptrCuda = 2, ptrDmabuf = 4 };

struct DeviceInfo {
  std::string name; // unique
  std::string pciPath;
  uint64_t guid = 0;
  int ptrKinds = ptrHost;
  bool regIsGlobal = false;
  bool forceFlush = false;
  int speedMbps = 10000;
  int port = 1;
  float latencyUs = 0;
  int maxConnections = 0;
  int maxRecvs = 1;
  std::vector<int> members; // of a merged device
};

// Traffic that networks may keep apart; each kind has its own service level and traffic class.
enum class TrafficKind { other, latency, throughput };

// What the connections of one communicator have in common.
struct CommConfig {
  uint64_t commId = 0;   // part of the job token unless NCCL_MOE_JOB_TOKEN is set; 0: none known
  int trafficClass = -1; // -1: the parameter of the traffic kind decides
  TrafficKind traffic = TrafficKind::other;
};

struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
  PtrKind kind = ptrHost;
  int dmabufFd = -1; // with kind ptrDmabuf
  uint64_t dmabufOffset = 0;
  bool strictOrder = false; // never relaxed ordering: memory that signals are stored to
};

// How the receiver describes registered memory to the sender; plain bytes, to be sent by any means.
struct RemoteRegion {
  uint64_t base = 0;
  uint64_t bytes = 0;
  uint64_t key = 0;          // tcp: of the region; verbs: how many ports there are; 0: no region
  uint32_t portKeys[4] = {}; // verbs: by port
};

struct Region {
  virtual ~Region() = default;
};

class Connection;

struct Request {
  Connection* connection = nullptr;
  int nSizes = 1; // how many sizes test tells
};

class Connection {
 public:
  virtual ~Connection() = default; // closes, and gives up what is outstanding

  virtual ncclResult_t registerMemory(const Memory& memory, Region** region) = 0;
  virtual ncclResult_t deregisterMemory(Region* region) = 0;
  virtual ncclResult_t remoteRegion(const Region* region, RemoteRegion* remote) = 0;

  virtual ncclResult_t isend(const void* data, size_t bytes, int tag, Region* region, Request** request) = 0;
  virtual ncclResult_t irecv(int n, void* const* data, const size_t* bytes, const int* tags, Region* const* regions,
                             Request** request) = 0;
  // Makes what the receives delivered to GPU memory visible to the GPU.
  virtual ncclResult_t iflush(int n, void* const* data, const int* bytes, Region* const* regions,
                              Request** request) = 0;

  // Writes bytes to offset of the remote region.  The request completes when the local memory may be reused.
  virtual ncclResult_t put(const void* data, size_t bytes, Region* region, const RemoteRegion& remote, uint64_t offset,
                           Request** request) = 0;
  // As put (bytes may be 0), then stores value at signalOffset (a multiple of 8) of the signal region, which must be
  // registered with strictOrder.  The value is visible only after the data of this and of all earlier puts on this
  // connection, as far as data and signal are both in the memory of one device (the host's, or one GPU's): PCIe does
  // not order writes to two of them.
  virtual ncclResult_t putSignal(const void* data, size_t bytes, Region* region, const RemoteRegion& remote,
                                 uint64_t offset, const RemoteRegion& signal, uint64_t signalOffset, uint64_t value,
                                 Request** request) = 0;

  // bytes may be nullptr; of a receive it has an entry per member.
  virtual ncclResult_t test(Request* request, bool* done, size_t* bytes) = 0;
  virtual ncclResult_t progress() = 0;
};

class Listener {
 public:
  virtual ~Listener() = default;
  // *connection stays empty until a peer has connected.
  virtual ncclResult_t accept(std::unique_ptr<Connection>* connection) = 0;
};

class Connector {
 public:
  virtual ~Connector() = default;
  // To be called until *connection is set.
  virtual ncclResult_t connect(std::unique_ptr<Connection>* connection) = 0;
};

// Finds the devices and owns the threads.  NCCL_MOE_NET_TRANSPORT chooses among verbs and tcp; on auto, tcp serves
// where no RDMA device is usable.  Connections and listeners must be gone before the engine goes.
class Engine {
 public:
  static ncclResult_t create(std::unique_ptr<Engine>* engine);
  virtual ~Engine() = default;
  virtual int nDevices() const = 0;
  virtual const DeviceInfo& device(int dev) const = 0;
  // Makes a device whose connections use several others (verbs ports of one link layer) together: messages are striped
  // over them, and a connection goes on as long as one of them works.  The same members give the same device.
  virtual ncclResult_t merge(const std::vector<int>& members, int* dev) = 0;
  // Writes the counters of the connections that this process has closed to NCCL_MOE_NET_STATS; the destructor does too.
  virtual void writeStats() const = 0;
  // Writes handleBytes to handle, which the peer passes to connector.
  virtual ncclResult_t listen(int dev, const CommConfig& config, void* handle, std::unique_ptr<Listener>* listener) = 0;
  virtual ncclResult_t connector(int dev, const CommConfig& config, const void* handle,
                                 std::unique_ptr<Connector>* connector) = 0;
};

} // namespace net
} // namespace moe
