// The examples compare themselves with a computation without parallelism; here they do so on the GPUs there are.
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

// says: what it prints if all is right.
void runExample(const char* name, const std::string& options, const char* says) {
  const std::string program = programPath(name);
  struct stat found {};
  if (stat(program.c_str(), &found) != 0) GTEST_SKIP() << name << " was not built, for want of libnccl.so or cuBLAS";
  std::string output;
  EXPECT_EQ(runProgram(program + options, &output), 0) << output;
  EXPECT_NE(output.find(says), std::string::npos) << output;
}
void runLayer(const std::string& options) { runExample("megatron_layer", options, "the layer is right"); }
void runDecodeStep(const std::string& options) { runExample("decode_step", options, "every output is right"); }

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

TEST(GpuExample, DecodeStepOnOneGpu) {
  NEED_GPUS(1);
  runDecodeStep(" -g 1");
}

TEST(GpuExample, DecodeStepOnAllGpus) {
  NEED_GPUS(2);
  runDecodeStep(" -n 100 -s 7");
}

} // namespace
} // namespace moe::test
