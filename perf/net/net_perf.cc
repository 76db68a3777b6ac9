// Starts the processes of a measurement or of a check, and prints the results.
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "perf/net/check.h"
#include "perf/net/measure.h"
#include "perf/net/options.h"

namespace moe {
namespace netperf {
namespace {

// What the client tells the server, so that one side's options hold for both.
struct Plan {
  uint32_t magic = 0x6d6f6531;
  uint32_t bytes = sizeof(Plan);
  uint64_t minBytes = 0, maxBytes = 0, room = 0;
  double factor = 0, seconds = 0;
  int32_t iters = 0, window = 0, verify = 0, timeoutSeconds = 0;
  int32_t check = 0;   // 1: checkTransfers on device, of this kind
  int32_t last = 0;    // the server ends after it
  int32_t device = -1; // -1: the server's own option
  int32_t kind = 0;    // MemoryKind
};

Plan planOf(const Options& o) {
  Plan plan;
  plan.minBytes = o.minBytes;
  plan.maxBytes = o.maxBytes;
  plan.room = o.room;
  plan.factor = o.factor;
  plan.seconds = o.seconds;
  plan.iters = o.iters;
  plan.window = o.window;
  plan.verify = o.verify;
  plan.timeoutSeconds = o.timeoutSeconds;
  plan.last = 1;
  plan.kind = int32_t(o.gpuMemory ? MemoryKind::peermem : MemoryKind::host);
  return plan;
}

bool logAll = false; // --check: what the plugin says at level INFO too

void logger(int level, unsigned long, const char*, int, const char* format, ...) {
  if (level > (logAll ? NCCL_LOG_INFO : NCCL_LOG_WARN)) return;
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  fprintf(logAll ? stdout : stderr, "  plugin: %s\n", text);
}

enum ExitBits { exitFailed = 1, exitLast = 2, exitWrong = 4 };

int complain(const char* who) {
  fflush(stdout);
  fprintf(stderr, "net_perf%s: %s\n", who, lastError());
  return exitFailed;
}

std::string sizeText(size_t bytes) {
  for (const auto& unit : {std::pair<size_t, char>{1 << 30, 'G'}, {1 << 20, 'M'}, {1 << 10, 'K'}}) {
    if (bytes >= unit.first && bytes % unit.first == 0) return std::to_string(bytes / unit.first) + unit.second;
  }
  return std::to_string(bytes);
}

void printHeader(const Properties& device, const NetApi& net, const Plan& plan) {
  printf("# net_perf: plugin \"%s\" (table v%d), device %s, %g Gb/s, %s\n", net.name(), net.version(),
         device.name.c_str(), device.speedMbps / 1000.0, memoryName(MemoryKind(plan.kind)));
  printf("# window %d; GB/s are 10^9 bytes of messages a second, latency is half a round trip; socket: one plain TCP\n"
         "# connection between the same two processes\n#\n",
         plan.window);
  printf("#%7s %8s %9s %9s %10s %9s %9s | %9s %9s %7s %7s\n", "size", "count", "out", "in+out", "messages", "lat 50%",
         "lat 99%", "socket", "lat 50%", "out/", "#wrong");
  printf("#%7s %8s %9s %9s %10s %9s %9s | %9s %9s %7s %7s\n", "", "", "GB/s", "GB/s", "M/s", "us", "us", "GB/s", "us",
         "socket", "bytes");
}

void printRow(const Result& r) {
  printf("%8s %8zu %9.3f %9.3f %10.4f %9.2f %9.2f | %9.3f %9.2f %7.2f ", sizeText(r.bytes).c_str(), r.iters, r.outGBs,
         r.bothGBs, r.messagesPerSecond / 1e6, r.latencyUs, r.latency99Us, r.socketGBs, r.socketLatencyUs,
         r.socketGBs > 0 ? r.outGBs / r.socketGBs : 0.0);
  if (r.wrong < 0) {
    printf("%7s\n", "N/A");
  } else {
    printf("%7ld\n", r.wrong);
  }
  fflush(stdout);
}

ncclResult_t writeJson(const Options& o, const NetApi& net, const Properties& device,
                       const std::vector<Result>& results) {
  nlohmann::json j = {{"plugin", net.name()},           {"table", net.version()}, {"device", device.name},
                      {"speed_mbps", device.speedMbps}, {"window", o.window},     {"results", nlohmann::json::array()}};
  for (const Result& r : results) {
    j["results"].push_back({{"bytes", r.bytes},
                            {"count", r.iters},
                            {"out_gbs", r.outGBs},
                            {"in_out_gbs", r.bothGBs},
                            {"messages_per_s", r.messagesPerSecond},
                            {"latency_us", r.latencyUs},
                            {"latency_p99_us", r.latency99Us},
                            {"socket_gbs", r.socketGBs},
                            {"socket_latency_us", r.socketLatencyUs},
                            {"wrong_bytes", r.wrong < 0 ? nlohmann::json() : nlohmann::json(r.wrong)}});
  }
  std::ofstream file(o.json);
  file << j.dump(2) << "\n";
  if (!file.flush()) return fail(ncclSystemError, "--json: cannot write %s", o.json.c_str());
  return ncclSuccess;
}

// One side of one measurement or check; the process ends after it.
ncclResult_t runSide(Control control, Plan plan, bool first, const Options& o, int* status) {
  Plan theirs;
  MOECHECK(control.exchange(plan, &theirs));
  if (theirs.magic != plan.magic || theirs.bytes != plan.bytes)
    return fail(ncclInvalidUsage, "the other side is not a net_perf of this version");
  const int device = first || theirs.device < 0 ? (plan.device >= 0 ? plan.device : o.device) : theirs.device;
  if (!first) {
    plan = theirs;
    if (o.gpuMemory && plan.check == 0) plan.kind = int32_t(MemoryKind::peermem);
  }
  if (plan.last != 0) *status |= exitLast;
  MOECHECK(control.setTimeout(plan.timeoutSeconds + 5)); // so that the error of a transfer comes first
  Options options = o;
  options.iters = plan.iters;
  options.seconds = plan.seconds;
  options.window = plan.window;
  options.verify = plan.verify != 0;

  std::unique_ptr<CudaDriver> cuda;
  if (MemoryKind(plan.kind) != MemoryKind::host) {
    MOECHECK(CudaDriver::open(&cuda));
    MOECHECK(cuda->use(o.gpu));
  }
  std::unique_ptr<NetApi> net;
  std::vector<int> versions;
  MOECHECK(loadNet(o.plugin, &net, &versions));
  const ncclResult_t result = net->init(logger);
  if (result != ncclSuccess)
    return fail(result, "the plugin's init returned error %d", int(result)); // its own words were logged
  int n = 0;
  if (net->devices(&n) != ncclSuccess || device >= n)
    return fail(ncclInvalidArgument, "the plugin has %d devices; there is no device %d", n, device);
  Properties properties;
  if (net->properties(device, &properties) != ncclSuccess)
    return fail(ncclInternalError, "the plugin's getProperties(%d) failed", device);
  // Before anything is spent on the connection, lest the other side wait for it in vain.
  if (MemoryKind(plan.kind) == MemoryKind::peermem && (properties.ptrSupport & NCCL_PTR_CUDA) == 0) {
    if (plan.check == 0 && (properties.ptrSupport & NCCL_PTR_DMABUF) != 0) {
      plan.kind = int32_t(MemoryKind::dmabuf);
    } else {
      return fail(ncclInvalidUsage, "device %s has no access to GPU memory (GPUDirect)", properties.name.c_str());
    }
  }
  const size_t largest = plan.check != 0 ? size_t(4 << 20) + 1 : plan.maxBytes;
  const size_t stride = (largest + 128) / 64 * 64;
  Link link;
  MOECHECK(link.connect(net.get(), device, &control, plan.timeoutSeconds));
  MOECHECK(link.registerBuffers(
    cuda.get(), MemoryKind(plan.kind),
    std::max(stride, std::min(stride * size_t(std::max(plan.window, 8)), stride + (64 << 20))), plan.room));
  MOECHECK(control.barrier());

  if (plan.check != 0) {
    long wrong = 0;
    int sizes = 0;
    MOECHECK(checkTransfers(&link, &control, first, &wrong, &sizes));
    if (first)
      printf("  %s, %s: %s (%d sizes, 8 messages each way)\n", properties.name.c_str(),
             memoryName(MemoryKind(plan.kind)), wrong == 0 ? "ok" : "WRONG DATA", sizes);
    if (wrong != 0) *status |= exitWrong;
    options.iters = 0;
    options.seconds = 0.1; // roughly is enough
    options.verify = false;
    Result small, big;
    MOECHECK(measure(&link, &control, first, options, 8, &small));
    MOECHECK(measure(&link, &control, first, options, 1 << 20, &big));
    if (first)
      printf("    8 bytes %.2f us, 1 MiB %.3f GB/s, both ways at once %.3f GB/s (a plain socket: %.2f us, %.3f GB/s)\n",
             small.latencyUs, big.outGBs, big.bothGBs, small.socketLatencyUs, big.socketGBs);
    return ncclSuccess;
  }
  std::vector<Result> results;
  if (first) printHeader(properties, *net, plan);
  for (size_t bytes = plan.minBytes;;) {
    Result r;
    MOECHECK(measure(&link, &control, first, options, bytes, &r));
    if (first) printRow(r);
    if (r.wrong > 0) *status |= exitWrong;
    results.push_back(r);
    if (bytes >= plan.maxBytes) break;
    bytes = std::min<size_t>(plan.maxBytes, std::max<size_t>(bytes + 1, size_t(double(bytes) * plan.factor)));
  }
  if (first && !o.json.empty()) MOECHECK(writeJson(o, *net, properties, results));
  if (first && plan.verify != 0) printf("# %s\n", (*status & exitWrong) != 0 ? "WRONG DATA" : "all data right");
  return ncclSuccess;
}

pid_t spawn(const std::function<int()>& body) {
  fflush(stdout);
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child != 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL); // whoever kills net_perf means all of it
  if (getppid() != parent) _exit(exitFailed);
  const int status = body();
  fflush(stdout);
  _exit(status);
}

// The exit bits of the child, whose end is not waited for without bound only because all its own waits are bounded.
int await(pid_t child, const char* who) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return exitFailed;
  }
  if (WIFEXITED(status)) return WEXITSTATUS(status);
  fprintf(stderr, "net_perf%s: the process was ended by signal %d (%s)\n", who, WTERMSIG(status),
          strsignal(WTERMSIG(status)));
  return exitFailed;
}

