// How ranks find each other, and who must not be able to join or disturb them.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

#include "host/job.h"

namespace moe::test {
namespace {

constexpr int kExperts = 3;

ncclMoeConfig_t config(int timeoutMs = 20000 * kSlow) { return makeConfig(kExperts, 8, 1, 64, timeoutMs); }

std::string initAndSmoke(Rank& rank, const ncclMoeConfig_t& config) {
  RANK_OK(rank.init(config), nullptr);
  return runSmoke(rank, rank.comm(), kExperts);
}

std::string tcpUrl(int port) { return "tcp://127.0.0.1:" + std::to_string(port); }

// A connection of somebody else; -1 while nobody listens.
int connectTo(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) return fd;
  close(fd);
  return -1;
}

int connectEventually(int port) {
  for (int i = 0; i < 400; i++) {
    const int fd = connectTo(port);
    if (fd >= 0) return fd;
    sleepMs(5);
  }
  return -1;
}

void sendBytes(int fd, const std::string& bytes) {
  // The other side may have hung up already, which is as it should be.
  (void)!send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
}

std::string readFile(const std::string& path) {
  std::ifstream file(path);
  std::stringstream content;
  content << file.rdbuf();
  return content.str();
}

void writeFile(const std::string& path, const std::string& content) { std::ofstream(path) << content; }

bool exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

// Runs nRanks good ranks as processes and one more process that is up to no good.
ClusterResult runWithIntruder(int nRanks, const std::string& url, const Body& good, const Body& intruder) {
  ClusterOptions options;
  options.nRanks = nRanks + 1;
  options.ranksPerProcess = 1;
  options.rendezvous = url;
  return runRanks(options, [&](Rank& rank) -> std::string {
    if (rank.rank() == nRanks) return intruder(rank);
    ClusterOptions own;
    own.nRanks = nRanks;
    Rank member(own, rank.rank(), url);
    return good(member);
  });
}

TEST(Rendezvous, TcpByNameAndByAddress) {
  for (const char* host : {"127.0.0.1", "localhost"}) {
    ClusterOptions options;
    options.nRanks = 4;
    options.ranksPerProcess = 2;
    options.rendezvous = std::string("tcp://") + host + ":" + std::to_string(freePort());
    const ClusterResult result = runRanks(options, [](Rank& rank) { return initAndSmoke(rank, config()); });
    EXPECT_EQ(result.failures(), "") << host;
  }
}

TEST(Rendezvous, SamePortAndFileAgain) {
  const TempDir dir;
  for (const std::string& url : {tcpUrl(freePort()), "file://" + dir.path() + "/again"}) {
    ClusterOptions options;
    options.nRanks = 2;
    options.ranksPerProcess = 1;
    options.rendezvous = url;
    const ClusterResult result = runRanks(options, [](Rank& rank) -> std::string {
      for (int i = 0; i < 5; i++) {
        RANK_TRY(initAndSmoke(rank, config()));
        RANK_OK(rank.destroy(), nullptr);
      }
      return "";
    });
    EXPECT_EQ(result.failures(), "") << url;
  }
}

TEST(Rendezvous, LateRankZeroAndLateOthers) {
  const TempDir dir;
  for (const int late : {0, 1}) {
    for (const std::string& url : {tcpUrl(freePort()), "file://" + dir.path() + "/late"}) {
      ClusterOptions options;
      options.nRanks = 3;
      options.ranksPerProcess = 1;
      options.rendezvous = url;
      const ClusterResult result = runRanks(options, [&](Rank& rank) {
        if (rank.rank() == late) sleepMs(300);
        return initAndSmoke(rank, config());
      });
      EXPECT_EQ(result.failures(), "") << url << " late " << late;
    }
  }
}

TEST(Rendezvous, TokenOfTheEnvironment) {
  ClusterOptions options;
  options.nRanks = 2;
  options.ranksPerProcess = 1;
  options.rendezvous = tcpUrl(freePort());
  const ClusterResult result = runRanks(options, [](Rank& rank) {
    setenv("NCCL_MOE_JOB_TOKEN", "from the environment", 1);
    ncclMoeConfig_t c = config();
    c.jobToken = rank.rank() == 0 ? nullptr : "from the environment";
    return initAndSmoke(rank, c);
  });
  EXPECT_EQ(result.failures(), "");
}

TEST(Rendezvous, FileNeedsNoToken) {
  ClusterOptions options;
  options.nRanks = 3;
  options.ranksPerProcess = 1;
  const ClusterResult result = runRanks(options, [](Rank& rank) {
    ncclMoeConfig_t c = config();
    c.jobToken = nullptr;
    return initAndSmoke(rank, c);
  });
  EXPECT_EQ(result.failures(), "");
}

// The file holds what lets a process join: its user's alone, and gone once it has served.
TEST(Rendezvous, FileIsPrivateAndTemporary) {
  const TempDir dir;
  const std::string path = dir.path() + "/meet";
  ClusterOptions options;
  options.nRanks = 2;
  options.ranksPerProcess = 1;
  options.rendezvous = "file://" + path;
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    umask(0);
    if (rank.rank() == 1) {
      struct stat status {};
      for (int i = 0; i < 1000 && stat(path.c_str(), &status) != 0; i++) sleepMs(5);
      RANK_CHECK(S_ISREG(status.st_mode) && (status.st_mode & 0777) == 0600, "mode %o", status.st_mode);
    }
    RANK_TRY(initAndSmoke(rank, config()));
    RANK_CHECK(!exists(path), "the file is still there");
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

TEST(Rendezvous, FileIsGoneAfterAFailedInit) {
  const TempDir dir;
  const std::string path = dir.path() + "/meet";
  ClusterOptions options;
  options.nRanks = 1;
  options.rendezvous = "file://" + path;
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    const ncclMoeConfig_t c = config(200 * kSlow);
    ncclMoeComm_t comm = nullptr;
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 0, rank.rendezvous().c_str(), &c), ncclRemoteError, nullptr, "rank 1");
    RANK_CHECK(comm == nullptr);
    RANK_CHECK(!exists(path), "the file is still there");
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

// A file that an earlier job left: of garbage, or of a rank 0 that was killed while it waited.
TEST(Rendezvous, StaleFile) {
  const TempDir dir;
  const std::string path = dir.path() + "/meet";
  const std::string url = "file://" + path;
  ClusterOptions options;
  options.nRanks = 1;
  options.rendezvous = url;
  runRanks(
    options,
    [&](Rank& rank) -> std::string {
      ncclMoeComm_t comm = nullptr;
      const ncclMoeConfig_t c = config();
      ncclMoeCommInitHost(&comm, 2, 0, rank.rendezvous().c_str(), &c);
      return "";
    },
    [&](const std::vector<pid_t>& pids) {
      for (int i = 0; i < 1000 && readFile(path).empty(); i++) sleepMs(5);
      kill(pids[0], SIGKILL);
    });
  const std::string left = readFile(path);
  ASSERT_NE(left, "") << "a killed rank 0 left no file to test with";
  for (const std::string& content : {left, std::string("garbage"), std::string(), std::string(100000, '\xff')}) {
    writeFile(path, content);
    options.nRanks = 3;
    options.ranksPerProcess = 1;
    const ClusterResult result = runRanks(options, [&](Rank& rank) {
      if (rank.rank() == 0) sleepMs(200); // so that the others read what is stale
      return initAndSmoke(rank, config());
    });
    EXPECT_EQ(result.failures(), "") << "stale file of " << content.size() << " bytes";
    EXPECT_LT(result.elapsedMs, 5000 * kSlow);
    EXPECT_FALSE(exists(path));
  }
}

// The file is made new: what a link at its place points to is not written.
TEST(Rendezvous, LinkAtThePlaceOfTheFile) {
  const TempDir dir;
  const std::string precious = dir.path() + "/precious";
  const std::string path = dir.path() + "/meet";
  writeFile(precious, "do not touch");
  ASSERT_EQ(symlink(precious.c_str(), path.c_str()), 0);
  ClusterOptions options;
  options.nRanks = 2;
  options.ranksPerProcess = 1;
  options.rendezvous = "file://" + path;
  const ClusterResult result = runRanks(options, [&](Rank& rank) { return initAndSmoke(rank, config(5000 * kSlow)); });
  EXPECT_EQ(result.failures(), "");
  EXPECT_EQ(readFile(precious), "do not touch");
}

TEST(Rendezvous, RankThatDoesNotCome) {
  const TempDir dir;
  for (const std::string& url : {tcpUrl(freePort()), "file://" + dir.path() + "/meet"}) {
    ClusterOptions options;
    options.nRanks = 2;
    options.ranksPerProcess = 1;
    options.rendezvous = url;
    // Ranks 0 and 1 of three.
    const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
      const ncclMoeConfig_t c = config(400 * kSlow);
      ncclMoeComm_t comm = nullptr;
      const char* words = rank.rank() == 0 ? "rank 2" : "rank";
      RANK_RESULT(ncclMoeCommInitHost(&comm, 3, rank.rank(), url.c_str(), &c), ncclRemoteError, nullptr, words);
      RANK_CHECK(comm == nullptr);
      return "";
    });
    EXPECT_EQ(result.failures(), "") << url;
    EXPECT_LT(result.elapsedMs, 5000 * kSlow);
  }
}

