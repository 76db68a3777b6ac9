// Starts the ranks of a run: forked processes, threads with a GPU each, or MPI's processes.
#pragma once

#include "perf/moe/options.h"

namespace moe::perf {

// The exit status of the program: 0 where all went well and no element was wrong.
int launch(const Options& options);

} // namespace moe::perf
