#include "perf/moe/bench.h"

#include <algorithm>
#include <numeric>

#include "perf/moe/checker.h"
#include "perf/moe/numeric.h"
#include "perf/moe/perf_error.h"

namespace moe::perf {

namespace {

// The library's sentence, which names the function already.
ncclResult_t libraryFail(ncclResult_t result, ncclMoeComm_t comm) {
  const char* sentence = ncclMoeGetLastError(comm);
  return perfFail(result, "%s", sentence[0] != '\0' ? sentence : ncclMoeGetLastError(nullptr));
}

struct RoutingDeleter {
  ncclMoeComm_t comm;
  void operator()(ncclMoeRouting_t routing) const { ncclMoeRoutingDestroy(routing, comm); }
};
using RoutingPtr = std::unique_ptr<ncclMoeRouting, RoutingDeleter>;

struct CommDeleter {
  void operator()(ncclMoeComm_t comm) const { ncclMoeCommDestroy(comm); }
};
using CommPtr = std::unique_ptr<ncclMoeComm, CommDeleter>;

class RankRun {
 public:
  RankRun(const Options& options, Group& group, Device& device, Observer* observer)
    : o_(options), group_(group), device_(device), observer_(observer) {}

  ncclResult_t run(int64_t* wrong) {
    PERFCHECK(makeRoutingSource(o_, group_.nRanks(), &source_));
    const std::vector<int> steps = tokenSteps(o_);
    const Shape largest = shapeOf(o_, group_.nRanks(), steps.back());
    const int64_t maxSlots = capacityOf(largest, Routing(largest, *source_));
    PERFCHECK(makeComm(largest));
    PERFCHECK(checkMemory(largest, maxSlots));
    BufferSet buffers(device_, comm_.get(), o_.libraryMemory);
    PERFCHECK(buffers.take(largest, group_.rank(), maxSlots));
    for (size_t i = 0; i < steps.size(); i++) {
      std::vector<SizeResult> results;
      PERFCHECK(runSize(steps[i], buffers.get(), static_cast<int>(i), static_cast<int>(steps.size()), &results));
      for (const SizeResult& result : results) {
        *wrong += std::max<int64_t>(0, result.dispatch.wrong) + std::max<int64_t>(0, result.combine.wrong);
        if (observer_ != nullptr) observer_->result(result);
      }
    }
    PERFCHECK(buffers.release());
    PERFCHECK(group_.barrier()); // nobody leaves while another still works
    return ncclSuccess;
  }

 private:
  void progress(int size, int nSizes, const char* what) {
    if (observer_ != nullptr) observer_->progress(size, nSizes, what);
  }

  // The rows that every rank's receive tensors get: the most that one needs; in a graph, which is replayed whatever the
  // routing, the most that any routing needs.  A multiple of 4, as column-major scales want it.
  int64_t capacityOf(const Shape& shape, const Routing& routing) const {
    int64_t most = 0;
    for (int r = 0; r < shape.nRanks; r++) {
      most = std::max(most, o_.graphCalls > 0 ? mostSlotsOf(shape, r) : slotsOf(shape, routing, r));
    }
    return shape.layout == ncclMoeLayoutExpertPadded ? most : (most + 3) / 4 * 4;
  }

  ncclResult_t makeComm(const Shape& largest) {
    ncclMoeConfig_t config = NCCL_MOE_CONFIG_INITIALIZER;
    config.nExperts = o_.experts;
    config.maxTokens = largest.maxTokens;
    config.maxTopK = o_.topK;
    config.maxRowBytes = std::max(largest.sendRowBytes(), largest.combineRowBytes());
    config.mode = o_.mode;
    config.timeoutMs = o_.timeoutSeconds * 1000;
    ncclMoeComm_t comm = nullptr;
    PERFCHECK(device_.commInit(&comm, config));
    comm_.reset(comm);
    return ncclSuccess;
  }

  ncclResult_t checkMemory(const Shape& largest, int64_t maxSlots) {
    const size_t needed = bufferBytes(largest, maxSlots);
    const size_t have = device_.freeMemory();
    if (needed <= have) return ncclSuccess;
    return perfFail(ncclInvalidArgument, "the tensors of a rank take %.1f GB at %d tokens; it may have %.1f GB",
                    static_cast<double>(needed) * 1e-9, largest.nTokens, static_cast<double>(have) * 1e-9);
  }

