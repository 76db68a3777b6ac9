// Messages: sizes, alignment, many outstanding, groups, order, registration, flush.
#include <algorithm>
#include <climits>
#include <cstring>
#include <deque>
#include <memory>
#include <sys/socket.h>
#include <unistd.h>

#include "harness.h"

namespace conformance {
namespace {

// A connection from rank 0 to rank 1.
struct Link {
  Rank& r;
  void* comm;
  explicit Link(Rank& rank) : r(rank) {
    r.start();
    comm = r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0);
  }
  bool sender() const { return r.rank == 0; }
  void end() {
    r.meet(1 - r.rank);
    if (sender())
      closeSend(r, comm);
    else
      closeRecv(r, comm);
    r.stop();
  }
};

uint64_t seedOf(size_t a, size_t b = 0) { return a * 1000003 + b * 7919 + 17; }

void sizes(Rank& r, const std::vector<size_t>& list, size_t misalign, size_t extra) {
  Link link(r);
  for (size_t n : list) {
    Buffer b(n + (link.sender() ? 0 : extra), misalign);
    if (link.sender()) b.fill(seedOf(n));
    void* m = reg(r, link.comm, b);
    if (link.sender()) {
      waitDone(r, postSend(r, link.comm, b.data(), n, 5, m));
      b.checkGuards("the sender's buffer");
    } else {
      int got = waitDone(r, postRecv(r, link.comm, b.data(), n + extra, 5, m));
      require(got == int(n), "test said %d bytes for a message of %zu", got, n);
      b.check(seedOf(n), n, ("a message of " + std::to_string(n)).c_str());
    }
    dereg(r, link.comm, m);
  }
  link.end();
}

std::vector<size_t> smallSizes() {
  std::vector<size_t> list = {0, 1, 2, 3, 7, 8, 9};
  for (size_t n : {64, 128, 256, 512, 1024, 4096, 8192, 16384, 65536, 131072, 262144, 1048576})
    for (int d : {-1, 0, 1}) list.push_back(n + size_t(d));
  for (size_t n : {8190, 8194, 100003, 524289, 3000001}) list.push_back(n);
  return list;
}

CASE("transfer.sizes", 2, 120, [](Rank& r) { sizes(r, smallSizes(), 0, 0); });
CASE("transfer.unaligned", 2, 120, [](Rank& r) { sizes(r, smallSizes(), 3, 0); });
CASE("transfer.recv_larger", 2, 120, [](Rank& r) { sizes(r, {0, 1, 127, 128, 5000, 65536, 1000001}, 1, 4097); });
CASE("transfer.64MiB", 2, 120, [](Rank& r) { sizes(r, {(4 << 20) + 3, 16 << 20, (64 << 20) - 1, 64 << 20}, 0, 0); });

void huge(Rank& r, size_t n) {
  if (!r.options->big) skip("needs --big");
  if (r.net.version() == 0) r.start();
  if (n > INT_MAX && r.net.version() < 9) skip("sizes are int before version 9");
  Properties props;
  requireOk(r.net.properties(r.dev, &props));
  if (r.net.version() >= 9 && props.maxP2pBytes < n) skip("maxP2pBytes is %zu", props.maxP2pBytes);
  r.stop();
  r.net.unload();
  Link link(r);
  Buffer b(n);
  if (link.sender()) b.fill(seedOf(n));
  void* m = reg(r, link.comm, b);
  if (link.sender()) {
    waitDone(r, postSend(r, link.comm, b.data(), n, 5, m));
  } else {
    waitDone(r, postRecv(r, link.comm, b.data(), n, 5, m)); // the int that test gives cannot hold the size
    b.check(seedOf(n), n, "a huge message");
  }
  dereg(r, link.comm, m);
  link.end();
}
CASE("transfer.over_1GiB", 2, 600, [](Rank& r) { huge(r, (size_t(1) << 30) + 4099); });
CASE("transfer.over_4GiB", 2, 1200, [](Rank& r) { huge(r, (size_t(1) << 32) + 4099); });

CASE("transfer.send_larger", 2, 120, [](Rank& r) {
  // Not allowed by NCCL, but it must end on both sides, and nothing past the receive buffer may be written.
  Link link(r);
  Buffer b(link.sender() ? 100000 : 60000);
  if (link.sender()) b.fill(3);
  void* m = reg(r, link.comm, b);
  if (link.sender()) {
    trySend(r, link.comm, b.data(), b.size(), 0, m);
  } else {
    ncclResult_t result = tryRecv(r, link.comm, b.data(), b.size(), 0, m);
    b.checkGuards("a receive smaller than its send");
    if (result == ncclSuccess) b.checkRange(3, 0, b.size(), "a receive smaller than its send");
  }
  r.net.deregMr(link.comm, m);
  link.end();
});

CASE("transfer.null_sizes", 2, 60, [](Rank& r) {
  Link link(r);
  Buffer b(10000);
  if (link.sender()) b.fill(3);
  void* m = reg(r, link.comm, b);
  for (int i = 0; i < 20; i++) {
    void* q = link.sender() ? postSend(r, link.comm, b.data(), b.size(), 0, m)
                            : postRecv(r, link.comm, b.data(), b.size(), 0, m);
    double begin = seconds();
    for (int done = 0; !done;) {
      requireOk(r.net.test(q, &done, nullptr));
      require(seconds() - begin < r.bound(), "test with NULL sizes never said done");
    }
  }
  if (!link.sender()) b.check(3, b.size(), "message");
  dereg(r, link.comm, m);
  link.end();
});

CASE("transfer.optional_completion", 2, 60, [](Rank& r) {
  // NCCL passes 1 in *request to say that it can do without the completion; *request has to be overwritten.
  Link link(r);
  Buffer b(10000);
  if (link.sender()) b.fill(3);
  void* m = reg(r, link.comm, b);
  for (int i = 0; i < 20; i++) {
    if (link.sender()) {
      waitDone(r, postSend(r, link.comm, b.data(), b.size(), 0, m));
      continue;
    }
    void *data = b.data(), *q = nullptr;
    size_t size = b.size();
    int tag = 0;
    double begin = seconds();
    do {
      q = reinterpret_cast<void*>(uintptr_t(NCCL_NET_OPTIONAL_RECV_COMPLETION));
      requireOk(r.net.irecv(link.comm, 1, &data, &size, &tag, &m, &q));
      require(q != reinterpret_cast<void*>(uintptr_t(NCCL_NET_OPTIONAL_RECV_COMPLETION)), "irecv left *request alone");
      require(seconds() - begin < r.bound(), "irecv was never taken");
    } while (q == nullptr);
    waitDone(r, q);
  }
  if (!link.sender()) b.check(3, b.size(), "message");
  dereg(r, link.comm, m);
  link.end();
});

// Keeps up to `window` messages of random sizes under way; both ends draw the same sizes.
void stream(Rank& r, void* comm, bool sender, int count, size_t maxBytes, size_t window, uint64_t seed, bool pauses) {
  std::mt19937_64 draw(seed);
  struct Item {
    std::unique_ptr<Buffer> buffer;
    void *mhandle, *request;
    size_t bytes;
    uint64_t id;
  };
  std::deque<Item> items;
  uint64_t posted = 0;
  double last = seconds();
  while (posted < uint64_t(count) || !items.empty()) {
    while (posted < uint64_t(count) && items.size() < window) {
      size_t bytes = draw() % 3 == 0 ? draw() % (maxBytes + 1) : draw() % 300;
      Item item = {std::make_unique<Buffer>(bytes), nullptr, nullptr, bytes, posted};
      if (sender) item.buffer->fill(seedOf(posted, seed));
      item.mhandle = reg(r, comm, *item.buffer);
      items.push_back(std::move(item));
      posted++;
    }
    // In order: what was not taken keeps those behind it back.
    for (auto& item : items) {
      if (item.request != nullptr) continue;
      void* data = item.buffer->data();
      int tag = 1;
      if (sender)
        requireOk(r.net.isend(comm, data, item.bytes, tag, item.mhandle, &item.request));
      else
        requireOk(r.net.irecv(comm, 1, &data, &item.bytes, &tag, &item.mhandle, &item.request));
      if (item.request == nullptr) break;
      last = seconds();
    }
    // Any of those under way may be asked first.
    std::vector<size_t> order;
    for (size_t i = 0; i < items.size(); i++)
      if (items[i].request != nullptr) order.push_back(i);
    std::shuffle(order.begin(), order.end(), r.random);
    std::vector<bool> gone(items.size(), false);
    for (size_t i : order) {
      int done = 0, got[8] = {};
      requireOk(r.net.test(items[i].request, &done, got));
      if (!done) continue;
      last = seconds();
      gone[i] = true;
      if (!sender) {
        require(got[0] == int(items[i].bytes), "message %llu: test said %d bytes, not %zu",
                (unsigned long long)items[i].id, got[0], items[i].bytes);
        items[i].buffer->check(seedOf(items[i].id, seed), items[i].bytes, "one of many messages");
      }
      dereg(r, comm, items[i].mhandle);
    }
    std::deque<Item> rest;
    for (size_t i = 0; i < items.size(); i++)
      if (!gone[i]) rest.push_back(std::move(items[i]));
    items.swap(rest);
    if (pauses && r.random() % 64 == 0) usleep(1000);
    require(seconds() - last < r.bound(), "nothing moved for %.0f s, %llu of %d messages posted", r.bound(),
            (unsigned long long)posted, count);
  }
}

CASE("transfer.barrage", 2, 120, [](Rank& r) {
  Link link(r);
  stream(r, link.comm, link.sender(), r.count(600), 200000, 16, r.options->seed, false);
  link.end();
});
CASE("transfer.barrage_with_pauses", 2, 120, [](Rank& r) {
  Link link(r);
  stream(r, link.comm, link.sender(), r.count(300), 200000, 24, r.options->seed + 1, true);
  link.end();
});

CASE("transfer.duplex", 2, 120, [](Rank& r) {
  // Both directions at once, on two connections, by one thread.
  r.start();
  int peer = 1 - r.rank;
  void *out, *in;
  if (r.rank == 0) {
    out = connectTo(r, peer);
    in = acceptFrom(r, peer);
  } else {
    in = acceptFrom(r, peer);
    out = connectTo(r, peer);
  }
  constexpr size_t n = 2 << 20;
  constexpr int rounds = 20;
  Buffer a(n), b(n);
  a.fill(seedOf(size_t(r.rank)));
  void *ma = reg(r, out, a), *mb = reg(r, in, b);
  for (int i = 0; i < rounds; i++) {
    b.poison();
    void *recv = nullptr, *send = nullptr;
    bool sent = false, received = false;
    double begin = seconds();
    while (!sent || !received) {
      void* data = b.data();
      size_t bytes = n;
      int tag = i, done = 0, got[8] = {};
      if (recv == nullptr && !received) requireOk(r.net.irecv(in, 1, &data, &bytes, &tag, &mb, &recv));
      if (send == nullptr && !sent) requireOk(r.net.isend(out, a.data(), n, i, ma, &send));
      if (recv != nullptr) requireOk(r.net.test(recv, &done, got));
      if (done) received = true, recv = nullptr;
      done = 0;
      if (send != nullptr) requireOk(r.net.test(send, &done, got));
      if (done) sent = true, send = nullptr;
      require(seconds() - begin < r.bound(), "round %d of a full-duplex transfer is stuck", i);
    }
    b.check(seedOf(size_t(peer)), n, "full-duplex message");
  }
  r.meet(peer);
  dereg(r, out, ma);
  dereg(r, in, mb);
  closeSend(r, out);
  closeRecv(r, in);
  r.stop();
});

CASE("transfer.exhaustion", 2, 120, [](Rank& r) {
  // At least 32 requests fit; then NULL, never an error; then everything goes through.
  Link link(r);
  constexpr size_t n = 64;
  constexpr size_t most = 4096;
  Buffer b(n * most);
  if (link.sender()) b.fill(1);
  void* m = reg(r, link.comm, b);
  std::vector<void*> requests;
  auto post = [&](size_t i, void** q) {
    void* data = b.data() + i * n;
    size_t bytes = n;
    int tag = 0;
    return link.sender() ? r.net.isend(link.comm, data, bytes, tag, m, q)
                         : r.net.irecv(link.comm, 1, &data, &bytes, &tag, &m, q);
  };
  // The receiver first, alone: its queue fills without being emptied.
  auto fillUp = [&] {
    int refused = 0;
    double begin = seconds();
    while (refused < 200 && requests.size() < most && seconds() - begin < 20 * r.options->scale) {
      void* q = nullptr;
      requireOk(post(requests.size(), &q));
      if (q == nullptr) {
        refused++;
        usleep(500);
        continue;
      }
      refused = 0;
      requests.push_back(q);
    }
  };
  size_t total = 0;
  if (!link.sender()) {
    fillUp();
    total = requests.size();
    require(total >= NCCL_NET_MAX_REQUESTS, "only %zu receives fit", total);
    r.sendValue(0, total);
  } else {
    total = r.receiveValue<size_t>(1);
    fillUp();
    require(requests.size() >= std::min<size_t>(total, NCCL_NET_MAX_REQUESTS), "only %zu sends fit", requests.size());
  }
  size_t done = 0;
  std::vector<bool> finished(std::max(total, requests.size()), false);
  double begin = seconds();
  if (requests.size() > total) total = requests.size();
  if (link.sender()) {
    r.sendValue(1, total);
  } else {
    total = r.receiveValue<size_t>(0);
  }
  finished.resize(total, false);
  while (done < total) {
    for (size_t i = 0; i < requests.size(); i++) {
      int ok = 0, got[8];
      if (finished[i]) continue;
      requireOk(r.net.test(requests[i], &ok, got));
      if (ok) {
        finished[i] = true;
        done++;
      }
    }
    while (requests.size() < total) {
      void* q = nullptr;
      requireOk(post(requests.size(), &q));
      if (q == nullptr) break;
      requests.push_back(q);
    }
    require(seconds() - begin < r.bound(), "%zu of %zu requests done after %.0f s", done, total, r.bound());
  }
  if (!link.sender()) b.checkRange(1, 0, n * total, "messages after exhaustion");
  dereg(r, link.comm, m);
  link.end();
});

CASE("transfer.slow_receiver", 2, 60, [](Rank& r) {
  Link link(r);
  constexpr size_t n = 70000;
  Buffer b(8 * n);
  if (link.sender()) b.fill(4);
  void* m = reg(r, link.comm, b);
  if (!link.sender()) usleep(500000);
  std::vector<void*> requests;
  for (size_t i = 0; i < 8; i++)
    requests.push_back(link.sender() ? postSend(r, link.comm, b.data() + i * n, n, 0, m)
                                     : postRecv(r, link.comm, b.data() + i * n, n, 0, m));
  for (void* q : requests) waitDone(r, q);
  if (!link.sender()) b.check(4, b.size(), "messages to a slow receiver");
  dereg(r, link.comm, m);
  link.end();
});

CASE("transfer.many_comms_one_thread", 2, 120, [](Rank& r) {
  // Eight connections served in turn by one thread, as NCCL's proxy does.
  r.start();
  std::vector<void*> comms;
  for (int i = 0; i < 8; i++) comms.push_back(r.rank == 0 ? connectTo(r, 1) : acceptFrom(r, 0));
  constexpr size_t n = 300000;
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<void*> mhandles, requests(8, nullptr);
  std::vector<int> round(8, 0);
  for (size_t i = 0; i < 8; i++) {
    buffers.push_back(std::make_unique<Buffer>(n));
    if (r.rank == 0) buffers[i]->fill(seedOf(i));
    mhandles.push_back(reg(r, comms[i], *buffers[i]));
  }
  double begin = seconds();
  for (int left = 8; left > 0;)
    for (size_t i = 0; i < 8; i++) {
      if (round[i] == 10) continue;
      void* data = buffers[i]->data();
      size_t bytes = n;
      int tag = 0, done = 0, got[8];
      if (requests[i] == nullptr) {
        if (r.rank == 0)
          requireOk(r.net.isend(comms[i], data, n, tag, mhandles[i], &requests[i]));
        else
          requireOk(r.net.irecv(comms[i], 1, &data, &bytes, &tag, &mhandles[i], &requests[i]));
      } else {
        requireOk(r.net.test(requests[i], &done, got));
        if (done) {
          requests[i] = nullptr;
          if (r.rank == 1) {
            buffers[i]->check(seedOf(i), n, "message on one of eight connections");
            buffers[i]->poison();
          }
          if (++round[i] == 10) left--;
        }
      }
      require(seconds() - begin < r.bound(), "eight connections are stuck");
    }
  r.meet(1 - r.rank);
  for (size_t i = 0; i < 8; i++) {
    dereg(r, comms[i], mhandles[i]);
    if (r.rank == 0)
      closeSend(r, comms[i]);
    else
      closeRecv(r, comms[i]);
  }
  r.stop();
});

// ---- order ----

CASE("order.fifo", 2, 60, [](Rank& r) {
  // Equal tags: the k-th receive gets the k-th send, whether the receives come early or late.
  Link link(r);
  constexpr size_t n = 48;
  for (int late = 0; late < 4; late++) {
    Buffer b(n * 1000);
    if (link.sender()) b.fill(seedOf(size_t(late)));
    void* m = reg(r, link.comm, b);
    if (link.sender() == (late % 2 == 0)) usleep(50000);
    std::vector<void*> requests;
    for (size_t i = 0; i < 16; i++) {
      size_t bytes = 100 + i * 40;
      requests.push_back(link.sender() ? postSend(r, link.comm, b.data() + i * 1000, bytes, 9, m)
                                       : postRecv(r, link.comm, b.data() + i * 1000, 1000, 9, m));
    }
    for (size_t i = 16; i-- > 0;) {
      int got = waitDone(r, requests[i]);
      if (!link.sender()) require(got == int(100 + i * 40), "receive %zu got %d bytes, not %zu", i, got, 100 + i * 40);
    }
    dereg(r, link.comm, m);
  }
  link.end();
});

CASE("order.wrap", 2, 240, [](Rank& r) {
  // More than 2^16 messages on one connection: sequence numbers and immediate values wrap.
  if (r.options->quick) skip("not with --quick");
  Link link(r);
  constexpr uint64_t count = 70000;
  constexpr size_t window = 24;
  Buffer b(window * 8);
  void* m = reg(r, link.comm, b);
  std::vector<void*> requests(window, nullptr);
  uint64_t posted = 0, finished = 0;
  double last = seconds();
  while (finished < count) {
    while (posted < count && posted - finished < window) {
      size_t slot = posted % window;
      uint8_t* data = b.data() + slot * 8;
      if (link.sender()) memcpy(data, &posted, 8);
      void *where = data, *q = nullptr;
      size_t bytes = 8;
      int tag = 0;
      if (link.sender())
        requireOk(r.net.isend(link.comm, where, 8, tag, m, &q));
      else
        requireOk(r.net.irecv(link.comm, 1, &where, &bytes, &tag, &m, &q));
      if (q == nullptr) break;
      requests[slot] = q;
      posted++;
    }
    if (finished < posted) {
      int done = 0, got[8] = {};
      size_t slot = finished % window;
      requireOk(r.net.test(requests[slot], &done, got));
      if (done) {
        if (!link.sender()) {
          uint64_t value;
          memcpy(&value, b.data() + slot * 8, 8);
          require(value == finished && got[0] == 8, "message %llu carries %llu, %d bytes", (unsigned long long)finished,
                  (unsigned long long)value, got[0]);
        }
        finished++;
        last = seconds();
      }
    }
    require(seconds() - last < r.bound(), "stuck at message %llu", (unsigned long long)finished);
  }
  dereg(r, link.comm, m);
  link.end();
});

// ---- groups ----

struct Member {
  size_t room, bytes;
  int tag;
};

// One grouped receive, with its sends in an order of their own.
void group(Rank& r, void* comm, const std::vector<Member>& members, const std::vector<size_t>& order, uint64_t seed) {
  size_t n = members.size();
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<void*> mhandles;
  for (const auto& member : members)
    buffers.push_back(std::make_unique<Buffer>(r.rank == 0 ? member.bytes : member.room));
  for (size_t i = 0; i < n; i++) {
    if (r.rank == 0) buffers[i]->fill(seedOf(i, seed));
    mhandles.push_back(reg(r, comm, *buffers[i]));
  }
  if (r.rank == 0) {
    std::vector<void*> requests;
    for (size_t i : order)
      requests.push_back(postSend(r, comm, buffers[i]->data(), members[i].bytes, members[i].tag, mhandles[i]));
    for (void* q : requests) waitDone(r, q);
  } else {
    std::vector<void*> data;
    std::vector<size_t> sizes;
    std::vector<int> tags;
    for (size_t i = 0; i < n; i++) {
      data.push_back(buffers[i]->data());
      sizes.push_back(members[i].room);
      tags.push_back(members[i].tag);
    }
    void* q = nullptr;
    double begin = seconds();
    while (q == nullptr) {
      requireOk(r.net.irecv(comm, int(n), data.data(), sizes.data(), tags.data(), mhandles.data(), &q));
      require(seconds() - begin < r.bound(), "a receive of %zu members was never taken", n);
    }
    int done = 0, got[64] = {};
    while (!done) {
      requireOk(r.net.test(q, &done, got));
      require(seconds() - begin < r.bound(), "a receive of %zu members was never done", n);
    }
    for (size_t i = 0; i < n; i++) {
      require(got[i] == int(members[i].bytes), "member %zu of %zu: %d bytes, not %zu", i, n, got[i], members[i].bytes);
      buffers[i]->check(seedOf(i, seed), members[i].bytes, "member of a group");
    }
  }
  for (void* m : mhandles) dereg(r, comm, m);
}

std::vector<size_t> permutation(size_t n, std::mt19937_64& draw) {
  std::vector<size_t> order(n);
  for (size_t i = 0; i < n; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), draw);
  return order;
}

