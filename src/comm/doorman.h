// Lets connections of other ranks in while a communicator forms: listeners, and the connections that have not yet said
// who they are.  Each of those has a deadline of its own, and none delays another.
#pragma once

#include <poll.h>

#include <functional>
#include <string>
#include <vector>

#include "comm/message_socket.h"

namespace moe {

class Doorman {
 public:
  explicit Doorman(size_t nRanks) : mostPending_(2 * nRanks + 64) {}
  void add(UniqueFd listener) { listeners_.push_back(std::move(listener)); }
  void close() {
    listeners_.clear();
    pending_.clear();
  }

  void poll(std::vector<pollfd>* set) const {
    for (const UniqueFd& listener : listeners_) set->push_back(pollfd{listener.get(), POLLIN, 0});
    for (const Pending& client : pending_) set->push_back(pollfd{client.socket.fd(), POLLIN, 0});
  }

  // Accepts and reads whatever is there; take gets each connection whose hello is complete and carries the job's token.
  using Take = std::function<void(MessageSocket socket, const Hello& hello, const SocketAddress& from)>;
  void serve(const std::string& token, const Take& take);

 private:
  struct Pending {
    MessageSocket socket;
    SocketAddress from;
    Clock::time_point deadline;
  };

  void accept();

  size_t mostPending_;
  std::vector<UniqueFd> listeners_;
  std::vector<Pending> pending_;
};

} // namespace moe
