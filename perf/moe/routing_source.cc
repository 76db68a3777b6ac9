#include "perf/moe/routing_source.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "perf/moe/npy.h"
#include "perf/moe/numeric.h"
#include "perf/moe/perf_error.h"

namespace moe::perf {

namespace {

// topK different experts of a hash sequence.
void distinctExperts(uint64_t key, int nExperts, int topK, int* idx) {
  uint64_t n = 0;
  for (int k = 0; k < topK; k++) {
    do {
      idx[k] = static_cast<int>(mix64(key + n++) % static_cast<uint64_t>(nExperts));
    } while (std::find(idx, idx + k, idx[k]) != idx + k);
  }
}

class Uniform : public RoutingSource {
 public:
  explicit Uniform(const Options& o) : o_(o) {}
  void select(int rank, int token, int* idx) const override {
    distinctExperts(keyOf(o_.seed, Purpose::routing, rank, token), o_.experts, o_.topK, idx);
  }

 private:
  Options o_;
};

// Draws without replacement with weights 1 / place^S; which expert has which place is drawn from the seed.
class Zipf : public RoutingSource {
 public:
  explicit Zipf(const Options& o) : o_(o), rate_(o.experts) {
    std::vector<int> place(o.experts);
    std::iota(place.begin(), place.end(), 1);
    for (int i = o.experts - 1; i > 0; i--) {
      const uint64_t bits = keyOf(o.seed, Purpose::expertOrder, i);
      std::swap(place[i], place[bits % static_cast<uint64_t>(i + 1)]);
    }
    for (int e = 0; e < o.experts; e++) rate_[e] = std::pow(static_cast<double>(place[e]), o.routing.exponent);
  }

  // An exponential race: the first K arrivals of processes with rates 1 / rate_ are such a draw.
  void select(int rank, int token, int* idx) const override {
    const uint64_t key = keyOf(o_.seed, Purpose::routing, rank, token);
    std::vector<std::pair<double, int>> arrival(o_.experts);
    for (int e = 0; e < o_.experts; e++)
      arrival[e] = {-std::log(unitOf(mix64(key + static_cast<uint64_t>(e)))) * rate_[e], e};
    std::partial_sort(arrival.begin(), arrival.begin() + o_.topK, arrival.end());
    for (int k = 0; k < o_.topK; k++) idx[k] = arrival[k].second;
  }

 private:
  Options o_;
  std::vector<double> rate_;
};

// DeepSeek-V3's gating: a group's score is the sum of its two best experts', the best groups stay, and the top-k are
// taken from those.
class Grouped : public RoutingSource {
 public:
  explicit Grouped(const Options& o) : o_(o), groupSize_(o.experts / o.routing.groups) {}

  void select(int rank, int token, int* idx) const override {
    const uint64_t key = keyOf(o_.seed, Purpose::routing, rank, token);
    const auto scoreOf = [key](int e) { return unitOf(mix64(key + static_cast<uint64_t>(e))); };
    std::vector<std::pair<double, int>> groups(o_.routing.groups);
    for (int g = 0; g < o_.routing.groups; g++) {
      double best = 0;
      double second = 0;
      for (int e = g * groupSize_; e < (g + 1) * groupSize_; e++) {
        const double score = scoreOf(e);
        if (score > best) {
          second = best;
          best = score;
        } else {
          second = std::max(second, score);
        }
      }
      groups[g] = {-(best + second), g};
    }
    std::partial_sort(groups.begin(), groups.begin() + o_.routing.groupsKept, groups.end());
    std::vector<std::pair<double, int>> candidates;
    for (int i = 0; i < o_.routing.groupsKept; i++) {
      const int first = groups[i].second * groupSize_;
      for (int e = first; e < first + groupSize_; e++) candidates.emplace_back(-scoreOf(e), e);
    }
    std::partial_sort(candidates.begin(), candidates.begin() + o_.topK, candidates.end());
    for (int k = 0; k < o_.topK; k++) idx[k] = candidates[k].second;
  }

 private:
  Options o_;
  int groupSize_;
};

// All tokens of all ranks to the experts of rank 0; where it has fewer than topK, the other selections are -1.
class Hot : public RoutingSource {
 public:
  Hot(const Options& o, int nRanks) : o_(o), nHot_(o.experts / nRanks + (o.experts % nRanks > 0 ? 1 : 0)) {}
  void select(int rank, int token, int* idx) const override {
    const int n = std::min(o_.topK, nHot_);
    distinctExperts(keyOf(o_.seed, Purpose::routing, rank, token), nHot_, n, idx);
    std::fill(idx + n, idx + o_.topK, -1);
  }