CASE("group.sizes", 2, 120, [](Rank& r) {
  Link link(r);
  if (r.maxRecvs == 1) skip("maxRecvs is 1");
  std::mt19937_64 draw(r.options->seed);
  for (int round = 0; round < 60; round++) {
    size_t n = 1 + draw() % size_t(r.maxRecvs);
    std::vector<Member> members;
    for (size_t i = 0; i < n; i++) {
      size_t room = draw() % 4 == 0 ? draw() % 500000 : 1 + draw() % 2000;
      members.push_back({room, draw() % 3 == 0 ? room : draw() % (room + 1), int(100 + i)});
    }
    group(r, link.comm, members, permutation(n, draw), uint64_t(round));
  }
  link.end();
});

CASE("group.duplicate_tags", 2, 60, [](Rank& r) {
  // Equal tags in one group are filled in order.
  Link link(r);
  if (r.maxRecvs < 4) skip("maxRecvs is %d", r.maxRecvs);
  group(r, link.comm, {{100, 10, 1}, {100, 20, 1}, {100, 30, 2}, {100, 40, 1}}, {0, 1, 3, 2}, 1);
  group(r, link.comm, {{100, 10, 1}, {100, 20, 1}, {100, 30, 2}, {100, 40, 1}}, {2, 0, 1, 3}, 2);
  link.end();
});

