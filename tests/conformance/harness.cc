#include "harness.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dirent.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

namespace conformance {
namespace {

constexpr size_t guard = 4096;
constexpr uint8_t poisonByte = 0xd5;

// One call of connect, accept, isend, ... never waits for a peer.  The bound leaves room for a busy machine; a call
// that does wait for a stopped peer takes longer than that.
constexpr double callBound = 2.0;

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

void stream(uint64_t seed, size_t offset, uint8_t* out, size_t bytes) {
  // Eight bytes at a time; offset is a multiple of 8 but for the last part.
  for (size_t i = 0; i < bytes; i += 8) {
    uint64_t word = mix(seed ^ mix((offset + i) / 8));
    memcpy(out + i, &word, std::min<size_t>(8, bytes - i));
  }
}

std::string describe(const char* format, va_list args) {
  char text[1024];
  vsnprintf(text, sizeof(text), format, args);
  return text;
}

int countEntries(const char* dir) {
  DIR* d = opendir(dir);
  if (d == nullptr) return -1;
  int n = 0;
  while (readdir(d) != nullptr) n++;
  closedir(d);
  return n - 2;
}

} // namespace

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void failed(const char* file, int line, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string text = describe(format, args);
  va_end(args);
  const char* base = strrchr(file, '/');
  throw Failure{std::string(base == nullptr ? file : base + 1) + ":" + std::to_string(line) + ": " + text};
}

void skip(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string text = describe(format, args);
  va_end(args);
  throw Skip{text};
}

std::vector<Case>& cases() {
  static std::vector<Case> list;
  return list;
}

// ---------------------------------------------------------------------------------------------- ranks ----

void Rank::start() {
  std::string error = net.load(options->plugin, options->version);
  require(error.empty(), "loading the plugin: %s", error.c_str());
  requireOk(net.init());
  int count = 0;
  requireOk(net.devices(&count));
  require(count > 0, "the plugin has no devices");
  dev = options->devs[size_t(rank) % options->devs.size()];
  require(dev < count, "device %d of %d was asked for", dev, count);
  if (!options->merge.empty()) {
    require(net.hasVDevice(), "--merge: the plugin has no makeVDevice in this version");
    requireOk(net.makeVDevice(&dev, options->merge));
  }
  Properties props;
  requireOk(net.properties(dev, &props));
  maxRecvs = props.maxRecvs;
}

void Rank::stop() {
  while (net.contexts() > 0) requireOk(net.finalize());
}

void Rank::send(int peer, const void* data, size_t bytes) {
  auto* at = static_cast<const char*>(data);
  while (bytes > 0) {
    ssize_t n = ::send(channels[size_t(peer)], at, bytes, MSG_NOSIGNAL);
    if (n == -1 && errno == EINTR) continue;
    if (n <= 0) throw PeerGone{};
    at += n;
    bytes -= size_t(n);
  }
}

void Rank::receive(int peer, void* data, size_t bytes) {
  auto* at = static_cast<char*>(data);
  while (bytes > 0) {
    ssize_t n = ::recv(channels[size_t(peer)], at, bytes, 0);
    if (n == -1 && errno == EINTR) continue;
    if (n <= 0) throw PeerGone{};
    at += n;
    bytes -= size_t(n);
  }
}

void Rank::meet(int peer) {
  sendValue(peer, 'm');
  require(receiveValue<char>(peer) == 'm', "the ranks of this case are out of step");
}

void Rank::killSelf() {
  kill(getpid(), SIGKILL);
  pause();
}

namespace {

// What a rank tells the runner before it ends.
struct Report {
  char kind; // p, f, s, g (peer gone)
  char text[1500];
};

[[noreturn]] void runRank(const Case& c, Rank& r, int reportFd) {
  Report report = {'p', ""};
  std::string text;
  try {
    c.run(r);
  } catch (const Failure& f) {
    report.kind = 'f';
    text = f.text;
  } catch (const Skip& s) {
    report.kind = 's';
    text = s.text;
  } catch (const PeerGone&) {
    report.kind = 'g';
    text = "a peer ended early";
  }
  if (report.kind == 'f' && !warnings().empty()) text += "; the plugin's last warning: " + warnings().back();
  snprintf(report.text, sizeof(report.text), "%s", text.c_str());
  if (write(reportFd, &report, sizeof(report)) == -1) _exit(3);
  fflush(nullptr);
  // A passing rank ends as a program does, so that exit handlers run and show their faults.
  if (report.kind == 'p') exit(0);
  _exit(0);
}

std::string endOf(int status) {
  if (WIFSIGNALED(status)) return std::string("killed by signal ") + strsignal(WTERMSIG(status));
  return "exit status " + std::to_string(WEXITSTATUS(status));
}

} // namespace

Result runCase(const Case& c, const Options& options) {
  Result result;
  double begin = seconds();
  auto n = size_t(c.ranks);
  // pairs[i][j]: i's end of the socket pair with j.
  std::vector<std::vector<int>> pairs(n, std::vector<int>(n, -1));
  for (size_t i = 0; i < n; i++)
    for (size_t j = i + 1; j < n; j++) {
      int fds[2];
      if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == -1) return {Verdict::failed, "socketpair", 0};
      pairs[i][j] = fds[0];
      pairs[j][i] = fds[1];
    }
  std::vector<int> reports(n), reportEnds(n);
  for (size_t i = 0; i < n; i++) {
    int fds[2];
    if (pipe(fds) == -1) return {Verdict::failed, "pipe", 0};
    reports[i] = fds[0];
    reportEnds[i] = fds[1];
  }
  std::vector<pid_t> pids(n, 0);
  fflush(nullptr);
  pid_t runner = getpid();
  for (size_t i = 0; i < n; i++) {
    pid_t pid = fork();
    if (pid == -1) return {Verdict::failed, "fork", 0};
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != runner) _exit(1);
      setpgid(0, 0); // takes what the case forks along when it is killed
      for (size_t k = 0; k < n; k++) {
        close(reports[k]);
        if (k != i) close(reportEnds[k]);
        for (size_t j = 0; j < n; j++)
          if (k != i && pairs[k][j] != -1) close(pairs[k][j]);
      }
      Rank r;
      r.rank = int(i);
      r.n = c.ranks;
      r.options = &options;
      r.random.seed(options.seed * 1000003 + std::hash<std::string>()(c.name) + i);
      r.channels = pairs[i];
      r.pids = pids;
      runRank(c, r, reportEnds[i]);
    }
    pids[i] = pid;
  }
  for (size_t i = 0; i < n; i++) {
    close(reportEnds[i]);
    for (size_t j = 0; j < n; j++)
      if (pairs[i][j] != -1) close(pairs[i][j]);
  }
  // Wait for all, within the limit.
  double end = begin + c.limit * options.scale;
  std::vector<int> status(n, 0);
  std::vector<bool> ended(n, false);
  bool late = false;
  size_t left = n;
  while (left > 0) {
    for (size_t i = 0; i < n; i++)
      if (!ended[i] && waitpid(pids[i], &status[i], WNOHANG) == pids[i]) {
        ended[i] = true;
        left--;
      }
    if (left == 0) break;
    if (!late && seconds() > end) {
      late = true;
      for (size_t i = 0; i < n; i++)
        if (!ended[i]) {
          kill(-pids[i], SIGKILL);
          kill(pids[i], SIGKILL);
        }
    }
    usleep(2000);
  }
  for (size_t i = 0; i < n; i++) kill(-pids[i], SIGKILL); // stragglers of its group
  std::string failures, skips, gone;
  for (size_t i = 0; i < n; i++) {
    Report report = {0, ""};
    bool any = read(reports[i], &report, sizeof(report)) == ssize_t(sizeof(report));
    close(reports[i]);
    std::string who = c.ranks == 1 ? "" : "rank " + std::to_string(i) + ": ";
    bool victim = std::find(c.victims.begin(), c.victims.end(), int(i)) != c.victims.end();
    bool clean = WIFEXITED(status[i]) && WEXITSTATUS(status[i]) == 0;
    if (any && report.kind == 'f') failures += who + report.text + "; ";
    if (any && report.kind == 's') skips = report.text;
    if (any && report.kind == 'g') gone += who + report.text + "; ";
    if (victim && WIFSIGNALED(status[i]) && WTERMSIG(status[i]) == SIGKILL && !late) continue;
    if (!any && !late) failures += who + endOf(status[i]) + "; ";
    if (any && !clean && report.kind == 'p') failures += who + "passed, then " + endOf(status[i]) + "; ";
  }
  if (late) {
    char text[100];
    snprintf(text, sizeof(text), "still running after %.0f s; ", c.limit * options.scale);
    failures = text + failures;
  }
  if (!failures.empty())
    result = {Verdict::failed, failures, 0};
  else if (!skips.empty())
    result = {Verdict::skipped, skips, 0};
  else if (!gone.empty())
    result = {Verdict::failed, gone, 0};
  if (result.reason.size() > 2 && result.verdict == Verdict::failed) result.reason.resize(result.reason.size() - 2);
  result.time = seconds() - begin;
  return result;
}

