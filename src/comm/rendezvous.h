// Where the ranks of a host communicator meet: tcp://HOST:PORT, or file:///PATH, in which rank 0 leaves its address.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "base/socket.h"

namespace moe {

struct Rendezvous {
  std::string path; // file:///PATH
  std::string host; // tcp://HOST:PORT
  int port = 0;
};

// Errors: ncclInvalidArgument.
ncclResult_t parseRendezvous(const char* text, Rendezvous* rendezvous);

// What rank 0 leaves in the file.
struct RendezvousFile {
  std::string token;  // drawn by rank 0, hexadecimal
  std::string bootId; // of rank 0's machine: its loopback addresses mean something only there
  std::vector<SocketAddress> addresses;
};

// Pure functions; parse is false for anything that is not exactly such a file.
std::string formatRendezvousFile(const RendezvousFile& file);
bool parseRendezvousFile(const std::string& text, RendezvousFile* file);

// The file while it exists: written under another name and renamed, so that a reader sees all of it or none, and so
// that one which an earlier job left behind is replaced.  Removed by the destructor, unless somebody replaced it.
class PublishedFile {
 public:
  PublishedFile() = default;
  PublishedFile(const PublishedFile&) = delete;
  PublishedFile& operator=(const PublishedFile&) = delete;
  ~PublishedFile() { remove(); }
  ncclResult_t write(const std::string& path, const RendezvousFile& file);
  void remove();

 private:
  std::string path_;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

// False if there is no such file (yet), or one that is not ours to trust; *why says which.
bool readRendezvousFile(const std::string& path, RendezvousFile* file, std::string* why);

std::string bootId();
// NCCL_HOSTID, or else host name and boot id: equal on ranks that meet in shared memory.
std::string hostId();
// n random bytes.
ncclResult_t randomBytes(void* out, size_t n);

} // namespace moe