CASE("group.empty_member", 2, 60, [](Rank& r) {
  Link link(r);
  if (r.maxRecvs < 3) skip("maxRecvs is %d", r.maxRecvs);
  group(r, link.comm, {{0, 0, 1}, {1000, 0, 2}, {100000, 100000, 3}}, {1, 2, 0}, 1);
  group(r, link.comm, {{0, 0, 1}, {0, 0, 2}, {0, 0, 3}}, {2, 1, 0}, 2);
  link.end();
});

CASE("group.missing_member", 2, 60, [](Rank& r) {
  // A group is done when all of it has come, not before.
  Link link(r);
  if (r.maxRecvs < 2) skip("maxRecvs is 1");
  Buffer a(1000), b(1000);
  if (link.sender()) {
    a.fill(1);
    b.fill(2);
  }
  void *ma = reg(r, link.comm, a), *mb = reg(r, link.comm, b);
  if (link.sender()) {
    waitDone(r, postSend(r, link.comm, a.data(), 1000, 11, ma));
    r.meet(1);
    usleep(200000);
    r.sendValue(1, 'n');
    waitDone(r, postSend(r, link.comm, b.data(), 1000, 22, mb));
  } else {
    void* data[] = {b.data(), a.data()};
    size_t sizes[] = {1000, 1000};
    int tags[] = {22, 11};
    void* mhandles[] = {mb, ma};
    void* q = nullptr;
    while (q == nullptr) requireOk(r.net.irecv(link.comm, 2, data, sizes, tags, mhandles, &q));
    double begin = seconds();
    int done = 0, got[8] = {};
    // The sender needs this side's progress for its first message.
    r.sendValue(0, 'm');
    bool met = false, allowed = false;
    while (!done) {
      requireOk(r.net.test(q, &done, got));
      char byte;
      // Two bytes are for here; the next belongs to the end of the case.
      if (!allowed && recv(r.channels[0], &byte, 1, MSG_DONTWAIT) == 1) (met ? allowed : met) = true;
      require(!done || allowed, "a group was done before its second member had been sent");
      require(seconds() - begin < r.bound(), "the group was never done");
    }
    a.check(1, 1000, "first member");
    b.check(2, 1000, "second member");
  }
  dereg(r, link.comm, ma);
  dereg(r, link.comm, mb);
  link.end();
});

