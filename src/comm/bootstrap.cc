#include "comm/bootstrap.h"

#include <poll.h>

#include <algorithm>
#include <thread>

#include "comm/doorman.h"
#include "comm/rendezvous.h"

namespace moe {
namespace {

using std::chrono::milliseconds;
using Got = MessageSocket::Got;

constexpr auto kAnswerTime = milliseconds(10000);  // rank 0 answers a hello at once; whoever does not is not rank 0
constexpr auto kConnectTime = milliseconds(2000);  // to one of several addresses
constexpr auto kFarewellTime = milliseconds(1000); // to tell the others why there will be no communicator
constexpr auto kMaxRetryPause = milliseconds(50);
constexpr char kRendezvous[] = "ncclMoeCommInitHost: rendezvous";

struct Job {
  const CommConfig& config;
  int rank;
  int nRanks;
  Rendezvous rendezvous;
  Hello hello; // this rank's
  Clock::time_point deadline;
};

uint64_t placementDigest(const std::vector<ExpertHome>& home) { // FNV-1a
  uint64_t hash = 0xcbf29ce484222325;
  for (const ExpertHome& at : home) hash = (hash ^ static_cast<uint64_t>(at.rank)) * 0x100000001b3;
  return hash;
}

ConfigValues configValues(const CommConfig& config) {
  ConfigValues values{};
  values.value[ConfigValues::nExperts] = static_cast<uint64_t>(config.nExperts);
  values.value[ConfigValues::maxTokens] = static_cast<uint64_t>(config.maxTokens);
  values.value[ConfigValues::maxTopK] = static_cast<uint64_t>(config.maxTopK);
  values.value[ConfigValues::maxRowBytes] = config.maxRowBytes;
  values.value[ConfigValues::mode] = static_cast<uint64_t>(config.mode);
  values.value[ConfigValues::maxMemory] = config.maxMemory;
  values.value[ConfigValues::expertToRank] = placementDigest(config.home);
  return values;
}

// The sentence about the first field in which two ranks differ; "" if none.
std::string difference(const ConfigValues& a, int rankA, const ConfigValues& b, int rankB) {
  for (int field = 0; field < ConfigValues::count; field++) {
    if (a.value[field] == b.value[field]) continue;
    std::string text = std::string("config.") + ConfigValues::name(field) + " differs: ";
    if (field == ConfigValues::expertToRank) {
      return text + "rank " + std::to_string(rankA) + " and rank " + std::to_string(rankB) +
             " place experts on different ranks";
    }
    return text + std::to_string(a.value[field]) + " on rank " + std::to_string(rankA) + ", " +
           std::to_string(b.value[field]) + " on rank " + std::to_string(rankB);
  }
  return "";
}

// "rank 3", "ranks 1, 2 and 5 others"
std::string nameRanks(const std::vector<int>& ranks) {
  constexpr size_t kNamed = 8;
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size() && i < kNamed; i++) text += (i > 0 ? ", " : "") + std::to_string(ranks[i]);
  if (ranks.size() > kNamed) text += " and " + std::to_string(ranks.size() - kNamed) + " others";
  return text;
}

// ------------------------------------------------------------------------------------------------------- rank 0 ----

struct Joined {
  MessageSocket socket;
  Hello hello;
  SocketAddress from;
};

void sendAll(std::vector<Joined>& joined, Clock::time_point deadline) {
  for (;;) {
    std::vector<pollfd> set;
    for (Joined& member : joined) {
      if (!member.socket || !member.socket.sending()) continue;
      if (!member.socket.send()) {
        member.socket = MessageSocket(); // its end is noticed by whoever needs it next
      } else if (member.socket.sending()) {
        set.push_back(pollfd{member.socket.fd(), POLLOUT, 0});
      }
    }
    if (set.empty() || Clock::now() >= deadline) return;
    ::poll(set.data(), set.size(), millisUntil(deadline));
  }
}

ncclResult_t refuseAll(std::vector<Joined>& joined, const std::string& sentence) {
  for (Joined& member : joined) {
    if (member.socket) member.socket.queue(MessageType::refuse, encodeText(sentence));
  }
  sendAll(joined, Clock::now() + kFarewellTime);
  return fail(ncclRemoteError, "ncclMoeCommInitHost: %s", sentence.c_str());
}

// A client that has the token: joins, or is refused and told why.
void admit(const Job& job, MessageSocket socket, const Hello& hello, const SocketAddress& from,
           std::vector<Joined>& joined, std::string* refusal) {
  std::string why;
  if (hello.nRanks != job.nRanks) {
    why = "nRanks differs: " + std::to_string(job.nRanks) + " on rank 0, " + std::to_string(hello.nRanks) +
          " on rank " + std::to_string(hello.rank);
  } else if (hello.rank == 0 || joined[hello.rank].socket) {
    why = "rank " + std::to_string(hello.rank) + " has joined already";
  }
  if (!why.empty()) {
    MOE_WARN("bootstrap: refused %s: %s", from.text().c_str(), why.c_str());
    *refusal = "; refused: " + why;
    socket.queue(MessageType::refuse, encodeText(why));
    socket.send(); // a fresh connection takes so little at once
    return;
  }
  socket.queue(MessageType::answer, {1});
  if (!socket.send()) return;
  joined[hello.rank] = Joined{std::move(socket), hello, from};
}

// A member says nothing before it has the table; if it does, or goes, its place is free again.
void watchMembers(std::vector<Joined>& joined) {
  for (size_t r = 0; r < joined.size(); r++) {
    if (!joined[r].socket) continue;
    const Got got = joined[r].socket.receive(MessageType::bye, MessageType::bye);
    if (got == Got::nothing) continue;
    MOE_WARN("bootstrap: rank %zu (%s) left before all ranks had joined", r, joined[r].from.text().c_str());
    joined[r].socket = MessageSocket();
  }
}

ncclResult_t openDoors(const Job& job, Doorman* doorman, std::string* token, PublishedFile* published) {
  if (!job.rendezvous.path.empty()) {
    RendezvousFile file;
    uint64_t random[4];
    MOECHECK(randomBytes(random, sizeof(random)));
    for (const uint64_t part : random) {
      char text[17];
      snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(part));
      file.token += text;
    }
    UniqueFd listener = listenAnywhere();
    if (!listener) return fail(ncclSystemError, "ncclMoeCommInitHost: cannot listen: %s", strerror(errno));
    file.bootId = bootId();
    file.addresses = localAddresses();
    for (SocketAddress& address : file.addresses) address.setPort(localAddress(listener.get()).port());
    if (file.addresses.empty()) return fail(ncclSystemError, "ncclMoeCommInitHost: this machine has no IP address");
    *token = file.token + ":" + job.config.jobToken;
    doorman->add(std::move(listener));
    return published->write(job.rendezvous.path, file);
  }
  *token = job.config.jobToken;
  std::vector<SocketAddress> addresses;
  MOECHECK(resolveHost(job.rendezvous.host, job.rendezvous.port, &addresses, kRendezvous));
  // The port may still be busy for a moment where jobs follow each other.
  const auto deadline = std::min(job.deadline, Clock::now() + kConnectTime);
  int error = 0;
  for (;;) {
    bool any = false;
    for (const SocketAddress& address : addresses) {
      UniqueFd listener = listenOn(address);
      if (!listener) {
        error = errno;
        continue;
      }
      doorman->add(std::move(listener));
      any = true;
    }
    if (any) return ncclSuccess;
    if (error != EADDRINUSE || Clock::now() >= deadline) break;
    std::this_thread::sleep_for(milliseconds(10));
  }
  return fail(ncclSystemError, "ncclMoeCommInitHost: rank 0 cannot listen on %s:%d: %s", job.rendezvous.host.c_str(),
              job.rendezvous.port, strerror(error));
}

