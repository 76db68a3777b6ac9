#include "net/topology.h"

#include <dlfcn.h>
#include <hwloc.h>

#include <algorithm>
#include <cstdio>

#include "base/error.h"

namespace moe {
namespace net {
namespace {

// The functions of libhwloc that are used.  Its inline helpers call more of them, so objects are walked by hand.
struct Hwloc {
  decltype(&hwloc_topology_init) init;
  decltype(&hwloc_topology_destroy) destroy;
  decltype(&hwloc_topology_abi_check) abiCheck;
  decltype(&hwloc_topology_load) load;
  decltype(&hwloc_topology_set_xml) setXml;
  decltype(&hwloc_topology_set_components) setComponents;
  decltype(&hwloc_topology_set_type_filter) setTypeFilter;
  decltype(&hwloc_get_nbobjs_by_depth) count;
  decltype(&hwloc_get_obj_by_depth) object;
  decltype(&hwloc_bitmap_next) bitmapNext;
  decltype(&hwloc_bitmap_isequal) bitmapIsEqual;
  decltype(&hwloc_bitmap_isincluded) bitmapIsIncluded;
};

template <typename F> bool resolve(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  return *function != nullptr;
}

// NULL where libhwloc cannot be loaded.  It stays loaded: threads may be inside it when the process ends.
const Hwloc* hwlocLibrary() {
  static Hwloc hwloc;
  static const bool loaded = [] {
    void* library = dlopen("libhwloc.so.15", RTLD_NOW | RTLD_LOCAL);
    return library != nullptr && resolve(library, "hwloc_topology_init", &hwloc.init) &&
           resolve(library, "hwloc_topology_destroy", &hwloc.destroy) &&
           resolve(library, "hwloc_topology_abi_check", &hwloc.abiCheck) &&
           resolve(library, "hwloc_topology_load", &hwloc.load) &&
           resolve(library, "hwloc_topology_set_xml", &hwloc.setXml) &&
           resolve(library, "hwloc_topology_set_components", &hwloc.setComponents) &&
           resolve(library, "hwloc_topology_set_type_filter", &hwloc.setTypeFilter) &&
           resolve(library, "hwloc_get_nbobjs_by_depth", &hwloc.count) &&
           resolve(library, "hwloc_get_obj_by_depth", &hwloc.object) &&
           resolve(library, "hwloc_bitmap_next", &hwloc.bitmapNext) &&
           resolve(library, "hwloc_bitmap_isequal", &hwloc.bitmapIsEqual) &&
           resolve(library, "hwloc_bitmap_isincluded", &hwloc.bitmapIsIncluded);
  }();
  return loaded ? &hwloc : nullptr;
}

constexpr unsigned nvidiaVendor = 0x10de;
constexpr unsigned displayClass = 0x03;

PciAddress addressOf(const decltype(hwloc_obj_attr_u::pcidev)& pci) {
  PciAddress address;
  address.domain = pci.domain;
  address.bus = pci.bus;
  address.device = pci.dev;
  address.function = pci.func;
  return address;
}

hwloc_obj_t findDevice(hwloc_topology* topology, PciAddress device) {
  if (topology == nullptr) return nullptr;
  const Hwloc& hwloc = *hwlocLibrary();
  const unsigned n = hwloc.count(topology, HWLOC_TYPE_DEPTH_PCI_DEVICE);
  for (unsigned i = 0; i < n; i++) {
    hwloc_obj_t object = hwloc.object(topology, HWLOC_TYPE_DEPTH_PCI_DEVICE, i);
    if (addressOf(object->attr->pcidev) == device) return object;
  }
  return nullptr;
}

bool isIo(hwloc_obj_t object) {
  return object->type == HWLOC_OBJ_BRIDGE || object->type == HWLOC_OBJ_PCI_DEVICE ||
         object->type == HWLOC_OBJ_OS_DEVICE;
}

bool isHostBridge(hwloc_obj_t object) {
  return object->type == HWLOC_OBJ_BRIDGE && object->attr->bridge.upstream_type == HWLOC_OBJ_BRIDGE_HOST;
}

// The part of the machine that a PCI device hangs off.
hwloc_obj_t localityOf(hwloc_obj_t device) {
  hwloc_obj_t object = device;
  while (isIo(object)) object = object->parent;
  return object;
}

// The NUMA node that holds all CPUs of the object; NULL if several have a part of them.
hwloc_obj_t numaOf(hwloc_topology* topology, hwloc_obj_t object) {
  const Hwloc& hwloc = *hwlocLibrary();
  const unsigned n = hwloc.count(topology, HWLOC_TYPE_DEPTH_NUMANODE);
  for (unsigned i = 0; i < n; i++) {
    hwloc_obj_t node = hwloc.object(topology, HWLOC_TYPE_DEPTH_NUMANODE, i);
    // A node without CPUs (a GPU's memory on Grace) includes nothing but the empty set.
    if (hwloc.bitmapNext(object->cpuset, -1) >= 0 && hwloc.bitmapIsIncluded(object->cpuset, node->cpuset)) return node;
  }
  return nullptr;
}

hwloc_obj_t packageOf(hwloc_obj_t object) {
  while (object != nullptr && object->type != HWLOC_OBJ_PACKAGE) object = object->parent;
  return object;
}

} // namespace

bool PciAddress::parse(const std::string& text, PciAddress* out) {
  unsigned domain = 0, bus = 0, device = 0, function = 0;
  int end = 0;
  const bool full = sscanf(text.c_str(), "%8x:%2x:%2x.%1x%n", &domain, &bus, &device, &function, &end) == 4 &&
                    text.size() == size_t(end);
  if (!full) {
    domain = 0;
    end = 0;
    if (sscanf(text.c_str(), "%2x:%2x.%1x%n", &bus, &device, &function, &end) != 3 || text.size() != size_t(end))
      return false;
  }
  if (text.find_first_not_of("0123456789abcdefABCDEF:.") != std::string::npos || device > 31 || function > 7)
    return false;
  out->domain = domain;
  out->bus = uint8_t(bus);
  out->device = uint8_t(device);
  out->function = uint8_t(function);
  return true;
}

bool PciAddress::fromPath(const std::string& path, PciAddress* out) {
  for (size_t end = path.size(); end != std::string::npos && end > 0;) {
    const size_t slash = path.rfind('/', end - 1);
    const size_t begin = slash == std::string::npos ? 0 : slash + 1;
    if (parse(path.substr(begin, end - begin), out)) return true;
    end = slash;
  }
  return false;
}

std::string PciAddress::text() const {
  char buffer[32];
  snprintf(buffer, sizeof(buffer), "%04x:%02x:%02x.%x", domain, bus, device, function);
  return buffer;
}

const char* nicDistanceName(NicDistance distance) {
  switch (distance) {
  case NicDistance::sameSwitch:
    return "PIX";
  case NicDistance::sameSwitches:
    return "PXB";
  case NicDistance::sameRoot:
    return "PHB";
  case NicDistance::sameNuma:
    return "NODE";
  case NicDistance::samePackage:
    return "SOCK";
  case NicDistance::system:
    break;
  }
  return "SYS";
}

Topology::Topology() = default;
Topology::~Topology() = default;
Topology::Topology(Topology&&) noexcept = default;
Topology& Topology::operator=(Topology&&) noexcept = default;

void Topology::Destroy::operator()(hwloc_topology* topology) const { hwlocLibrary()->destroy(topology); }

ncclResult_t Topology::load(const char* xmlFile, Topology* topology) {
  topology->topology_.reset();
  const Hwloc* hwloc = hwlocLibrary();
  if (hwloc == nullptr) {
    if (xmlFile != nullptr) return fail(ncclSystemError, "libhwloc.so.15 is needed to read %s", xmlFile);
    MOE_WARN("libhwloc.so.15 not found: NICs are given to GPUs without regard to their distance");
    return ncclSuccess;
  }
  hwloc_topology* raw = nullptr;
  if (hwloc->init(&raw) != 0) return fail(ncclSystemError, "hwloc_topology_init failed: %s", strerror(errno));
  std::unique_ptr<hwloc_topology, Destroy> owner(raw);
  if (hwloc->abiCheck(raw) != 0) return fail(ncclSystemError, "libhwloc.so.15 has another ABI than this library");
  if (xmlFile != nullptr && hwloc->setXml(raw, xmlFile) != 0)
    return fail(ncclInvalidArgument, "%s is not an hwloc XML file", xmlFile);
  // hwloc's plugins would start CUDA, OpenCL, ... within a library that is loaded by NCCL.
  for (const char* component : {"cuda", "nvml", "opencl", "rsmi", "levelzero", "gl"}) {
    hwloc->setComponents(raw, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, component);
  }
  // The default filter drops bridges, and with them the switches.
  if (hwloc->setTypeFilter(raw, HWLOC_OBJ_BRIDGE, HWLOC_TYPE_FILTER_KEEP_ALL) != 0 ||
      hwloc->setTypeFilter(raw, HWLOC_OBJ_PCI_DEVICE, HWLOC_TYPE_FILTER_KEEP_ALL) != 0 || hwloc->load(raw) != 0)
    return fail(ncclSystemError, "hwloc cannot load the topology of %s", xmlFile != nullptr ? xmlFile : "this machine");
  topology->topology_ = std::move(owner);
  return ncclSuccess;
}

std::vector<PciAddress> Topology::gpus() const {
  std::vector<PciAddress> gpus;
  if (!topology_) return gpus;
  const Hwloc& hwloc = *hwlocLibrary();
  const unsigned n = hwloc.count(topology_.get(), HWLOC_TYPE_DEPTH_PCI_DEVICE);
  for (unsigned i = 0; i < n; i++) {
    const decltype(hwloc_obj_attr_u::pcidev)& pci =
      hwloc.object(topology_.get(), HWLOC_TYPE_DEPTH_PCI_DEVICE, i)->attr->pcidev;
    if (pci.vendor_id == nvidiaVendor && pci.class_id >> 8 == displayClass) gpus.push_back(addressOf(pci));
  }
  std::sort(gpus.begin(), gpus.end());
  return gpus;
}

bool Topology::has(PciAddress device) const { return findDevice(topology_.get(), device) != nullptr; }

NicDistance Topology::distance(PciAddress a, PciAddress b) const {
  hwloc_obj_t first = findDevice(topology_.get(), a);
  hwloc_obj_t second = findDevice(topology_.get(), b);
  if (first == nullptr || second == nullptr) return NicDistance::system;
  // Walk up from both to the lowest common ancestor, counting the bridges below it.
  int bridges = 0;
  for (hwloc_obj_t up = first->parent; up != nullptr && isIo(up); up = up->parent, bridges++) {
    int others = 0;
    for (hwloc_obj_t down = second->parent; down != nullptr && isIo(down); down = down->parent, others++) {
      if (up != down) continue;
      if (isHostBridge(up)) return NicDistance::sameRoot;
      // A switch is its upstream bridge and one downstream bridge per port: one bridge below the ancestor at most.
      return bridges <= 1 && others <= 1 ? NicDistance::sameSwitch : NicDistance::sameSwitches;
    }
  }
  const Hwloc& hwloc = *hwlocLibrary();
  hwloc_obj_t near = localityOf(first), far = localityOf(second);
  hwloc_obj_t numa = numaOf(topology_.get(), near);
  if (numa != nullptr && numa == numaOf(topology_.get(), far)) return NicDistance::sameNuma;
  hwloc_obj_t package = packageOf(near);
  if (package != nullptr && package == packageOf(far)) {
    // One CPU set for both means that the firmware tells no more than the package.
    return hwloc.bitmapIsEqual(near->cpuset, far->cpuset) ? NicDistance::sameNuma : NicDistance::samePackage;
  }
  return NicDistance::system;
}

ncclResult_t Topology::cpusNear(PciAddress device, cpu_set_t* cpus) const {
  CPU_ZERO(cpus);
  if (!topology_) {
    if (sched_getaffinity(0, sizeof(*cpus), cpus) != 0)
      return fail(ncclSystemError, "sched_getaffinity failed: %s", strerror(errno));
    return ncclSuccess;
  }
  const Hwloc& hwloc = *hwlocLibrary();
  hwloc_obj_t object = findDevice(topology_.get(), device);
  object = object != nullptr ? localityOf(object) : hwloc.object(topology_.get(), 0, 0);
  for (int cpu = hwloc.bitmapNext(object->cpuset, -1); cpu >= 0 && cpu < CPU_SETSIZE;
       cpu = hwloc.bitmapNext(object->cpuset, cpu)) {
    CPU_SET(cpu, cpus);
  }
  return ncclSuccess;
}

} // namespace net
} // namespace moe
