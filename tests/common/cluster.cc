#include "common/cluster.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#endif

namespace moe::test {
namespace {

using Clock = std::chrono::steady_clock;

int millisecondsSince(Clock::time_point start) {
  return static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start).count());
}

struct Message {
  int rank;
  uint32_t bytes;
};

void writeAll(int fd, const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = write(fd, p, bytes);
    if (n <= 0) return; // the parent has given up
    p += n;
    bytes -= static_cast<size_t>(n);
  }
}

// The forked process: runs ranks first..last-1 as threads and writes their sentences to fd.
[[noreturn]] void runProcess(const ClusterOptions& options, int first, int last, const std::string& rendezvous,
                             const Body& body, int fd) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (options.nHosts > 0) {
    const int perProcess = options.ranksPerProcess > 0 ? options.ranksPerProcess : options.nRanks;
    setenv("NCCL_HOSTID", format("pretended-host-%d", first / perProcess % options.nHosts).c_str(), 1);
  }
  for (const auto& [name, value] : options.environment) setenv(name.c_str(), value.c_str(), 1);
  std::mutex mutex;
  const auto runRank = [&](int rank) {
    std::string sentence;
    {
      Rank context(options, rank, rendezvous);
      sentence = body(context);
    }
    std::lock_guard<std::mutex> lock(mutex);
    const Message message{rank, static_cast<uint32_t>(sentence.size())};
    writeAll(fd, &message, sizeof(message));
    writeAll(fd, sentence.data(), sentence.size());
  };
  {
    std::vector<std::thread> threads;
    for (int rank = first + 1; rank < last; rank++) threads.emplace_back(runRank, rank);
    runRank(first);
    for (std::thread& thread : threads) thread.join();
  }
  int status = 0;
#if defined(__SANITIZE_ADDRESS__)
  // _exit skips the check at exit, which would also blame this process for what the test holds.
  if (__lsan_do_recoverable_leak_check() != 0) status = 23;
#endif
  fflush(nullptr);
  _exit(status);
}

struct Process {
  pid_t pid;
  int fd;
  int first;
  int last;
  std::string received;
  bool open = true;
};

std::string deathSentence(int status, bool timedOut) {
  if (timedOut) return "hangs (killed at the time limit)";
  if (WIFSIGNALED(status)) return format("died of signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
  return format("its process ended with status %d", WEXITSTATUS(status));
}

} // namespace

uint64_t testSeed() {
  static const uint64_t seed = [] {
    const char* text = getenv("MOE_TEST_SEED");
    const uint64_t value = text != nullptr ? strtoull(text, nullptr, 10) : std::random_device{}() % 1000000;
    printf("MOE_TEST_SEED=%llu\n", static_cast<unsigned long long>(value));
    fflush(stdout);
    return value;
  }();
  return seed;
}

std::string format(const char* text, ...) {
  char buffer[2048];
  va_list args;
  va_start(args, text);
  vsnprintf(buffer, sizeof(buffer), text, args);
  va_end(args);
  return buffer;
}

TempDir::TempDir() {
  char name[] = "/tmp/moe-test-XXXXXX";
  if (mkdtemp(name) != nullptr) path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;
  if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
}

int freePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  int port = -1;
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0) {
    port = ntohs(address.sin_port);
  }
  close(fd);
  return port;
}

Rank::Rank(const ClusterOptions& options, int rank, const std::string& rendezvous)
  : rank_(rank), nRanks_(options.nRanks), rendezvous_(rendezvous), jitter_(options.jitter),
    random_(options.seed * 1000003 + static_cast<uint64_t>(rank)) {}

Rank::~Rank() { destroy(); }

void Rank::jitter() {
  if (jitter_ && random_() % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 3000));
}

ncclResult_t Rank::init(const ncclMoeConfig_t& config) {
  return ncclMoeCommInitHost(&comm_, nRanks_, rank_, rendezvous_.c_str(), &config);
}

ncclResult_t Rank::destroy() {
  const ncclResult_t result = ncclMoeCommDestroy(comm_);
  comm_ = nullptr;
  return result;
}

std::string ClusterResult::failures() const {
  std::string all;
  for (size_t rank = 0; rank < ranks.size(); rank++) {
    if (!ranks[rank].empty()) all += format("rank %zu: ", rank) + ranks[rank] + "\n";
  }
  return all;
}

ClusterResult runRanks(const ClusterOptions& options, const Body& body) {
  return runRanks(options, body, [](const std::vector<pid_t>&) {});
}