ncclResult_t gather(Job& job, std::vector<BootstrapPeer>* peers) {
  Doorman doorman(job.nRanks);
  PublishedFile published;
  MOECHECK(openDoors(job, &doorman, &job.hello.token, &published));
  std::vector<Joined> joined(job.nRanks);
  std::string refusal; // the last one: it may be why a rank is missing
  for (;;) {
    std::vector<int> missing;
    for (int r = 1; r < job.nRanks; r++) {
      if (!joined[r].socket) missing.push_back(r);
    }
    if (missing.empty()) break;
    if (Clock::now() >= job.deadline) {
      return refuseAll(joined, nameRanks(missing) + " did not come within " + std::to_string(job.config.timeoutMs) +
                                 " ms" + refusal);
    }
    std::vector<pollfd> set;
    doorman.poll(&set);
    for (const Joined& member : joined) {
      if (member.socket) set.push_back(pollfd{member.socket.fd(), POLLIN, 0});
    }
    ::poll(set.data(), set.size(), millisUntil(job.deadline, 200));
    doorman.serve(job.hello.token, [&](MessageSocket socket, const Hello& hello, const SocketAddress& from) {
      admit(job, std::move(socket), hello, from, joined, &refusal);
    });
    watchMembers(joined);
  }
  // Nobody may meet this job's door once any rank's init has returned: the next job may use the same rendezvous.
  doorman.close();
  published.remove();
  for (int r = 1; r < job.nRanks; r++) {
    const std::string differs = difference(job.hello.config, 0, joined[r].hello.config, r);
    if (!differs.empty()) return refuseAll(joined, differs);
  }
  RankTable table;
  MOECHECK(randomBytes(table.nonce, sizeof(table.nonce)));
  for (int r = 0; r < job.nRanks; r++) {
    TableEntry entry;
    entry.hostId = r == 0 ? job.hello.hostId : joined[r].hello.hostId;
    if (r > 0) {
      entry.address = joined[r].from;
      entry.address.setPort(joined[r].hello.port);
    } else {
      entry.address.storage.ss_family = AF_INET; // everyone is connected to rank 0 already
    }
    table.ranks.push_back(entry);
  }
  for (int r = 1; r < job.nRanks; r++) joined[r].socket.queue(MessageType::table, encodeTable(table));
  sendAll(joined, job.deadline);
  for (int r = 0; r < job.nRanks; r++) {
    (*peers)[r].hostId = table.ranks[r].hostId;
    if (r > 0) (*peers)[r].socket = joined[r].socket.release();
  }
  return ncclSuccess;
}