int sideMain(Control control, const Plan& plan, bool first, const Options& o) {
  int status = 0;
  if (runSide(std::move(control), plan, first, o, &status) != ncclSuccess) status |= complain(first ? "" : " (server)");
  return status;
}

// The client's part: both processes, or this machine's alone.
int launch(const Plan& plan, const Options& o) {
  if (!o.client.empty()) {
    return await(spawn([&] {
                   Control control;
                   if (Control::dial(o.client, o.port, o.timeoutSeconds, &control) != ncclSuccess) return complain("");
                   return sideMain(std::move(control), plan, true, o);
                 }),
                 "");
  }
  Control ends[2];
  if (Control::pair(&ends[0], &ends[1]) != ncclSuccess) return complain("");
  const auto side = [&](int i) {
    return spawn([&] {
      Control mine = std::move(ends[i]);
      ends[1 - i] = Control(); // so that the other's end is seen
      return sideMain(std::move(mine), plan, i == 0, o);
    });
  };
  const pid_t server = side(1), client = side(0);
  ends[0] = Control();
  ends[1] = Control();
  const int status = await(client, "");
  return status | await(server, " (server)");
}

int serve(const Options& o) {
  if (o.check) describeMachine();
  UniqueFd listener;
  if (Control::listen(o.port, &listener) != ncclSuccess) return complain(" (server)");
  printf("# waiting at port %d\n", o.port);
  fflush(stdout);
  for (;;) {
    Control control;
    if (Control::accept(listener, o.timeoutSeconds, &control) != ncclSuccess) return complain(" (server)");
    const pid_t child = spawn([&] { return sideMain(std::move(control), planOf(o), false, o); });
    control = Control();
    const int status = await(child, " (server)");
    if ((status & exitLast) != 0) return status & ~exitLast;
  }
}

