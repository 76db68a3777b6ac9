#include "perf/moe/options.h"

#include <getopt.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "perf/moe/perf_error.h"

namespace moe::perf {

namespace {

// Long options without a short form.
enum LongOption {
  optJson = 256,
  optDevice,
  optHidden,
  optTopK,
  optRoutingTokens,
  optExperts,
  optLayout,
  optAlign,
  optQuant,
  optScaleLayout,
  optWeights,
  optExact,
  optCombineQuant,
  optNumSms,
  optMode,
  optSeed,
  optTimeout,
  optRouting,
  optGraph,
  optLate,
  optMemory,
  optRival,
};

const option longOptions[] = {
  {"minTokens", required_argument, nullptr, 'b'},
  {"maxTokens", required_argument, nullptr, 'e'},
  {"stepfactor", required_argument, nullptr, 'f'},
  {"step", required_argument, nullptr, 'i'},
  {"iters", required_argument, nullptr, 'n'},
  {"warmup_iters", required_argument, nullptr, 'w'},
  {"check", required_argument, nullptr, 'c'},
  {"datatype", required_argument, nullptr, 'd'},
  {"ranks", required_argument, nullptr, 'r'},
  {"ngpus", required_argument, nullptr, 'g'},
  {"help", no_argument, nullptr, 'h'},
  {"json", required_argument, nullptr, optJson},
  {"device", required_argument, nullptr, optDevice},
  {"hidden", required_argument, nullptr, optHidden},
  {"topk", required_argument, nullptr, optTopK},
  {"routing-tokens", required_argument, nullptr, optRoutingTokens},
  {"experts", required_argument, nullptr, optExperts},
  {"layout", required_argument, nullptr, optLayout},
  {"align", required_argument, nullptr, optAlign},
  {"quant", required_argument, nullptr, optQuant},
  {"scale-layout", required_argument, nullptr, optScaleLayout},
  {"weights", required_argument, nullptr, optWeights},
  {"exact", no_argument, nullptr, optExact},
  {"combine-quant", required_argument, nullptr, optCombineQuant},
  {"num-sms", required_argument, nullptr, optNumSms},
  {"mode", required_argument, nullptr, optMode},
  {"seed", required_argument, nullptr, optSeed},
  {"timeout", required_argument, nullptr, optTimeout},
  {"routing", required_argument, nullptr, optRouting},
  {"graph", required_argument, nullptr, optGraph},
  {"late", required_argument, nullptr, optLate},
  {"memory", required_argument, nullptr, optMemory},
  {"rival", required_argument, nullptr, optRival},
  {nullptr, 0, nullptr, 0},
};

std::string nameOf(int opt) {
  for (const option* o = longOptions; o->name != nullptr; o++) {
    if (o->val == opt) return std::string("--") + o->name;
  }
  return "option";
}

// A whole decimal number with an optional K or M (powers of 1024).
ncclResult_t toInt(int opt, const char* text, int64_t min, int64_t max, int* value) {
  char* end = nullptr;
  errno = 0;
  long long v = strtoll(text, &end, 10);
  const bool digits = end != text && errno == 0;
  if (digits && (*end == 'K' || *end == 'k') && std::llabs(v) < INT_MAX)
    v *= 1024, end++;
  else if (digits && (*end == 'M' || *end == 'm') && std::llabs(v) < INT_MAX)
    v *= 1048576, end++;
  if (!digits || *end != '\0' || v < min || v > max) {
    return perfFail(ncclInvalidArgument, "%s must be a number from %lld to %lld, not '%s'", nameOf(opt).c_str(),
                    static_cast<long long>(min), static_cast<long long>(max), text);
  }
  *value = static_cast<int>(v);
  return ncclSuccess;
}

// Such numbers with commas between them.
ncclResult_t toInts(int opt, const std::string& text, int64_t min, int64_t max, std::vector<int>* values) {
  values->clear();
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    int value = 0;
    PERFCHECK(toInt(opt, text.substr(at, end - at).c_str(), min, max, &value));
    values->push_back(value);
    at = end + 1;
  }
  return ncclSuccess;
}

template <typename T> struct Choice {
  const char* name;
  T value;
};

template <typename T, size_t n>
ncclResult_t choose(int opt, const char* text, const Choice<T> (&choices)[n], T* value) {
  std::string names;
  for (const Choice<T>& c : choices) {
    if (strcmp(text, c.name) == 0) {
      *value = c.value;
      return ncclSuccess;
    }
    names += (names.empty() ? "" : ", ") + std::string(c.name);
  }
  return perfFail(ncclInvalidArgument, "%s must be one of %s, not '%s'", nameOf(opt).c_str(), names.c_str(), text);
}

const Choice<ncclDataType_t> types[] = {{"bfloat16", ncclBfloat16},
                                        {"bf16", ncclBfloat16},
                                        {"half", ncclFloat16},
                                        {"float", ncclFloat32},
                                        {"fp8", ncclMoeFloat8e4m3}};
const Choice<DeviceKind> devices[] = {
  {"host", DeviceKind::host}, {"cuda", DeviceKind::cuda}, {"auto", DeviceKind::automatic}};
const Choice<ncclMoeLayout_t> layouts[] = {
  {"rank", ncclMoeLayoutRankMajor}, {"expert", ncclMoeLayoutExpertMajor}, {"padded", ncclMoeLayoutExpertPadded}};
const Choice<ncclMoeQuant_t> combineQuants[] = {{"none", ncclMoeQuantNone}, {"fp8", ncclMoeQuantFp8}};
const Choice<ncclMoeQuant_t> quants[] = {
  {"none", ncclMoeQuantNone}, {"fp8", ncclMoeQuantFp8}, {"ue8m0", ncclMoeQuantFp8Ue8m0}};
const Choice<ncclMoeScaleLayout_t> scaleLayouts[] = {{"row", ncclMoeScaleRowMajor}, {"col", ncclMoeScaleColumnMajor}};
const Choice<ncclMoeMode_t> modes[] = {
  {"auto", ncclMoeModeAuto}, {"throughput", ncclMoeModeThroughput}, {"latency", ncclMoeModeLatency}};
const Choice<bool> weightings[] = {{"inside", true}, {"outside", false}};
const Choice<bool> rivals[] = {{"none", false}, {"nccl", true}};
const Choice<bool> memories[] = {{"library", true}, {"plain", false}};

ncclResult_t checkTogether(const Options& o, bool weightsGiven) {
  if (o.maxTokens < o.minTokens)
    return perfFail(ncclInvalidArgument, "-e (%d) is below -b (%d)", o.maxTokens, o.minTokens);
  const int last = tokenSteps(o).back();
  if (o.routingTokens != 0 && o.routingTokens < last)
    return perfFail(ncclInvalidArgument, "--routing-tokens (%d) is below the last T, %d", o.routingTokens, last);
  if (o.topK > o.experts && o.routing.kind != RoutingKind::file)
    return perfFail(ncclInvalidArgument, "--topk (%d) is above --experts (%d)", o.topK, o.experts);
  if (o.layout == ncclMoeLayoutRankMajor && weightsGiven && o.weightsInside)
    return perfFail(ncclInvalidArgument,
                    "--weights inside needs --layout expert or padded: rank-major rows are sums already");
  if (o.layout == ncclMoeLayoutRankMajor && o.exact)
    return perfFail(ncclInvalidArgument, "--exact needs --layout expert or padded");
  if (o.combineQuant != ncclMoeQuantNone && (o.exact || (o.type != ncclBfloat16 && o.type != ncclMoeFloat8e4m3)))
    return perfFail(ncclInvalidArgument, "--combine-quant casts sums to bfloat16, and not with --exact");
  if (o.combineQuant != ncclMoeQuantNone && o.mode == ncclMoeModeThroughput)
    return perfFail(ncclInvalidArgument, "--combine-quant is for latency mode, not --mode throughput");
  if (o.lateUs != 0 && o.graphCalls == 0)
    return perfFail(ncclInvalidArgument, "--late needs --graph: before single calls the ranks meet");
  if (o.layout != ncclMoeLayoutExpertMajor && o.align != 1)
    return perfFail(ncclInvalidArgument, "--align needs --layout expert");
  if (o.quant != ncclMoeQuantNone && o.type != ncclBfloat16)
    return perfFail(ncclInvalidArgument, "--quant casts from bfloat16 only");
  if (o.routing.kind == RoutingKind::grouped) {
    const int size = o.experts / o.routing.groups;
    if (o.experts % o.routing.groups != 0 || size < 2)
      return perfFail(ncclInvalidArgument,
                      "--routing grouped: %d groups do not divide %d experts into two or more each", o.routing.groups,
                      o.experts);
    if (o.routing.groupsKept * size < o.topK)
      return perfFail(ncclInvalidArgument, "--routing grouped: %d groups of %d experts have fewer than --topk %d",
                      o.routing.groupsKept, size, o.topK);
  }
  return ncclSuccess;
}

ncclResult_t parseOne(int opt, const char* arg, Options* o, bool* weightsGiven) {
  const int maxTokens = 1 << 24;
  switch (opt) {
  case 'b':
    return toInt(opt, arg, 0, maxTokens, &o->minTokens);
  case 'e':
    return toInt(opt, arg, 0, maxTokens, &o->maxTokens);
  case 'f':
    return toInt(opt, arg, 1, INT_MAX, &o->stepFactor);
  case 'i':
    o->stepFactor = 1;
    return toInt(opt, arg, 1, maxTokens, &o->stepAdd);
  case 'n':
    return toInt(opt, arg, 1, 1000000, &o->iterations);
  case 'w':
    return toInt(opt, arg, 0, 1000000, &o->warmup);
  case 'c':
    return toInt(opt, arg, 0, 1000000, &o->checks);
  case 'd':
    return choose(opt, arg, types, &o->type);
  case 'r':
    return toInt(opt, arg, 1, NCCL_MOE_MAX_RANKS, &o->ranks);
  case 'g':
    return toInt(opt, arg, 1, NCCL_MOE_MAX_RANKS, &o->gpus);
  case 'h':
    o->help = true;
    return ncclSuccess;
  case optJson:
    o->jsonPath = arg; // which is written after minutes of measuring
    if (!std::ofstream(arg, std::ios::app)) return perfFail(ncclInvalidArgument, "--json: %s cannot be written", arg);
    return ncclSuccess;
  case optDevice:
    return choose(opt, arg, devices, &o->device);
  case optHidden:
    return toInt(opt, arg, 1, 1 << 24, &o->hidden);
  case optTopK:
    return toInt(opt, arg, 1, NCCL_MOE_MAX_TOPK, &o->topK);
  case optRoutingTokens:
    return toInt(opt, arg, 0, maxTokens, &o->routingTokens);
  case optExperts:
    return toInt(opt, arg, 1, 1 << 20, &o->experts);
  case optLayout:
    return choose(opt, arg, layouts, &o->layout);
  case optAlign:
    return toInt(opt, arg, 1, 65536, &o->align);
  case optQuant:
    return choose(opt, arg, quants, &o->quant);
  case optScaleLayout:
    return choose(opt, arg, scaleLayouts, &o->scaleLayout);
  case optWeights:
    *weightsGiven = true;
    return choose(opt, arg, weightings, &o->weightsInside);
  case optExact:
    o->exact = true;
    return ncclSuccess;
  case optCombineQuant:
    return choose(opt, arg, combineQuants, &o->combineQuant);
  case optNumSms:
    return toInts(opt, arg, 0, 65536, &o->numSms);
  case optMode:
    return choose(opt, arg, modes, &o->mode);
  case optSeed: {
    int seed = 0;
    PERFCHECK(toInt(opt, arg, 0, INT_MAX, &seed));
    o->seed = static_cast<uint64_t>(seed);
    return ncclSuccess;
  }
  case optTimeout:
    return toInt(opt, arg, 1, 1000000, &o->timeoutSeconds);
  case optRouting:
    o->routingText = arg;
    return parseRouting(arg, &o->routing);
  case optGraph:
    return toInt(opt, arg, 0, 100000, &o->graphCalls);
  case optLate:
    return toInt(opt, arg, 0, 1000000, &o->lateUs);
  case optMemory:
    return choose(opt, arg, memories, &o->libraryMemory);
  case optRival:
    return choose(opt, arg, rivals, &o->rivalNccl);
  default:
    return perfFail(ncclInvalidArgument, "unknown option, or an option without its value; see --help");
  }
}

} // namespace

