#include "perf/moe/launch.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "perf/moe/group.h"
#include "perf/moe/perf_error.h"
#include "perf/moe/report.h"

#ifdef MOE_MPI
#include <mpi.h>
#endif

namespace moe::perf {

namespace {

enum ExitStatus { exitFine = 0, exitWrong = 1, exitFailed = 2 };

int complain(const char* who, int rank) {
  if (rank >= 0)
    fprintf(stderr, "%s: rank %d: %s\n", who, rank, perfError());
  else
    fprintf(stderr, "%s: %s\n", who, perfError());
  return exitFailed;
}

ncclResult_t gatherRanks(Group& group, const Device& device, RunInfo* info) {
  char mine[256];
  snprintf(mine, sizeof(mine), "Pid %6d on %s", getpid(), device.describe().c_str());
  std::vector<char> all(sizeof(mine) * static_cast<size_t>(group.nRanks()));
  PERFCHECK(group.allGather(mine, all.data(), sizeof(mine)));
  for (int r = 0; r < group.nRanks(); r++) info->ranks.emplace_back(&all[sizeof(mine) * static_cast<size_t>(r)]);
  return ncclSuccess;
}

ncclResult_t rankMain(const Options& o, bool cuda, Group& group, int localIndex, const std::string& rendezvous,
                      int64_t* wrong) {
  std::unique_ptr<Device> device;
  if (cuda)
    PERFCHECK(makeCudaDevice(group, localIndex, &device));
  else
    PERFCHECK(makeHostDevice(group, rendezvous, &device));
  RunInfo info;
  info.machine = describeMachine();
  info.backend = cuda ? "cuda" : "host";
  PERFCHECK(gatherRanks(group, *device, &info));
  Report report(o, info);
  if (group.rank() == 0) report.header();
  PERFCHECK(runRank(o, group, *device, group.rank() == 0 ? &report : nullptr, wrong));
  return group.rank() == 0 ? report.finish(*wrong) : ncclSuccess;
}

// One rank from its beginning to its exit status.
int rankStatus(const Options& o, bool cuda, Group& group, int localIndex, const std::string& rendezvous) {
  int64_t wrong = 0;
  const auto run = [&]() -> ncclResult_t {
    try {
      return rankMain(o, cuda, group, localIndex, rendezvous, &wrong);
    } catch (const std::bad_alloc&) {
      return perfFail(ncclSystemError, "out of host memory with %d tokens of each rank", o.maxTokens);
    }
  };
  if (run() != ncclSuccess) {
    const int status = complain("moe_perf", group.rank());
    group.abort();
    return status;
  }
  return wrong == 0 ? exitFine : exitWrong;
}

int barrierTimeoutMs(const Options& o) {
  return o.timeoutSeconds > 1000000 ? 1000000000 : o.timeoutSeconds * 1000 + 30000; // the library's wait ends first
}

// The ranks of one forked process.
int processStatus(const Options& o, bool cuda, GroupMemory* memory, int process, int nRanks,
                  const std::string& rendezvous) {
  std::vector<int> status(o.gpus, exitFailed);
  std::vector<std::thread> threads;
  for (int i = 0; i < o.gpus; i++) {
    const int rank = process * o.gpus + i;
    const auto body = [&, i, rank] {
      const std::unique_ptr<Group> group = makeSharedGroup(memory, rank, nRanks, barrierTimeoutMs(o));
      status[i] = rankStatus(o, cuda, *group, rank, rendezvous);
    };
    if (o.gpus == 1)
      body();
    else
      threads.emplace_back(body);
  }
  for (std::thread& t : threads) t.join();
  int worst = exitFine;
  for (const int s : status) worst = std::max(worst, s);
  return worst;
}

// Waits for all; when one fails, the others get some seconds to notice and are then killed.
int reap(std::vector<pid_t> children, Group& group) {
  using Clock = std::chrono::steady_clock;
  int worst = exitFine;
  bool failed = false;
  Clock::time_point deadline{};
  while (!children.empty()) {
    int state = 0;
    const pid_t pid = waitpid(-1, &state, failed ? WNOHANG : 0);
    if (pid > 0) {
      for (size_t i = 0; i < children.size(); i++) {
        if (children[i] == pid) children.erase(children.begin() + static_cast<ptrdiff_t>(i));
      }
      const int status = WIFEXITED(state) ? WEXITSTATUS(state) : exitFailed;
      if (WIFSIGNALED(state))
        fprintf(stderr, "moe_perf: process %d was ended by signal %d (%s)\n", pid, WTERMSIG(state),
                strsignal(WTERMSIG(state)));
      worst = std::max(worst, status);
      if (status >= exitFailed && !failed) {
        failed = true;
        deadline = Clock::now() + std::chrono::seconds(10);
        group.abort();
      }
    } else if (pid < 0 && errno != EINTR) {
      return exitFailed;
    } else if (failed) {
      if (Clock::now() > deadline) {
        for (const pid_t child : children) kill(child, SIGKILL);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }
  return worst;
}

// A child that runs body and exits with its result; -1 where fork fails.
template <typename Body> pid_t forkChild(const Body& body) {
  const pid_t parent = getpid();
  fflush(stdout);
  fflush(stderr);
  const pid_t pid = fork();
  if (pid != 0) return pid;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(exitFailed);
  const int status = body();
  fflush(stdout);
  fflush(stderr);
  _exit(status);
}

// Asks in a child, for a process that has initialised CUDA cannot fork ranks.
int countGpusApart() {
  const pid_t pid = forkChild([] { return std::min(countGpus(), 255); });
  int state = 0;
  if (pid < 0 || waitpid(pid, &state, 0) != pid || !WIFEXITED(state)) return 0;
  return WEXITSTATUS(state);
}

#ifdef NCCL_MOE_NO_CUDA
constexpr char whyNoGpu[] = "this build has no CUDA part";
#else
constexpr char whyNoGpu[] = "CUDA finds no GPU on this machine";
#endif

// Decides between the backends; cuda without a GPU is an error.
ncclResult_t resolveDevice(const Options& o, int nGpus, bool* cuda) {
  *cuda = o.device == DeviceKind::cuda || (o.device == DeviceKind::automatic && nGpus > 0);
  if (*cuda && nGpus == 0) return perfFail(ncclInvalidUsage, "--device cuda: %s", whyNoGpu);
  if (!*cuda && o.rivalNccl) return perfFail(ncclInvalidArgument, "--rival nccl is for --device cuda");
  if (!*cuda && o.gpus != 1)
    return perfFail(ncclInvalidArgument, "-g is for --device cuda; the host backend's ranks are processes: -r");
  return ncclSuccess;
}

// A fresh directory that no one else can write to, for the rendezvous file.
class RendezvousDirectory {
 public:
  ~RendezvousDirectory() {
    if (path_.empty()) return;
    unlink((path_ + "/rendezvous").c_str());
    rmdir(path_.c_str());
  }
  ncclResult_t make() {
    const char* tmp = getenv("TMPDIR");
    std::string pattern = std::string(tmp != nullptr && tmp[0] == '/' ? tmp : "/tmp") + "/moe_perf.XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) return perfFail(ncclSystemError, "%s cannot be made: %m", pattern.c_str());
    path_ = pattern;
    return ncclSuccess;
  }
  std::string address() const { return "file://" + path_ + "/rendezvous"; }

 private:
  std::string path_;
};

#ifdef MOE_MPI
ncclResult_t rendezvousFromRankZero(Group& group, RendezvousDirectory* directory, std::string* address) {
  char mine[256] = "";
  ncclResult_t made = ncclSuccess;
  if (group.rank() == 0) {
    made = directory->make();
    snprintf(mine, sizeof(mine), "%s", made == ncclSuccess ? directory->address().c_str() : "");
  }
  std::vector<char> all(sizeof(mine) * static_cast<size_t>(group.nRanks()));
  PERFCHECK(group.allGather(mine, all.data(), sizeof(mine)));
  PERFCHECK(made);
  *address = all.data();
  return address->empty() ? perfFail(ncclRemoteError, "rank 0 could not make the rendezvous") : ncclSuccess;
}

// One rank in each process of mpirun, which decides how many there are.
int launchMpi(const Options& o) {
  MPI_Init(nullptr, nullptr);
  MPI_Comm local = MPI_COMM_NULL;
  int localIndex = 0;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local);
  MPI_Comm_rank(local, &localIndex);
  MPI_Comm_free(&local);
  const std::unique_ptr<Group> group = makeMpiGroup();
  RendezvousDirectory directory;
  std::string rendezvous;
  bool cuda = false;
  int status = exitFailed;
  if (o.ranks > 1 || o.gpus > 1) {
    perfFail(ncclInvalidArgument, "under MPI each process is one rank: leave -r and -g out");
    status = complain("moe_perf", group->rank());
    group->abort();
  } else if (resolveDevice(o, countGpus(), &cuda) != ncclSuccess ||
             (!cuda && rendezvousFromRankZero(*group, &directory, &rendezvous) != ncclSuccess)) {
    status = complain("moe_perf", group->rank());
    group->abort();
  } else {
    status = rankStatus(o, cuda, *group, localIndex, rendezvous);
  }
  MPI_Finalize();
  return status;
}

bool startedByMpi() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"}) {
    if (getenv(name) != nullptr) return true;
  }
  return false;
}
#endif

} // namespace

