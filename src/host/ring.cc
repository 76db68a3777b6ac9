#include "host/ring.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>

#include "comm/rendezvous.h"

namespace moe {
namespace {

// First page of the file: what it is, and the positions of both rings.
struct Head {
  uint8_t nonce[kNonceBytes]; // proves to the opener that this is the file that was offered
  RingPositions rings[2];
};

constexpr const char* kName = "nccl-moe-ring";
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL; // a mapped page cannot go away

size_t pageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// The same bytes of the file twice, one after the other.
ncclResult_t mapTwice(int fd, size_t offset, size_t bytes, UniqueMap* map) {
  void* base = mmap(nullptr, 2 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return fail(ncclSystemError, "mmap of %zu bytes failed: %s", 2 * bytes, strerror(errno));
  UniqueMap owned(base, 2 * bytes);
  for (int half = 0; half < 2; half++) {
    void* at = static_cast<uint8_t*>(base) + static_cast<size_t>(half) * bytes;
    if (mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, static_cast<off_t>(offset)) == MAP_FAILED) {
      return fail(ncclSystemError, "mmap of a ring of %zu bytes failed: %s", bytes, strerror(errno));
    }
  }
  *map = std::move(owned);
  return ncclSuccess;
}

} // namespace

RingPositions* RingPair::positions(int ring) const { return &static_cast<Head*>(head_.get())->rings[ring]; }

ncclResult_t RingPair::map() {
  void* head = mmap(nullptr, pageBytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (head == MAP_FAILED) {
    return fail(ncclSystemError, "mmap of a ring's head failed: %s%s", strerror(errno),
                errno == ENOMEM ? " (a process may have vm.max_map_count mappings)" : "");
  }
  head_ = UniqueMap(head, pageBytes());
  for (int ring = 0; ring < 2; ring++) {
    MOECHECK(mapTwice(fd_.get(), pageBytes() + static_cast<size_t>(ring) * ringBytes_, ringBytes_, &data_[ring]));
  }
  return ncclSuccess;
}

ncclResult_t RingPair::create(size_t ringBytes) {
  ringBytes_ = ringBytes;
  fd_ = UniqueFd(memfd_create(kName, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd_) return fail(ncclSystemError, "memfd_create failed: %s", strerror(errno));
  SYSCHECK(ftruncate(fd_.get(), static_cast<off_t>(pageBytes() + 2 * ringBytes)), "ftruncate of a ring's memory");
  SYSCHECK(fcntl(fd_.get(), F_ADD_SEALS, kSeals), "fcntl(F_ADD_SEALS)");
  MOECHECK(map());
  auto* head = static_cast<Head*>(head_.get());
  return randomBytes(head->nonce, kNonceBytes); // the positions are zero, as all of a new file is
}

ShmOffer RingPair::offer() const {
  ShmOffer offer{static_cast<int32_t>(getpid()), fd_.get(), ringBytes_, {}};
  memcpy(offer.nonce, static_cast<const Head*>(head_.get())->nonce, kNonceBytes);
  return offer;
}

bool RingPair::open(const ShmOffer& offer, size_t ringBytes) {
  if (offer.pid <= 0 || offer.fd < 0 || offer.ringBytes != ringBytes) return false;
  // In another pid namespace the path may lead to any file of any process: look before opening, and at the nonce after.
  char path[64];
  snprintf(path, sizeof(path), "/proc/%d/fd/%d", offer.pid, offer.fd);
  char target[64] = "";
  if (readlink(path, target, sizeof(target) - 1) <= 0 || strstr(target, kName) == nullptr) return false;
  fd_ = UniqueFd(::open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!fd_) return false;
  struct stat info {};
  const int seals = fcntl(fd_.get(), F_GET_SEALS);
  ringBytes_ = ringBytes;
  if (seals == -1 || (seals & F_SEAL_SHRINK) == 0 || fstat(fd_.get(), &info) != 0 ||
      static_cast<size_t>(info.st_size) != pageBytes() + 2 * ringBytes || map() != ncclSuccess) {
    return false;
  }
  const bool same = memcmp(static_cast<const Head*>(head_.get())->nonce, offer.nonce, kNonceBytes) == 0;
  fd_.reset();
  return same;
}

} // namespace moe