CASE("group.outstanding", 2, 120, [](Rank& r) {
  // Several groups under way, sends shuffled inside each.
  Link link(r);
  if (r.maxRecvs == 1) skip("maxRecvs is 1");
  constexpr size_t groups = 12, n = 4000;
  auto width = size_t(r.maxRecvs);
  std::mt19937_64 draw(r.options->seed);
  Buffer b(groups * width * n);
  if (link.sender()) b.fill(6);
  void* m = reg(r, link.comm, b);
  for (int round = 0; round < 5; round++) {
    if (!link.sender()) b.poison();
    r.meet(1 - r.rank);
    std::vector<void*> requests;
    for (size_t g = 0; g < groups; g++) {
      auto order = permutation(width, draw);
      if (link.sender()) {
        for (size_t i : order) requests.push_back(postSend(r, link.comm, b.data() + (g * width + i) * n, n, int(i), m));
      } else {
        std::vector<void*> data, mhandles(width, m);
        std::vector<size_t> sizes(width, n);
        std::vector<int> tags;
        for (size_t i = 0; i < width; i++) {
          data.push_back(b.data() + (g * width + i) * n);
          tags.push_back(int(i));
        }
        void* q = nullptr;
        double begin = seconds();
        while (q == nullptr) {
          requireOk(r.net.irecv(link.comm, int(width), data.data(), sizes.data(), tags.data(), mhandles.data(), &q));
          require(seconds() - begin < r.bound(), "group %zu of %zu was never taken", g, groups);
        }
        requests.push_back(q);
      }
    }
    for (void* q : requests) {
      double begin = seconds();
      for (int done = 0; !done;) {
        int got[64];
        requireOk(r.net.test(q, &done, got));
        require(seconds() - begin < r.bound(), "a group was never done");
      }
    }
    if (!link.sender()) b.check(6, b.size(), "groups");
  }
  dereg(r, link.comm, m);
  link.end();
});

