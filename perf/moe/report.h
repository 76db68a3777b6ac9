// What a run prints, in nccl-tests' manner, and its JSON.
#pragma once

#include <string>
#include <vector>

#include "perf/moe/bench.h"

namespace moe::perf {

struct RunInfo {
  std::string machine;            // processor and cores
  std::vector<std::string> ranks; // one line each
  std::string backend;            // host or cuda
};

class Report : public Observer {
 public:
  Report(const Options& options, RunInfo info) : o_(options), info_(std::move(info)) {}
  void header();
  void progress(int size, int nSizes, const char* what) override;
  void result(const SizeResult& result) override;
  // The footer, and the JSON file if one was asked for.
  ncclResult_t finish(int64_t wrong);

 private:
  ncclResult_t writeJson(int64_t wrong) const;

  Options o_;
  RunInfo info_;
  std::vector<SizeResult> results_;
  bool progressShown_ = false;
};

// "AMD EPYC, 2 cores, Linux 6.1.0"
std::string describeMachine();

} // namespace moe::perf
