#include "net.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <elf.h>
#include <fstream>
#include <iterator>
#include <link.h>
#include <mutex>
#include <unistd.h>

namespace conformance {
namespace {

constexpr int newest = 12, oldest = 8;

std::mutex logMutex;
bool logAll = false;

std::vector<std::string>& warningList() {
  static std::vector<std::string> list;
  return list;
}

void log(int level, unsigned long, const char*, int, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  std::lock_guard<std::mutex> lock(logMutex);
  if (level == NCCL_LOG_WARN) warningList().push_back(text);
  if (logAll) fprintf(stderr, "%d: %s\n", getpid(), text);
}

template <class Props> void common(const Props& p, Properties* out) {
  out->name = p.name == nullptr ? "" : p.name;
  out->hasPciPath = p.pciPath != nullptr;
  out->pciPath = p.pciPath == nullptr ? "" : p.pciPath;
  out->guid = p.guid;
  out->ptrSupport = p.ptrSupport;
  out->regIsGlobal = p.regIsGlobal;
  out->speed = p.speed;
  out->port = p.port;
  out->latency = p.latency;
  out->maxComms = p.maxComms;
  out->maxRecvs = p.maxRecvs;
  out->netDeviceType = p.netDeviceType;
}

void rest(const ncclNetProperties_v8_t&, Properties*) {}
template <class Props> void rest(const Props& p, Properties* out) {
  out->nVirtual = p.vProps.ndevs;
  out->virtualDev0 = p.vProps.devs[0];
  out->maxP2pBytes = p.maxP2pBytes;
  out->maxCollBytes = p.maxCollBytes;
}

template <class Table> struct Traits;
template <> struct Traits<ncclNet_v8_t> {
  using Props = ncclNetProperties_v8_t;
  static constexpr int version = 8;
};
template <> struct Traits<ncclNet_v9_t> {
  using Props = ncclNetProperties_v9_t;
  using VProps = ncclNetVDeviceProps_v9_t;
  static constexpr int version = 9;
};
template <> struct Traits<ncclNet_v10_t> {
  using Props = ncclNetProperties_v10_t;
  using VProps = ncclNetVDeviceProps_v9_t;
  static constexpr int version = 10;
};
template <> struct Traits<ncclNet_v11_t> {
  using Props = ncclNetProperties_v11_t;
  using VProps = ncclNetVDeviceProps_v9_t;
  static constexpr int version = 11;
};
template <> struct Traits<ncclNet_v12_t> {
  using Props = ncclNetProperties_v12_t;
  using VProps = ncclNetVDeviceProps_v12_t;
  static constexpr int version = 12;
};
template <class T> using TraitsOf = Traits<std::remove_const_t<std::remove_reference_t<T>>>;

// A handle of this value, for the context and profiler parameters that a test leaves out.
ncclNetCommConfig_v10_t* config() {
  static ncclNetCommConfig_v10_t c = {NCCL_NET_TRAFFIC_CLASS_UNDEF};
  return &c;
}

constexpr uint64_t commId = 0x636f6e666f726dull;

} // namespace

template <class F> auto Net::table(F&& f) const {
  switch (version_) {
  case 8:
    return f(*static_cast<const ncclNet_v8_t*>(table_));
  case 9:
    return f(*static_cast<const ncclNet_v9_t*>(table_));
  case 10:
    return f(*static_cast<const ncclNet_v10_t*>(table_));
  case 11:
    return f(*static_cast<const ncclNet_v11_t*>(table_));
  default:
    return f(*static_cast<const ncclNet_v12_t*>(table_));
  }
}

std::string Net::load(const std::string& path, int version) {
  library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) return dlerror();
  for (int v = newest; v >= oldest; v--) {
    if (version != 0 && v != version) continue;
    table_ = dlsym(library_, ("ncclNetPlugin_v" + std::to_string(v)).c_str());
    version_ = v;
    if (table_ != nullptr) return "";
  }
  return path + " exports no table of " + (version == 0 ? "versions 8 to 12" : "version " + std::to_string(version));
}

void Net::unload() {
  if (library_ != nullptr) dlclose(library_);
  library_ = nullptr;
  table_ = nullptr;
}

std::string Net::name() const {
  return table([](const auto& t) { return std::string(t.name == nullptr ? "" : t.name); });
}

