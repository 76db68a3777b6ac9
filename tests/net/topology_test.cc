// The choice of NICs on the topologies of tests/topology: a table of machines, and the properties that hold for all.
#include "net/topology.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include "base/error.h"

namespace moe {
namespace net {
namespace {

using Answer = std::map<std::string, std::vector<std::string>>; // GPU -> NICs, by PCI address

std::string fixture(const std::string& name) {
  const std::string here = __FILE__;
  return here.substr(0, here.rfind('/')) + "/../topology/" + name + ".xml";
}

PciAddress at(const std::string& text) {
  PciAddress address;
  EXPECT_TRUE(PciAddress::parse(text, &address)) << text;
  return address;
}

std::vector<NicInfo> nicsAt(const std::vector<std::string>& addresses, int speedMbps = 400000, bool infiniband = true) {
  std::vector<NicInfo> nics;
  for (const std::string& address : addresses) {
    NicInfo nic;
    nic.name = "nic_" + address;
    nic.address = at(address);
    nic.speedMbps = speedMbps;
    nic.infiniband = infiniband;
    nics.push_back(nic);
  }
  return nics;
}

std::vector<NicInfo> operator+(std::vector<NicInfo> a, const std::vector<NicInfo>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Machine {
  std::string name;
  std::vector<NicInfo> nics;
  NicDistance distance; // of every GPU to its NICs
  Answer expected;
};

std::vector<Machine> machines() {
  std::vector<Machine> all;
  all.push_back(
    {"hgx-h100",
     // Eight compute NICs, two dual-port DPUs on Ethernet, and the slow card that carries the default route.
     nicsAt({"13:00.0", "23:00.0", "3b:00.0", "53:00.0", "93:00.0", "a3:00.0", "bb:00.0", "d3:00.0"}) +
       nicsAt({"31:00.0", "31:00.1", "b1:00.0", "b1:00.1"}, 200000, false) +
       nicsAt({"61:00.0", "61:00.1"}, 10000, false),
     NicDistance::sameSwitch,
     {{"0000:14:00.0", {"0000:13:00.0"}},
      {"0000:24:00.0", {"0000:23:00.0"}},
      {"0000:3c:00.0", {"0000:3b:00.0"}},
      {"0000:54:00.0", {"0000:53:00.0"}},
      {"0000:94:00.0", {"0000:93:00.0"}},
      {"0000:a4:00.0", {"0000:a3:00.0"}},
      {"0000:bc:00.0", {"0000:bb:00.0"}},
      {"0000:d4:00.0", {"0000:d3:00.0"}}}});
  all.push_back(
    {"dgx-a100",
     // The ninth is a storage NIC of the same kind, below another root of the first pair's NUMA node.
     nicsAt({"07:00.0", "08:00.0", "47:00.0", "48:00.0", "87:00.0", "88:00.0", "c7:00.0", "c8:00.0", "61:00.0"},
            200000),
     NicDistance::sameSwitches,
     {{"0000:03:00.0", {"0000:07:00.0"}},
      {"0000:04:00.0", {"0000:08:00.0"}},
      {"0000:43:00.0", {"0000:47:00.0"}},
      {"0000:44:00.0", {"0000:48:00.0"}},
      {"0000:83:00.0", {"0000:87:00.0"}},
      {"0000:84:00.0", {"0000:88:00.0"}},
      {"0000:c3:00.0", {"0000:c7:00.0"}},
      {"0000:c4:00.0", {"0000:c8:00.0"}}}});
  {
    Machine p5{"ec2-p5", {}, NicDistance::sameSwitch, {}};
    for (int bus : {0x44, 0x54, 0x64, 0x74, 0x84, 0x94, 0xa4, 0xb4}) {
      char gpu[16], nic[16];
      snprintf(gpu, sizeof(gpu), "0000:%02x:00.0", bus + 7);
      for (int i = 3; i < 7; i++) {
        snprintf(nic, sizeof(nic), "0000:%02x:00.0", bus + i);
        p5.nics = p5.nics + nicsAt({nic}, 100000, false);
        p5.expected[gpu].push_back(nic);
      }
    }
    all.push_back(p5);
  }
  all.push_back({"ec2-p4",
                 nicsAt({"10:1b.0", "20:1b.0", "90:1b.0", "a0:1b.0"}, 100000, false),
                 NicDistance::sameRoot,
                 {{"0000:10:1c.0", {"0000:10:1b.0"}},
                  {"0000:10:1d.0", {"0000:10:1b.0"}},
                  {"0000:20:1c.0", {"0000:20:1b.0"}},
                  {"0000:20:1d.0", {"0000:20:1b.0"}},
                  {"0000:90:1c.0", {"0000:90:1b.0"}},
                  {"0000:90:1d.0", {"0000:90:1b.0"}},
                  {"0000:a0:1c.0", {"0000:a0:1b.0"}},
                  {"0000:a0:1d.0", {"0000:a0:1b.0"}}}});
  all.push_back({"juwels-booster",
                 nicsAt({"04:00.0", "43:00.0", "83:00.0", "c3:00.0"}, 200000),
                 NicDistance::sameSwitch,
                 {{"0000:03:00.0", {"0000:04:00.0"}},
                  {"0000:44:00.0", {"0000:43:00.0"}},
                  {"0000:84:00.0", {"0000:83:00.0"}},
                  {"0000:c4:00.0", {"0000:c3:00.0"}}}});
  all.push_back({"gb200",
                 nicsAt({"0000:01:00.0", "0002:01:00.0", "0010:01:00.0", "0012:01:00.0"}) +
                   nicsAt({"0006:01:00.0", "0006:01:00.1", "0016:01:00.0", "0016:01:00.1"}, 200000, false),
                 NicDistance::sameNuma,
                 {{"0008:01:00.0", {"0000:01:00.0"}},
                  {"0009:01:00.0", {"0002:01:00.0"}},
                  {"0018:01:00.0", {"0010:01:00.0"}},
                  {"0019:01:00.0", {"0012:01:00.0"}}}});
  all.push_back({"ec2-gb200",
                 // Two NICs on the GPU's switch, two more elsewhere: never striped together.
                 nicsAt({"43:00.0", "44:00.0", "4b:00.0", "4c:00.0", "53:00.0", "54:00.0", "5b:00.0", "5c:00.0",
                         "93:00.0", "94:00.0", "9b:00.0", "9c:00.0", "a3:00.0", "a4:00.0", "ab:00.0", "ac:00.0"},
                        400000, false),
                 NicDistance::sameSwitch,
                 {{"0000:45:00.0", {"0000:43:00.0", "0000:44:00.0"}},
                  {"0000:55:00.0", {"0000:53:00.0", "0000:54:00.0"}},
                  {"0000:95:00.0", {"0000:93:00.0", "0000:94:00.0"}},
                  {"0000:a5:00.0", {"0000:a3:00.0", "0000:a4:00.0"}}}});
  {
    Machine flat{"flat-vm", {}, NicDistance::sameRoot, {}};
    Machine domains{"domains-vm", {}, NicDistance::sameNuma, {}};
    for (int i = 0; i < 8; i++) {
      char gpu[16], nic[16];
      snprintf(gpu, sizeof(gpu), "0000:00:%02x.0", 4 + i);
      snprintf(nic, sizeof(nic), "0000:00:%02x.0", 16 + i);
      flat.expected[gpu] = {nic};
      flat.nics = flat.nics + nicsAt({nic});
      snprintf(gpu, sizeof(gpu), "%04x:00:00.0", 1 + i);
      snprintf(nic, sizeof(nic), "%04x:00:00.0", 0x101 + i);
      domains.expected[gpu] = {nic};
      domains.nics = domains.nics + nicsAt({nic});
    }
    for (NicInfo& nic : flat.nics) nic.isVf = true; // the physical functions are the host's and not to be seen
    all.push_back(flat);
    all.push_back(domains);
  }
  return all;
}

Answer answer(const Topology& topology, const std::vector<PciAddress>& gpus, const std::vector<NicInfo>& nics,
              const std::string& user = "") {
  std::vector<NicChoice> choices;
  Answer result;
  EXPECT_EQ(chooseNics(topology, gpus, nics, user, &choices), ncclSuccess) << lastError();
  for (const NicChoice& choice : choices) {
    for (int nic : choice.nics) result[choice.gpu.text()].push_back(nics[size_t(nic)].address.text());
    if (choice.nics.empty()) result[choice.gpu.text()];
  }
  return result;
}

Topology loaded(const std::string& name) {
  Topology topology;
  EXPECT_EQ(Topology::load(fixture(name).c_str(), &topology), ncclSuccess) << lastError();
  return topology;
}

class Machines : public testing::TestWithParam<Machine> {};
INSTANTIATE_TEST_SUITE_P(Topology, Machines, testing::ValuesIn(machines()), [](const auto& info) {
  std::string name = info.param.name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});
void PrintTo(const Machine& machine, std::ostream* out) { *out << machine.name; }

TEST_P(Machines, givesEachGpuTheExpectedNics) {
  const Machine& machine = GetParam();
  const Topology topology = loaded(machine.name);
  ASSERT_EQ(topology.gpus().size(), machine.expected.size());
  EXPECT_EQ(answer(topology, topology.gpus(), machine.nics), machine.expected);
  for (const auto& entry : machine.expected) {
    for (const std::string& nic : entry.second) {
      EXPECT_EQ(topology.distance(at(entry.first), at(nic)), machine.distance) << entry.first << " " << nic;
    }
  }
}

TEST_P(Machines, isSymmetricAndCoversTheGpus) {
  const Machine& machine = GetParam();
  const Topology topology = loaded(machine.name);
  for (PciAddress gpu : topology.gpus()) {
    EXPECT_TRUE(topology.has(gpu));
    for (const NicInfo& nic : machine.nics) {
      EXPECT_EQ(topology.distance(gpu, nic.address), topology.distance(nic.address, gpu));
    }
  }
}

// Reverses the bridges and devices among the children of every object, recursively; hwloc insists on the order of CPUs.
// The fixtures have one element per line.
std::vector<std::string> reversed(const std::vector<std::string>& lines, size_t* at) {
  std::vector<std::string> result, io;
  while (*at < lines.size() && lines[*at].find("</object>") == std::string::npos) {
    const std::string& line = lines[(*at)++];
    std::vector<std::string> child{line};
    if (line.find("/>") == std::string::npos) {
      const std::vector<std::string> inner = reversed(lines, at);
      child.insert(child.end(), inner.begin(), inner.end());
      child.push_back(lines[(*at)++]);
    }
    const bool isIo = line.find("\"Bridge\"") != std::string::npos || line.find("\"PCIDev\"") != std::string::npos;
    std::vector<std::string>& into = isIo ? io : result;
    into.insert(isIo ? io.begin() : into.end(), child.begin(), child.end());
  }
  result.insert(result.end(), io.begin(), io.end());
  return result;
}

TEST_P(Machines, isStableUnderReordering) {
  const Machine& machine = GetParam();
  std::ifstream in(fixture(machine.name));
  std::vector<std::string> head, body;
  for (std::string line; std::getline(in, line);) {
    (line.find("object") == std::string::npos ? head : body).push_back(line);
  }
  ASSERT_EQ(head.size(), 4u) << "the header, and </topology>";
  size_t position = 0;
  const std::vector<std::string> turned = reversed(body, &position);
  ASSERT_EQ(turned.size(), body.size());
  ASSERT_NE(turned, body);
  char path[] = "/tmp/moe_topologyXXXXXX";
  const int fd = mkstemp(path);
  ASSERT_GE(fd, 0);
  close(fd);
  std::ofstream out(path);
  for (size_t i = 0; i < 3; i++) out << head[i] << "\n";
  for (const std::string& line : turned) out << line << "\n";
  out << head[3] << "\n";
  out.close();
  Topology topology;
  const ncclResult_t result = Topology::load(path, &topology);
  unlink(path);
  ASSERT_EQ(result, ncclSuccess) << lastError();

  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (int round = 0; round < 5; round++) {
    std::vector<PciAddress> gpus = topology.gpus();
    std::vector<NicInfo> nics = machine.nics;
    std::shuffle(gpus.begin(), gpus.end(), random);
    std::shuffle(nics.begin(), nics.end(), random);
    EXPECT_EQ(answer(topology, gpus, nics), machine.expected);
  }
}

// Whatever NICs are taken away: no GPU is left without while one is there, all of a GPU's NICs are equally far and
// none of the others is nearer, and no NIC has two GPUs while one just as near to either is idle.
TEST_P(Machines, isBalancedWithAnyNicsRemoved) {
  const Machine& machine = GetParam();
  const Topology topology = loaded(machine.name);
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (int round = 0; round < 200; round++) {
    std::vector<NicInfo> nics;
    for (const NicInfo& nic : machine.nics) {
      if (random() % 3 != 0) nics.push_back(nic);
    }
    std::vector<NicChoice> choices;
    std::vector<std::string> whyNot;
    ASSERT_EQ(chooseNics(topology, topology.gpus(), nics, "", &choices, &whyNot), ncclSuccess) << lastError();
    ASSERT_EQ(choices.size(), topology.gpus().size());
    std::vector<int> uses(nics.size(), 0);
    for (const NicChoice& choice : choices) {
      EXPECT_EQ(choice.nics.empty(), nics.empty());
      EXPECT_EQ(std::set<int>(choice.nics.begin(), choice.nics.end()).size(), choice.nics.size());
      for (int nic : choice.nics) {
        uses[size_t(nic)]++;
        EXPECT_EQ(whyNot[size_t(nic)], "");
        EXPECT_EQ(topology.distance(choice.gpu, nics[size_t(nic)].address), choice.distance);
        EXPECT_EQ(nics[size_t(nic)].speedMbps, nics[size_t(choice.nics[0])].speedMbps);
      }
      for (size_t i = 0; i < nics.size(); i++) {
        if (whyNot[i].empty()) {
          EXPECT_GE(topology.distance(choice.gpu, nics[i].address), choice.distance);
        }
      }
    }
    for (const NicChoice& choice : choices) {
      for (size_t i = 0; i < nics.size(); i++) {
        if (!whyNot[i].empty() || uses[i] != 0 || choice.nics.empty()) continue;
        if (topology.distance(choice.gpu, nics[i].address) != choice.distance) continue;
        for (int nic : choice.nics) EXPECT_EQ(uses[size_t(nic)], 1) << nics[i].name << " is idle";
      }
    }
  }
}

TEST(Topology, sharesTwoNicsBetweenThreeGpusAndNothingElse) {
  const Topology topology = loaded("sriov");
  const std::vector<NicInfo> nics = nicsAt({"15:00.0", "16:00.0", "81:00.0"});
  // The third GPU has no NIC below its root, but two on its NUMA node.
  const Answer expected = {
    {"0000:13:00.0", {"0000:15:00.0"}}, {"0000:14:00.0", {"0000:16:00.0"}}, {"0000:21:00.0", {"0000:15:00.0"}}};
  EXPECT_EQ(answer(topology, topology.gpus(), nics), expected);
}

TEST(Topology, leavesTheInnerNicToTheInnerGpu) {
  const Topology topology = loaded("nested");
  const Answer expected = {{"0000:12:00.0", {"0000:18:00.0"}}, {"0000:13:00.0", {"0000:14:00.0"}}};
  EXPECT_EQ(answer(topology, topology.gpus(), nicsAt({"14:00.0", "18:00.0"})), expected);
  EXPECT_EQ(topology.distance(at("12:00.0"), at("18:00.0")), NicDistance::sameRoot);
  EXPECT_EQ(topology.distance(at("12:00.0"), at("14:00.0")), NicDistance::sameRoot);
  EXPECT_EQ(topology.distance(at("13:00.0"), at("14:00.0")), NicDistance::sameSwitch);
}

TEST(Topology, tellsPackagesFromTheSystem) {
  const Topology topology = loaded("dgx-a100");
  EXPECT_EQ(topology.distance(at("43:00.0"), at("61:00.0")), NicDistance::sameNuma);
  EXPECT_EQ(topology.distance(at("43:00.0"), at("07:00.0")), NicDistance::samePackage);
  EXPECT_EQ(topology.distance(at("43:00.0"), at("87:00.0")), NicDistance::system);
  EXPECT_EQ(topology.distance(at("43:00.0"), at("99:00.0")), NicDistance::system) << "not there at all";
}

TEST(Topology, pinsThreadsNextToTheDevice) {
  const Topology topology = loaded("juwels-booster");
  cpu_set_t cpus;
  ASSERT_EQ(topology.cpusNear(at("83:00.0"), &cpus), ncclSuccess);
  EXPECT_EQ(CPU_COUNT(&cpus), 2);
  EXPECT_TRUE(CPU_ISSET(14, &cpus) && CPU_ISSET(15, &cpus));
  ASSERT_EQ(topology.cpusNear(at("77:00.0"), &cpus), ncclSuccess);
  EXPECT_EQ(CPU_COUNT(&cpus), 16) << "an unknown device is near to all";
}

TEST(Topology, leavesOutByRule) {
  const Topology topology = loaded("sriov");
  std::vector<NicInfo> nics = nicsAt({"15:00.0", "16:00.0", "81:00.0", "81:00.1"});
  nics[3].isVf = true;
  nics[3].physical = at("81:00.0");
  std::vector<NicChoice> choices;
  std::vector<std::string> whyNot;
  const auto reasons = [&](const char* user = "") {
    EXPECT_EQ(chooseNics(topology, topology.gpus(), nics, user, &choices, &whyNot), ncclSuccess) << lastError();
    return whyNot;
  };
  using Reasons = std::vector<std::string>;
  const std::string vf = "its physical function is used";
  EXPECT_EQ(reasons(), (Reasons{"", "", "", vf}));
  nics[2].active = false; // then the virtual function is the only way to that port
  EXPECT_EQ(reasons(), (Reasons{"", "", "its port is down", ""}));
  nics[2].active = true;
  nics[0].defaultRoute = true;
  EXPECT_EQ(reasons(), (Reasons{"it carries the default route (management)", "", "", vf}));
  EXPECT_EQ(reasons("nic_15:00.0"), (Reasons{"", "NCCL_MOE_NET_NIC does not name it",
                                             "NCCL_MOE_NET_NIC does not name it", "NCCL_MOE_NET_NIC does not name it"}))
    << "the user's word counts more";
  nics[0].defaultRoute = false;
  nics[1].speedMbps = 100000;
  EXPECT_EQ(reasons(), (Reasons{"", "it is slower than half of the fastest NIC", "", vf}));
  nics[1].speedMbps = 400000;
  nics[1].infiniband = false;
  EXPECT_EQ(reasons(), (Reasons{"", "it is Ethernet and the faster NICs are InfiniBand", "", vf}));
  nics = nicsAt({"15:00.0"});
  nics[0].defaultRoute = true;
  EXPECT_EQ(reasons(), (Reasons{""})) << "the only NIC stays";
  nics[0].active = false;
  EXPECT_EQ(reasons(), (Reasons{"its port is down"}));
  for (const NicChoice& choice : choices) EXPECT_TRUE(choice.nics.empty());
}

TEST(Topology, takesTheFasterOfEquallyNearNics) {
  const Topology topology = loaded("sriov");
  std::vector<NicInfo> nics = nicsAt({"15:00.0", "16:00.0"});
  nics[0].speedMbps = 200000;
  const Answer expected = {
    {"0000:13:00.0", {"0000:16:00.0"}}, {"0000:14:00.0", {"0000:16:00.0"}}, {"0000:21:00.0", {"0000:16:00.0"}}};
  EXPECT_EQ(answer(topology, topology.gpus(), nics), expected);
}

TEST(Topology, followsTheUser) {
  const Topology topology = loaded("juwels-booster");
  std::vector<NicInfo> nics = nicsAt({"04:00.0", "43:00.0", "83:00.0", "c3:00.0"});
  for (size_t i = 0; i < nics.size(); i++) nics[i].name = i == 3 ? "mlx5_10" : "mlx5_" + std::to_string(i);
  const std::vector<PciAddress> gpus = topology.gpus(); // 03, 44, 84, c4
  const std::string a = "0000:04:00.0", b = "0000:43:00.0", c = "0000:83:00.0", d = "0000:c3:00.0";
  const auto expect = [&](const std::string& user, const std::vector<std::vector<std::string>>& lists) {
    Answer expected;
    for (size_t i = 0; i < gpus.size(); i++) expected[gpus[i].text()] = lists[i];
    EXPECT_EQ(answer(topology, gpus, nics, user), expected) << user;
  };
  expect("mlx5_1", {{b}, {b}, {b}, {b}}); // not mlx5_10 too
  expect("mlx5_1*", {{b}, {b}, {d}, {d}});
  expect("^mlx5_1", {{a}, {a}, {c}, {d}}); // the GPU without goes to its package's other NIC
  expect("0000:83:00.0", {{c}, {c}, {c}, {c}});
  expect("mlx5_0:1", {{a}, {a}, {a}, {a}});
  expect("0=mlx5_10", {{d}, {b}, {c}, {d}});
  expect("0=mlx5_10,mlx5_2;44:00.0=mlx5_0", {{d, c}, {a}, {c}, {d}});
  for (const std::string bad : {"mlx5_3", "mlx5_0:2", "^mlx5_3", "4=mlx5_0", "x=mlx5_0", "=mlx5_0", "0=",
                                "0=mlx5_0;0=mlx5_1", "43:00.0=mlx5_0", "mlx5_0,", "0=mlx5_0;mlx5_1", "^", "0=mlx5_9"}) {
    std::vector<NicChoice> choices;
    EXPECT_EQ(chooseNics(topology, gpus, nics, bad, &choices), ncclInvalidArgument) << bad;
    EXPECT_NE(std::string(lastError()).find("NCCL_MOE_NET_NIC"), std::string::npos) << lastError();
  }
  nics[0].active = false;
  std::vector<NicChoice> choices;
  EXPECT_EQ(chooseNics(topology, gpus, nics, "0=mlx5_0", &choices), ncclInvalidArgument);
  EXPECT_NE(std::string(lastError()).find("down"), std::string::npos) << lastError();
}

TEST(Topology, givesPortsOfOneCardToDifferentGpus) {
  const Topology topology = loaded("sriov");
  std::vector<NicInfo> nics = nicsAt({"15:00.0", "15:00.0"});
  nics[0].port = 2;
  std::vector<NicChoice> choices;
  ASSERT_EQ(chooseNics(topology, {at("14:00.0"), at("13:00.0")}, nics, "", &choices), ncclSuccess);
  EXPECT_EQ(choices[0].nics, std::vector<int>{0});
  EXPECT_EQ(choices[1].nics, std::vector<int>{1});
}

TEST(Topology, worksWithoutAnyTopology) {
  const Topology none;
  EXPECT_TRUE(none.gpus().empty());
  const Answer expected = {{"0000:13:00.0", {"0000:15:00.0"}}, {"0000:14:00.0", {"0000:16:00.0"}}};
  EXPECT_EQ(answer(none, {at("14:00.0"), at("13:00.0")}, nicsAt({"16:00.0", "15:00.0"})), expected);
  EXPECT_TRUE(answer(none, {}, nicsAt({"16:00.0"})).empty());
  cpu_set_t cpus;
  ASSERT_EQ(none.cpusNear(at("13:00.0"), &cpus), ncclSuccess);
  EXPECT_GT(CPU_COUNT(&cpus), 0);
}

TEST(Topology, loadsThisMachine) {
  Topology topology;
  ASSERT_EQ(Topology::load(nullptr, &topology), ncclSuccess) << lastError();
  cpu_set_t cpus;
  ASSERT_EQ(topology.cpusNear(at("ff:1f.7"), &cpus), ncclSuccess);
  EXPECT_GT(CPU_COUNT(&cpus), 0);
}

TEST(Topology, honoursHwlocXmlFile) {
  ASSERT_EQ(setenv("HWLOC_XMLFILE", fixture("gb200").c_str(), 1), 0);
  Topology topology;
  EXPECT_EQ(Topology::load(nullptr, &topology), ncclSuccess) << lastError();
  unsetenv("HWLOC_XMLFILE");
  EXPECT_EQ(topology.gpus().size(), 4u);
}

TEST(Topology, refusesWhatIsNotATopology) {
  Topology topology;
  EXPECT_NE(Topology::load(fixture("missing").c_str(), &topology), ncclSuccess);
  EXPECT_NE(Topology::load(__FILE__, &topology), ncclSuccess);
  EXPECT_NE(std::string(lastError()).find("topology_test.cc"), std::string::npos) << lastError();
  EXPECT_TRUE(topology.gpus().empty());
}

TEST(PciAddress, isTheLastInAPath) {
  const std::string port = "/sys/devices/pci0000:00/0000:00:03.0";
  PciAddress address;
  for (const std::string& path :
       {port, port + "/", port + "/virtio2", port + "/virtio2/net/eth0", std::string("00:03.0")}) {
    address = PciAddress();
    EXPECT_TRUE(PciAddress::fromPath(path, &address)) << path;
    EXPECT_EQ(address.text(), "0000:00:03.0") << path;
  }
  EXPECT_TRUE(PciAddress::fromPath(port + "/0000:3b:00.1", &address));
  EXPECT_EQ(address.text(), "0000:3b:00.1");
  for (const char* path : {"", "/", "//", "eth0", "/sys/devices/virtual/net/lo"}) {
    EXPECT_FALSE(PciAddress::fromPath(path, &address)) << path;
  }
}

TEST(PciAddress, parsesEveryWritingAndNothingElse) {
  EXPECT_EQ(at("0000:3B:00.0").text(), "0000:3b:00.0");
  EXPECT_EQ(at("00000000:3B:00.0").text(), "0000:3b:00.0");
  EXPECT_EQ(at("3b:1f.7").text(), "0000:3b:1f.7");
  EXPECT_EQ(at("0019:01:00.0").text(), "0019:01:00.0");
  for (const char* bad : {"", "x", "3b:00", "3b:00.0x", "3b:00.0 ", " 3b:00.0", "3b:20.0", "3b:00.8", "0000:3b:00.0.0",
                          "-1:00.0", "0000:0000:3b:00.0", "3b:+1.0", "123456789:00:00.0"}) {
    PciAddress address;
    EXPECT_FALSE(PciAddress::parse(bad, &address)) << bad;
  }
}

} // namespace
} // namespace net
} // namespace moe