// -------------------------------------------------------------------------------------------------- other ranks ----

// Waits until the socket is readable or the deadline has passed.
void waitReadable(int fd, Clock::time_point deadline) {
  pollfd wait{fd, POLLIN, 0};
  ::poll(&wait, 1, millisUntil(deadline));
}

enum class Greeting { joined, refused, failed };

// Sends the hello to what may be rank 0 and waits for the table.  failed: whoever that was, it is not (or no longer)
// rank 0 of this job; *why says how that showed.
Greeting greet(const Job& job, MessageSocket& socket, RankTable* table, std::string* why) {
  socket.queue(MessageType::hello, encodeHello(job.hello));
  const auto answerBy = std::min(Clock::now() + kAnswerTime, std::max(Clock::now(), job.deadline) + kFarewellTime);
  const auto tableBy = Clock::now() + milliseconds(job.config.timeoutMs) + kFarewellTime;
  bool answered = false;
  for (;;) {
    if (!socket.send()) {
      *why = "the connection broke";
      return Greeting::failed;
    }
    const Got got = socket.receive(answered ? MessageType::table : MessageType::answer, MessageType::refuse);
    if (got == Got::message && socket.type() == MessageType::answer) {
      answered = true;
    } else if (got == Got::message && socket.type() == MessageType::refuse) {
      *why = parseText(socket.body().data(), socket.body().size());
      return Greeting::refused;
    } else if (got == Got::message) {
      if (parseTable(socket.body().data(), socket.body().size(), table) &&
          table->ranks.size() == static_cast<size_t>(job.nRanks)) {
        return Greeting::joined;
      }
      *why = "rank 0 sent a malformed table";
      return Greeting::refused;
    } else if (got == Got::garbage) {
      *why = std::string("whoever listens there ") + socket.reason();
      return Greeting::failed;
    } else if (got == Got::closed) {
      *why = answered ? "rank 0 left" : "the connection was closed (is the job token the same on every rank?)";
      return Greeting::failed;
    } else if (Clock::now() >= (answered ? tableBy : answerBy)) {
      *why = answered ? "rank 0 did not say who else came" : "whoever listens there does not answer";
      return answered ? Greeting::refused : Greeting::failed;
    }
    waitReadable(socket.fd(), answered ? tableBy : answerBy);
  }
}

