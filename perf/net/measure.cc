#include "perf/net/measure.h"

#include <algorithm>
#include <cstring>

namespace moe {
namespace netperf {
namespace {

constexpr size_t cacheBytes = 64 << 20; // messages spread over so much, so that buffers are not all in cache
constexpr size_t guard = 64;            // bytes behind each message that must stay as they are

size_t strideOf(size_t bytes) { return (bytes + guard + 63) / 64 * 64; }

int slotsOf(const Link& link, size_t bytes, int window) {
  const size_t room = const_cast<Link&>(link).sendBuffer().bytes();
  return int(std::max<size_t>(1, std::min({size_t(window), room / strideOf(bytes), cacheBytes / strideOf(bytes) + 1})));
}

// How often, so that it takes the time asked for; the same on both sides.
ncclResult_t agree(Control* control, bool first, const Options& options, double secondsPerMessage, int least, int most,
                   int* iters) {
  int mine = options.iters;
  if (mine == 0) {
    mine = int(std::min(double(most), std::max(double(least), options.seconds / std::max(secondsPerMessage, 1e-9))));
  }
  int theirs = 0;
  MOECHECK(control->exchange(mine, &theirs));
  *iters = first ? mine : theirs;
  return ncclSuccess;
}

// The slower side's time for nSend messages there and nRecv back.
ncclResult_t timed(Link* link, Control* control, size_t nSend, size_t nRecv, size_t bytes, int window,
                   double* seconds) {
  MOECHECK(control->barrier());
  const int64_t begin = nowNs();
  MOECHECK(link->transfer(nSend, nRecv, bytes, strideOf(bytes), slotsOf(*link, bytes, window), window));
  const double mine = double(nowNs() - begin) / 1e9;
  double theirs = 0;
  MOECHECK(control->exchange(mine, &theirs));
  *seconds = std::max(mine, theirs);
  return ncclSuccess;
}

void percentiles(std::vector<int64_t>* ns, double* median, double* p99) {
  std::sort(ns->begin(), ns->end());
  *median = double((*ns)[ns->size() / 2]) / 2000;
  *p99 = double((*ns)[std::min(ns->size() - 1, ns->size() * 99 / 100)]) / 2000;
}

ncclResult_t socketTimes(Control* control, bool first, size_t bytes, int iters, int rounds, Result* result) {
  // As many buffers as the plugin gets, for the sake of the caches.
  const size_t slots = std::max<size_t>(1, std::min<size_t>(16, cacheBytes / std::max<size_t>(bytes, 1)));
  std::vector<char> data(std::max<size_t>(bytes * slots, 1), 1);
  MOECHECK(control->barrier());
  const int64_t begin = nowNs();
  for (int i = 0; i < iters; i++) {
    char* at = data.data() + size_t(i) % slots * bytes;
    MOECHECK(first ? control->send(at, bytes) : control->receive(at, bytes));
  }
  const double mine = double(nowNs() - begin) / 1e9;
  double theirs = 0;
  MOECHECK(control->exchange(mine, &theirs));
  result->socketGBs = double(bytes) * iters / std::max(mine, theirs) / 1e9;
  std::vector<int64_t> ns;
  for (int i = 0; i < rounds; i++) {
    const int64_t start = nowNs();
    if (first) MOECHECK(control->send(data.data(), bytes));
    MOECHECK(control->receive(data.data(), bytes));
    if (!first) MOECHECK(control->send(data.data(), bytes));
    ns.push_back(nowNs() - start);
  }
  double p99 = 0;
  percentiles(&ns, &result->socketLatencyUs, &p99);
  return ncclSuccess;
}

void pattern(uint32_t seed, size_t bytes, std::vector<char>* data) {
  data->resize(bytes);
  std::mt19937_64 random(seed);
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    const uint64_t word = random();
    memcpy(data->data() + i, &word, 8);
  }
  for (; i < bytes; i++) (*data)[i] = char(random());
}

} // namespace

ncclResult_t verify(Link* link, Control* control, size_t bytes, int count, bool first, long* wrong) {
  const size_t stride = strideOf(bytes);
  count = std::min(count, slotsOf(*link, bytes, count));
  uint32_t seed = std::random_device{}(), peersSeed = 0;
  MOECHECK(control->exchange(seed, &peersSeed));
  seed = first ? seed : peersSeed; // one seed for both; each side's data differ by the sign below
  std::vector<char> data, expected, got(stride), poison(stride, char(0xA5));
  for (int i = 0; i < count; i++) {
    pattern(seed + uint32_t(i) * 2 + (first ? 0 : 1), bytes, &data);
    MOECHECK(link->sendBuffer().write(size_t(i) * stride, data.data(), bytes));
    MOECHECK(link->recvBuffer().write(size_t(i) * stride, poison.data(), stride));
  }
  MOECHECK(control->barrier());
  std::vector<int> sizes;
  MOECHECK(link->transfer(size_t(count), size_t(count), bytes, stride, count, count, &sizes));
  long mine = 0;
  for (int i = 0; i < count; i++) {
    if (link->recvBuffer().kind() != MemoryKind::host) MOECHECK(link->flush(size_t(i) * stride, bytes));
    MOECHECK(link->recvBuffer().read(size_t(i) * stride, got.data(), stride));
    pattern(seed + uint32_t(i) * 2 + (first ? 1 : 0), bytes, &expected);
    for (size_t k = 0; k < stride; k++) mine += got[k] != (k < bytes ? expected[k] : char(0xA5));
    if (size_t(sizes[size_t(i)]) != bytes) mine += long(std::max<size_t>(bytes, 1));
  }
  long theirs = 0;
  MOECHECK(control->exchange(mine, &theirs));
  *wrong = mine + theirs;
  return ncclSuccess;
}

ncclResult_t measure(Link* link, Control* control, bool first, const Options& options, size_t bytes, Result* result) {
  *result = Result();
  result->bytes = bytes;
  const auto oneWay = [&](int n, double* seconds) {
    return timed(link, control, first ? size_t(n) : 0, first ? 0 : size_t(n), bytes, options.window, seconds);
  };
  // Warm up, then see how long a message takes.
  const int warm = std::max(4, std::min(64, int((16 << 20) / std::max<size_t>(bytes, 1))));
  double seconds = 0;
  MOECHECK(oneWay(warm, &seconds));
  MOECHECK(oneWay(warm, &seconds));
  int iters = 0;
  MOECHECK(agree(control, first, options, seconds / warm, 4, 2000000, &iters));
  MOECHECK(oneWay(iters, &seconds));
  result->iters = size_t(iters);
  result->outGBs = double(bytes) * iters / seconds / 1e9;
  result->messagesPerSecond = iters / seconds;
  MOECHECK(timed(link, control, size_t(iters), size_t(iters), bytes, options.window, &seconds));
  result->bothGBs = 2.0 * double(bytes) * iters / seconds / 1e9;

  std::vector<int64_t> ns;
  MOECHECK(control->barrier());
  MOECHECK(link->pingPong(first, bytes, 10, &ns));
  std::sort(ns.begin(), ns.end());
  int rounds = 0;
  MOECHECK(agree(control, first, options, double(ns[ns.size() / 2]) / 1e9, 10, 20000, &rounds));
  rounds = std::max(rounds, 10);
  ns.clear();
  MOECHECK(control->barrier());
  MOECHECK(link->pingPong(first, bytes, rounds, &ns));
  percentiles(&ns, &result->latencyUs, &result->latency99Us);
  if (bytes > 0) MOECHECK(socketTimes(control, first, bytes, iters, rounds, result));
  if (options.verify) MOECHECK(verify(link, control, bytes, 8, first, &result->wrong));
  return ncclSuccess;
}

} // namespace netperf
} // namespace moe
