// What the plugin owes to the process that loads it: counters however the process ends, and a child of fork that may
// begin anew.  Every test runs in processes of its own, for the plugin reads its variables once.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "plugin/nccl_net_abi.h"

namespace {

constexpr unsigned patience = 60; // seconds until a child that hangs is ended, and so has failed

const ncclNet_v12_t* load() {
  setenv("NCCL_MOE_NET_TRANSPORT", "tcp", 1);
  setenv("NCCL_MOE_NET_IFNAME", "lo", 1);
  // Beside this binary; not by its bare name, for address sanitizer's dlopen does not look at this binary's run path.
  char self[PATH_MAX] = {};
  if (readlink("/proc/self/exe", self, sizeof(self) - 1) <= 0) return nullptr;
  std::string path = self;
  path.resize(path.rfind('/'));
  path += "/../lib/libnccl-net-moe.so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    fprintf(stderr, "%s\n", dlerror());
    return nullptr;
  }
  return static_cast<const ncclNet_v12_t*>(dlsym(library, "ncclNetPlugin_v12"));
}

// Ends a child.  GoogleTest's assertions are for the process that it runs in.
#define NEED(condition)                                                                                                \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      fprintf(stderr, "line %d, in a child: not so: %s\n", __LINE__, #condition);                                      \
      _exit(1);                                                                                                        \
    }                                                                                                                  \
  } while (0)

// A connection of a process with itself.
struct Loop {
  const ncclNet_v12_t* net = nullptr;
  void *listening = nullptr, *sending = nullptr, *receiving = nullptr;

  void open(const ncclNet_v12_t* with, void* ctx) {
    net = with;
    alignas(64) char handle[NCCL_NET_HANDLE_MAXSIZE] = {};
    NEED(net->listen(ctx, 0, handle, &listening) == ncclSuccess);
    while (sending == nullptr || receiving == nullptr) {
      if (sending == nullptr) NEED(net->connect(ctx, 0, handle, &sending, nullptr) == ncclSuccess);
      if (receiving == nullptr) NEED(net->accept(listening, &receiving, nullptr) == ncclSuccess);
    }
  }
  void message(char value) {
    char out[1000], in[sizeof(out)] = {};
    memset(out, value, sizeof(out));
    void *outMr = nullptr, *inMr = nullptr, *sent = nullptr, *received = nullptr;
    NEED(net->regMr(sending, out, sizeof(out), NCCL_PTR_HOST, &outMr) == ncclSuccess);
    NEED(net->regMr(receiving, in, sizeof(in), NCCL_PTR_HOST, &inMr) == ncclSuccess);
    void* at = in;
    size_t bytes = sizeof(in);
    int tag = 7;
    while (received == nullptr)
      NEED(net->irecv(receiving, 1, &at, &bytes, &tag, &inMr, nullptr, &received) == ncclSuccess);
    while (sent == nullptr) NEED(net->isend(sending, out, sizeof(out), tag, outMr, nullptr, &sent) == ncclSuccess);
    for (void* request : {sent, received}) {
      int done = 0, size = 0;
      while (done == 0) NEED(net->test(request, &done, &size) == ncclSuccess);
    }
    NEED(memcmp(in, out, sizeof(in)) == 0);
    NEED(net->deregMr(sending, outMr) == ncclSuccess);
    NEED(net->deregMr(receiving, inMr) == ncclSuccess);
  }
  void close() {
    NEED(net->closeSend(sending) == ncclSuccess);
    NEED(net->closeRecv(receiving) == ncclSuccess);
    NEED(net->closeListen(listening) == ncclSuccess);
  }
};

void* newContext(const ncclNet_v12_t* net) {
  ncclNetCommConfig_v10_t config = {NCCL_NET_TRAFFIC_CLASS_UNDEF};
  void* ctx = nullptr;
  NEED(net != nullptr);
  NEED(net->init(&ctx, 42, &config, nullptr, nullptr) == ncclSuccess);
  int n = 0;
  NEED(net->devices(&n) == ncclSuccess && n > 0);
  return ctx;
}

// Runs it in a child, which ends as programs do, with exit; gives the child's status, and its process id.
int inChild(const std::function<void()>& run, pid_t* pid = nullptr) {
  fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(patience);
    run();
    exit(0);
  }
  if (pid != nullptr) *pid = child;
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

// Longer than what a std::string holds in itself.
std::string statsPattern() {
  return testing::TempDir() + "counters-of-the-network-" + std::to_string(getpid()) + "-%p.json";
}

nlohmann::json readStats(std::string path, pid_t pid) {
  path.replace(path.find("%p"), 2, std::to_string(pid));
  std::ifstream file(path);
  nlohmann::json root = nlohmann::json::parse(file, nullptr, false);
  unlink(path.c_str());
  return root;
}

void expectStats(const nlohmann::json& root, pid_t pid, size_t connections, uint64_t messages) {
  ASSERT_TRUE(root.is_object());
  EXPECT_EQ(root["pid"], pid);
  EXPECT_EQ(root["connections"].size(), connections);
  ASSERT_EQ(root["devices"].size(), 1u);
  const nlohmann::json& counters = root["devices"][0]["counters"];
  EXPECT_EQ(counters["sends"], messages);
  EXPECT_EQ(counters["sendBytes"], 1000 * messages);
  EXPECT_EQ(counters["receives"], messages);
  EXPECT_EQ(counters["receiveBytes"], 1000 * messages);
  EXPECT_EQ(counters["errors"], 0);
}

