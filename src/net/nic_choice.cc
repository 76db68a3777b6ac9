// chooseNics: which NICs are left out, what the user asked for, and who gets which.
#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "net/topology.h"

namespace moe {
namespace net {
namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (;;) {
    const size_t end = text.find(separator, begin);
    parts.push_back(text.substr(begin, end == std::string::npos ? end : end - begin));
    if (end == std::string::npos) return parts;
    begin = end + 1;
  }
}

bool nicMatches(const NicInfo& nic, const std::string& pattern) {
  PciAddress address;
  if (PciAddress::parse(pattern, &address)) return nic.address == address;
  if (!pattern.empty() && pattern.back() == '*')
    return nic.name.compare(0, pattern.size() - 1, pattern, 0, pattern.size() - 1) == 0;
  return pattern == nic.name || pattern == nic.name + ":" + std::to_string(nic.port);
}

// Appends the NICs that a comma-separated list names, each once.
ncclResult_t parseNics(const std::string& list, const std::vector<NicInfo>& nics, std::vector<int>* found) {
  for (const std::string& pattern : split(list, ',')) {
    bool any = false;
    for (size_t i = 0; i < nics.size(); i++) {
      if (!nicMatches(nics[i], pattern)) continue;
      any = true;
      if (std::find(found->begin(), found->end(), int(i)) == found->end()) found->push_back(int(i));
    }
    if (!any) return fail(ncclInvalidArgument, "NCCL_MOE_NET_NIC: no NIC is called \"%s\"", pattern.c_str());
  }
  return ncclSuccess;
}

struct UserChoice {
  std::vector<int> only; // empty: all
  std::vector<int> exclude;
  std::map<PciAddress, std::vector<int>> byGpu; // NICs of the GPUs that the user mapped
  bool maps = false;
};

// Where sortedGpus is nullptr, nobody knows what GPUs there are, and byGpu stays empty.
ncclResult_t parseUser(const std::string& user, const std::vector<PciAddress>* sortedGpus,
                       const std::vector<NicInfo>& nics, UserChoice* choice) {
  if (user.empty()) return ncclSuccess;
  choice->maps = user.find('=') != std::string::npos;
  if (choice->maps && user[0] == '^')
    return fail(ncclInvalidArgument, "NCCL_MOE_NET_NIC=%s: ^NIC,... and GPU=NIC,... cannot go together", user.c_str());
  if (user[0] == '^') return parseNics(user.substr(1), nics, &choice->exclude);
  if (!choice->maps) return parseNics(user, nics, &choice->only);
  std::set<std::string> keys;
  for (const std::string& entry : split(user, ';')) {
    const size_t equals = entry.find('=');
    if (equals == std::string::npos)
      return fail(ncclInvalidArgument, "NCCL_MOE_NET_NIC: \"%s\" is not GPU=NIC,...", entry.c_str());
    const std::string key = entry.substr(0, equals);
    PciAddress gpu;
    const bool address = PciAddress::parse(key, &gpu);
    const bool number = !key.empty() && key.size() < 6 && key.find_first_not_of("0123456789") == std::string::npos;
    if (!address && !number)
      return fail(ncclInvalidArgument, "NCCL_MOE_NET_NIC: \"%s\" is no GPU, neither an index nor a PCI address",
                  key.c_str());
    if (sortedGpus != nullptr && !address) {
      if (size_t(std::stoi(key)) >= sortedGpus->size())
        return fail(ncclInvalidArgument, "NCCL_MOE_NET_NIC: \"%s\" is none of the %zu GPUs", key.c_str(),
                    sortedGpus->size());
      gpu = (*sortedGpus)[size_t(std::stoi(key))];
    }
    if (sortedGpus != nullptr && !std::binary_search(sortedGpus->begin(), sortedGpus->end(), gpu))
      return fail(ncclInvalidArgument, "NCCL_MOE_NET_NIC: there is no GPU %s", key.c_str());
    if (!keys.insert(address || sortedGpus != nullptr ? gpu.text() : key).second)
      return fail(ncclInvalidArgument, "NCCL_MOE_NET_NIC: GPU %s is named twice", key.c_str());
    std::vector<int> found;
    MOECHECK(parseNics(entry.substr(equals + 1), nics, &found));
    if (sortedGpus != nullptr) choice->byGpu[gpu] = std::move(found);
  }
  return ncclSuccess;
}

// Drops every candidate for which out is true, unless that would leave none.
template <typename F>
void drop(const std::vector<NicInfo>& nics, const char* reason, F out, std::vector<std::string>* whyNot) {
  std::vector<size_t> dropped;
  size_t candidates = 0;
  for (size_t i = 0; i < nics.size(); i++) {
    if (!(*whyNot)[i].empty()) continue;
    candidates++;
    if (out(nics[i])) dropped.push_back(i);
  }
  if (dropped.size() == candidates) return;
  for (size_t i : dropped) (*whyNot)[i] = reason;
}

void dropByRule(const std::vector<NicInfo>& nics, std::vector<std::string>* whyNot) {
  const auto usable = [&](size_t i) { return (*whyNot)[i].empty(); };
  // A port that is down is of no use even if it is the only one.
  for (size_t i = 0; i < nics.size(); i++) {
    if (usable(i) && !nics[i].active) (*whyNot)[i] = "its port is down";
  }
  std::set<PciAddress> present;
  int64_t speed[2] = {0, 0}; // by link layer: Ethernet, InfiniBand
  for (size_t i = 0; i < nics.size(); i++) {
    if (usable(i)) present.insert(nics[i].address);
  }
  drop(
    nics, "its physical function is used",
    [&](const NicInfo& nic) { return nic.isVf && present.count(nic.physical) != 0; }, whyNot);
  for (size_t i = 0; i < nics.size(); i++) {
    if (usable(i)) speed[nics[i].infiniband ? 1 : 0] += nics[i].speedMbps;
  }
  const bool infiniband = speed[1] >= speed[0]; // a tie is InfiniBand's: Ethernet then is most likely storage
  drop(
    nics,
    infiniband ? "it is Ethernet and the faster NICs are InfiniBand"
               : "it is InfiniBand and the faster NICs are Ethernet",
    [&](const NicInfo& nic) { return nic.infiniband != infiniband; }, whyNot);
  int fastest = 0;
  for (size_t i = 0; i < nics.size(); i++) {
    if (usable(i)) fastest = std::max(fastest, nics[i].speedMbps);
  }
  drop(
    nics, "it is slower than half of the fastest NIC", [&](const NicInfo& nic) { return nic.speedMbps < fastest / 2; },
    whyNot);
  drop(
    nics, "it carries the default route (management)", [](const NicInfo& nic) { return nic.defaultRoute; }, whyNot);
}

// The GPUs that have the same nearest NICs.
struct Group {
  NicDistance distance = NicDistance::system;
  std::vector<int> nics;
  std::vector<PciAddress> gpus;
};

// Shares the group's NICs out, those first that fewest GPUs use so far.
void assignGroup(const Group& group, std::vector<int>* uses, std::map<PciAddress, NicChoice>* chosen) {
  const size_t idle =
    size_t(std::count_if(group.nics.begin(), group.nics.end(), [&](int nic) { return (*uses)[size_t(nic)] == 0; }));
  const size_t each = std::max<size_t>(1, idle / group.gpus.size());
  for (PciAddress gpu : group.gpus) {
    std::vector<int> order = group.nics;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return (*uses)[size_t(a)] < (*uses)[size_t(b)]; });
    order.resize(each);
    for (int nic : order) (*uses)[size_t(nic)]++;
    NicChoice& choice = (*chosen)[gpu];
    choice.distance = group.distance;
    choice.nics = std::move(order);
  }
}

} // namespace

