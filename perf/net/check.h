// net_perf --check: what a user with a problem, or with hardware that we have not got, sends us.
#pragma once

#include "net/topology.h"
#include "perf/net/link.h"

namespace moe {
namespace netperf {

struct DeviceSummary {
  char name[64];
  char pciAddress[32]; // "" if it has none
  int ptrSupport;
  int speedMbps;
};

// Shared between the processes of a check.
struct Found {
  static constexpr int maxDevices = 64;
  int nDevices, nGpus;
  bool hasDmaBuf, gpuDirect, gpuDmaBuf;
  DeviceSummary devices[maxDevices];
};

// System, kernel modules and verbs library with their versions, limits, variables, RDMA devices with their ports and
// GIDs.
void describeMachine();
// The plugin's devices that have a PCI address, and what chooseNics makes of them; user is NCCL_MOE_NET_NIC.
ncclResult_t chooseFromDevices(const net::Topology& topology, const Found& found, const std::string& user,
                               std::vector<net::NicInfo>* nics, std::vector<net::NicChoice>* choices);
// Loads the plugin, and prints its tables and devices and the GPUs with their distances and the NICs chosen for them.
ncclResult_t describePlugin(const std::string& file, ncclDebugLogger_t logger, int gpu, Found* found);
// Every size that is a boundary of something, each way at once; prints one line.
ncclResult_t checkTransfers(Link* link, Control* control, bool first, long* wrong, int* sizes);

} // namespace netperf
} // namespace moe
