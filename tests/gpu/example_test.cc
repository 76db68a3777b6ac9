// The example layer compares itself with the layer without parallelism; here it does so on the GPUs there are.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <climits>
#include <cstdio>

#include "gpu/gpu.h"

namespace moe::test {
namespace {

// Next to this test.
std::string programPath(const char* name) {
  char self[PATH_MAX] = "";
  const ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
  const std::string path(self, n > 0 ? static_cast<size_t>(n) : 0);
  return path.substr(0, path.rfind('/') + 1) + name;
}

int runProgram(const std::string& command, std::string* output) {
  FILE* pipe = popen(("timeout 120 " + command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return -1;
  char line[512];
  while (fgets(line, sizeof(line), pipe) != nullptr) *output += line;
  return pclose(pipe);
}

void runLayer(const std::string& options) {
  const std::string program = programPath("megatron_layer");
  struct stat found {};
  if (stat(program.c_str(), &found) != 0)
    GTEST_SKIP() << "megatron_layer was not built, for want of libnccl.so or cuBLAS";
  std::string output;
  EXPECT_EQ(runProgram(program + options, &output), 0) << output;
  EXPECT_NE(output.find("the layer is right"), std::string::npos) << output;
}

TEST(GpuExample, LayerOnOneGpu) {
  NEED_GPUS(1);
  runLayer(" -g 1");
}

TEST(GpuExample, LayerOnAllGpus) {
  NEED_GPUS(2);
  runLayer("");
}

// More tokens than latency mode takes.
TEST(GpuExample, LayerWithManyTokens) {
  NEED_GPUS(1);
  runLayer(" -t 600");
}

// Experts without a token, and more of them on some ranks than on others.
TEST(GpuExample, LayerWithFewTokensAndManyExperts) {
  NEED_GPUS(1);
  runLayer(" -t 5 -e 37 -k 3 -s 7");
}

} // namespace
} // namespace moe::test