CASE("group.too_many", 2, 60, [](Rank& r) {
  Link link(r);
  if (!link.sender()) {
    // A plugin that offers fewer than 8 may take more all the same.
    auto n = size_t(std::max(r.maxRecvs, 8)) + 1;
    Buffer b(n * 100);
    void* m = reg(r, link.comm, b);
    std::vector<void*> data, mhandles(n, m);
    std::vector<size_t> sizes(n, 100);
    std::vector<int> tags(n, 0);
    for (size_t i = 0; i < n; i++) data.push_back(b.data() + 100 * i);
    for (int count : {int(n), 0, -1}) {
      void* q = nullptr;
      ncclResult_t rc = r.net.irecv(link.comm, count, data.data(), sizes.data(), tags.data(), mhandles.data(), &q);
      require(rc != ncclSuccess, "a receive of %d members is accepted, maxRecvs is %d", count, r.maxRecvs);
    }
    r.net.deregMr(link.comm, m);
    r.meet(0);
    r.net.closeRecv(link.comm);
  } else {
    r.meet(1);
    r.net.closeSend(link.comm);
  }
  r.stop();
});

// ---- memory ----

CASE("memory.overlapping", 2, 60, [](Rank& r) {
  // The same range twice, nested and overlapping ones; given back in another order, the rest stays usable.
  Link link(r);
  Buffer b(200000);
  if (link.sender()) b.fill(2);
  struct {
    size_t offset, bytes;
  } ranges[] = {{0, 200000}, {0, 200000}, {1000, 5000}, {1000, 5000}, {3000, 100000}, {0, 4096}, {199999, 1}};
  std::vector<void*> mhandles;
  for (auto& range : ranges) {
    void* m = nullptr;
    requireOk(r.net.regMr(link.comm, b.data() + range.offset, range.bytes, &m));
    mhandles.push_back(m);
  }
  std::vector<size_t> alive = {0, 1, 2, 3, 4, 5, 6};
  std::mt19937_64 draw(r.options->seed);
  while (!alive.empty()) {
    for (size_t i : alive) {
      auto& range = ranges[i];
      void* at = b.data() + range.offset;
      waitDone(r, link.sender() ? postSend(r, link.comm, at, range.bytes, 0, mhandles[i])
                                : postRecv(r, link.comm, at, range.bytes, 0, mhandles[i]));
    }
    size_t k = draw() % alive.size();
    dereg(r, link.comm, mhandles[alive[k]]);
    alive.erase(alive.begin() + long(k));
  }
  if (!link.sender()) b.check(2, b.size(), "overlapping registrations");
  link.end();
});

