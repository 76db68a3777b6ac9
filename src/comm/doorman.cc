#include "comm/doorman.h"

namespace moe {
namespace {

using std::chrono::milliseconds;
using Got = MessageSocket::Got;

constexpr auto kHelloTime = milliseconds(5000); // a client that has not said who it is by then is dropped

} // namespace

void Doorman::serve(const std::string& token, const Take& take) {
  accept();
  for (size_t i = 0; i < pending_.size();) {
    const Got got = pending_[i].socket.receive(MessageType::hello, MessageType::hello);
    if (got == Got::nothing && Clock::now() < pending_[i].deadline) {
      i++;
      continue;
    }
    Pending client = std::move(pending_[i]);
    pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(i));
    const std::string from = client.from.text();
    Hello hello;
    if (got == Got::nothing) {
      MOE_WARN("bootstrap: dropped %s, which did not say who it is in %lld ms", from.c_str(),
               static_cast<long long>(kHelloTime.count()));
    } else if (got == Got::closed) {
      MOE_WARN("bootstrap: %s connected and left without a word", from.c_str());
    } else if (got == Got::garbage) {
      MOE_WARN("bootstrap: dropped %s, which %s", from.c_str(), client.socket.reason());
    } else if (!parseHello(client.socket.body().data(), client.socket.body().size(), &hello)) {
      MOE_WARN("bootstrap: dropped %s, which sent a malformed hello", from.c_str());
    } else if (!equalSecret(hello.token, token)) {
      MOE_WARN("bootstrap: dropped %s, whose job token is wrong", from.c_str());
    } else {
      take(std::move(client.socket), hello, client.from);
    }
  }
}

void Doorman::accept() {
  for (const UniqueFd& listener : listeners_) {
    SocketAddress from;
    while (UniqueFd fd = acceptOne(listener.get(), &from)) {
      if (pending_.size() >= mostPending_) {
        MOE_WARN("bootstrap: dropped %s, the oldest of too many silent connections",
                 pending_.front().from.text().c_str());
        pending_.erase(pending_.begin());
      }
      pending_.push_back(Pending{MessageSocket(std::move(fd)), from, Clock::now() + kHelloTime});
    }
  }
}

} // namespace moe
