// What CUDA memory is served for.  It is known without CUDA: the host backend refuses the same shapes of latency mode,
// so that a program that was developed on it finds no new refusal on GPUs.
#pragma once

#include <cstddef>

#include "nccl_moe.h"

namespace moe {

struct CommConfig;

constexpr int kMaxDeviceRanks = 64;
constexpr int kMaxDeviceExperts = 8192;  // the route kernel's bitmaps of a chunk lie in shared memory
constexpr int kMaxLatencyExperts = 4094; // a pick names one, or none, in 12 bits
constexpr int kMaxLatencyTokens = 512;   // what AUTO leaves to latency mode
constexpr size_t kMaxLatencyShared = 96 << 10;

// An error where ncclMoeCommInit could not make the communicator, whatever the GPU.
ncclResult_t deviceRefusal(const CommConfig& config, int nRanks, const char* function);

// Shared memory that latency mode's dispatch takes for its lists (device/latency_dispatch_lists.cuh) on a rank with
// nLocal experts, and on the rank that takes most.
size_t latencyListBytes(int nRanks, int nExperts, int nLocal, int maxTokens);
size_t latencyListBytes(const CommConfig& config, int nRanks, int maxTokens);

// Whether latency mode serves a routing of so many tokens, as config.mode says.
bool servedByLatency(const CommConfig& config, int nRanks, int maxTokens);
// An error where config.mode asks for latency mode but it cannot serve such a routing.
ncclResult_t latencyRefusal(const CommConfig& config, int nRanks, int maxTokens, const char* function);

} // namespace moe