TEST(PluginStats, ProgramThatDoesNotFinalize) {
  const std::string pattern = statsPattern();
  pid_t pid = 0;
  const int status = inChild(
    [&] {
      setenv("NCCL_MOE_NET_STATS", pattern.c_str(), 1);
      static void* kept = nullptr; // not finalized, and no leak
      const ncclNet_v12_t* net = load();
      kept = newContext(net);
      Loop loop;
      loop.open(net, kept);
      loop.message('a');
      loop.message('b');
      loop.close();
    },
    &pid);
  EXPECT_EQ(status, 0);
  expectStats(readStats(pattern, pid), pid, 2, 2);
}

TEST(PluginStats, CountersOutliveTheEngine) {
  const std::string pattern = statsPattern();
  pid_t pid = 0;
  const int status = inChild(
    [&] {
      setenv("NCCL_MOE_NET_STATS", pattern.c_str(), 1);
      const ncclNet_v12_t* net = load();
      for (int turn = 0; turn < 3; turn++) {
        void* ctx = newContext(net);
        Loop loop;
        loop.open(net, ctx);
        for (int i = 0; i <= turn; i++) loop.message('a');
        loop.close();
        NEED(net->finalize(ctx) == ncclSuccess);
      }
    },
    &pid);
  EXPECT_EQ(status, 0);
  expectStats(readStats(pattern, pid), pid, 6, 6);
}

// What the plugin logs, as NCCL would write it.
std::string logged;
void keepLog(int, unsigned long, const char*, int, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  logged += std::string(text) + "\n";
}

TEST(PluginLog, NamesTheJobTokenButDoesNotTellIt) {
  const int status = inChild([] {
    setenv("NCCL_MOE_JOB_TOKEN", "open-sesame", 1);
    setenv("NCCL_DEBUG", "INFO", 1);
    const ncclNet_v12_t* net = load();
    NEED(net != nullptr);
    ncclNetCommConfig_v10_t config = {NCCL_NET_TRAFFIC_CLASS_UNDEF};
    void* ctx = nullptr;
    NEED(net->init(&ctx, 42, &config, keepLog, nullptr) == ncclSuccess);
    Loop loop;
    loop.open(net, ctx);
    loop.message('a');
    loop.close();
    NEED(net->finalize(ctx) == ncclSuccess);
    NEED(logged.find("NCCL_MOE_JOB_TOKEN") != std::string::npos);
    NEED(logged.find("sesame") == std::string::npos);
  });
  EXPECT_EQ(status, 0);
}

// Thread sanitizer ends a child of a process with threads that starts a thread.
#ifdef __SANITIZE_THREAD__
#define SKIP_FORK GTEST_SKIP() << "thread sanitizer allows no threads in a child of fork"
#else
#define SKIP_FORK (void)0
#endif

TEST(PluginFork, ChildBeginsAnewAndClosesWhatItInherited) {
  SKIP_FORK;
  const int status = inChild([] {
    const ncclNet_v12_t* net = load();
    void* ctx = newContext(net);
    Loop loop;
    loop.open(net, ctx);
    loop.message('a');
    const int childs = inChild([&] {
      // As a program's helper would that cleans up with its parent's calls.
      int n = 0;
      NEED(net->devices(&n) == ncclSuccess);
      NEED(net->closeSend(loop.sending) == ncclSuccess);
      NEED(net->finalize(ctx) == ncclSuccess);
      void* own = newContext(net);
      Loop second;
      second.open(net, own);
      second.message('c');
      // The rest of its parent's, now that it has an engine itself.
      NEED(net->closeRecv(loop.receiving) == ncclSuccess);
      NEED(net->closeListen(loop.listening) == ncclSuccess);
      NEED(net->finalize(ctx) == ncclSuccess);
      second.message('d');
      second.close();
      NEED(net->finalize(own) == ncclSuccess);
      _exit(0);
    });
    NEED(childs == 0);
    loop.message('e'); // nothing of it has come to the parent's connection
    loop.close();
    NEED(net->finalize(ctx) == ncclSuccess);
  });
  EXPECT_EQ(status, 0);
}

TEST(PluginFork, ChildCountsForItself) {
  SKIP_FORK;
  const std::string pattern = statsPattern();
  const int status = inChild([&] {
    setenv("NCCL_MOE_NET_STATS", pattern.c_str(), 1);
    const ncclNet_v12_t* net = load();
    const auto messages = [&](int count) {
      void* ctx = newContext(net);
      Loop loop;
      loop.open(net, ctx);
      for (int i = 0; i < count; i++) loop.message('a');
      loop.close();
      NEED(net->finalize(ctx) == ncclSuccess);
    };
    messages(3);
    pid_t pid = 0;
    NEED(inChild(
           [&] {
             messages(1);
             _exit(0);
           },
           &pid) == 0);
    expectStats(readStats(pattern, pid), pid, 2, 1);
    expectStats(readStats(pattern, getpid()), getpid(), 2, 3);
    NEED(!testing::Test::HasFailure());
    _exit(0);
  });
  EXPECT_EQ(status, 0);
}

} // namespace
