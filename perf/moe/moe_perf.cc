// Times and checks dispatch and combine, in the manner of nccl-tests.
#include <cstdio>

#include "perf/moe/launch.h"
#include "perf/moe/perf_error.h"

int main(int argc, char** argv) {
  moe::perf::Options options;
  if (moe::perf::parseOptions(argc, argv, &options) != ncclSuccess) {
    fprintf(stderr, "moe_perf: %s\n", moe::perf::perfError());
    return 2;
  }
  if (options.help) {
    fputs(moe::perf::usageText(), stdout);
    return 0;
  }
  return moe::perf::launch(options);
}