  ncclMoeDispatchArgs_t dispatchArgs(const Shape& s, const Buffers& b, int64_t capacity) const {
    ncclMoeDispatchArgs_t args = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
    args.x = b.x;
    args.type = s.type;
    args.hidden = s.hidden;
    args.nTokens = s.nTokens;
    args.topkIdx = b.topkIdx;
    args.topkIdxType = ncclInt64;
    args.topkWeights = static_cast<float*>(b.topkWeights);
    args.scales = b.scales;
    args.scaleBytes = b.scales != nullptr ? s.scaleBytes : 0;
    args.quant = s.quant;
    args.scaleLayout = s.scaleLayout;
    args.recvX = b.recvX;
    args.recvCapacity = capacity;
    args.recvScales = b.recvScales;
    args.recvTopkIdx = static_cast<int*>(b.recvTopkIdx);
    args.recvWeights = static_cast<float*>(b.recvWeights);
    args.recvCount = static_cast<int*>(b.recvCount);
    args.expertCounts = static_cast<int*>(b.expertCounts);
    args.expertOffsets = static_cast<int*>(b.expertOffsets);
    return args;
  }

  ncclMoeCombineArgs_t combineArgs(const Shape& s, const Buffers& b) const {
    ncclMoeCombineArgs_t args = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
    args.x = b.expertX;
    args.type = s.combineType;
    args.hidden = s.hidden;
    args.weights = s.weightsInside ? static_cast<float*>(b.recvWeights) : nullptr;
    args.out = b.out;
    args.flags = s.exact ? NCCL_MOE_EXACT : 0;
    args.quant = s.combineQuant;
    return args;
  }

  // Errors that the work met after it was enqueued.
  ncclResult_t settle() {
    PERFCHECK(device_.synchronize());
    ncclResult_t asyncError = ncclSuccess;
    const ncclResult_t result = ncclMoeCommGetAsyncError(comm_.get(), &asyncError);
    if (result != ncclSuccess) return libraryFail(result, comm_.get());
    return asyncError == ncclSuccess ? ncclSuccess : libraryFail(asyncError, comm_.get());
  }

  // Of each iteration the slowest rank's time; of those the median, least and greatest.
  ncclResult_t timeCall(const Call& call, Measurement* m) {
    const auto n = static_cast<size_t>(o_.iterations);
    std::vector<double> us(n);
    PERFCHECK(device_.time(call, {o_.warmup, o_.iterations, o_.graphCalls, o_.lateUs}, us.data()));
    PERFCHECK(settle());
    std::vector<double> all(n * static_cast<size_t>(group_.nRanks()));
    PERFCHECK(group_.allGather(us.data(), all.data(), n * sizeof(double)));
    for (size_t i = 0; i < all.size(); i++) us[i % n] = std::max(us[i % n], all[i]);
    std::sort(us.begin(), us.end());
    m->us = n % 2 == 1 ? us[n / 2] : (us[n / 2 - 1] + us[n / 2]) / 2;
    m->usMin = us.front();
    m->usMax = us.back();
    return ncclSuccess;
  }

  // The rows of dispatch or combine by plain sends and receives.  They lie ready in the order of the ranks.
  ncclResult_t timeRival(bool combine, const Shape& s, const Routing& routing, double* us) {
    const size_t rowBytes = combine ? s.combineRowBytes() : s.recvRowBytes() + s.scaleBytes;
    const auto bytes = [&](int owner, int holder) {
      if (owner == holder) return size_t{0};
      return static_cast<size_t>(rowsBetween(s, routing, owner, holder, combine && s.exact)) * rowBytes;
    };
    std::vector<size_t> sendBytes;
    std::vector<size_t> recvBytes;
    for (int r = 0; r < s.nRanks; r++) {
      const size_t mine = bytes(group_.rank(), r);
      const size_t theirs = bytes(r, group_.rank());
      sendBytes.push_back(combine ? theirs : mine);
      recvBytes.push_back(combine ? mine : theirs);
    }
    const size_t one = 1; // for ranks that move nothing
    void* send = nullptr;
    void* recv = nullptr;
    PERFCHECK(device_.alloc(&send, std::accumulate(sendBytes.begin(), sendBytes.end(), one)));
    PERFCHECK(device_.alloc(&recv, std::accumulate(recvBytes.begin(), recvBytes.end(), one)));
    const Call exchange = [&](cudaStream_t stream) {
      return device_.exchange(send, sendBytes, recv, recvBytes, stream);
    };
    PERFCHECK(exchange(device_.stream())); // NCCL connects the ranks, which does not belong into a graph
    PERFCHECK(device_.synchronize());
    Measurement rival;
    PERFCHECK(timeCall(exchange, &rival));
    *us = rival.us;
    // Freeing waits for the GPUs of the process, where no kernel may wait for this rank.
    PERFCHECK(group_.barrier());
    device_.free(send);
    device_.free(recv);
    return group_.barrier();
  }