bool Net::hasVDevice() const {
  return table([](const auto& t) {
    if constexpr (TraitsOf<decltype(t)>::version >= 9)
      return t.makeVDevice != nullptr;
    else
      return false;
  });
}

std::vector<std::string> Net::missing() const {
  return table([](const auto& t) {
    std::vector<std::string> names;
    auto check = [&](auto* f, const char* name) {
      if (f == nullptr) names.push_back(name);
    };
    check(t.name, "name");
    check(t.init, "init");
    check(t.devices, "devices");
    check(t.getProperties, "getProperties");
    check(t.listen, "listen");
    check(t.connect, "connect");
    check(t.accept, "accept");
    check(t.regMr, "regMr");
    check(t.deregMr, "deregMr");
    check(t.isend, "isend");
    check(t.irecv, "irecv");
    check(t.iflush, "iflush");
    check(t.test, "test");
    check(t.closeSend, "closeSend");
    check(t.closeRecv, "closeRecv");
    check(t.closeListen, "closeListen");
    if constexpr (TraitsOf<decltype(t)>::version >= 11) check(t.finalize, "finalize");
    return names;
  });
}

ncclResult_t Net::init() {
  return table([&](const auto& t) {
    constexpr int v = TraitsOf<decltype(t)>::version;
    if constexpr (v <= 9) {
      return t.init(log);
    } else if constexpr (v == 10) {
      return t.init(log, nullptr);
    } else {
      void* context = nullptr;
      ncclResult_t result = t.init(&context, commId, config(), log, nullptr);
      if (result == ncclSuccess) contexts_.push_back(context);
      return result;
    }
  });
}

ncclResult_t Net::finalize() {
  return table([&](const auto& t) {
    if constexpr (TraitsOf<decltype(t)>::version >= 11) {
      if (contexts_.empty()) return ncclSuccess;
      void* context = contexts_.back();
      contexts_.pop_back();
      return t.finalize(context);
    } else {
      return ncclSuccess;
    }
  });
}

ncclResult_t Net::finalizeNull() {
  return table([&](const auto& t) {
    if constexpr (TraitsOf<decltype(t)>::version >= 11)
      return t.finalize(nullptr);
    else
      return ncclSuccess;
  });
}

ncclResult_t Net::devices(int* n) {
  return table([&](const auto& t) { return t.devices(n); });
}

ncclResult_t Net::properties(int dev, Properties* props) {
  return table([&](const auto& t) {
    typename TraitsOf<decltype(t)>::Props p = {};
    ncclResult_t result = t.getProperties(dev, &p);
    *props = Properties();
    if (result == ncclSuccess) {
      common(p, props);
      rest(p, props);
    }
    return result;
  });
}

ncclResult_t Net::makeVDevice(int* dev, const std::vector<int>& members) {
  return table([&](const auto& t) {
    if constexpr (TraitsOf<decltype(t)>::version >= 9) {
      typename TraitsOf<decltype(t)>::VProps p = {};
      p.ndevs = int(members.size());
      for (size_t i = 0; i < std::min(members.size(), std::size(p.devs)); i++) p.devs[i] = members[i];
      return t.makeVDevice(dev, &p);
    } else {
      return ncclInvalidUsage;
    }
  });
}

ncclResult_t Net::listen(int dev, void* handle, void** comm) {
  return table([&](const auto& t) {
    if constexpr (TraitsOf<decltype(t)>::version >= 11)
      return t.listen(contexts_.empty() ? nullptr : contexts_.back(), dev, handle, comm);
    else
      return t.listen(dev, handle, comm);
  });
}

ncclResult_t Net::connect(int dev, void* handle, void** comm) {
  return table([&](const auto& t) {
    constexpr int v = TraitsOf<decltype(t)>::version;
    ncclNetDeviceHandle_v8_t* devComm = nullptr;
    if constexpr (v >= 11)
      return t.connect(contexts_.empty() ? nullptr : contexts_.back(), dev, handle, comm, &devComm);
    else if constexpr (v == 10)
      return t.connect(dev, config(), handle, comm, &devComm);
    else
      return t.connect(dev, handle, comm, &devComm);
  });
}

ncclResult_t Net::accept(void* listenComm, void** comm) {
  ncclNetDeviceHandle_v8_t* devComm = nullptr;
  return table([&](const auto& t) { return t.accept(listenComm, comm, &devComm); });
}

