#include "perf/net/options.h"

#include <getopt.h>
#include <libgen.h>
#include <limits.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "base/error.h"
#include "base/param.h"

namespace moe {
namespace netperf {
namespace {

enum LongOption { optJson = 256, optCheck, optPlugin, optVerify, optSeconds, optTimeout, optRoom };

const option longOptions[] = {{"minbytes", required_argument, nullptr, 'b'},
                              {"maxbytes", required_argument, nullptr, 'e'},
                              {"stepfactor", required_argument, nullptr, 'f'},
                              {"iters", required_argument, nullptr, 'n'},
                              {"window", required_argument, nullptr, 'w'},
                              {"device", required_argument, nullptr, 'd'},
                              {"memory", required_argument, nullptr, 'm'},
                              {"gpu", required_argument, nullptr, 'g'},
                              {"server", no_argument, nullptr, 's'},
                              {"client", required_argument, nullptr, 'c'},
                              {"port", required_argument, nullptr, 'p'},
                              {"plugin", required_argument, nullptr, optPlugin},
                              {"json", required_argument, nullptr, optJson},
                              {"check", no_argument, nullptr, optCheck},
                              {"verify", required_argument, nullptr, optVerify},
                              {"seconds", required_argument, nullptr, optSeconds},
                              {"timeout", required_argument, nullptr, optTimeout},
                              {"room", required_argument, nullptr, optRoom},
                              {"help", no_argument, nullptr, 'h'},
                              {}};

ncclResult_t number(const char* name, const char* text, int64_t min, int64_t max, int64_t* value) {
  if (!parseInt(text, value) || *value < min || *value > max)
    return fail(ncclInvalidArgument, "%s must be a number from %lld to %lld, not \"%s\"", name, (long long)min,
                (long long)max, text);
  return ncclSuccess;
}

ncclResult_t real(const char* name, const char* text, double min, double max, double* value) {
  char* end = nullptr;
  *value = strtod(text, &end);
  if (end == text || *end != 0 || !(*value >= min && *value <= max))
    return fail(ncclInvalidArgument, "%s must be a number from %g to %g, not \"%s\"", name, min, max, text);
  return ncclSuccess;
}

// ../lib from the binary, where make puts both.
std::string defaultPlugin() {
  char path[PATH_MAX] = "";
  const ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (n <= 0) return "libnccl-net-moe.so";
  path[n] = 0;
  return std::string(dirname(path)) + "/../lib/libnccl-net-moe.so";
}

} // namespace

ncclResult_t parseOptions(int argc, char** argv, Options* o) {
  o->plugin = defaultPlugin();
  int c = 0;
  int64_t value = 0;
  opterr = 0;
  while ((c = getopt_long(argc, argv, "b:e:f:n:w:d:m:g:sc:p:h", longOptions, nullptr)) != -1) {
    switch (c) {
    case 'b':
      MOECHECK(number("-b", optarg, 0, 1ll << 30, &value));
      o->minBytes = size_t(value);
      break;
    case 'e':
      MOECHECK(number("-e", optarg, 0, 1ll << 30, &value));
      o->maxBytes = size_t(value);
      break;
    case 'f':
      MOECHECK(real("-f", optarg, 1.01, 1e9, &o->factor));
      break;
    case 'n':
      MOECHECK(number("-n", optarg, 1, 100000000, &value));
      o->iters = int(value);
      break;
    case 'w':
      MOECHECK(number("-w", optarg, 1, 32, &value));
      o->window = int(value);
      break;
    case 'd':
      MOECHECK(number("-d", optarg, 0, 1023, &value));
      o->device = int(value);
      break;
    case 'm':
      if (strcmp(optarg, "host") != 0 && strcmp(optarg, "cuda") != 0)
        return fail(ncclInvalidArgument, "-m must be host or cuda, not \"%s\"", optarg);
      o->gpuMemory = strcmp(optarg, "cuda") == 0;
      break;
    case 'g':
      MOECHECK(number("-g", optarg, 0, 1023, &value));
      o->gpu = int(value);
      break;
    case 's':
      o->server = true;
      break;
    case 'c':
      if (*optarg == 0) return fail(ncclInvalidArgument, "-c needs the server's name or address");
      o->client = optarg;
      break;
    case 'p':
      MOECHECK(number("-p", optarg, 1, 65535, &value));
      o->port = int(value);
      break;
    case optPlugin:
      o->plugin = optarg;
      break;
    case optJson:
      o->json = optarg; // which is written after minutes of measuring
      if (!std::ofstream(optarg, std::ios::app)) return fail(ncclInvalidArgument, "--json: cannot write %s", optarg);
      break;
    case optCheck:
      o->check = true;
      break;
    case optVerify:
      MOECHECK(number("--verify", optarg, 0, 1, &value));
      o->verify = value != 0;
      break;
    case optSeconds:
      MOECHECK(real("--seconds", optarg, 0.001, 3600, &o->seconds));
      break;
    case optRoom:
      MOECHECK(number("--room", optarg, 0, 1 << 26, &value));
      o->room = size_t(value);
      break;
    case optTimeout:
      MOECHECK(number("--timeout", optarg, 1, 86400, &value));
      o->timeoutSeconds = int(value);
      break;
    case 'h':
      o->help = true;
      break;
    default:
      return fail(ncclInvalidArgument, "unknown or incomplete option \"%s\"; -h lists them", argv[optind - 1]);
    }
  }
  if (optind != argc) return fail(ncclInvalidArgument, "\"%s\" is no option; -h lists them", argv[optind]);
  if (o->server && !o->client.empty()) return fail(ncclInvalidArgument, "-s and -c exclude each other");
  if (o->minBytes > o->maxBytes) return fail(ncclInvalidArgument, "-b is more than -e");
  return ncclSuccess;
}

void printHelp() {
  printf(
    "net_perf [options]: bandwidth, latency and message rate of an NCCL net plugin between two processes\n"
    "\n"
    "Without -s and -c it starts both processes on this machine.\n"
    "  -s                    waits for the other machine        -c HOST   takes the one where -s waits\n"
    "  -p PORT               of that control connection (18517)\n"
    "  --plugin FILE         the plugin (libnccl-net-moe.so beside this program)\n"
    "  -d DEV                device of the plugin (0)\n"
    "  -m host|cuda  -g GPU  which memory (host), which GPU (0)\n"
    "  -b -e -f              smallest and largest message (8, 64M), factor between (8)\n"
    "  -n N                  messages per measurement; default: as many as take --seconds S (0.3)\n"
    "  -w N                  messages outstanding (16)\n"
    "  --room N              bytes that a receive offers where its message is smaller (the message's); NCCL posts\n"
    "                        receives of its whole slots\n"
    "  --verify 0|1          compares the data (1)\n"
    "  --timeout S           without any progress until it is an error (30)\n"
    "  --json FILE           writes the results there too\n"
    "  --check               describes machine, plugin and devices, verifies data on every device, in host and GPU\n"
    "                        memory, and measures each in short.  Send its output with a report.\n");
}

} // namespace netperf
} // namespace moe