CASE("memory.storm", 2, 90, [](Rank& r) {
  // 512 registrations, given back in reverse and in random order.
  Link link(r);
  Buffer b(512 * 8192);
  std::mt19937_64 draw(r.options->seed);
  for (int round = 0; round < 2; round++) {
    std::vector<void*> mhandles;
    for (size_t i = 0; i < 512; i++) {
      void* m = nullptr;
      requireOk(r.net.regMr(link.comm, b.data() + i * 8192, 8192, &m));
      mhandles.push_back(m);
    }
    if (round == 0)
      std::reverse(mhandles.begin(), mhandles.end());
    else
      std::shuffle(mhandles.begin(), mhandles.end(), draw);
    for (void* m : mhandles) dereg(r, link.comm, m);
  }
  link.end();
});

CASE("memory.remapped", 2, 60, [](Rank& r) {
  // Memory that is given back and mapped anew at the same address is other memory.
  Link link(r);
  for (size_t round = 0; round < 10; round++) {
    Buffer b(1 << 20); // mmap gives the same address again
    if (link.sender()) b.fill(seedOf(round));
    void* m = reg(r, link.comm, b);
    waitDone(r, link.sender() ? postSend(r, link.comm, b.data(), b.size(), 0, m)
                              : postRecv(r, link.comm, b.data(), b.size(), 0, m));
    if (!link.sender()) b.check(seedOf(round), b.size(), "memory mapped anew");
    dereg(r, link.comm, m);
  }
  link.end();
});

