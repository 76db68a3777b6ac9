#include "comm/rendezvous.h"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <sstream>

namespace moe {
namespace {

constexpr size_t kMaxFileBytes = 16384;
constexpr size_t kMaxAddresses = 64;
constexpr const char* kFirstLine = "nccl-moe-rendezvous 1";

bool readAll(int fd, std::string* text) {
  char buffer[4096];
  for (;;) {
    const ssize_t n = read(fd, buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n == 0;
    text->append(buffer, static_cast<size_t>(n));
    if (text->size() > kMaxFileBytes) return false;
  }
}

} // namespace

ncclResult_t parseRendezvous(const char* text, Rendezvous* rendezvous) {
  const std::string value = text;
  const std::string tcp = "tcp://";
  const std::string file = "file://";
  if (value.compare(0, tcp.size(), tcp) == 0) {
    if (!splitHostPort(value.substr(tcp.size()), &rendezvous->host, &rendezvous->port)) {
      return fail(ncclInvalidArgument,
                  "ncclMoeCommInitHost: rendezvous \"%s\" is not tcp://HOST:PORT with a port in 1..65535", text);
    }
    return ncclSuccess;
  }
  if (value.compare(0, file.size(), file) == 0) {
    rendezvous->path = value.substr(file.size());
    if (rendezvous->path.size() > 1 && rendezvous->path.front() == '/' && rendezvous->path.back() != '/') {
      return ncclSuccess;
    }
  }
  return fail(ncclInvalidArgument, "ncclMoeCommInitHost: rendezvous \"%s\" is not tcp://HOST:PORT or file:///PATH",
              text);
}

std::string formatRendezvousFile(const RendezvousFile& file) {
  std::string text = std::string(kFirstLine) + "\ntoken " + file.token + "\nboot " + file.bootId + "\n";
  for (size_t i = 0; i < file.addresses.size() && i < kMaxAddresses; i++)
    text += "address " + file.addresses[i].text() + "\n";
  return text + "end\n";
}

bool parseRendezvousFile(const std::string& text, RendezvousFile* file) {
  std::istringstream lines(text);
  std::string line;
  if (text.size() > kMaxFileBytes || !std::getline(lines, line) || line != kFirstLine) return false;
  *file = RendezvousFile{};
  while (std::getline(lines, line)) {
    const size_t space = line.find(' ');
    const std::string key = line.substr(0, space);
    const std::string value = space == std::string::npos ? "" : line.substr(space + 1);
    if (key == "end") return value.empty() && !file->token.empty() && !file->addresses.empty();
    if (key == "token") {
      if (value.size() > 256) return false;
      file->token = value;
    } else if (key == "boot") {
      file->bootId = value;
    } else if (key == "address") {
      std::string host;
      int port = 0;
      SocketAddress address;
      if (file->addresses.size() >= kMaxAddresses || !splitHostPort(value, &host, &port) ||
          !SocketAddress::fromLiteral(host, port, &address)) {
        return false;
      }
      file->addresses.push_back(address);
    } else {
      return false;
    }
  }
  return false;
}

ncclResult_t PublishedFile::write(const std::string& path, const RendezvousFile& file) {
  uint64_t random = 0;
  MOECHECK(randomBytes(&random, sizeof(random)));
  char suffix[32];
  snprintf(suffix, sizeof(suffix), ".%016llx", static_cast<unsigned long long>(random));
  const std::string temporary = path + suffix;
  const UniqueFd fd(open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) {
    return fail(ncclSystemError, "ncclMoeCommInitHost: cannot write the rendezvous file %s: %s", path.c_str(),
                strerror(errno));
  }
  const std::string text = formatRendezvousFile(file);
  struct stat info {};
  const bool written = ::write(fd.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()) &&
                       fstat(fd.get(), &info) == 0 && rename(temporary.c_str(), path.c_str()) == 0;
  if (!written) {
    const int error = errno;
    unlink(temporary.c_str());
    return fail(ncclSystemError, "ncclMoeCommInitHost: cannot write the rendezvous file %s: %s", path.c_str(),
                strerror(error));
  }
  path_ = path;
  device_ = info.st_dev;
  inode_ = info.st_ino;
  return ncclSuccess;
}

void PublishedFile::remove() {
  if (path_.empty()) return;
  struct stat info {};
  if (stat(path_.c_str(), &info) == 0 && info.st_dev == device_ && info.st_ino == inode_) unlink(path_.c_str());
  path_.clear();
}

bool readRendezvousFile(const std::string& path, RendezvousFile* file, std::string* why) {
  const UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd) {
    *why = std::string("cannot open ") + path + ": " + strerror(errno);
    return false;
  }
  struct stat info {};
  if (fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_uid != geteuid()) {
    *why = path + " is not a regular file of this user";
    return false;
  }
  std::string text;
  if (!readAll(fd.get(), &text) || !parseRendezvousFile(text, file)) {
    *why = path + " is not a rendezvous file of this version";
    return false;
  }
  return true;
}

std::string bootId() {
  const UniqueFd fd(open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC));
  std::string text;
  if (!fd || !readAll(fd.get(), &text)) return "unknown";
  return text.substr(0, text.find('\n'));
}

std::string hostId() {
  const char* given = getenv("NCCL_HOSTID");
  if (given != nullptr && *given != '\0') return given;
  char name[256] = "unknown";
  gethostname(name, sizeof(name) - 1);
  return std::string(name) + " " + bootId();
}

ncclResult_t randomBytes(void* out, size_t n) {
  auto* at = static_cast<uint8_t*>(out);
  while (n > 0) {
    const ssize_t got = getrandom(at, n, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail(ncclSystemError, "getrandom failed: %s", strerror(errno));
    at += got;
    n -= static_cast<size_t>(got);
  }
  return ncclSuccess;
}

} // namespace moe