TEST(Rendezvous, RankZeroDoesNotCome) {
  const TempDir dir;
  for (const std::string& url : {tcpUrl(freePort()), "file://" + dir.path() + "/meet"}) {
    ClusterOptions options;
    options.nRanks = 1;
    options.rendezvous = url;
    const ClusterResult result = runRanks(options, [&](Rank&) -> std::string {
      const ncclMoeConfig_t c = config(300 * kSlow);
      ncclMoeComm_t comm = nullptr;
      RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 1, url.c_str(), &c), ncclRemoteError, nullptr, "rank 0");
      return "";
    });
    EXPECT_EQ(result.failures(), "") << url;
    EXPECT_LT(result.elapsedMs, 5000 * kSlow);
  }
}

// On rank 0, which would listen there, and on another, which would connect.
TEST(Rendezvous, HostThatCannotBeResolved) {
  ClusterOptions options;
  options.nRanks = 2;
  options.ranksPerProcess = 1;
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    ncclMoeConfig_t c = config();
    c.jobToken = "secret";
    ncclMoeComm_t comm = nullptr;
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2, rank.rank(), "tcp://no..name:4711", &c), ncclSystemError, nullptr,
                "ncclMoeCommInitHost: rendezvous,no..name");
    RANK_CHECK(comm == nullptr);
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

