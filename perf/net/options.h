#pragma once

#include <cstddef>
#include <string>

#include "nccl_moe.h"

namespace moe {
namespace netperf {

struct Options {
  std::string plugin; // default: libnccl-net-moe.so of this build
  size_t minBytes = 8;
  size_t maxBytes = 64 << 20;
  double factor = 8;
  int iters = 0; // 0: as many as seconds allow
  double seconds = 0.3;
  int window = 16;
  size_t room = 0; // that receives offer, if it is more than the message
  int device = 0;
  bool gpuMemory = false;
  int gpu = 0;
  bool verify = true;
  bool server = false;
  std::string client; // host
  int port = 18517;
  int timeoutSeconds = 30;
  std::string json;
  bool check = false;
  bool help = false;
};

ncclResult_t parseOptions(int argc, char** argv, Options* options);
void printHelp();

} // namespace netperf
} // namespace moe
