#include "net/tcp_poller.h"

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <system_error>

#include "base/error.h"
#include "base/param.h"
#include "net/socket.h"

namespace moe {
namespace net {
namespace {

IntParam spinUs{"NCCL_MOE_NET_TCP_SPIN_US", 50, 0, 1000000,
                "microseconds that a TCP helper thread keeps looking for work before it sleeps"};

constexpr size_t sendAtOnce = 1 << 20; // per visit of a socket, so that sockets take turns
constexpr size_t receiveAtOnce = 1 << 20;
constexpr double lingerSeconds = 5;
constexpr double lingerAtExit = 1;

} // namespace

void TcpShared::fail(const std::string& text) {
  std::lock_guard<std::mutex> lock(mutex);
  if (problem.empty()) problem = text;
  failed.store(true, std::memory_order_release);
}

// ---- a socket ----

bool DataSocket::full() const {
  return head_.load(std::memory_order_relaxed) - tail_.load(std::memory_order_acquire) == ringSize;
}

bool DataSocket::empty() const {
  return head_.load(std::memory_order_acquire) == tail_.load(std::memory_order_relaxed);
}

void DataSocket::push(const ChunkJob& job) {
  const uint64_t head = head_.load(std::memory_order_relaxed);
  ring_[head % ringSize] = job;
  // Sequentially consistent together with scheduled_: either the poller sees the job or this thread schedules it.
  head_.store(head + 1);
  if (!scheduled_.exchange(true)) poller->kick(this);
}

void DataSocket::broken(const char* what) {
  dead_ = true;
  shared->fail(std::string(what) + ": " + strerror(errno));
}

bool DataSocket::pump(bool* blocked) {
  *blocked = false;
  size_t budget = sendAtOnce;
  bool moved = false;
  if (dead_ && !empty()) shared->fail("the peer has closed the connection");
  while (!dead_ && !empty() && budget > 0) {
    const uint64_t tail = tail_.load(std::memory_order_relaxed);
    const ChunkJob& job = ring_[tail % ringSize];
    iovec parts[2];
    int n = 0;
    const size_t header = sizeof(job.header);
    if (sent_ < header) {
      parts[n++] = {const_cast<char*>(reinterpret_cast<const char*>(&job.header)) + sent_, header - sent_};
    }
    const size_t done = sent_ > header ? sent_ - header : 0;
    const size_t bytes = std::min<size_t>(job.header.bytes - done, budget);
    parts[n++] = {const_cast<char*>(job.data) + done, bytes};
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<size_t>(n);
    const ssize_t sent = sendmsg(fd.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        *blocked = true;
      } else {
        broken("sending failed");
      }
      return moved;
    }
    moved = true;
    sent_ += static_cast<size_t>(sent);
    budget -= std::min(budget, static_cast<size_t>(sent));
    if (sent_ == header + job.header.bytes) {
      sent_ = 0;
      std::atomic<uint64_t>* remaining = job.remaining;
      const uint64_t count = job.header.bytes;
      tail_.store(tail + 1, std::memory_order_release);
      remaining->fetch_sub(count, std::memory_order_release);
    }
  }
  return moved;
}

bool DataSocket::receiveHeader() {
  if (parseChunk(&in_, sizeof(in_), static_cast<uint32_t>(shared->slots.size()), &in_) != ParseResult::ok) {
    errno = EPROTO;
    broken("the peer sent a chunk that is none");
    return false;
  }
  slot_ = &shared->slots[in_.slot];
  const uint64_t generation = slot_->generation.load(std::memory_order_acquire);
  if (generation == 0 || generation != in_.generation || in_.total > slot_->room) {
    errno = EPROTO;
    broken("the peer sent a chunk for a receive that is not there");
    return false;
  }
  // A peer whose chunks overlap, or which sends the message twice, would write into a buffer that is no longer the
  // receive's.
  uint64_t total = 0, claimed = slot_->claimed.load();
  bool fits = slot_->total.compare_exchange_strong(total, in_.total) || total == in_.total;
  do {
    fits = fits && claimed <= in_.total && in_.bytes <= in_.total - claimed;
  } while (fits && !slot_->claimed.compare_exchange_weak(claimed, claimed + in_.bytes));
  if (!fits || slot_->generation.load() != generation) {
    errno = EPROTO;
    broken("the peer sent more chunks than its message has");
    return false;
  }
  inBytes_ = 0;
  return true;
}

bool DataSocket::receive() {
  size_t budget = receiveAtOnce;
  bool moved = false;
  while (!dead_ && budget > 0) {
    iovec parts[2];
    int n = 0;
    ChunkHeader next;
    const size_t missing = slot_ != nullptr ? in_.bytes - inBytes_ : 0;
    const size_t now = std::min(missing, budget);
    if (slot_ != nullptr) parts[n++] = {slot_->data + in_.offset + inBytes_, now};
    if (slot_ == nullptr) {
      parts[n++] = {reinterpret_cast<char*>(&in_) + inHeader_, sizeof(in_) - inHeader_};
    } else if (now == missing) {
      parts[n++] = {&next, sizeof(next)};
    }
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<size_t>(n);
    const ssize_t got = recvmsg(fd.get(), &message, MSG_DONTWAIT);
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) broken("receiving failed");
      return moved;
    }
    if (got == 0) {
      if (slot_ != nullptr || inHeader_ != 0) {
        errno = ECONNRESET;
        broken("the peer closed the connection inside a message");
      }
      dead_ = true;
      shared->openSockets.fetch_sub(1, std::memory_order_release);
      return moved;
    }
    moved = true;
    size_t count = static_cast<size_t>(got);
    budget -= std::min(budget, count);
    if (slot_ != nullptr) {
      const size_t payload = std::min(count, missing);
      inBytes_ += payload;
      count -= payload;
      if (inBytes_ == in_.bytes) {
        slot_->received.fetch_add(in_.bytes, std::memory_order_release);
        slot_ = nullptr;
        inHeader_ = count;
        if (count > 0) memcpy(&in_, &next, count);
      }
    } else {
      inHeader_ += count;
    }
    if (slot_ == nullptr && inHeader_ == sizeof(in_)) {
      inHeader_ = 0;
      if (!receiveHeader()) return moved;
    }
  }
  return moved;
}