// Whoever listens at rank 0's place takes connections and never says a word.
TEST(Rendezvous, SilentListenerInPlaceOfRankZero) {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  socklen_t size = sizeof(address);
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(listener, 8), 0);
  ASSERT_EQ(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size), 0);
  ClusterOptions options;
  options.rendezvous = tcpUrl(ntohs(address.sin_port));
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    const ncclMoeConfig_t c = config(300 * kSlow);
    ncclMoeComm_t comm = nullptr;
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 1, rank.rendezvous().c_str(), &c), ncclRemoteError, nullptr,
                "does not answer");
    return "";
  });
  close(listener);
  EXPECT_EQ(result.failures(), "");
  EXPECT_LT(result.elapsedMs, 4000 * kSlow); // not the time that rank 0 has for its answer
}

TEST(Rendezvous, NumbersOfRanksDiffer) {
  ClusterOptions options;
  options.nRanks = 2;
  options.ranksPerProcess = 1;
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    const ncclMoeConfig_t c = config(500 * kSlow);
    ncclMoeComm_t comm = nullptr;
    // Rank 1 learns why it cannot join; rank 0 misses it.
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2 + rank.rank(), rank.rank(), rank.rendezvous().c_str(), &c),
                ncclRemoteError, nullptr, rank.rank() == 0 ? "rank 1" : "nRanks");
    return "";
  });
  EXPECT_EQ(result.failures(), "");
}

