// How the two processes of a measurement talk beside the plugin: a stream socket, every call with a deadline.
#pragma once

#include <cstddef>
#include <string>

#include "base/error.h"
#include "base/handle.h"

namespace moe {
namespace netperf {

class Control {
 public:
  // Two ends of one machine: TCP over loopback, so that it also serves as the plain socket to compare with.
  static ncclResult_t pair(Control* first, Control* second);
  static ncclResult_t listen(int port, UniqueFd* listener);
  static ncclResult_t accept(const UniqueFd& listener, int timeoutSeconds, Control* control);
  static ncclResult_t dial(const std::string& host, int port, int timeoutSeconds, Control* control);

  ncclResult_t setTimeout(int seconds);
  ncclResult_t send(const void* data, size_t bytes);
  ncclResult_t receive(void* data, size_t bytes);
  // Both sides give, both get.
  template <typename T> ncclResult_t exchange(const T& mine, T* theirs) {
    MOECHECK(send(&mine, sizeof(T)));
    return receive(theirs, sizeof(T));
  }
  ncclResult_t barrier() {
    const char mine = 'b';
    char theirs = 0;
    MOECHECK(exchange(mine, &theirs));
    return theirs == mine ? ncclSuccess : fail(ncclRemoteError, "the peer is at another step");
  }

 private:
  UniqueFd fd_;
};

} // namespace netperf
} // namespace moe
