// The command line of moe_perf.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "nccl_moe.h"

namespace moe::perf {

enum class RoutingKind { uniform, zipf, grouped, hot, file, hash };
enum class DeviceKind { host, cuda, automatic };

struct RoutingSpec {
  RoutingKind kind = RoutingKind::uniform;
  double exponent = 0; // zipf
  int groups = 0;      // grouped
  int groupsKept = 0;  // grouped
  std::string path;    // file, hash
};

struct Options {
  int minTokens = 4096; // per rank
  int maxTokens = 4096;
  int routingTokens = 0; // that the routing is made for; 0: those of the size
  int stepAdd = 0;       // used where stepFactor is 1
  int stepFactor = 2;
  int iterations = 20;
  int warmup = 5;
  int checks = 1;
  ncclDataType_t type = ncclBfloat16;
  int ranks = 0; // processes; 0: 2 on the host, 1 on CUDA
  int gpus = 1;  // threads of each process, one GPU each
  DeviceKind device = DeviceKind::automatic;
  int hidden = 7168;
  int topK = 8;
  int experts = 256;
  ncclMoeLayout_t layout = ncclMoeLayoutRankMajor;
  int align = 1;
  ncclMoeQuant_t quant = ncclMoeQuantNone;
  ncclMoeScaleLayout_t scaleLayout = ncclMoeScaleRowMajor;
  bool weightsInside = false;
  bool exact = false;
  ncclMoeQuant_t combineQuant = ncclMoeQuantNone;
  std::vector<int> numSms = {0}; // each size is measured with every one; 0: the library's choice
  ncclMoeMode_t mode = ncclMoeModeAuto;
  uint64_t seed = 1;
  int timeoutSeconds = 100;
  int graphCalls = 0;        // 0: one call is timed
  int lateUs = 0;            // what rank 0 is late with each graph
  bool libraryMemory = true; // rows lie in ncclMoeMemAlloc's memory
  bool rivalNccl = false;    // time plain sends and receives too
  RoutingSpec routing;
  std::string routingText = "uniform";
  std::string jsonPath;
  bool help = false;
};

// Fills *options; ncclInvalidArgument with a sentence where the command line is wrong.
ncclResult_t parseOptions(int argc, char** argv, Options* options);
ncclResult_t parseRouting(const std::string& text, RoutingSpec* spec);
const char* usageText();

// The token counts that -b, -e, -f and -i ask for.
std::vector<int> tokenSteps(const Options& options);

const char* layoutName(ncclMoeLayout_t layout);
const char* quantName(ncclMoeQuant_t quant);
const char* modeName(ncclMoeMode_t mode);

} // namespace moe::perf