ncclResult_t Net::regMr(void* comm, void* data, size_t bytes, void** mhandle) {
  return table([&](const auto& t) { return t.regMr(comm, data, bytes, NCCL_PTR_HOST, mhandle); });
}

bool Net::hasDmaBuf() const {
  return table([](const auto& t) { return t.regMrDmaBuf != nullptr; });
}

ncclResult_t Net::regMrDmaBuf(void* comm, void* data, size_t bytes, uint64_t offset, int fd, void** mhandle) {
  return table([&](const auto& t) { return t.regMrDmaBuf(comm, data, bytes, NCCL_PTR_CUDA, offset, fd, mhandle); });
}

ncclResult_t Net::deregMr(void* comm, void* mhandle) {
  return table([&](const auto& t) { return t.deregMr(comm, mhandle); });
}

ncclResult_t Net::isend(void* comm, void* data, size_t bytes, int tag, void* mhandle, void** request) {
  return table([&](const auto& t) {
    constexpr int v = TraitsOf<decltype(t)>::version;
    if constexpr (v >= 10)
      return t.isend(comm, data, bytes, tag, mhandle, nullptr, request);
    else if constexpr (v == 9)
      return t.isend(comm, data, bytes, tag, mhandle, request);
    else
      return t.isend(comm, data, int(bytes), tag, mhandle, request);
  });
}

ncclResult_t Net::irecv(void* comm, int n, void** data, size_t* sizes, int* tags, void** mhandles, void** request) {
  return table([&](const auto& t) {
    constexpr int v = TraitsOf<decltype(t)>::version;
    if constexpr (v >= 10) {
      std::vector<void*> profiler(size_t(n > 0 ? n : 1), nullptr);
      return t.irecv(comm, n, data, sizes, tags, mhandles, profiler.data(), request);
    } else if constexpr (v == 9) {
      return t.irecv(comm, n, data, sizes, tags, mhandles, request);
    } else {
      std::vector<int> ints(sizes, sizes + (n > 0 ? n : 0));
      return t.irecv(comm, n, data, ints.data(), tags, mhandles, request);
    }
  });
}

ncclResult_t Net::iflush(void* comm, int n, void** data, int* sizes, void** mhandles, void** request) {
  return table([&](const auto& t) { return t.iflush(comm, n, data, sizes, mhandles, request); });
}

ncclResult_t Net::test(void* request, int* done, int* sizes) {
  return table([&](const auto& t) { return t.test(request, done, sizes); });
}

ncclResult_t Net::closeSend(void* comm) {
  return table([&](const auto& t) { return t.closeSend(comm); });
}
ncclResult_t Net::closeRecv(void* comm) {
  return table([&](const auto& t) { return t.closeRecv(comm); });
}
ncclResult_t Net::closeListen(void* comm) {
  return table([&](const auto& t) { return t.closeListen(comm); });
}

const std::vector<std::string>& warnings() { return warningList(); }
void printLog(bool on) { logAll = on; }

std::vector<std::string> exportedSymbols(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<std::string> names;
  auto at = [&](size_t offset, size_t n) { return offset + n <= image.size() ? image.data() + offset : nullptr; };
  auto* header = reinterpret_cast<ElfW(Ehdr)*>(at(0, sizeof(ElfW(Ehdr))));
  if (header == nullptr || memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return names;
  auto* sections = reinterpret_cast<ElfW(Shdr)*>(at(header->e_shoff, header->e_shnum * sizeof(ElfW(Shdr))));
  for (int i = 0; sections != nullptr && i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_DYNSYM) continue;
    const auto& strings = sections[sections[i].sh_link];
    size_t n = sections[i].sh_size / sizeof(ElfW(Sym));
    auto* symbols = reinterpret_cast<ElfW(Sym)*>(at(sections[i].sh_offset, sections[i].sh_size));
    for (size_t j = 0; symbols != nullptr && j < n; j++)
      if (symbols[j].st_shndx != SHN_UNDEF && symbols[j].st_shndx != SHN_ABS &&
          ELF64_ST_BIND(symbols[j].st_info) != STB_LOCAL)
        names.push_back(image.data() + strings.sh_offset + symbols[j].st_name);
  }
  return names;
}

} // namespace conformance