// -------------------------------------------------------------------------------------------- buffers ----

Buffer::Buffer(size_t bytes, size_t misalign)
  : size_(bytes), mapped_((bytes + misalign + 2 * guard + 4095) & ~size_t(4095)) {
  void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(p != MAP_FAILED, "cannot map %zu bytes", mapped_);
  base_ = static_cast<uint8_t*>(p);
  data_ = base_ + guard + misalign;
  poison();
}

Buffer::~Buffer() { munmap(base_, mapped_); }

void Buffer::poison() { memset(base_, poisonByte, mapped_); }

void Buffer::fill(uint64_t seed) { stream(seed, 0, data_, size_); }

void Buffer::checkRange(uint64_t seed, size_t offset, size_t bytes, const char* what) {
  std::vector<uint8_t> want(64 << 10);
  for (size_t at = 0; at < bytes; at += want.size()) {
    size_t part = std::min(want.size(), bytes - at);
    stream(seed, at, want.data(), part);
    if (memcmp(data_ + offset + at, want.data(), part) == 0) continue;
    size_t i = 0;
    while (data_[offset + at + i] == want[i]) i++;
    failed("data", 0, "%s: byte %zu of %zu is 0x%02x, not 0x%02x", what, at + i, bytes, data_[offset + at + i],
           want[i]);
  }
}

