#include "net/regcache.h"

#include <unistd.h>

#include <cerrno>

namespace moe {
namespace net {

void RegistrationCache::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Entry& entry : entries_) (void)registrar_->remove(entry.mr);
  for (Region* held : held_) delete held;
  entries_.clear();
  held_.clear();
}

int RegistrationCache::add(const Memory& memory, int access, Held** held) {
  *held = nullptr;
  // Whole pages, so that neighbours in a page share one registration; devices pin whole pages anyway.
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t data = reinterpret_cast<uintptr_t>(memory.data);
  uintptr_t begin = data, end = data + memory.bytes;
  if (end < data) return EINVAL;
  if (memory.kind == ptrHost) {
    begin = begin / page * page;
    end = (end + page - 1) / page * page;
    if (end == begin) end = begin + page;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = entries_.end();
  for (auto it = entries_.begin(); it != entries_.end() && memory.kind != ptrDmabuf; ++it) {
    if (it->kind == memory.kind && it->access == access && it->begin <= begin && end <= it->end) {
      found = it;
      break;
    }
  }
  if (found == entries_.end()) {
    Memory whole = memory;
    if (memory.kind == ptrHost) {
      whole.data = reinterpret_cast<void*>(begin);
      whole.bytes = end - begin;
    }
    Entry fresh;
    fresh.begin = begin;
    fresh.end = end;
    fresh.access = access;
    fresh.kind = memory.kind;
    if (int error = registrar_->add(whole, access, &fresh.mr)) return error;
    found = entries_.insert(entries_.end(), fresh);
  }
  found->references++;
  auto owner = std::make_unique<Held>();
  owner->data = static_cast<char*>(memory.data);
  owner->bytes = memory.bytes;
  owner->kind = memory.kind;
  owner->localKey = found->mr.localKey;
  owner->remoteKey = found->mr.remoteKey;
  owner->entry = found;
  *held = owner.get();
  held_.insert(owner.release());
  return 0;
}

int RegistrationCache::remove(Region* region) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = held_.find(region);
  if (it == held_.end()) return EINVAL;
  auto* held = static_cast<Held*>(region);
  held_.erase(it);
  const auto entry = held->entry;
  delete held;
  if (--entry->references > 0) return 0;
  // Even if the device does not let go of it: the memory behind it is the user's again.
  const int error = registrar_->remove(entry->mr);
  entries_.erase(entry);
  return error;
}

size_t RegistrationCache::entries() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return entries_.size();
}

} // namespace net
} // namespace moe
