#include "net/stats.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/log.h"
#include "base/param.h"

namespace moe {
namespace net {
namespace {

constexpr size_t maxEntries = 4096;

StringParam statsFile{"NCCL_MOE_NET_STATS", "",
                      "file for the network's counters as JSON; %h and %p stand for host name and process id"};

nlohmann::json toJson(const Counters& c) {
  nlohmann::json histogram = nlohmann::json::object();
  for (int i = 0; i < Counters::nBuckets; i++) {
    if (c.latencyUs[i] != 0) histogram[std::to_string(uint64_t{1} << i)] = c.latencyUs[i];
  }
  return {{"sends", c.sends},
          {"sendBytes", c.sendBytes},
          {"receives", c.receives},
          {"receiveBytes", c.receiveBytes},
          {"puts", c.puts},
          {"putBytes", c.putBytes},
          {"signals", c.signals},
          {"flushes", c.flushes},
          {"retries", c.retries},
          {"errors", c.errors},
          {"failovers", c.failovers},
          {"maxDepth", c.maxDepth},
          {"latencyBelowUs", histogram}};
}

} // namespace

void Counters::end(double seconds) {
  if (depth > 0) depth--;
  const double us = seconds * 1e6;
  int bucket = 0;
  while (bucket < nBuckets - 1 && us >= static_cast<double>(uint64_t{1} << bucket)) bucket++;
  latencyUs[bucket]++;
}

void Counters::add(const Counters& o) {
  sends += o.sends;
  sendBytes += o.sendBytes;
  receives += o.receives;
  receiveBytes += o.receiveBytes;
  puts += o.puts;
  putBytes += o.putBytes;
  signals += o.signals;
  flushes += o.flushes;
  retries += o.retries;
  errors += o.errors;
  failovers += o.failovers;
  maxDepth = std::max(maxDepth, o.maxDepth);
  for (int i = 0; i < nBuckets; i++) latencyUs[i] += o.latencyUs[i];
}

std::string expandFileName(const std::string& pattern) {
  char host[256] = "unknown";
  gethostname(host, sizeof(host) - 1);
  const std::string name(host);
  std::string path;
  for (size_t i = 0; i < pattern.size(); i++) {
    if (pattern.compare(i, 2, "%h") == 0) {
      path += name.substr(0, name.find('.'));
      i++;
    } else if (pattern.compare(i, 2, "%p") == 0) {
      path += std::to_string(getpid());
      i++;
    } else {
      path += pattern[i];
    }
  }
  return path;
}

Stats& Stats::process() {
  static Stats* const stats = new Stats();
  return *stats;
}

void Stats::dropInherited() {
  if (pid_ == getpid()) return;
  connections_.clear();
  devices_.clear();
  pid_ = getpid();
}

bool Stats::enabled() { return !statsFile.get().empty(); }

void Stats::add(const std::string& device, const std::string& peer, const char* role, const Counters& counters) {
  if (!enabled()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  dropInherited();
  if (connections_.size() < maxEntries) connections_.push_back({device, peer, role, counters});
  auto sum = std::find_if(devices_.begin(), devices_.end(), [&](const Entry& e) { return e.device == device; });
  if (sum == devices_.end()) {
    devices_.push_back({device, "", "", counters});
  } else {
    sum->counters.add(counters);
  }
}

void Stats::write() {
  if (!enabled()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  dropInherited();
  nlohmann::json root;
  root["pid"] = getpid();
  root["devices"] = nlohmann::json::array();
  for (const Entry& e : devices_) root["devices"].push_back({{"device", e.device}, {"counters", toJson(e.counters)}});
  root["connections"] = nlohmann::json::array();
  for (const Entry& e : connections_) {
    root["connections"].push_back(
      {{"device", e.device}, {"peer", e.peer}, {"role", e.role}, {"counters", toJson(e.counters)}});
  }
  const std::string path = expandFileName(statsFile.get());
  std::ofstream file(path);
  // A peer names its device in bytes of its own.
  file << root.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  if (!file) MOE_WARN("NCCL_MOE_NET_STATS: cannot write %s", path.c_str());
}

} // namespace net
} // namespace moe