// ---- the thread ----

ncclResult_t Poller::start() {
  epoll_.reset(epoll_create1(EPOLL_CLOEXEC));
  SYSCHECK(epoll_.get(), "epoll_create1");
  event_.reset(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  SYSCHECK(event_.get(), "eventfd");
  epoll_event event = {};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;
  SYSCHECK(epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, event_.get(), &event), "epoll_ctl");
  // The application's signals are not for this thread.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  ncclResult_t result = ncclSuccess;
  try {
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "moe-net-tcp");
  } catch (const std::system_error& error) {
    result = fail(ncclSystemError, "starting a TCP helper thread failed: %s", error.what());
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return result;
}

Poller::~Poller() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    haveInbox_.store(true);
  }
  const uint64_t one = 1;
  (void)!write(event_.get(), &one, sizeof(one));
  thread_.join();
}

void Poller::submit(const Command& command) {
  bool wake;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    inbox_.push_back(command);
    haveInbox_.store(true, std::memory_order_release);
    wake = sleeping_;
    sleeping_ = false;
  }
  const uint64_t one = 1;
  if (wake) (void)!write(event_.get(), &one, sizeof(one));
}

void Poller::attach(DataSocket* socket) {
  socket->poller = this;
  submit({Command::attach, socket, nullptr});
}

void Poller::kick(DataSocket* socket) { submit({Command::kick, socket, nullptr}); }

void Poller::detach(DataSocket* socket) {
  bool done = false;
  submit({Command::detach, socket, &done});
  std::unique_lock<std::mutex> lock(mutex_);
  detached_.wait(lock, [&done] { return done; });
}

void Poller::linger(UniqueFd fd) {
  std::lock_guard<std::mutex> lock(mutex_);
  incoming_.push_back({std::move(fd), nowSeconds() + lingerSeconds});
  haveInbox_.store(true, std::memory_order_release);
  const uint64_t one = 1;
  if (sleeping_) (void)!write(event_.get(), &one, sizeof(one));
  sleeping_ = false;
}