// Where rank 0 may be; empty, with *why filled, if that is not known yet.
ncclResult_t candidates(Job& job, std::vector<SocketAddress>* addresses, std::string* why) {
  if (job.rendezvous.path.empty()) {
    job.hello.token = job.config.jobToken;
    return resolveHost(job.rendezvous.host, job.rendezvous.port, addresses, kRendezvous);
  }
  RendezvousFile file;
  if (!readRendezvousFile(job.rendezvous.path, &file, why)) return ncclSuccess;
  job.hello.token = file.token + ":" + job.config.jobToken;
  const bool sameMachine = file.bootId == bootId();
  for (const SocketAddress& address : file.addresses) {
    if (sameMachine || !address.isLoopback()) addresses->push_back(address);
  }
  return ncclSuccess;
}

ncclResult_t join(Job& job, MessageSocket* rank0, SocketAddress* rank0Address, RankTable* table) {
  std::string why = "no answer";
  auto pause = milliseconds(1);
  for (;;) {
    std::vector<SocketAddress> addresses;
    MOECHECK(candidates(job, &addresses, &why));
    for (const SocketAddress& address : addresses) {
      UniqueFd fd = connectTo(address, std::min(job.deadline, Clock::now() + kConnectTime));
      if (!fd) {
        why = address.text() + ": " + strerror(errno);
        continue;
      }
      MessageSocket socket(std::move(fd));
      const Greeting greeting = greet(job, socket, table, &why);
      if (greeting == Greeting::refused) return fail(ncclRemoteError, "ncclMoeCommInitHost: %s", why.c_str());
      if (greeting == Greeting::joined) {
        *rank0 = std::move(socket);
        *rank0Address = address;
        return ncclSuccess;
      }
      why = address.text() + ": " + why;
    }
    if (Clock::now() >= job.deadline) {
      return fail(ncclRemoteError, "ncclMoeCommInitHost: rank 0 was not found within %d ms; last attempt: %s",
                  job.config.timeoutMs, why.c_str());
    }
    std::this_thread::sleep_for(std::min(pause, milliseconds(millisUntil(job.deadline))));
    pause = std::min(pause * 2, kMaxRetryPause);
  }
}