void Buffer::check(uint64_t seed, size_t bytes, const char* what) {
  checkRange(seed, 0, bytes, what);
  for (size_t i = bytes; i < size_; i++)
    require(data_[i] == poisonByte, "%s: byte %zu past the message of %zu was written", what, i, bytes);
  checkGuards(what);
}

void Buffer::checkGuards(const char* what) {
  for (uint8_t* p = base_; p < data_; p++)
    require(*p == poisonByte, "%s: %td bytes before the buffer were written", what, data_ - p);
  for (uint8_t* p = data_ + size_; p < base_ + mapped_; p++)
    require(*p == poisonByte, "%s: byte %td past the buffer was written", what, p - data_);
}

// ---------------------------------------------------------------------------------------- connections ----

namespace {

// Polls a step until it yields something.
template <class F> void* loop(Rank& r, const char* what, F&& step) {
  double begin = seconds();
  for (int i = 0;; i++) {
    void* result = nullptr;
    double before = seconds();
    ncclResult_t rc = step(&result);
    double took = seconds() - before;
    require(rc == ncclSuccess, "%s returned %d", what, int(rc));
    require(took < callBound * r.options->scale, "one call of %s took %.2f s", what, took);
    if (result != nullptr) return result;
    require(seconds() - begin < r.bound(), "%s gave nothing in %.0f s", what, r.bound());
    if (i > 100) usleep(50);
  }
}

} // namespace

void* connectLoop(Rank& r, void* handle) {
  return loop(r, "connect", [&](void** comm) { return r.net.connect(r.dev, handle, comm); });
}

void* acceptLoop(Rank& r, void* listenComm) {
  return loop(r, "accept", [&](void** comm) { return r.net.accept(listenComm, comm); });
}

void* listenOn(Rank& r, Handle* handle) {
  void* comm = nullptr;
  requireOk(r.net.listen(r.dev, handle->bytes, &comm));
  require(comm != nullptr, "listen gave no comm");
  return comm;
}