ncclResult_t parseRouting(const std::string& text, RoutingSpec* spec) {
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const std::string rest = colon == std::string::npos ? "" : text.substr(colon + 1);
  char* end = nullptr;
  *spec = RoutingSpec();
  if (text == "uniform") return ncclSuccess;
  if (text == "hot") {
    spec->kind = RoutingKind::hot;
    return ncclSuccess;
  }
  if (name == "zipf" && !rest.empty()) {
    spec->kind = RoutingKind::zipf;
    spec->exponent = strtod(rest.c_str(), &end);
    if (*end == '\0' && std::isfinite(spec->exponent) && spec->exponent >= 0 && spec->exponent <= 20)
      return ncclSuccess;
  } else if (name == "grouped" && !rest.empty()) {
    spec->kind = RoutingKind::grouped;
    const long groups = strtol(rest.c_str(), &end, 10);
    const long kept = *end == ',' ? strtol(end + 1, &end, 10) : 0;
    if (*end == '\0' && kept >= 1 && groups >= kept && groups <= 1 << 20) {
      spec->groups = static_cast<int>(groups);
      spec->groupsKept = static_cast<int>(kept);
      return ncclSuccess;
    }
  } else if ((name == "file" || name == "hash") && !rest.empty()) {
    spec->kind = name == "file" ? RoutingKind::file : RoutingKind::hash;
    spec->path = rest;
    return ncclSuccess;
  }
  return perfFail(
    ncclInvalidArgument,
    "--routing must be uniform, zipf:S (S from 0 to 20), grouped:GROUPS,KEPT, hot, file:PATH or hash:PATH, "
    "not '%s'",
    text.c_str());
}