// Connects to the lower ranks and lets the higher ones connect.
ncclResult_t mesh(const Job& job, const RankTable& table, const SocketAddress& rank0Address, int rank0Fd,
                  Doorman& doorman, std::vector<BootstrapPeer>* peers) {
  const auto deadline = Clock::now() + milliseconds(job.config.timeoutMs);
  std::vector<MessageSocket> lower(job.rank);
  const std::vector<uint8_t> hello = encodeHello(job.hello);
  for (int r = 1; r < job.rank; r++) {
    SocketAddress address = table.ranks[r].address;
    // What rank 0 saw of a rank on its own machine may be a loopback address.
    if (table.ranks[r].hostId == table.ranks[0].hostId || address.isLoopback()) {
      const int port = address.port();
      address = rank0Address;
      address.setPort(port);
    }
    UniqueFd fd = connectTo(address, deadline);
    if (!fd) {
      return fail(ncclRemoteError, "ncclMoeCommInitHost: rank %d cannot connect to rank %d at %s: %s", job.rank, r,
                  address.text().c_str(), strerror(errno));
    }
    lower[r] = MessageSocket(std::move(fd));
    lower[r].queue(MessageType::hello, hello);
  }
  for (;;) {
    std::vector<pollfd> set = {pollfd{rank0Fd, POLLRDHUP, 0}};
    std::vector<int> missing;
    for (int r = 1; r < job.nRanks; r++) {
      if (r == job.rank || (*peers)[r].socket) continue;
      missing.push_back(r);
      if (r > job.rank) continue;
      const Got got = lower[r].send() ? lower[r].receive(MessageType::hello, MessageType::hello) : Got::closed;
      Hello theirs;
      if (got == Got::closed) return fail(ncclRemoteError, "ncclMoeCommInitHost: rank %d left", r);
      if (got == Got::garbage ||
          (got == Got::message && (!parseHello(lower[r].body().data(), lower[r].body().size(), &theirs) ||
                                   !equalSecret(theirs.token, job.hello.token) || theirs.rank != r))) {
        return fail(ncclRemoteError, "ncclMoeCommInitHost: who listens at rank %d's address is not rank %d", r, r);
      }
      if (got == Got::message) {
        (*peers)[r].socket = lower[r].release();
        missing.pop_back();
      } else {
        set.push_back(pollfd{lower[r].fd(), static_cast<short>(lower[r].sending() ? POLLIN | POLLOUT : POLLIN), 0});
      }
    }
    if (missing.empty()) return ncclSuccess;
    if (Clock::now() >= deadline) {
      return fail(ncclRemoteError, "ncclMoeCommInitHost: %s did not connect to rank %d within %d ms",
                  nameRanks(missing).c_str(), job.rank, job.config.timeoutMs);
    }
    doorman.poll(&set);
    ::poll(set.data(), set.size(), millisUntil(deadline, 200));
    if ((set[0].revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0) {
      return fail(ncclRemoteError, "ncclMoeCommInitHost: rank 0 left while the ranks connected to each other");
    }
    doorman.serve(job.hello.token, [&](MessageSocket socket, const Hello& theirs, const SocketAddress& from) {
      const bool ours = memcmp(theirs.nonce, job.hello.nonce, kNonceBytes) == 0 && theirs.nRanks == job.nRanks &&
                        theirs.rank > job.rank && !(*peers)[theirs.rank].socket;
      if (!ours) {
        MOE_WARN("bootstrap: dropped %s, which is not a rank that was to come", from.text().c_str());
        return;
      }
      socket.queue(MessageType::hello, hello);
      if (socket.send() && !socket.sending()) (*peers)[theirs.rank].socket = socket.release();
    });
  }
}

ncclResult_t joinAndMesh(Job& job, std::vector<BootstrapPeer>* peers) {
  UniqueFd listener = listenAnywhere();
  if (!listener) return fail(ncclSystemError, "ncclMoeCommInitHost: cannot listen: %s", strerror(errno));
  job.hello.port = static_cast<uint16_t>(localAddress(listener.get()).port());
  Doorman doorman(job.nRanks);
  doorman.add(std::move(listener));
  MessageSocket rank0;
  SocketAddress rank0Address;
  RankTable table;
  MOECHECK(join(job, &rank0, &rank0Address, &table));
  memcpy(job.hello.nonce, table.nonce, kNonceBytes);
  (*peers)[0].socket = rank0.release();
  for (int r = 0; r < job.nRanks; r++) (*peers)[r].hostId = table.ranks[r].hostId;
  return mesh(job, table, rank0Address, (*peers)[0].socket.get(), doorman, peers);
}

} // namespace

ncclResult_t bootstrap(const CommConfig& config, int rank, int nRanks, const char* rendezvous,
                       std::vector<BootstrapPeer>* peers) {
  Job job{config, rank, nRanks, {}, {}, Clock::now() + milliseconds(config.timeoutMs)};
  MOECHECK(parseRendezvous(rendezvous, &job.rendezvous));
  if (!job.rendezvous.host.empty() && config.jobToken.empty()) {
    return fail(ncclInvalidArgument,
                "ncclMoeCommInitHost: a tcp:// rendezvous needs config.jobToken or NCCL_MOE_JOB_TOKEN");
  }
  job.hello.rank = rank;
  job.hello.nRanks = nRanks;
  job.hello.hostId = hostId().substr(0, kMaxHostIdBytes);
  job.hello.config = configValues(config);
  peers->clear();
  peers->resize(nRanks);
  (*peers)[rank].hostId = job.hello.hostId;
  if (nRanks == 1) return ncclSuccess;
  return rank == 0 ? gather(job, peers) : joinAndMesh(job, peers);
}

} // namespace moe