void* connectTo(Rank& r, int peer) {
  auto handle = r.receiveValue<Handle>(peer);
  return connectLoop(r, handle.bytes);
}

void* acceptFrom(Rank& r, int peer) {
  Handle handle = {};
  void* listenComm = listenOn(r, &handle);
  r.sendValue(peer, handle);
  void* comm = acceptLoop(r, listenComm);
  requireOk(r.net.closeListen(listenComm));
  return comm;
}

void closeSend(Rank& r, void* comm) { requireOk(r.net.closeSend(comm)); }
void closeRecv(Rank& r, void* comm) { requireOk(r.net.closeRecv(comm)); }

void* reg(Rank& r, void* comm, Buffer& buffer) {
  void* mhandle = nullptr;
  requireOk(r.net.regMr(comm, buffer.data(), buffer.size(), &mhandle));
  return mhandle;
}

void dereg(Rank& r, void* comm, void* mhandle) { requireOk(r.net.deregMr(comm, mhandle)); }

void* postSend(Rank& r, void* comm, void* data, size_t bytes, int tag, void* mhandle) {
  return loop(r, "isend", [&](void** request) { return r.net.isend(comm, data, bytes, tag, mhandle, request); });
}

void* postRecv(Rank& r, void* comm, void* data, size_t bytes, int tag, void* mhandle) {
  return loop(r, "irecv", [&](void** request) { return r.net.irecv(comm, 1, &data, &bytes, &tag, &mhandle, request); });
}

int waitDone(Rank& r, void* request) {
  int size = -1;
  loop(r, "test", [&](void** result) {
    int done = 0, sizes[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
    ncclResult_t rc = r.net.test(request, &done, sizes);
    size = sizes[0];
    *result = done ? request : nullptr;
    return rc;
  });
  return size;
}

namespace {

template <class Post> ncclResult_t tryOne(Rank& r, const char* what, Post&& post) {
  double begin = seconds();
  void* request = nullptr;
  while (request == nullptr) {
    ncclResult_t rc = post(&request);
    if (rc != ncclSuccess) return rc;
    require(seconds() - begin < r.bound(), "%s: neither taken nor refused in %.0f s", what, r.bound());
    if (request == nullptr) usleep(50);
  }
  for (;;) {
    int done = 0, sizes[8] = {};
    ncclResult_t rc = r.net.test(request, &done, sizes);
    if (rc != ncclSuccess) return rc;
    if (done) return ncclSuccess;
    require(seconds() - begin < r.bound(), "%s: neither done nor failed in %.0f s", what, r.bound());
    usleep(20);
  }
}

} // namespace

ncclResult_t trySend(Rank& r, void* comm, void* data, size_t bytes, int tag, void* mhandle) {
  return tryOne(r, "isend", [&](void** q) { return r.net.isend(comm, data, bytes, tag, mhandle, q); });
}

ncclResult_t tryRecv(Rank& r, void* comm, void* data, size_t bytes, int tag, void* mhandle) {
  return tryOne(r, "irecv", [&](void** q) { return r.net.irecv(comm, 1, &data, &bytes, &tag, &mhandle, q); });
}

void sendMessage(Rank& r, void* comm, size_t bytes, uint64_t seed) {
  Buffer buffer(bytes);
  buffer.fill(seed);
  void* mhandle = reg(r, comm, buffer);
  waitDone(r, postSend(r, comm, buffer.data(), bytes, 0, mhandle));
  dereg(r, comm, mhandle);
}

void recvMessage(Rank& r, void* comm, size_t bytes, uint64_t seed) {
  Buffer buffer(bytes);
  void* mhandle = reg(r, comm, buffer);
  int size = waitDone(r, postRecv(r, comm, buffer.data(), bytes, 0, mhandle));
  require(size == int(bytes), "test said %d bytes for a message of %zu", size, bytes);
  buffer.check(seed, bytes, "message");
  dereg(r, comm, mhandle);
}

int openFds() { return countEntries("/proc/self/fd"); }
int threads() { return countEntries("/proc/self/task"); }

} // namespace conformance
