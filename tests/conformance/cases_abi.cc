// The tables, init and finalize, devices.
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <set>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

namespace conformance {
namespace {

// A message each way between ranks 0 and 1, to see that the plugin works.
void exchange(Rank& r) {
  int peer = 1 - r.rank;
  void* out = nullptr;
  void* in = nullptr;
  if (r.rank == 0) {
    out = connectTo(r, peer);
    in = acceptFrom(r, peer);
    sendMessage(r, out, 3000, 1);
    recvMessage(r, in, 5000, 2);
  } else {
    in = acceptFrom(r, peer);
    out = connectTo(r, peer);
    recvMessage(r, in, 3000, 1);
    sendMessage(r, out, 5000, 2);
  }
  r.meet(peer);
  closeSend(r, out);
  closeRecv(r, in);
}

CASE("abi.tables", 1, 20, [](Rank& r) {
  std::string name;
  int found = 0;
  for (int v = 8; v <= 12; v++) {
    Net net;
    if (!net.load(r.options->plugin, v).empty()) continue;
    found++;
    for (const auto& f : net.missing()) require(false, "version %d: %s is NULL", v, f.c_str());
    require(!net.name().empty(), "version %d has no name", v);
    require(name.empty() || net.name() == name, "version %d is called %s, another %s", v, net.name().c_str(),
            name.c_str());
    name = net.name();
  }
  require(found > 0, "no table of versions 8 to 12");
});

CASE("abi.exports", 1, 20, [](Rank& r) {
  for (const auto& symbol : exportedSymbols(r.options->plugin))
    require(symbol.rfind("nccl", 0) == 0, "symbol %s is exported", symbol.c_str());
});

CASE("abi.name_survives", 1, 20, [](Rank& r) {
  std::string error = r.net.load(r.options->plugin, r.options->version);
  require(error.empty(), "loading the plugin: %s", error.c_str());
  std::string before = r.net.name();
  requireOk(r.net.init());
  require(r.net.name() == before, "init changed the name from %s to %s", before.c_str(), r.net.name().c_str());
  r.stop();
  require(r.net.name() == before, "finalize changed the name from %s to %s", before.c_str(), r.net.name().c_str());
});

CASE("abi.init_per_communicator", 2, 60, [](Rank& r) {
  r.start();
  for (int i = 0; i < 4; i++) requireOk(r.net.init());
  exchange(r);
  if (r.net.hasFinalize()) {
    for (int i = 0; i < 4; i++) requireOk(r.net.finalize());
    exchange(r); // one context is left
  }
  r.stop();
});

CASE("abi.init_again", 2, 60, [](Rank& r) {
  r.start();
  if (!r.net.hasFinalize()) skip("version %d has no finalize", r.net.version());
  for (int i = 0; i < 3; i++) {
    exchange(r);
    r.stop();
    requireOk(r.net.init());
    int n = 0;
    requireOk(r.net.devices(&n));
  }
  exchange(r);
  r.stop();
});

CASE("abi.reload", 2, 60, [](Rank& r) {
  for (int i = 0; i < 3; i++) {
    r.start();
    exchange(r);
    r.stop();
    r.meet(1 - r.rank);
    r.net.unload();
  }
});

CASE("abi.finalize_null", 1, 20, [](Rank& r) {
  r.start();
  if (!r.net.hasFinalize()) skip("version %d has no finalize", r.net.version());
  r.net.finalizeNull(); // NCCL does that after a failed init; any result, no crash, and the context stays usable
  int n = 0;
  requireOk(r.net.devices(&n));
  r.stop();
});

CASE("abi.fork", 2, 60, [](Rank& r) {
  r.start();
  if (r.rank == 0) {
    pid_t child = fork();
    if (child == 0) _exit(0); // ends without looking at the plugin, as a program's helper does
    int status = 0;
    waitpid(child, &status, 0);
  }
  exchange(r);
  if (r.rank == 0) {
    // A child that execs must not keep the plugin's descriptors.
    pid_t child = fork();
    if (child == 0) {
      execl("/bin/true", "true", static_cast<char*>(nullptr));
      _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the forked child ended with status %d", status);
  }
  exchange(r);
  r.stop();
});

CASE("abi.two_versions", 2, 60, [](Rank& r) {
  r.start();
  Net other;
  int v = 0;
  for (int candidate = 8; candidate < r.net.version() && v == 0; candidate++)
    if (other.load(r.options->plugin, candidate).empty()) v = candidate;
  if (v == 0) skip("there is one version only");
  unsetenv("FAKEVERBS_REPORT"); // the older version has no finalize: its context stays
  requireOk(other.init());
  int a = 0, b = 0;
  requireOk(r.net.devices(&a));
  requireOk(other.devices(&b));
  require(a == b, "%d devices in version %d, %d in version %d", a, r.net.version(), b, v);
  exchange(r);
  r.stop();
});

CASE("devices.properties", 1, 20, [](Rank& r) {
  r.start();
  int n = 0;
  requireOk(r.net.devices(&n));
  std::set<std::string> names;
  for (int dev = 0; dev < n; dev++) {
    Properties p;
    requireOk(r.net.properties(dev, &p));
    require(!p.name.empty(), "device %d has no name", dev);
    require(names.insert(p.name).second, "two devices are called %s", p.name.c_str());
    require(p.ptrSupport & NCCL_PTR_HOST, "device %d does not take host memory", dev);
    require((p.ptrSupport & ~(NCCL_PTR_HOST | NCCL_PTR_CUDA | NCCL_PTR_DMABUF)) == 0, "device %d: ptrSupport is %d",
            dev, p.ptrSupport);
    require(p.speed > 0 && p.speed <= 10000000, "device %d: %d Mbit/s", dev, p.speed);
    require(std::isfinite(p.latency) && p.latency >= 0 && p.latency < 1e6f, "device %d: latency %g us", dev,
            double(p.latency));
    require(p.maxComms > 0, "device %d: maxComms is %d", dev, p.maxComms);
    require(p.maxRecvs >= 1 && p.maxRecvs <= 64, "device %d: maxRecvs is %d", dev, p.maxRecvs);
    require(p.netDeviceType == NCCL_NET_DEVICE_HOST, "device %d: netDeviceType is %d", dev, p.netDeviceType);
    if (r.net.version() >= 9) {
      require(p.maxP2pBytes > 0 && p.maxP2pBytes <= NCCL_MAX_NET_SIZE_BYTES, "device %d: maxP2pBytes is %zu", dev,
              p.maxP2pBytes);
      require(p.maxCollBytes > 0 && p.maxCollBytes <= NCCL_MAX_NET_SIZE_BYTES, "device %d: maxCollBytes is %zu", dev,
              p.maxCollBytes);
      require(p.nVirtual >= 0 && p.nVirtual <= 8, "device %d: %d virtual members", dev, p.nVirtual);
      if (p.nVirtual == 1) require(p.virtualDev0 == dev, "device %d consists of device %d", dev, p.virtualDev0);
    }
    if (p.hasPciPath) {
      char resolved[PATH_MAX];
      require(realpath(p.pciPath.c_str(), resolved) != nullptr, "device %d: pciPath %s does not exist", dev,
              p.pciPath.c_str());
      require(strncmp(resolved, "/sys/", 5) == 0, "device %d: pciPath %s is not in /sys", dev, p.pciPath.c_str());
    }
  }
  r.stop();
});

CASE("devices.out_of_range", 1, 20, [](Rank& r) {
  r.start();
  int n = 0;
  requireOk(r.net.devices(&n));
  Properties p;
  for (int dev : {-1, n, n + 100, INT_MAX, INT_MIN}) {
    require(r.net.properties(dev, &p) != ncclSuccess, "getProperties(%d) of %d devices succeeds", dev, n);
    Handle handle;
    void* comm = nullptr;
    require(r.net.listen(dev, handle.bytes, &comm) != ncclSuccess, "listen on device %d of %d succeeds", dev, n);
  }
  r.stop();
});

CASE("devices.virtual", 1, 20, [](Rank& r) {
  r.start();
  if (!r.net.hasVDevice()) skip("makeVDevice is NULL");
  int n = 0;
  requireOk(r.net.devices(&n));
  int dev = -1;
  require(r.net.makeVDevice(&dev, {}) != ncclSuccess, "a virtual device of no members");
  require(r.net.makeVDevice(&dev, {0, 0}) != ncclSuccess, "a virtual device with one member twice");
  require(r.net.makeVDevice(&dev, {0, n}) != ncclSuccess, "a virtual device with member %d of %d", n, n);
  require(r.net.makeVDevice(&dev, {-1}) != ncclSuccess, "a virtual device with member -1");
  r.stop();
});

CASE("devices.virtual_again", 2, 60, [](Rank& r) {
  // An NCCL that keeps the plugin loaded after its last communicator neither counts nor merges devices again.
  r.start();
  if (!r.net.hasVDevice() || !r.net.hasFinalize())
    skip("version %d has no makeVDevice or no finalize", r.net.version());
  int n = 0, merged = -1;
  requireOk(r.net.devices(&n));
  if (n < 2 || r.net.makeVDevice(&merged, {0, 1}) != ncclSuccess) skip("no two devices that can be one");
  Properties before, after;
  requireOk(r.net.properties(merged, &before));
  r.stop();
  requireOk(r.net.init());
  requireOk(r.net.properties(0, &after));
  requireOk(r.net.properties(merged, &after));
  require(after.name == before.name && after.nVirtual == before.nVirtual, "device %d was %s and is %s now", merged,
          before.name.c_str(), after.name.c_str());
  r.dev = merged;
  exchange(r);
  r.stop();
  // One that counts again begins with the devices that there are.
  int again = 0;
  requireOk(r.net.init());
  requireOk(r.net.devices(&again));
  require(again == (r.options->merge.empty() ? n : n - 1), "%d devices at first, %d after the next init", n, again);
  requireOk(r.net.makeVDevice(&merged, {0, 1}));
  r.dev = merged;
  exchange(r);
  r.stop();
});

} // namespace
} // namespace conformance