int launch(const Options& options) {
#ifdef MOE_MPI
  if (startedByMpi()) return launchMpi(options);
#endif
  bool cuda = false;
  const int nGpus = options.device == DeviceKind::host ? 0 : countGpusApart();
  if (resolveDevice(options, nGpus, &cuda) != ncclSuccess) return complain("moe_perf", -1);
  const int nProcesses = options.ranks > 0 ? options.ranks : (cuda ? 1 : 2);
  const int nRanks = nProcesses * options.gpus;
  if (nRanks > NCCL_MOE_MAX_RANKS) {
    perfFail(ncclInvalidArgument, "-r times -g is %d ranks; %d are possible", nRanks, NCCL_MOE_MAX_RANKS);
    return complain("moe_perf", -1);
  }
  std::unique_ptr<RoutingSource> source; // so that what is wrong with a file is said once, not by every rank
  if (makeRoutingSource(options, nRanks, &source) != ncclSuccess) return complain("moe_perf", -1);
  source.reset();
  RendezvousDirectory directory;
  GroupMemoryPtr memory;
  if (directory.make() != ncclSuccess || makeGroupMemory(nRanks, &memory) != ncclSuccess)
    return complain("moe_perf", -1);
  const std::unique_ptr<Group> group = makeSharedGroup(memory.get(), 0, nRanks, barrierTimeoutMs(options));
  std::vector<pid_t> children;
  for (int p = 0; p < nProcesses; p++) {
    const pid_t pid =
      forkChild([&] { return processStatus(options, cuda, memory.get(), p, nRanks, directory.address()); });
    if (pid < 0) {
      perfFail(ncclSystemError, "fork failed: %m");
      complain("moe_perf", -1);
      group->abort();
      reap(children, *group);
      return exitFailed;
    }
    children.push_back(pid);
  }
  return reap(children, *group);
}

} // namespace moe::perf