CASE("memory.bad_arguments", 2, 60, [](Rank& r) {
  // Any result but a crash; the connection works afterwards.
  Link link(r);
  void* m = nullptr;
  if (r.net.regMr(link.comm, nullptr, 4096, &m) == ncclSuccess && m != nullptr) r.net.deregMr(link.comm, m);
  m = nullptr;
  char byte;
  if (r.net.regMr(link.comm, &byte, 0, &m) == ncclSuccess && m != nullptr) r.net.deregMr(link.comm, m);
  r.net.deregMr(link.comm, nullptr);
  if (link.sender())
    sendMessage(r, link.comm, 1000, 3);
  else
    recvMessage(r, link.comm, 1000, 3);
  link.end();
});

// ---- flush ----

CASE("flush.host", 2, 60, [](Rank& r) {
  // Host memory needs no flush: NULL says so, and a request has to end.
  Link link(r);
  auto n = size_t(r.maxRecvs);
  for (size_t k = 1; k <= n; k++) {
    Buffer b(k * 1000);
    if (link.sender()) b.fill(seedOf(k));
    void* m = reg(r, link.comm, b);
    for (size_t i = 0; i < k; i++)
      waitDone(r, link.sender() ? postSend(r, link.comm, b.data() + i * 1000, 1000, 0, m)
                                : postRecv(r, link.comm, b.data() + i * 1000, 1000, 0, m));
    for (int empty = 0; empty < 2 && !link.sender(); empty++) {
      std::vector<void*> data, mhandles(k, m);
      std::vector<int> sizes(k, empty ? 0 : 1000);
      for (size_t i = 0; i < k; i++) data.push_back(b.data() + i * 1000);
      void* q = nullptr;
      requireOk(r.net.iflush(link.comm, int(k), data.data(), sizes.data(), mhandles.data(), &q));
      double begin = seconds();
      for (int done = q == nullptr; !done;) {
        requireOk(r.net.test(q, &done, nullptr));
        require(seconds() - begin < r.bound(), "a flush was never done");
      }
    }
    if (!link.sender()) b.check(seedOf(k), b.size(), "flushed memory");
    dereg(r, link.comm, m);
  }
  link.end();
});

} // namespace
} // namespace conformance
