// One rank's part of a run: buffers, timed calls and verified calls of every size.
#pragma once

#include <memory>
#include <vector>

#include "perf/moe/device.h"
#include "perf/moe/reference.h"

namespace moe::perf {

struct Measurement {
  double us = 0;
  double usMin = 0;
  double usMax = 0;
  double wireBytes = 0; // mean over ranks
  double allBytes = 0;  // the own rank's rows included
  double roofline = 0;  // GB/s; 0: not known
  int64_t wrong = -1;   // of all ranks; -1: not checked
  double rivalUs = 0;   // plain NCCL's time; 0: not measured

  double wireRate() const { return us > 0 ? wireBytes / us * 1e-3 : 0; } // GB/s
  // Time over that of the roofline; 0 where there is none.
  double ratio() const { return wireBytes > 0 && roofline > 0 ? us * 1e3 * roofline / wireBytes : 0; }
  double rivalRatio() const { return us > 0 ? rivalUs / us : 0; }
  double allRatio() const { return allBytes > 0 && roofline > 0 ? us * 1e3 * roofline / allBytes : 0; }
};

struct SizeResult {
  int nTokens = 0;
  int numSms = 0;
  int64_t nRows = 0; // that dispatch delivers, mean over ranks
  Measurement dispatch;
  Measurement combine;
  Measurement pair; // a dispatch and its combine, with --graph; its times alone
};

// Takes what rank 0 finds out while the others work.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void progress(int size, int nSizes, const char* what) = 0;
  virtual void result(const SizeResult& result) = 0;
};

// observer is NULL but on one rank.  *wrong: elements that were wrong on any rank.
ncclResult_t runRank(const Options& options, Group& group, Device& device, Observer* observer, int64_t* wrong);

} // namespace moe::perf