ncclResult_t parseOptions(int argc, char** argv, Options* options) {
  *options = Options();
  bool weightsGiven = false;
  bool maxGiven = false;
  bool minGiven = false;
  optind = 1;
  opterr = 0;
  for (;;) {
    const int opt = getopt_long(argc, argv, "b:e:f:i:n:w:c:d:r:g:h", longOptions, nullptr);
    if (opt == -1) break;
    if (opt == '?') {
      // A letter may stand among others, of which optind tells nothing.
      const bool isLetter = optopt > 0 && optopt <= UCHAR_MAX;
      const std::string what = isLetter ? std::string("-") + static_cast<char>(optopt) : argv[optind - 1];
      return perfFail(ncclInvalidArgument, "'%s' is no option, or lacks its value; see --help", what.c_str());
    }
    maxGiven = maxGiven || opt == 'e';
    minGiven = minGiven || opt == 'b';
    PERFCHECK(parseOne(opt, optarg, options, &weightsGiven));
  }
  if (optind < argc) return perfFail(ncclInvalidArgument, "'%s' is no option; see --help", argv[optind]);
  if (options->help) return ncclSuccess;
  if (minGiven && !maxGiven) options->maxTokens = options->minTokens;
  if (maxGiven && !minGiven) options->minTokens = options->maxTokens;
  if (!weightsGiven) options->weightsInside = options->layout != ncclMoeLayoutRankMajor;
  return checkTogether(*options, weightsGiven);
}