  ncclResult_t sumOverRanks(int64_t mine, int64_t* sum) {
    std::vector<int64_t> all(group_.nRanks());
    PERFCHECK(group_.allGather(&mine, all.data(), sizeof(mine)));
    *sum = 0;
    for (const int64_t n : all) *sum += n;
    return ncclSuccess;
  }

  // A result for each number of SMs.
  ncclResult_t runSize(int nTokens, const Buffers& b, int index, int nSizes, std::vector<SizeResult>* results) {
    progress(index, nSizes, "preparing");
    const Shape shape = shapeOf(o_, group_.nRanks(), nTokens);
    const Routing routing(shape, *source_);
    const Delivery delivery = deliveryOf(shape, routing, group_.rank());
    const Case c{shape, routing, delivery, group_.rank(), capacityOf(shape, routing)};

    ncclMoeRoutingConfig_t config = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
    config.topK = shape.topK;
    config.maxTokens = shape.maxTokens;
    config.layout = shape.layout;
    config.expertAlignment = shape.align;
    ncclMoeRouting_t handle = nullptr;
    const ncclResult_t created = ncclMoeRoutingCreate(&handle, comm_.get(), &config);
    if (created != ncclSuccess) return libraryFail(created, comm_.get());
    const RoutingPtr owner(handle, RoutingDeleter{comm_.get()});

    ncclMoeDispatchArgs_t dispatchArguments = dispatchArgs(shape, b, c.capacity);
    ncclMoeCombineArgs_t combineArguments = combineArgs(shape, b);
    const Call dispatch = [&](cudaStream_t stream) {
      const ncclResult_t r = ncclMoeDispatch(&dispatchArguments, handle, comm_.get(), stream);
      return r == ncclSuccess ? r : libraryFail(r, comm_.get());
    };
    const Call combine = [&](cudaStream_t stream) {
      const ncclResult_t r = ncclMoeCombine(&combineArguments, handle, comm_.get(), stream);
      return r == ncclSuccess ? r : libraryFail(r, comm_.get());
    };

    const Traffic traffic = trafficOf(shape, routing);
    int64_t rows = 0;
    PERFCHECK(sumOverRanks(static_cast<int64_t>(delivery.rows.size()), &rows));
    SizeResult first;
    first.nTokens = nTokens;
    first.nRows = rows / shape.nRanks;
    first.dispatch.wireBytes = traffic.wireDispatch;
    first.dispatch.allBytes = traffic.allDispatch;
    first.combine.wireBytes = traffic.wireCombine;
    first.combine.allBytes = traffic.allCombine;

    PERFCHECK(writeInputs(device_, b, c));
    PERFCHECK(writeExpertRows(device_, b, c));
    // Next to the calls they are compared with: on a shared machine what the link gives changes from minute to minute.
    progress(index, nSizes, "timing dispatch");
    PERFCHECK(device_.roofline(shape.recvRowBytes() + shape.scaleBytes, &first.dispatch.roofline));
    if (o_.rivalNccl && shape.nRanks > 1) PERFCHECK(timeRival(false, shape, routing, &first.dispatch.rivalUs));
    results->assign(o_.numSms.size(), first);
    for (size_t i = 0; i < o_.numSms.size(); i++) {
      (*results)[i].numSms = dispatchArguments.numSms = o_.numSms[i];
      PERFCHECK(timeCall(dispatch, &(*results)[i].dispatch));
    }
    progress(index, nSizes, "timing combine");
    PERFCHECK(device_.roofline(shape.combineRowBytes(), &first.combine.roofline));
    if (o_.rivalNccl && shape.nRanks > 1) PERFCHECK(timeRival(true, shape, routing, &first.combine.rivalUs));
    for (size_t i = 0; i < o_.numSms.size(); i++) {
      (*results)[i].combine = first.combine;
      combineArguments.numSms = o_.numSms[i];
      PERFCHECK(timeCall(combine, &(*results)[i].combine));
    }
    // A decode step runs both in turn, which need not cost the sum of the two by themselves.
    const Call pair = [&](cudaStream_t stream) {
      PERFCHECK(dispatch(stream));
      return combine(stream);
    };
    if (o_.graphCalls > 0) progress(index, nSizes, "timing pairs");
    for (size_t i = 0; i < o_.numSms.size() && o_.graphCalls > 0; i++) {
      dispatchArguments.numSms = combineArguments.numSms = o_.numSms[i];
      PERFCHECK(timeCall(pair, &(*results)[i].pair));
    }
    for (size_t n = 0; n < o_.numSms.size() && o_.checks > 0; n++) {
      dispatchArguments.numSms = combineArguments.numSms = o_.numSms[n];
      int64_t wrongDispatch = 0;
      int64_t wrongCombine = 0;
      for (int i = 0; i < o_.checks; i++) {
        progress(index, nSizes, "verifying");
        Shape fresh = shape; // the same routing, new data in every run
        fresh.seed = mix64(shape.seed + static_cast<uint64_t>(i) + 1);
        const Case data{fresh, routing, delivery, c.rank, c.capacity};
        PERFCHECK(verify(data, b, dispatch, combine, &wrongDispatch, &wrongCombine));
        if (o_.graphCalls > 0) PERFCHECK(verifyPairs(data, b, pair, &wrongDispatch, &wrongCombine));
      }
      PERFCHECK(sumOverRanks(wrongDispatch, &(*results)[n].dispatch.wrong));
      PERFCHECK(sumOverRanks(wrongCombine, &(*results)[n].combine.wrong));
    }
    return ncclSuccess;
  }