void Poller::arm(DataSocket* socket, bool forWriting) {
  if (socket->armed_ == forWriting) return;
  socket->armed_ = forWriting;
  epoll_event event = {};
  event.events = forWriting ? EPOLLIN | EPOLLOUT : EPOLLIN;
  event.data.ptr = socket;
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, socket->fd.get(), &event);
}

bool Poller::takeCommands() {
  if (!haveInbox_.load(std::memory_order_acquire)) return false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    commands_.swap(inbox_);
    for (Lingering& item : incoming_) lingering_.push_back(std::move(item));
    incoming_.clear();
    haveInbox_.store(false, std::memory_order_relaxed);
  }
  for (const Command& command : commands_) {
    DataSocket* socket = command.socket;
    if (command.kind == Command::attach) {
      epoll_event event = {};
      event.events = EPOLLIN;
      event.data.ptr = socket;
      if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, socket->fd.get(), &event) == -1) socket->broken("epoll_ctl failed");
    } else if (command.kind == Command::kick) {
      active_.push_back(socket);
    } else {
      epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, socket->fd.get(), nullptr);
      active_.erase(std::remove(active_.begin(), active_.end(), socket), active_.end());
      std::lock_guard<std::mutex> lock(mutex_);
      *command.done = true;
      detached_.notify_all();
    }
  }
  commands_.clear();
  return true;
}

bool Poller::pumpActive() {
  bool moved = false;
  for (size_t i = 0; i < active_.size();) {
    DataSocket* socket = active_[i];
    bool blocked = false;
    moved |= socket->pump(&blocked);
    bool keep = !blocked && !socket->dead_;
    if (blocked) arm(socket, true); // stays scheduled; the event brings it back
    if (keep && socket->empty()) {
      socket->scheduled_.store(false);
      keep = socket->head_.load() != socket->tail_.load() && !socket->scheduled_.exchange(true);
    }
    if (keep) {
      i++;
    } else {
      active_.erase(active_.begin() + static_cast<ptrdiff_t>(i));
    }
  }
  return moved;
}

bool Poller::handleEvents(int timeoutMs) {
  std::array<epoll_event, 64> events;
  const int n = epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeoutMs);
  bool moved = false;
  for (int i = 0; i < n; i++) {
    auto* socket = static_cast<DataSocket*>(events[i].data.ptr);
    if (socket == nullptr) {
      uint64_t count;
      (void)!read(event_.get(), &count, sizeof(count));
      moved = true;
      continue;
    }
    if ((events[i].events & EPOLLOUT) != 0) {
      arm(socket, false);
      active_.push_back(socket);
      moved = true;
    }
    if ((events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) != 0) {
      moved |= socket->receive();
      // A socket with nothing more to say would keep the poller awake.
      if (socket->dead_) {
        epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, socket->fd.get(), nullptr);
        if (!socket->empty()) socket->shared->fail("the peer has closed the connection");
      }
    }
  }
  return moved;
}

void Poller::sweepLingering() {
  char scratch[4096];
  const double now = nowSeconds();
  for (size_t i = 0; i < lingering_.size();) {
    const ssize_t n = recv(lingering_[i].fd.get(), scratch, sizeof(scratch), MSG_DONTWAIT);
    const bool waiting = n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
    if (waiting && now < lingering_[i].deadline) {
      i++;
    } else {
      lingering_.erase(lingering_.begin() + static_cast<ptrdiff_t>(i));
    }
  }
}

void Poller::run() {
  const double spin = static_cast<double>(spinUs.get()) * 1e-6;
  double idleSince = nowSeconds();
  double stopAt = 0;
  for (;;) {
    bool moved = takeCommands();
    moved |= pumpActive();
    moved |= handleEvents(0);
    sweepLingering();
    const double now = nowSeconds();
    if (moved) {
      idleSince = now;
      continue;
    }
    if (now - idleSince < spin) continue;
    bool stopping;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping = stop_;
      if (!stopping && !inbox_.empty()) continue;
      sleeping_ = true;
    }
    if (stopping) {
      if (stopAt == 0) stopAt = now + lingerAtExit;
      if (lingering_.empty() || now > stopAt) return;
    }
    handleEvents(lingering_.empty() ? 1000 : 10);
    std::lock_guard<std::mutex> lock(mutex_);
    sleeping_ = false;
  }
}

} // namespace net
} // namespace moe