TEST(Rendezvous, PortInUse) {
  const int port = freePort();
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(fd, 4), 0);
  ClusterOptions options;
  options.rendezvous = tcpUrl(port);
  const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
    ncclMoeComm_t comm = nullptr;
    const ncclMoeConfig_t c = config(500 * kSlow);
    RANK_RESULT(ncclMoeCommInitHost(&comm, 2, 0, rank.rendezvous().c_str(), &c), ncclSystemError, nullptr,
                std::to_string(port));
    return "";
  });
  EXPECT_EQ(result.failures(), "");
  close(fd);
}

// Somebody with another token claims to be a rank: refused, and the job does not notice.
TEST(Rendezvous, WrongToken) {
  const TempDir dir;
  for (const std::string& url : {tcpUrl(freePort()), "file://" + dir.path() + "/meet"}) {
    const int nRanks = 3;
    const ClusterResult result = runWithIntruder(
      nRanks, url,
      [&](Rank& rank) {
        if (rank.rank() != 0) sleepMs(300); // the intruder is first
        return initAndSmoke(rank, config());
      },
      [&](Rank&) -> std::string {
        ncclMoeConfig_t c = config(350 * kSlow);
        for (const char* token : {"a token of the test", "a token of the tests ", "x"}) {
          c.jobToken = token;
          ncclMoeComm_t comm = nullptr;
          RANK_RESULT(ncclMoeCommInitHost(&comm, nRanks, 1, url.c_str(), &c), ncclRemoteError, nullptr, "");
          RANK_CHECK(comm == nullptr);
        }
        return "";
      });
    EXPECT_EQ(result.failures(), "") << url;
  }
}

// Port scanners, web browsers, silence and garbage at rank 0's port, before, during and after init.
TEST(Rendezvous, StrangersAtThePort) {
  const int port = freePort();
  const ClusterResult result = runWithIntruder(
    3, tcpUrl(port),
    [&](Rank& rank) -> std::string {
      if (rank.rank() != 0) sleepMs(400);
      RANK_TRY(initAndSmoke(rank, config()));
      sleepMs(300);
      return runSmoke(rank, rank.comm(), kExperts);
    },
    [&](Rank& rank) -> std::string {
      std::vector<int> silent;
      for (int i = 0; i < 40; i++) {
        const int fd = i == 0 ? connectEventually(port) : connectTo(port);
        if (fd < 0) {
          RANK_CHECK(i > 0, "rank 0 never listened");
          sleepMs(10);
          continue;
        }
        std::string bytes(static_cast<size_t>(pick(rank.random(), 0, 5000)), '\0');
        for (char& c : bytes) c = static_cast<char>(rank.random()());
        const int kind = i % 5;
        if (kind == 0) sendBytes(fd, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        if (kind == 1) sendBytes(fd, bytes);
        if (kind == 2) sendBytes(fd, std::string(1 << 20, '\xff'));
        if (kind < 4) {
          close(fd);
        } else {
          silent.push_back(fd); // says nothing and stays
        }
        sleepMs(15);
      }
      sleepMs(500);
      for (const int fd : silent) close(fd);
      return "";
    });
  EXPECT_EQ(result.failures(), "");
  EXPECT_LT(result.elapsedMs, 10000 * kSlow);
}

TEST(Rendezvous, RankGivenTwice) {
  const TempDir dir;
  for (const std::string& url : {tcpUrl(freePort()), "file://" + dir.path() + "/meet"}) {
    ClusterOptions options;
    options.nRanks = 3;
    options.ranksPerProcess = 1;
    options.rendezvous = url;
    const ClusterResult result = runRanks(options, [&](Rank& rank) -> std::string {
      const ncclMoeConfig_t c = config(600 * kSlow);
      ncclMoeComm_t comm = nullptr;
      // Ranks 0, 1 and 1 again, of three.
      const int claimed = rank.rank() == 2 ? 1 : rank.rank();
      RANK_RESULT(ncclMoeCommInitHost(&comm, 3, claimed, url.c_str(), &c), ncclRemoteError, nullptr, "rank");
      return "";
    });
    EXPECT_EQ(result.failures(), "") << url;
    EXPECT_LT(result.elapsedMs, 5000 * kSlow);
  }
}

} // namespace
} // namespace moe::test