int check(const Options& o) {
  logAll = true;
  auto* found =
    static_cast<Found*>(mmap(nullptr, sizeof(Found), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (found == MAP_FAILED) return exitFailed;
  describeMachine();
  int status =
    await(spawn([&] { return describePlugin(o.plugin, logger, o.gpu, found) == ncclSuccess ? 0 : complain(""); }), "");
  printf("# data\n");
  logAll = false;
  std::vector<Plan> plans;
  for (int device = 0; device < found->nDevices; device++) {
    const DeviceSummary& d = found->devices[device];
    for (MemoryKind kind : {MemoryKind::host, MemoryKind::peermem, MemoryKind::dmabuf}) {
      const char* reason = nullptr;
      if (kind != MemoryKind::host && found->nGpus == 0)
        reason = "no GPU";
      else if (kind == MemoryKind::peermem && (d.ptrSupport & NCCL_PTR_CUDA) == 0)
        reason = "the plugin does not offer it";
      else if (kind == MemoryKind::dmabuf && ((d.ptrSupport & NCCL_PTR_DMABUF) == 0 || !found->hasDmaBuf))
        reason = "the plugin does not offer it";
      else if (kind == MemoryKind::dmabuf && !found->gpuDmaBuf)
        reason = "the GPU's driver does not offer it";
      if (reason != nullptr) {
        printf("  %s, %s: not run: %s\n", d.name, memoryName(kind), reason);
        continue;
      }
      Plan plan = planOf(o);
      plan.check = 1;
      plan.device = device;
      plan.kind = int32_t(kind);
      plans.push_back(plan);
    }
  }
  for (size_t i = 0; i < plans.size(); i++) {
    plans[i].last = i + 1 == plans.size();
    const int one = launch(plans[i], o);
    if ((one & exitFailed) != 0)
      printf("  %s, %s: FAILED\n", found->devices[plans[i].device].name, memoryName(MemoryKind(plans[i].kind)));
    status |= one;
  }
  status &= exitFailed | exitWrong;
  if (plans.empty()) status |= exitFailed;
  printf("# result: %s\n", status == 0 ? "every check that could run passed" : "FAILED");
  munmap(found, sizeof(Found));
  return status;
}

} // namespace
} // namespace netperf
} // namespace moe

int main(int argc, char** argv) {
  using namespace moe::netperf;
  Options options;
  signal(SIGPIPE, SIG_IGN);
  if (parseOptions(argc, argv, &options) != ncclSuccess) return complain("");
  if (options.help) {
    printHelp();
    return 0;
  }
  int status = 0;
  // The plugin is to say what is wrong; net_perf's own sentences come from complain.
  setenv("NCCL_DEBUG", options.check ? "INFO" : "WARN", 0);
  moe::setLogSink([](moe::LogLevel, const char*, int, const char*) {});
  if (options.server) {
    status = serve(options);
  } else if (options.check) {
    status = check(options);
  } else {
    status = launch(planOf(options), options) & (exitFailed | exitWrong);
  }
  return status == 0 ? 0 : 1;
}