std::vector<int> tokenSteps(const Options& options) {
  std::vector<int> steps;
  int64_t t = options.minTokens;
  while (t <= options.maxTokens) {
    steps.push_back(static_cast<int>(t));
    if (options.stepFactor > 1)
      t = t == 0 ? 1 : t * options.stepFactor;
    else if (options.stepAdd > 0)
      t += options.stepAdd;
    else
      break;
  }
  return steps;
}

const char* layoutName(ncclMoeLayout_t layout) {
  for (const auto& c : layouts) {
    if (c.value == layout) return c.name;
  }
  return "?";
}

const char* quantName(ncclMoeQuant_t quant) {
  for (const auto& c : quants) {
    if (c.value == quant) return c.name;
  }
  return "?";
}

const char* modeName(ncclMoeMode_t mode) {
  for (const auto& c : modes) {
    if (c.value == mode) return c.name;
  }
  return "?";
}

const char* usageText() {
  return "Usage: moe_perf [options]\n"
         "Times and checks ncclMoeDispatch and ncclMoeCombine.  T stands for the tokens of each rank.\n"
         "\n"
         "Sizes\n"
         "  -b, --minTokens N         first T (4096); K and M are understood\n"
         "  -e, --maxTokens N         last T (-b's)\n"
         "  -f, --stepfactor N        T is multiplied by N (2)\n"
         "  -i, --step N              or N is added to it\n"
         "      --routing-tokens N    the routing is made for N tokens of each rank, as a server's is, whatever T (0: "
         "T)\n"
         "      --hidden N            elements of a row (7168)\n"
         "      --topk N              experts of a token (8)\n"
         "      --experts N           experts of all ranks (256)\n"
         "  -d, --datatype TYPE       rows: bfloat16, half, float, fp8 (with scales; combine is then bfloat16)\n"
         "What is asked of the library\n"
         "      --layout L            rank, expert, padded (rank)\n"
         "      --align N             rows; expert groups start at its multiples (1)\n"
         "      --quant Q             none, fp8, ue8m0: dispatch casts bfloat16 rows (none)\n"
         "      --scale-layout L      row, col (row)\n"
         "      --weights W           inside, outside: who applies the top-k weights (inside, outside for layout "
         "rank)\n"
         "      --exact               combine rounds once (NCCL_MOE_EXACT)\n"
         "      --combine-quant Q     none, fp8: how combine's sums travel; latency mode only (none)\n"
         "      --num-sms N,N...      SMs of a call, each size with every N (0: the library's choice)\n"
         "      --mode M              auto, throughput, latency\n"
         "      --memory M            library (ncclMoeMemAlloc), plain: where the rows lie (library)\n"
         "Routing\n"
         "      --routing R           uniform; zipf:S; grouped:GROUPS,KEPT (group-limited gating on random scores);\n"
         "                            hot (all to rank 0's experts); file:PATH (.npy, [T,K] int32 or int64);\n"
         "                            hash:PATH (each word of a text goes to K experts by its hash)  (uniform)\n"
         "      --seed N              of all random data (1)\n"
         "Ranks\n"
         "      --device D            host, cuda, auto (auto: cuda where there is a GPU)\n"
         "  -r, --ranks N             processes (host 2, cuda 1)\n"
         "  -g, --ngpus N             threads of each process, one GPU each; cuda only (1)\n"
         "Measuring\n"
         "  -n, --iters N             timed calls, of which the median counts (20)\n"
         "  -w, --warmup_iters N      untimed calls before (5)\n"
         "  -c, --check N             verified runs of what is timed, apart from the timed ones; 0: none (1)\n"
         "      --graph N             times N calls in a row, on cuda as one captured graph, and prints the time of "
         "one,\n"
         "                            then N pairs of a dispatch and a combine likewise\n"
         "                            (0: single calls)\n"
         "      --late US             with --graph: rank 0 begins so much later than the others, whose time counts "
         "it,\n"
         "                            that of one call its N-th part (0)\n"
         "      --rival R             none, nccl: also times the same rows between the same ranks by plain ncclSend "
         "and\n"
         "                            ncclRecv, in whose favour counts, order and own rows are left out; cuda only "
         "(none)\n"
         "      --timeout SECONDS     of every wait on another rank (100)\n"
         "      --json FILE           writes the results there too\n";
}

} // namespace moe::perf
