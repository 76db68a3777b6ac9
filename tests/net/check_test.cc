// What net_perf --check says about NICs and GPUs, for devices as the plugin names them.
#include <gtest/gtest.h>

#include "base/error.h"
#include "perf/net/check.h"

namespace moe {
namespace netperf {
namespace {

// The machine's NICs as far as the plugin has devices for them: each has one port.
Found devicesOf(const std::vector<std::pair<std::string, std::string>>& nics) {
  Found found = {};
  for (const auto& [name, address] : nics) {
    DeviceSummary& device = found.devices[found.nDevices++];
    snprintf(device.name, sizeof(device.name), "%s", name.c_str());
    snprintf(device.pciAddress, sizeof(device.pciAddress), "%s", address.c_str());
    device.speedMbps = 400000;
  }
  return found;
}

class Check : public testing::Test {
 protected:
  void SetUp() override {
    const std::string here = __FILE__;
    ASSERT_EQ(net::Topology::load((here.substr(0, here.rfind('/')) + "/../topology/hgx-h100.xml").c_str(), &topology_),
              ncclSuccess);
  }
  // The NIC chosen for the GPU, or what went wrong.
  std::string choice(const Found& found, const std::string& user, size_t gpu) {
    std::vector<net::NicInfo> nics;
    std::vector<net::NicChoice> choices;
    if (chooseFromDevices(topology_, found, user, &nics, &choices) != ncclSuccess) return lastError();
    if (choices.size() <= gpu || choices[gpu].nics.size() != 1) return "not one NIC";
    const net::NicInfo& nic = nics[size_t(choices[gpu].nics[0])];
    return nic.name + " port " + std::to_string(nic.port);
  }
  net::Topology topology_;
};

TEST_F(Check, NicVariableNamesNicsWithoutTheirPort) {
  EXPECT_EQ(choice(devicesOf({{"mlx5_0:1", "0000:13:00.0"}}), "mlx5_0", 0), "mlx5_0 port 1");
  EXPECT_EQ(choice(devicesOf({{"mlx5_0:2", "0000:13:00.0"}}), "mlx5_0:2", 0), "mlx5_0 port 2");
}

// The plugin has no device for a NIC that is left out, so nothing there is called by its name.
TEST_F(Check, ExcludedNicIsNotLookedFor) {
  EXPECT_EQ(choice(devicesOf({{"mlx5_0:1", "0000:13:00.0"}, {"mlx5_1:1", "0000:23:00.0"}}), "^mlx5_4", 1),
            "mlx5_1 port 1");
}

TEST_F(Check, MappedGpuHasItsNic) {
  const Found found = devicesOf({{"mlx5_0:1", "0000:13:00.0"}, {"mlx5_1:1", "0000:23:00.0"}});
  EXPECT_EQ(choice(found, "0=mlx5_1", 0), "mlx5_1 port 1");
  EXPECT_NE(choice(found, "0=mlx5_9", 0).find("mlx5_9"), std::string::npos);
}

TEST_F(Check, NamesWithoutPortAndDevicesWithoutAddress) {
  EXPECT_EQ(choice(devicesOf({{"lo", ""}, {"eth:a", "0000:13:00.0"}}), "", 0), "eth:a port 1");
}

} // namespace
} // namespace netperf
} // namespace moe
