// net_conformance: loads a net plugin and sees whether it does what NCCL counts on.
//
//   net_conformance [--plugin FILE.so] [--version 8..12] [--dev N[,N]] [--merge N,N] [--only GLOB]
//                   [--except GLOB] [--list] [--json FILE] [--big | --quick]
//                   [--seed N] [--scale X] [--bound SECONDS] [--verbose]
//
// --dev 0,1: even ranks use device 0, odd ones device 1.  --merge 0,1: all use these two as one (makeVDevice).  One
// line a case, and at the end "N passed, N failed, N skipped"; exit status 1 if any failed.  --only and --except may
// come several times.  --big adds messages of gigabytes, --quick makes the long cases short (for an emulated machine).
// --scale stretches time limits for slow machines; --bound is the time within which the plugin has to report a dead
// peer.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fnmatch.h>
#include <getopt.h>
#include <limits.h>
#include <string>
#include <unistd.h>
#include <vector>

#include "harness.h"

using namespace conformance;

namespace {

bool matches(const std::vector<std::string>& globs, const char* name) {
  for (const auto& g : globs)
    if (fnmatch(g.c_str(), name, 0) == 0) return true;
  return false;
}

std::string quoted(const std::string& text) {
  std::string s = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') s += '\\';
    s += c < ' ' && c >= 0 ? ' ' : c;
  }
  return s + "\"";
}

// Beside this binary, as the build puts it.
std::string defaultPlugin() {
  char self[PATH_MAX] = {};
  if (readlink("/proc/self/exe", self, sizeof(self) - 1) <= 0) return "libnccl-net-moe.so";
  std::string path = self;
  path.resize(path.rfind('/'));
  return path + "/../lib/libnccl-net-moe.so";
}

} // namespace

int main(int argc, char** argv) {
  Options options;
  options.plugin = defaultPlugin();
  std::vector<std::string> only, except;
  std::string json;
  bool list = false;
  const option names[] = {{"plugin", 1, nullptr, 'p'},  {"version", 1, nullptr, 'V'}, {"dev", 1, nullptr, 'd'},
                          {"only", 1, nullptr, 'o'},    {"except", 1, nullptr, 'x'},  {"list", 0, nullptr, 'l'},
                          {"json", 1, nullptr, 'j'},    {"big", 0, nullptr, 'b'},     {"quick", 0, nullptr, 'q'},
                          {"seed", 1, nullptr, 's'},    {"scale", 1, nullptr, 'c'},   {"bound", 1, nullptr, 'B'},
                          {"verbose", 0, nullptr, 'v'}, {"merge", 1, nullptr, 'm'},   {nullptr, 0, nullptr, 0}};
  for (int c; (c = getopt_long(argc, argv, "", names, nullptr)) != -1;) {
    switch (c) {
    case 'p':
      options.plugin = optarg;
      break;
    case 'V':
      options.version = atoi(optarg);
      break;
    case 'd':
    case 'm': {
      std::vector<int>& into = c == 'd' ? options.devs : options.merge;
      into.clear();
      for (const char* at = optarg; at != nullptr; at = strchr(at, ',') == nullptr ? nullptr : strchr(at, ',') + 1)
        into.push_back(atoi(at));
      break;
    }
    case 'o':
      only.push_back(optarg);
      break;
    case 'x':
      except.push_back(optarg);
      break;
    case 'l':
      list = true;
      break;
    case 'j':
      json = optarg;
      break;
    case 'q':
      options.quick = true;
      break;
    case 'b':
      options.big = true;
      break;
    case 's':
      options.seed = strtoull(optarg, nullptr, 10);
      break;
    case 'c':
      options.scale = atof(optarg);
      break;
    case 'B':
      options.errorBound = atof(optarg);
      break;
    case 'v':
      options.verbose = true;
      break;
    default:
      fprintf(stderr, "net_conformance: the options stand at the top of tests/conformance/main.cc\n");
      return 2;
    }
  }
  if (optind < argc) {
    fprintf(stderr, "net_conformance: unknown argument %s (--plugin FILE.so)\n", argv[optind]);
    return 2;
  }
  if (list) {
    for (const auto& c : cases()) printf("%s\n", c.name);
    return 0;
  }
  setenv("NCCL_DEBUG", "WARN", 0); // a failed case names the plugin's last warning
  printLog(options.verbose);
  if (access(options.plugin.c_str(), R_OK) != 0) {
    fprintf(stderr, "net_conformance: cannot read %s (--plugin FILE.so)\n", options.plugin.c_str());
    return 2;
  }
  printf("# plugin %s, seed %llu\n", options.plugin.c_str(), (unsigned long long)options.seed);
  int passed = 0, failures = 0, skipped = 0;
  std::string rows;
  for (const auto& c : cases()) {
    if ((!only.empty() && !matches(only, c.name)) || matches(except, c.name)) continue;
    Result result = runCase(c, options);
    const char* word = result.verdict == Verdict::passed ? "pass" : result.verdict == Verdict::failed ? "FAIL" : "skip";
    (result.verdict == Verdict::passed ? passed : result.verdict == Verdict::failed ? failures : skipped)++;
    printf("%-4s %-34s %7.2f s%s%s\n", word, c.name, result.time, result.reason.empty() ? "" : "  ",
           result.reason.c_str());
    fflush(stdout);
    char time[32];
    snprintf(time, sizeof(time), "%.3f", result.time);
    rows += std::string(rows.empty() ? "" : ",\n") + "  {\"case\": " + quoted(c.name) + ", \"result\": \"" + word +
            "\", \"seconds\": " + time + ", \"reason\": " + quoted(result.reason) + "}";
  }
  printf("%d passed, %d failed, %d skipped\n", passed, failures, skipped);
  if (!json.empty()) {
    FILE* f = fopen(json.c_str(), "w");
    if (f == nullptr) {
      perror(json.c_str());
      return 2;
    }
    fprintf(f,
            "{\"plugin\": %s, \"seed\": %llu, \"passed\": %d, \"failed\": %d, \"skipped\": %d, \"cases\": [\n%s\n]}\n",
            quoted(options.plugin).c_str(), (unsigned long long)options.seed, passed, failures, skipped, rows.c_str());
    fclose(f);
  }
  // A run of nothing proves nothing.
  if (failures == 0 && passed == 0) {
    fprintf(stderr, "net_conformance: no case ran; --list names them, --only and --except choose\n");
  }
  return failures > 0 || passed == 0;
}