ClusterResult runRanks(const ClusterOptions& options, const Body& body,
                       const std::function<void(const std::vector<pid_t>&)>& meanwhile) {
  const Clock::time_point start = Clock::now();
  const TempDir dir;
  const std::string rendezvous = options.rendezvous.empty() ? "file://" + dir.path() + "/meet" : options.rendezvous;
  const int perProcess = options.ranksPerProcess > 0 ? options.ranksPerProcess : options.nRanks;
  ClusterResult result;
  result.ranks.assign(static_cast<size_t>(options.nRanks), "never started");
  std::vector<Process> processes;
  std::vector<pid_t> pids;
  fflush(nullptr);
  for (int first = 0; first < options.nRanks; first += perProcess) {
    const int last = first + perProcess < options.nRanks ? first + perProcess : options.nRanks;
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) != 0) break;
    const pid_t pid = fork();
    if (pid == 0) {
      close(fds[0]);
      for (const Process& earlier : processes) close(earlier.fd);
      runProcess(options, first, last, rendezvous, body, fds[1]);
    }
    close(fds[1]);
    if (pid < 0) {
      close(fds[0]);
      break;
    }
    processes.push_back(Process{pid, fds[0], first, last, "", true});
    pids.push_back(pid);
  }
  meanwhile(pids);
  bool timedOut = false;
  while (true) {
    std::vector<pollfd> waiting;
    std::vector<Process*> owners;
    for (Process& process : processes) {
      if (!process.open) continue;
      waiting.push_back(pollfd{process.fd, POLLIN, 0});
      owners.push_back(&process);
    }
    if (waiting.empty()) break;
    const int left = options.timeLimitMs - millisecondsSince(start);
    if (left <= 0 && !timedOut) {
      timedOut = true;
      for (const Process* process : owners) kill(process->pid, SIGKILL);
    }
    if (poll(waiting.data(), waiting.size(), timedOut ? 5000 : left) < 0) continue;
    for (size_t i = 0; i < waiting.size(); i++) {
      if (waiting[i].revents == 0) continue;
      char buffer[4096];
      const ssize_t n = read(owners[i]->fd, buffer, sizeof(buffer));
      if (n <= 0) {
        owners[i]->open = false;
      } else {
        owners[i]->received.append(buffer, static_cast<size_t>(n));
      }
    }
  }
  for (Process& process : processes) {
    close(process.fd);
    int status = 0;
    waitpid(process.pid, &status, 0);
    for (int rank = process.first; rank < process.last; rank++) {
      result.ranks[rank] = deathSentence(status, timedOut && WIFSIGNALED(status));
    }
    size_t at = 0;
    while (at + sizeof(Message) <= process.received.size()) {
      Message message;
      memcpy(&message, &process.received[at], sizeof(message));
      at += sizeof(message);
      result.ranks[message.rank] = process.received.substr(at, message.bytes);
      at += message.bytes;
    }
    // A process whose ranks were all content may still have leaked or crashed at its end.
    if (status != 0 && result.ranks[process.first].empty()) {
      result.ranks[process.first] =
        WIFEXITED(status) && WEXITSTATUS(status) == 23 ? "leaks memory" : deathSentence(status, timedOut);
    }
  }
  result.elapsedMs = millisecondsSince(start);
  return result;
}

ncclMoeConfig_t makeConfig(int nExperts, int maxTokens, int maxTopK, size_t maxRowBytes, int timeoutMs) {
  ncclMoeConfig_t config = NCCL_MOE_CONFIG_INITIALIZER;
  config.nExperts = nExperts;
  config.maxTokens = maxTokens;
  config.maxTopK = maxTopK;
  config.maxRowBytes = maxRowBytes;
  config.timeoutMs = timeoutMs;
  config.jobToken = "a token of the tests";
  return config;
}

const char* resultName(ncclResult_t result) {
  switch (static_cast<int>(result)) {
  case ncclSuccess:
    return "ncclSuccess";
  case ncclUnhandledCudaError:
    return "ncclUnhandledCudaError";
  case ncclSystemError:
    return "ncclSystemError";
  case ncclInternalError:
    return "ncclInternalError";
  case ncclInvalidArgument:
    return "ncclInvalidArgument";
  case ncclInvalidUsage:
    return "ncclInvalidUsage";
  case ncclRemoteError:
    return "ncclRemoteError";
  default:
    return "an unknown result";
  }
}

std::string expectResult(const char* where, ncclResult_t got, ncclResult_t want, ncclMoeComm_t comm,
                         const std::string& mentions) {
  const std::string sentence = got == ncclSuccess ? "" : ncclMoeGetLastError(comm);
  if (got != want) {
    return std::string(where) + " returned " + resultName(got) + " instead of " + resultName(want) + ": " + sentence;
  }
  if (got != ncclSuccess && sentence.empty()) return std::string(where) + ": an error without a sentence";
  for (size_t at = 0; at < mentions.size();) {
    size_t end = mentions.find(',', at);
    if (end == std::string::npos) end = mentions.size();
    const std::string word = mentions.substr(at, end - at);
    if (sentence.find(word) == std::string::npos) {
      return std::string(where) + ": the sentence \"" + sentence + "\" does not mention \"" + word + "\"";
    }
    at = end + 1;
  }
  return "";
}

} // namespace moe::test
