// Which NICs serve which GPU: pure functions on a hardware topology, whether this machine's or one from an hwloc XML
// file, so that the choice for any machine can be tested on any other.
//
// libhwloc is loaded at run time.  Where it is missing, all distances are equal and NICs are spread over the GPUs by
// their PCI addresses.
#pragma once

#include <sched.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "nccl_moe.h"

struct hwloc_topology;

namespace moe {
namespace net {

// A PCI address as hwloc, sysfs, CUDA (upper case) and NVML (8-digit domain) write it: [domain:]bus:device.function.
struct PciAddress {
  uint32_t domain = 0;
  uint8_t bus = 0, device = 0, function = 0;
  static bool parse(const std::string& text, PciAddress* out);
  // Of a device in sysfs: the last part of the path that is an address (below it there may be virtio2 or the like).
  static bool fromPath(const std::string& path, PciAddress* out);
  uint64_t key() const { return uint64_t(domain) << 24 | bus << 16 | device << 8 | function; }
  bool operator==(const PciAddress& other) const { return key() == other.key(); }
  bool operator<(const PciAddress& other) const { return key() < other.key(); }
  std::string text() const;
};

// From near to far, with the name that `nvidia-smi topo` gives to the class.
enum class NicDistance {
  sameSwitch,   // PIX: one PCI switch between the two
  sameSwitches, // PXB: several switches, below one root port
  sameRoot,     // PHB: across the ports of one root complex
  sameNuma,     // NODE
  samePackage,  // SOCK: two NUMA nodes of one package (nvidia-smi says SYS)
  system        // SYS, and whatever is not known
};
const char* nicDistanceName(NicDistance distance);

class Topology {
 public:
  Topology();
  ~Topology();
  Topology(Topology&&) noexcept;
  Topology& operator=(Topology&&) noexcept;

  // xmlFile NULL: this machine, or the file that HWLOC_XMLFILE names.
  static ncclResult_t load(const char* xmlFile, Topology* topology);

  // NVIDIA's GPUs in the order of their addresses (the order of nvidia-smi), whichever of them CUDA shows this process.
  std::vector<PciAddress> gpus() const;
  bool has(PciAddress device) const;
  NicDistance distance(PciAddress a, PciAddress b) const;
  // The CPUs next to the device, to pin a thread that serves it; all of the machine's where that is not known.
  ncclResult_t cpusNear(PciAddress device, cpu_set_t* cpus) const;

 private:
  struct Destroy {
    void operator()(hwloc_topology* topology) const;
  };
  std::unique_ptr<hwloc_topology, Destroy> topology_;
};

// A port of a verbs device, as the transport sees it.
struct NicInfo {
  std::string name; // the verbs device
  int port = 1;
  PciAddress address;
  bool isVf = false;   // a virtual function ...
  PciAddress physical; // ... and the physical function that it belongs to
  int speedMbps = 0;
  bool active = true;
  bool infiniband = false;   // link layer: InfiniBand, or else Ethernet (RoCE)
  bool defaultRoute = false; // its network interface carries the host's default route
};

struct NicChoice {
  PciAddress gpu;
  NicDistance distance = NicDistance::system;
  std::vector<int> nics; // indices into the NICs given; all at the same distance and of the same speed
};

// Assigns NICs to GPUs.  Every process of a machine must pass the same GPUs (Topology::gpus) and NICs to get the same
// answer; their order does not matter.
//
// Left out, in this order, unless the user names the NIC: ports that are down; virtual functions whose physical
// function is there too; the link layer with the smaller total speed (a job's NICs must reach one another); NICs slower
// than half of the fastest; the NIC of the default route if others remain (management).  whyNot, if given, receives
// for each NIC the reason, or "".
//
// A GPU uses only the NICs nearest to it, and of those the fastest: never a mix.  GPUs that have the same nearest NICs
// share them out evenly: several NICs each, or one each, and NICs are shared only where GPUs outnumber them.
//
// user is NCCL_MOE_NET_NIC:
//   "mlx5_0,mlx5_1"            only these             "^mlx5_4,mlx5_5"  all but these
//   "0=mlx5_0;1=mlx5_1,mlx5_2" these for these GPUs (nvidia-smi's index or PCI address), the rest as without
// A NIC is a verbs device, with ":port" for one of its ports, or a PCI address; names match whole, or as a prefix
// when they end in '*'.  What matches nothing is an error.
ncclResult_t chooseNics(const Topology& topology, const std::vector<PciAddress>& gpus, const std::vector<NicInfo>& nics,
                        const std::string& user, std::vector<NicChoice>* choices,
                        std::vector<std::string>* whyNot = nullptr);

// Which NICs a process may use at all by that choice; where it maps GPUs (*maps), all of them.
ncclResult_t usableNics(const std::vector<NicInfo>& nics, const std::string& user, std::vector<bool>* usable,
                        bool* maps);

} // namespace net
} // namespace moe