ncclResult_t usableNics(const std::vector<NicInfo>& nics, const std::string& user, std::vector<bool>* usable,
                        bool* maps) {
  UserChoice choice;
  MOECHECK(parseUser(user, nullptr, nics, &choice));
  usable->assign(nics.size(), choice.only.empty());
  for (int i : choice.only) (*usable)[size_t(i)] = true;
  for (int i : choice.exclude) (*usable)[size_t(i)] = false;
  *maps = choice.maps;
  return ncclSuccess;
}

ncclResult_t chooseNics(const Topology& topology, const std::vector<PciAddress>& gpus, const std::vector<NicInfo>& nics,
                        const std::string& user, std::vector<NicChoice>* choices, std::vector<std::string>* whyNot) {
  std::vector<PciAddress> sortedGpus = gpus;
  std::sort(sortedGpus.begin(), sortedGpus.end());
  sortedGpus.erase(std::unique(sortedGpus.begin(), sortedGpus.end()), sortedGpus.end());
  UserChoice userChoice;
  MOECHECK(parseUser(user, &sortedGpus, nics, &userChoice));

  std::vector<std::string> reasons(nics.size());
  if (!userChoice.only.empty()) {
    reasons.assign(nics.size(), "NCCL_MOE_NET_NIC does not name it");
    for (int i : userChoice.only) reasons[size_t(i)] = nics[size_t(i)].active ? "" : "its port is down";
  } else {
    for (int i : userChoice.exclude) reasons[size_t(i)] = "NCCL_MOE_NET_NIC excludes it";
    dropByRule(nics, &reasons);
  }
  std::vector<int> usable;
  for (size_t i = 0; i < nics.size(); i++) {
    if (reasons[i].empty()) usable.push_back(int(i));
  }
  std::sort(usable.begin(), usable.end(), [&](int a, int b) {
    const NicInfo &x = nics[size_t(a)], &y = nics[size_t(b)];
    if (!(x.address == y.address)) return x.address < y.address;
    return x.port != y.port ? x.port < y.port : x.name < y.name;
  });

  std::vector<int> uses(nics.size(), 0);
  std::map<PciAddress, NicChoice> chosen;
  for (auto& mapped : userChoice.byGpu) {
    NicChoice& choice = chosen[mapped.first];
    choice.nics = mapped.second;
    choice.distance = NicDistance::sameSwitch;
    for (int nic : mapped.second) {
      if (!nics[size_t(nic)].active)
        return fail(ncclInvalidArgument, "NCCL_MOE_NET_NIC: the port of %s is down", nics[size_t(nic)].name.c_str());
      uses[size_t(nic)]++;
      choice.distance = std::max(choice.distance, topology.distance(mapped.first, nics[size_t(nic)].address));
    }
  }

  std::vector<Group> groups;
  for (PciAddress gpu : sortedGpus) {
    if (usable.empty() || chosen.count(gpu) != 0) continue;
    Group mine;
    mine.gpus.push_back(gpu);
    int fastest = 0;
    for (int nic : usable) {
      const NicDistance distance = topology.distance(gpu, nics[size_t(nic)].address);
      const int speed = nics[size_t(nic)].speedMbps;
      const bool nearer = mine.nics.empty() || distance < mine.distance;
      if (!nearer && (distance != mine.distance || speed < fastest)) continue;
      if (nearer || speed > fastest) mine.nics.clear();
      mine.distance = distance;
      fastest = speed;
      mine.nics.push_back(nic);
    }
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const Group& group) {
      return group.nics == mine.nics && group.distance == mine.distance;
    });
    if (same == groups.end()) {
      groups.push_back(std::move(mine));
    } else {
      same->gpus.push_back(gpu);
    }
  }
  // Distances form a tree, so two groups' NICs are disjoint or nested.  The inner group goes first: the outer one can
  // then take what is idle.
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) {
    return a.nics.size() != b.nics.size() ? a.nics.size() < b.nics.size() : a.distance < b.distance;
  });
  for (const Group& group : groups) assignGroup(group, &uses, &chosen);

  choices->clear();
  for (PciAddress gpu : gpus) {
    NicChoice choice = chosen[gpu];
    choice.gpu = gpu;
    choices->push_back(std::move(choice));
  }
  if (whyNot != nullptr) *whyNot = std::move(reasons);
  return ncclSuccess;
}

} // namespace net
} // namespace moe
