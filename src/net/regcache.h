// Memory registrations of one protection domain, shared by its connections.
//
// Registering again what a registration with the same access flags covers costs a reference, not a system call.  An
// entry lives while somebody holds it, never longer: memory that was given back to the system must not be found here.
// dma-buf registrations are not shared, since a descriptor's number says nothing about the buffer behind it.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "net/engine.h"

namespace moe {
namespace net {

// What a device returns for a registration.
struct DeviceMr {
  void* mr = nullptr;
  uint32_t localKey = 0, remoteKey = 0;
};

// The device's side.  Both return 0 or an errno.
class Registrar {
 public:
  virtual ~Registrar() = default;
  virtual int add(const Memory& memory, int access, DeviceMr* out) = 0;
  virtual int remove(const DeviceMr& mr) = 0;
};

class RegistrationCache {
 public:
  struct Entry {
    uintptr_t begin = 0, end = 0;
    int access = 0;
    PtrKind kind = ptrHost;
    int references = 0;
    DeviceMr mr;
  };
  // What a user holds.
  struct Held : Region {
    char* data = nullptr;
    size_t bytes = 0;
    PtrKind kind = ptrHost;
    uint32_t localKey = 0, remoteKey = 0;
    std::list<Entry>::iterator entry;
  };

  explicit RegistrationCache(Registrar* registrar) : registrar_(registrar) {}
  ~RegistrationCache() { clear(); }
  // Gives back what its users did not.
  void clear();
  // 0 or an errno.  Nothing stays registered after an error.
  int add(const Memory& memory, int access, Held** held);
  // EINVAL if held is not, or not any more, one of this cache's.
  int remove(Region* held);
  size_t entries() const;

 private:
  Registrar* registrar_;
  mutable std::mutex mutex_;
  std::list<Entry> entries_;
  std::unordered_set<Region*> held_;
};

} // namespace net
} // namespace moe
