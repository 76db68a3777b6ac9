#include "net/verbs_lib.h"

#include <dlfcn.h>

#include <mutex>

#include "base/param.h"

namespace moe {
namespace net {
namespace {

StringParam libraryParam{"NCCL_MOE_NET_IBVERBS_LIB", "libibverbs.so.1", "the verbs library to open"};

struct Loaded {
  VerbsLib lib;
  bool usable = false;
  std::string why;
};

// Stays open for good: providers register themselves in it.
Loaded load() {
  Loaded loaded;
  const std::string& name = libraryParam.get();
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    loaded.why = "the verbs library cannot be opened (" + std::string(error != nullptr ? error : name.c_str()) + ")";
    return loaded;
  }
  auto find = [&](auto* function, const char* symbol, bool needed) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, symbol));
    if (needed && *function == nullptr && loaded.why.empty()) loaded.why = name + " has no " + symbol;
  };
  VerbsLib& l = loaded.lib;
  find(&l.getDeviceList, "ibv_get_device_list", true);
  find(&l.freeDeviceList, "ibv_free_device_list", true);
  find(&l.getDeviceName, "ibv_get_device_name", true);
  find(&l.openDevice, "ibv_open_device", true);
  find(&l.closeDevice, "ibv_close_device", true);
  find(&l.queryDevice, "ibv_query_device", true);
  find(&l.queryPort, "ibv_query_port", true);
  find(&l.queryGid, "ibv_query_gid", true);
  find(&l.queryGidEx, "_ibv_query_gid_ex", false);
  find(&l.allocPd, "ibv_alloc_pd", true);
  find(&l.deallocPd, "ibv_dealloc_pd", true);
  find(&l.regMr, "ibv_reg_mr", true);
  find(&l.regMrIova2, "ibv_reg_mr_iova2", false);
  find(&l.regDmabufMr, "ibv_reg_dmabuf_mr", false);
  find(&l.deregMr, "ibv_dereg_mr", true);
  find(&l.createCq, "ibv_create_cq", true);
  find(&l.destroyCq, "ibv_destroy_cq", true);
  find(&l.createQp, "ibv_create_qp", true);
  find(&l.destroyQp, "ibv_destroy_qp", true);
  find(&l.modifyQp, "ibv_modify_qp", true);
  find(&l.getAsyncEvent, "ibv_get_async_event", true);
  find(&l.ackAsyncEvent, "ibv_ack_async_event", true);
  find(&l.eventTypeStr, "ibv_event_type_str", true);
  find(&l.wcStatusStr, "ibv_wc_status_str", true);
  find(&l.forkInit, "ibv_fork_init", false);
  loaded.usable = loaded.why.empty();
  // Without it, a child of fork takes pages away from under the device.  It has to come before all other verbs.
  if (loaded.usable && l.forkInit != nullptr) l.forkInit();
  return loaded;
}

} // namespace

const VerbsLib* verbsLib(std::string* why) {
  static const Loaded* const loaded = new Loaded(load());
  *why = loaded->why;
  return loaded->usable ? &loaded->lib : nullptr;
}

} // namespace net
} // namespace moe