  // On tensors that are being written still.
  ncclResult_t runToEnd(const Call& call) {
    PERFCHECK(device_.synchronize());
    PERFCHECK(device_.run(call, o_.graphCalls));
    return settle();
  }

  ncclResult_t verify(const Case& c, const Buffers& b, const Call& dispatch, const Call& combine,
                      int64_t* wrongDispatch, int64_t* wrongCombine) {
    PERFCHECK(writeInputs(device_, b, c));
    PERFCHECK(poisonDispatch(device_, b, c));
    PERFCHECK(runToEnd(dispatch));
    PERFCHECK(checkDispatch(device_, b, c, wrongDispatch));
    // Combine reads the weights that dispatch delivered, but rows that do not depend on it.
    PERFCHECK(writeExpertRows(device_, b, c));
    PERFCHECK(poisonCombine(device_, b, c));
    PERFCHECK(runToEnd(combine));
    return checkCombine(device_, b, c, wrongCombine);
  }

  // Behind verify: the inputs and the experts' rows lie ready.
  ncclResult_t verifyPairs(const Case& c, const Buffers& b, const Call& pair, int64_t* wrongDispatch,
                           int64_t* wrongCombine) {
    PERFCHECK(poisonDispatch(device_, b, c));
    PERFCHECK(poisonCombine(device_, b, c));
    PERFCHECK(runToEnd(pair));
    PERFCHECK(checkDispatch(device_, b, c, wrongDispatch));
    return checkCombine(device_, b, c, wrongCombine);
  }

  const Options& o_;
  Group& group_;
  Device& device_;
  Observer* observer_;
  std::unique_ptr<RoutingSource> source_;
  CommPtr comm_;
};

} // namespace

ncclResult_t runRank(const Options& options, Group& group, Device& device, Observer* observer, int64_t* wrong) {
  *wrong = 0;
  return RankRun(options, group, device, observer).run(wrong);
}

} // namespace moe::perf