 private:
  Options o_;
  int nHot_;
};

// Rank r's tokens are the table's lines from r * maxTokens on, from the beginning again after its end.
class Table : public RoutingSource {
 public:
  Table(const Options& o, std::vector<int> ids) : o_(o), ids_(std::move(ids)) {}
  void select(int rank, int token, int* idx) const override {
    const uint64_t nLines = ids_.size() / static_cast<size_t>(o_.topK);
    const uint64_t line = (static_cast<uint64_t>(rank) * static_cast<uint64_t>(o_.maxTokens) + token) % nLines;
    std::copy_n(ids_.begin() + static_cast<ptrdiff_t>(line * o_.topK), o_.topK, idx);
  }

 private:
  Options o_;
  std::vector<int> ids_;
};

ncclResult_t readFile(const std::string& path, std::string* content) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(fopen(path.c_str(), "rb"), fclose);
  if (file == nullptr) return perfFail(ncclInvalidArgument, "--routing: %s cannot be opened: %m", path.c_str());
  char buffer[65536];
  size_t n = 0;
  while ((n = fread(buffer, 1, sizeof(buffer), file.get())) > 0) content->append(buffer, n);
  if (ferror(file.get()) != 0) return perfFail(ncclInvalidArgument, "--routing: %s cannot be read", path.c_str());
  return ncclSuccess;
}

ncclResult_t tableOfNpy(const Options& o, const std::string& content, std::vector<int>* ids) {
  NpyArray array;
  std::string error;
  uint64_t rows = 0;
  uint64_t columns = 0;
  if (!parseNpy(reinterpret_cast<const uint8_t*>(content.data()), content.size(), &array, &error) ||
      !npyToIndices(array, &rows, &columns, ids, &error))
    return perfFail(ncclInvalidArgument, "--routing: %s: %s", o.routing.path.c_str(), error.c_str());
  if (columns != static_cast<uint64_t>(o.topK) || rows == 0)
    return perfFail(ncclInvalidArgument,
                    "--routing: %s has the shape [%llu, %llu]; with --topk %d it must be [T, %d], T > 0",
                    o.routing.path.c_str(), static_cast<unsigned long long>(rows),
                    static_cast<unsigned long long>(columns), o.topK, o.topK);
  for (size_t i = 0; i < ids->size(); i++) {
    const int id = (*ids)[i];
    const size_t first = i / o.topK * o.topK;
    const auto begin = ids->begin() + static_cast<ptrdiff_t>(first);
    const auto here = ids->begin() + static_cast<ptrdiff_t>(i);
    if (id < -1 || id >= o.experts || (id >= 0 && std::find(begin, here, id) != here))
      return perfFail(ncclInvalidArgument, "--routing: %s, token %zu, selection %zu: expert %d is %s",
                      o.routing.path.c_str(), i / o.topK, i % o.topK, id,
                      id < -1 || id >= o.experts ? "out of range" : "repeated");
  }
  return ncclSuccess;
}

ncclResult_t tableOfText(const Options& o, const std::string& content, std::vector<int>* ids) {
  const std::vector<std::string> words = wordsOf(content);
  if (words.empty()) return perfFail(ncclInvalidArgument, "--routing: %s has no words", o.routing.path.c_str());
  ids->resize(words.size() * static_cast<size_t>(o.topK));
  for (size_t w = 0; w < words.size(); w++) {
    uint64_t hash = o.seed;
    for (const char c : words[w]) hash = mix64(hash ^ static_cast<unsigned char>(c));
    distinctExperts(hash, o.experts, o.topK, &(*ids)[w * static_cast<size_t>(o.topK)]);
  }
  return ncclSuccess;
}

} // namespace

std::vector<std::string> wordsOf(const std::string& text) {
  std::vector<std::string> words;
  std::string word;
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (std::isalnum(u) != 0 || u >= 128) { // whatever is not ASCII counts as a letter
      word += static_cast<char>(std::tolower(u));
    } else if (!word.empty()) {
      words.push_back(std::move(word));
      word.clear();
    }
  }
  if (!word.empty()) words.push_back(std::move(word));
  return words;
}

ncclResult_t makeRoutingSource(const Options& options, int nRanks, std::unique_ptr<RoutingSource>* source) {
  switch (options.routing.kind) {
  case RoutingKind::uniform:
    *source = std::make_unique<Uniform>(options);
    break;
  case RoutingKind::zipf:
    *source = std::make_unique<Zipf>(options);
    break;
  case RoutingKind::grouped:
    *source = std::make_unique<Grouped>(options);
    break;
  case RoutingKind::hot:
    *source = std::make_unique<Hot>(options, nRanks);
    break;
  case RoutingKind::file:
  case RoutingKind::hash: {
    std::string content;
    std::vector<int> ids;
    PERFCHECK(readFile(options.routing.path, &content));
    if (options.routing.kind == RoutingKind::file)
      PERFCHECK(tableOfNpy(options, content, &ids));
    else
      PERFCHECK(tableOfText(options, content, &ids));
    *source = std::make_unique<Table>(options, std::move(ids));
    break;
  }
  }
  return ncclSuccess;
}

} // namespace moe::perf
