#include "perf/net/check.h"

#include <dirent.h>
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>

#include "base/param.h"
#include "perf/net/measure.h"

extern char** environ;

namespace moe {
namespace netperf {
namespace {

std::string fileText(const std::string& path) {
  std::ifstream in(path);
  std::string text;
  std::getline(in, text);
  return text;
}

std::vector<std::string> listed(const std::string& folder) {
  std::vector<std::string> names;
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(folder.c_str()),
                                                [](DIR* d) { return d != nullptr ? closedir(d) : 0; });
  if (dir == nullptr) return names;
  while (const dirent* entry = readdir(dir.get())) {
    if (entry->d_name[0] != '.') names.push_back(entry->d_name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string lastPart(const std::string& link) {
  char target[4096];
  const ssize_t n = readlink(link.c_str(), target, sizeof(target) - 1);
  if (n <= 0) return "";
  target[n] = 0;
  const char* slash = strrchr(target, '/');
  return slash != nullptr ? slash + 1 : target;
}

bool startsWith(const std::string& text, const char* prefix) { return text.compare(0, strlen(prefix), prefix) == 0; }

// rdma-core has no call that tells its version, but the library's file has it in its name (libibverbs.so.1.14.44.0 is
// 44.0).
void describeVerbsLibrary() {
  const char* user = getenv("NCCL_MOE_NET_IBVERBS_LIB");
  const char* name = user != nullptr ? user : "libibverbs.so.1";
  void* const library = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
  void* const symbol = library != nullptr ? dlsym(library, "ibv_get_device_list") : nullptr;
  Dl_info info = {};
  char path[PATH_MAX] = "";
  if (symbol == nullptr || dladdr(symbol, &info) == 0 || realpath(info.dli_fname, path) == nullptr) {
    printf("  verbs library: no %s\n", name);
  } else {
    printf("  verbs library: %s\n", path);
  }
  if (library != nullptr) dlclose(library);
}

// The GIDs of a port with their types; unused entries are all zero.
void describeGids(const std::string& port) {
  for (const std::string& index : listed(port + "/gids")) {
    const std::string gid = fileText(port + "/gids/" + index);
    if (gid.find_first_not_of("0:") == std::string::npos || gid == "fe80:0000:0000:0000:0000:0000:0000:0000") continue;
    printf("      gid %s: %s %s %s\n", index.c_str(), gid.c_str(), fileText(port + "/gid_attrs/types/" + index).c_str(),
           fileText(port + "/gid_attrs/ndevs/" + index).c_str());
  }
}

std::string bytesText(rlim_t bytes) { return bytes == RLIM_INFINITY ? "unlimited" : std::to_string(bytes) + " bytes"; }

void describePointers(int support) {
  printf("    memory: host%s%s\n", (support & NCCL_PTR_CUDA) != 0 ? ", GPU (regMr)" : "",
         (support & NCCL_PTR_DMABUF) != 0 ? ", GPU (dma-buf)" : "");
}

// Distances of the GPUs to the plugin's devices, and what chooseNics would give them.
void describeDistances(const Found& found) {
  net::Topology topology;
  if (net::Topology::load(nullptr, &topology) != ncclSuccess) {
    printf("  no topology: %s\n", lastError());
    return;
  }
  std::vector<net::NicInfo> nics;
  std::vector<net::NicChoice> choices;
  const char* user = getenv("NCCL_MOE_NET_NIC");
  const ncclResult_t chosen = chooseFromDevices(topology, found, user != nullptr ? user : "", &nics, &choices);
  const std::vector<net::PciAddress> gpus = topology.gpus();
  if (gpus.empty() || nics.empty()) {
    printf("  distances: none (%zu NVIDIA GPUs in the PCI tree, %zu devices with a PCI address)\n", gpus.size(),
           nics.size());
    return;
  }
  for (net::PciAddress gpu : gpus) {
    printf("  GPU %s:", gpu.text().c_str());
    for (const net::NicInfo& nic : nics)
      printf(" %s:%d %s", nic.name.c_str(), nic.port, nicDistanceName(topology.distance(gpu, nic.address)));
    printf("\n");
  }
  if (chosen != ncclSuccess) {
    printf("  choice: %s\n", lastError());
    return;
  }
  for (const net::NicChoice& choice : choices) {
    printf("  choice for GPU %s:", choice.gpu.text().c_str());
    for (int nic : choice.nics) printf(" %s:%d", nics[size_t(nic)].name.c_str(), nics[size_t(nic)].port);
    printf("\n");
  }
}

} // namespace

ncclResult_t chooseFromDevices(const net::Topology& topology, const Found& found, const std::string& user,
                               std::vector<net::NicInfo>* nics, std::vector<net::NicChoice>* choices) {
  for (int i = 0; i < found.nDevices; i++) {
    net::NicInfo nic;
    if (!net::PciAddress::parse(found.devices[i].pciAddress, &nic.address)) continue;
    // The plugin calls port 1 of mlx5_0 mlx5_0:1.
    nic.name = found.devices[i].name;
    const size_t colon = nic.name.rfind(':');
    int64_t port = 0;
    if (colon != std::string::npos && parseInt(nic.name.c_str() + colon + 1, &port)) {
      nic.name.resize(colon);
      nic.port = int(port);
    }
    nic.speedMbps = found.devices[i].speedMbps;
    nics->push_back(nic);
  }
  // Which NICs to use at all the plugin has seen to: it has no device for those that are left out.
  const bool maps = user.find('=') != std::string::npos;
  return chooseNics(topology, topology.gpus(), *nics, maps ? user : "", choices);
}

void describeMachine() {
  utsname system{};
  uname(&system);
  printf("# machine\n  %s %s %s, %ld CPUs\n", system.sysname, system.release, system.machine,
         sysconf(_SC_NPROCESSORS_ONLN));
  std::string os = fileText("/etc/os-release");
  printf("  %s\n", os.c_str());
  printf("  IOMMU groups: %zu\n", listed("/sys/kernel/iommu_groups").size());
  printf("  modules:");
  std::ifstream modules("/proc/modules");
  for (std::string line; std::getline(modules, line);) {
    const std::string name = line.substr(0, line.find(' '));
    if (startsWith(name, "ib_") || startsWith(name, "mlx") || startsWith(name, "nvidia") || startsWith(name, "rdma") ||
        startsWith(name, "gdrdrv") || startsWith(name, "efa") || startsWith(name, "bnxt_re") ||
        startsWith(name, "irdma") || startsWith(name, "siw")) {
      const std::string version = fileText("/sys/module/" + name + "/version"); // most of the kernel's own have none
      printf(" %s%s%s", name.c_str(), version.empty() ? "" : " ", version.c_str());
    }
  }
  printf("\n");
  describeVerbsLibrary();
  rlimit locked{}, files{};
  getrlimit(RLIMIT_MEMLOCK, &locked);
  getrlimit(RLIMIT_NOFILE, &files);
  printf("  locked memory: %s; open files: %llu\n", bytesText(locked.rlim_cur).c_str(),
         (unsigned long long)files.rlim_cur);
  for (char** variable = environ; *variable != nullptr; variable++) {
    const std::string text = *variable;
    if (!startsWith(text, "NCCL_")) continue;
    printf("  %s\n", startsWith(text, "NCCL_MOE_JOB_TOKEN") ? "NCCL_MOE_JOB_TOKEN=(set)" : text.c_str());
  }
  const std::string root = "/sys/class/infiniband";
  const std::vector<std::string> devices = listed(root);
  printf("# RDMA devices of the kernel: %zu\n", devices.size());
  for (const std::string& name : devices) {
    const std::string device = root + "/" + name;
    printf("  %s: PCI %s, NUMA node %s, %s, firmware %s\n", name.c_str(), lastPart(device + "/device").c_str(),
           fileText(device + "/device/numa_node").c_str(), fileText(device + "/hca_type").c_str(),
           fileText(device + "/fw_ver").c_str());
    for (const std::string& number : listed(device + "/ports")) {
      const std::string port = device + "/ports/" + number;
      printf("    port %s: %s, %s, %s, lid %s\n", number.c_str(), fileText(port + "/state").c_str(),
             fileText(port + "/rate").c_str(), fileText(port + "/link_layer").c_str(), fileText(port + "/lid").c_str());
      describeGids(port);
    }
  }
}

ncclResult_t describePlugin(const std::string& file, ncclDebugLogger_t logger, int gpu, Found* found) {
  std::unique_ptr<NetApi> net;
  std::vector<int> versions;
  printf("# plugin %s\n", file.c_str());
  MOECHECK(loadNet(file, &net, &versions));
  printf("  \"%s\", tables:", net->name());
  for (int version : versions) printf(" v%d", version);
  printf("\n");
  const ncclResult_t result = net->init(logger);
  if (result != ncclSuccess)
    return fail(result, "the plugin's init returned error %d", int(result)); // its own words were logged
  int n = 0;
  if (net->devices(&n) != ncclSuccess) return fail(ncclInternalError, "the plugin's devices() failed");
  printf("  devices: %d\n", n);
  found->nDevices = std::min(n, Found::maxDevices);
  found->hasDmaBuf = net->hasDmaBuf();
  for (int dev = 0; dev < found->nDevices; dev++) {
    Properties p;
    MOECHECK(net->properties(dev, &p));
    DeviceSummary& summary = found->devices[dev];
    snprintf(summary.name, sizeof(summary.name), "%s", p.name.c_str());
    net::PciAddress address;
    if (net::PciAddress::fromPath(p.pciPath, &address))
      snprintf(summary.pciAddress, sizeof(summary.pciAddress), "%s", address.text().c_str());
    summary.ptrSupport = p.ptrSupport;
    summary.speedMbps = p.speedMbps;
    printf("  %d: %s, %g Gb/s, port %d, latency %g us\n", dev, p.name.c_str(), p.speedMbps / 1000.0, p.port,
           double(p.latencyUs));
    printf("    PCI path %s, NUMA node %s\n", p.pciPath.empty() ? "(none)" : p.pciPath.c_str(),
           summary.pciAddress[0] == 0
             ? "?"
             : fileText("/sys/bus/pci/devices/" + std::string(summary.pciAddress) + "/numa_node").c_str());
    describePointers(p.ptrSupport);
    printf("    guid %016llx, connections %d, grouped receives %d, largest message %zu, physical devices %d\n",
           (unsigned long long)p.guid, p.maxComms, p.maxRecvs, p.maxP2pBytes, p.physicalDevices);
    printf("    registration %s, flush %s, rail %d, plane %d\n", p.regIsGlobal != 0 ? "global" : "per connection",
           p.forceFlush != 0 ? "always" : "where needed", p.railId, p.planeId);
  }
  printf("# GPUs\n");
  std::unique_ptr<CudaDriver> cuda;
  if (CudaDriver::open(&cuda) != ncclSuccess) {
    printf("  none: %s\n", lastError());
  } else {
    printf("  CUDA driver API %d.%d\n", cuda->version() / 1000, cuda->version() % 1000 / 10);
    found->nGpus = int(cuda->gpus().size());
    for (int i = 0; i < found->nGpus; i++) {
      const GpuInfo& info = cuda->gpus()[size_t(i)];
      printf("  %d: %s, PCI %s, GPUDirect RDMA %s, dma-buf %s\n", i, info.name.c_str(), info.pciAddress.c_str(),
             info.gpuDirect ? "yes" : "no", info.dmaBuf ? "yes" : "no");
      if (i == gpu) {
        found->gpuDirect = info.gpuDirect;
        found->gpuDmaBuf = info.dmaBuf;
      }
    }
  }
  describeDistances(*found);
  return ncclSuccess;
}

ncclResult_t checkTransfers(Link* link, Control* control, bool first, long* wrong, int* sizes) {
  // Round the powers of two, the bounds of inline, routing and striping thresholds, and odd ones.
  std::vector<size_t> all = {
    0,    1,    7,    8,     63,    64,    65,     127,    128,    129,     1000,          4095,    4096,         4097,
    8191, 8192, 8193, 65535, 65536, 65537, 131071, 131072, 131073, 1000003, (4 << 20) - 1, 4 << 20, (4 << 20) + 1};
  *wrong = 0;
  *sizes = 0;
  for (size_t bytes : all) {
    long here = 0;
    MOECHECK(verify(link, control, bytes, 8, first, &here));
    if (here != 0 && first) printf("    %zu bytes: %ld wrong\n", bytes, here);
    *wrong += here;
    ++*sizes;
  }
  return ncclSuccess;
}

} // namespace netperf
} // namespace moe
