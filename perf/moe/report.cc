#include "perf/moe/report.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>

#include "perf/moe/numeric.h"
#include "perf/moe/perf_error.h"

namespace moe::perf {

namespace {

std::string number(double value, const char* format) {
  if (value <= 0) return "N/A";
  char text[32];
  snprintf(text, sizeof(text), format, value);
  return text;
}

std::string wrongText(int64_t wrong) { return wrong < 0 ? "N/A" : std::to_string(wrong); }

std::string smsText(int numSms) { return numSms > 0 ? std::to_string(numSms) : "auto"; }
std::string smsText(const std::vector<int>& numSms) {
  std::string text;
  for (const int n : numSms) text += (text.empty() ? "" : ",") + smsText(n);
  return text;
}

struct Column {
  const char* name;
  const char* unit;
  int width;
};

// Of each collective.
std::vector<Column> columnsOf(const Options& o) {
  std::vector<Column> columns = {{"wire B", "(B)", 11},     {"time", "(us)", 10}, {"wire BW", "(GB/s)", 8},
                                 {"roofline", "(GB/s)", 8}, {"ratio", "", 6},     {"all", "", 6}};
  if (o.rivalNccl) columns.insert(columns.end(), {{"nccl", "(us)", 10}, {"/time", "", 6}});
  columns.push_back({"#wrong", "", 7});
  return columns;
}

void printMeasurement(const Measurement& m, const Options& o) {
  std::vector<std::string> values = {std::to_string(std::llround(m.wireBytes)),
                                     number(m.us, "%.1f"),
                                     number(m.wireRate(), "%.2f"),
                                     number(m.roofline, "%.2f"),
                                     number(m.ratio(), "%.2f"),
                                     number(m.allRatio(), "%.2f")};
  if (o.rivalNccl) values.insert(values.end(), {number(m.rivalUs, "%.1f"), number(m.rivalRatio(), "%.2f")});
  values.push_back(wrongText(m.wrong));
  const std::vector<Column> columns = columnsOf(o);
  printf(" ");
  for (size_t i = 0; i < columns.size(); i++) printf(" %*s", columns[i].width, values[i].c_str());
}

struct ColumnGroup {
  const char* title;
  std::vector<Column> columns;
};

// The pairs come last, so that the other columns stand where they always do.
std::vector<ColumnGroup> groupsOf(const Options& o) {
  std::vector<ColumnGroup> groups = {{" dispatch ", columnsOf(o)}, {" combine ", columnsOf(o)}};
  if (o.graphCalls > 0) groups.push_back({" pair ", {{"time", "(us)", 10}}});
  return groups;
}

// A line over each group's columns.
void printTitles(const std::vector<ColumnGroup>& groups) {
  printf("# %8s %9s %5s", "", "", "");
  for (const ColumnGroup& group : groups) {
    int width = -1;
    for (const Column& c : group.columns) width += c.width + 1;
    const int dashes = width - static_cast<int>(strlen(group.title));
    printf("  %s%s%s", std::string(dashes / 2, '-').c_str(), group.title,
           std::string(dashes - dashes / 2, '-').c_str());
  }
  printf("\n");
}

void printHeading(const std::vector<ColumnGroup>& groups, bool units) {
  printf("# %8s %9s %5s", units ? "" : "tokens", units ? "" : "rows", units ? "" : "SMs");
  for (const ColumnGroup& group : groups) {
    printf(" ");
    for (const Column& c : group.columns) printf(" %*s", c.width, units ? c.unit : c.name);
  }
  printf("\n");
}

nlohmann::json toJson(const Measurement& m) {
  nlohmann::json j = {{"time_us", m.us},           {"time_us_min", m.usMin},  {"time_us_max", m.usMax},
                      {"wire_bytes", m.wireBytes}, {"all_bytes", m.allBytes}, {"wire_gbps", m.wireRate()},
                      {"roofline_gbps", nullptr},  {"ratio", nullptr},        {"all_ratio", nullptr},
                      {"wrong", nullptr}};
  if (m.roofline > 0) j["roofline_gbps"] = m.roofline;
  if (m.ratio() > 0) j["ratio"] = m.ratio();
  if (m.allRatio() > 0) j["all_ratio"] = m.allRatio();
  if (m.wrong >= 0) j["wrong"] = m.wrong;
  if (m.rivalUs > 0) j["nccl_us"] = m.rivalUs;
  return j;
}

std::string versionText() {
  int v = 0;
  if (ncclMoeGetVersion(&v) != ncclSuccess) return "unknown";
  return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
}

// The mean of the ratios that there are; 0 if none.
template <typename Get> double meanOf(const std::vector<SizeResult>& results, const Get& get) {
  double sum = 0;
  int n = 0;
  for (const SizeResult& r : results) {
    const double value = get(r);
    sum += value;
    n += value > 0 ? 1 : 0;
  }
  return n > 0 ? sum / n : 0;
}

} // namespace

std::string describeMachine() {
  std::ifstream info("/proc/cpuinfo");
  std::string line;
  std::string model = "unknown processor";
  while (std::getline(info, line)) {
    if (line.rfind("model name", 0) != 0) continue;
    model = line.substr(line.find(':') + 2);
    break;
  }
  utsname system{};
  uname(&system);
  return model + ", " + std::to_string(sysconf(_SC_NPROCESSORS_ONLN)) + " cores, " + system.sysname + " " +
         system.machine;
}

void Report::header() {
  const Shape s = shapeOf(o_, static_cast<int>(info_.ranks.size()), o_.maxTokens);
  const std::string late = o_.lateUs > 0 ? ", rank 0 begins " + std::to_string(o_.lateUs) + " us late" : "";
  const std::string measured =
    o_.graphCalls > 0 ? std::to_string(o_.graphCalls) + " calls in a row, time of one" + late : "single calls";
  printf("# moe_perf, libmoenccl %s\n", versionText().c_str());
  printf("# machine: %s\n", info_.machine.c_str());
  for (size_t r = 0; r < info_.ranks.size(); r++) printf("#   Rank %2zu %s\n", r, info_.ranks[r].c_str());
  const std::string routed = o_.routingTokens != 0 ? " for " + std::to_string(o_.routingTokens) + " tokens" : "";
  printf("# tokens per rank %d to %d, hidden %d, top-k %d, experts %d, routing %s%s, seed %llu\n", o_.minTokens,
         o_.maxTokens, o_.hidden, o_.topK, o_.experts, o_.routingText.c_str(), routed.c_str(),
         static_cast<unsigned long long>(o_.seed));
  printf("# rows %s, quant %s, scales %d bytes (%s), combine %s, layout %s, align %d, weights %s%s, memory %s\n",
         typeName(s.type), quantName(s.quant), s.scaleBytes, s.scaleLayout == ncclMoeScaleRowMajor ? "row" : "col",
         typeName(s.combineType), layoutName(s.layout), s.align, s.weightsInside ? "inside" : "outside",
         s.exact                             ? ", exact"
         : s.combineQuant == ncclMoeQuantFp8 ? ", sums FP8"
                                             : "",
         o_.libraryMemory ? "library" : "plain");
  printf("# mode %s, SMs %s, warmup %d, iters %d (%s), verified runs %d\n", modeName(o_.mode),
         smsText(o_.numSms).c_str(), o_.warmup, o_.iterations, measured.c_str(), o_.checks);
  printf(
    "#\n"
    "# wire B    bytes to other ranks, mean per rank.  dispatch: once per (token, other rank) the row, its scales, "
    "and\n"
    "#           %d ids and weights of 4 bytes; combine: the row, once per (token, other rank)%s.\n"
    "# time      median over iterations of the slowest rank's; counts, routing and the layout asked for included\n"
    "# roofline  GB/s of each rank when all %s of that size at once\n"
    "# ratio     time / (wire B / roofline);  all: the same with the bytes of all rows that dispatch delivers and\n"
    "#           combine reads, the rank's own too\n"
    "# #wrong    elements of any output that differ from what the seed says, or should not have been written\n#\n",
    o_.topK, s.exact ? " and selection" : "", info_.backend == "host" ? "memcpy rows" : "push rows to random peers");
  if (o_.rivalNccl)
    printf(
      "# nccl      time of one group of ncclSend and ncclRecv of the same rows between the same ranks; the counts are\n"
      "#           known and the rows lie in the order of the ranks; own rows, ids and weights do not move;\n"
      "#           /time: that over ours\n#\n");
  if (o_.graphCalls > 0)
    printf("# pair      time of a dispatch and a combine, one after the other: of %d such pairs in a row\n#\n",
           o_.graphCalls);
  const std::vector<ColumnGroup> groups = groupsOf(o_);
  printTitles(groups);
  printHeading(groups, false);
  printHeading(groups, true);
  fflush(stdout);
}

void Report::progress(int size, int nSizes, const char* what) {
  if (isatty(STDERR_FILENO) == 0) return;
  fprintf(stderr, "\r\033[Ksize %d of %d: %s", size + 1, nSizes, what);
  fflush(stderr);
  progressShown_ = true;
}

void Report::result(const SizeResult& result) {
  if (progressShown_) fputs("\r\033[K", stderr);
  progressShown_ = false;
  results_.push_back(result);
  printf("  %8d %9lld %5s", result.nTokens, static_cast<long long>(result.nRows), smsText(result.numSms).c_str());
  printMeasurement(result.dispatch, o_);
  printMeasurement(result.combine, o_);
  if (o_.graphCalls > 0) printf("  %10s", number(result.pair.us, "%.1f").c_str());
  printf("\n");
  fflush(stdout);
}

ncclResult_t Report::finish(int64_t wrong) {
  const auto dispatchRatio = [](const SizeResult& r) { return r.dispatch.ratio(); };
  const auto combineRatio = [](const SizeResult& r) { return r.combine.ratio(); };
  if (o_.checks > 0)
    printf("# Out of bounds values : %lld %s\n", static_cast<long long>(wrong), wrong == 0 ? "OK" : "FAILED");
  else
    printf("# Out of bounds values : N/A (not checked)\n");
  printf("# Avg ratio to roofline: dispatch %s, combine %s\n", number(meanOf(results_, dispatchRatio), "%.3f").c_str(),
         number(meanOf(results_, combineRatio), "%.3f").c_str());
  fflush(stdout);
  return o_.jsonPath.empty() ? ncclSuccess : writeJson(wrong);
}

ncclResult_t Report::writeJson(int64_t wrong) const {
  const Shape s = shapeOf(o_, static_cast<int>(info_.ranks.size()), o_.maxTokens);
  nlohmann::json j;
  j["version"] = versionText();
  j["time"] = static_cast<int64_t>(std::time(nullptr));
  j["machine"] = info_.machine;
  j["backend"] = info_.backend;
  j["ranks"] = info_.ranks;
  j["parameters"] = {{"hidden", o_.hidden},
                     {"topk", o_.topK},
                     {"experts", o_.experts},
                     {"routing", o_.routingText},
                     {"routing_tokens", o_.routingTokens}, // 0: those of each result
                     {"seed", o_.seed},
                     {"datatype", typeName(s.type)},
                     {"combine_datatype", typeName(s.combineType)},
                     {"quant", quantName(s.quant)},
                     {"scale_layout", s.scaleLayout == ncclMoeScaleRowMajor ? "row" : "col"},
                     {"layout", layoutName(s.layout)},
                     {"align", s.align},
                     {"weights", s.weightsInside ? "inside" : "outside"},
                     {"exact", s.exact},
                     {"combine_quant", quantName(s.combineQuant)},
                     {"mode", modeName(o_.mode)},
                     {"memory", o_.libraryMemory ? "library" : "plain"},
                     {"iters", o_.iterations},
                     {"warmup", o_.warmup},
                     {"graph", o_.graphCalls},
                     {"late_us", o_.lateUs},
                     {"check", o_.checks}};
  j["results"] = nlohmann::json::array();
  for (const SizeResult& r : results_) {
    j["results"].push_back({{"tokens", r.nTokens},
                            {"rows", r.nRows},
                            {"num_sms", r.numSms},
                            {"dispatch", toJson(r.dispatch)},
                            {"combine", toJson(r.combine)}});
    if (o_.graphCalls > 0)
      j["results"].back()["pair"] = {
        {"time_us", r.pair.us}, {"time_us_min", r.pair.usMin}, {"time_us_max", r.pair.usMax}};
  }
  if (o_.checks > 0) j["out_of_bounds"] = wrong;
  std::ofstream file(o_.jsonPath);
  // A path need not be UTF-8.
  file << j.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  file.flush();
  if (!file) return perfFail(ncclSystemError, "--json: %s cannot be written", o_.jsonPath.c_str());
  return ncclSuccess;
}

} // namespace moe::perf
