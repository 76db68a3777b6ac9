// What dispatch and combine must deliver, worked out the slow way from all ranks' inputs and from nothing but
// nccl_moe.h.  It shares no code with the library and knows no backend, so every backend is checked against it.
//
// Expectations are images of whole output buffers: the caller fills an image with its poison, the reference writes what
// the collective must write and leaves the rest, and the image must then equal the buffer everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "nccl_moe.h"

namespace moe::test {

// ---- numbers: written without the bit tricks of a fast conversion, so that a mistake there is not repeated here

size_t elementBytes(ncclDataType_t type);
float loadElement(ncclDataType_t type, const void* element);
// Rounds to the nearest value of type, ties to the even mantissa; overflow becomes infinity.
void storeElement(ncclDataType_t type, double value, void* element);
double e4m3Value(uint8_t code);    // NaN for the two NaN codes
uint8_t nearestE4m3(double value); // of all 256 codes; saturates, keeps the sign of zero
// Bitwise equal, or both NaN.
bool sameElement(ncclDataType_t type, const void* a, const void* b);

// ---- dispatch

// One rank's input.
struct Source {
  int nTokens = 0;
  std::vector<uint8_t> x; // [T, H]
  std::vector<int64_t> topkIdx;
  std::vector<float> topkWeights; // [T, K], or empty: not given
  std::vector<uint8_t> scales;    // [T, scaleBytes], or empty: not given
};

// Arguments that all ranks share.
struct DispatchProblem {
  int nRanks = 1;
  int nExperts = 1;
  int topK = 1;
  int hidden = 16;
  int maxTokens = 0; // of the routing: the planes of EXPERT_PADDED
  ncclDataType_t type = ncclBfloat16;
  ncclMoeLayout_t layout = ncclMoeLayoutRankMajor;
  int expertAlignment = 1;
  ncclMoeQuant_t quant = ncclMoeQuantNone;
  ncclMoeScaleLayout_t scaleLayout = ncclMoeScaleRowMajor;
  int scaleBytes = 0; // of the caller's scales
  bool weighted = false;
  std::vector<int> expertToRank; // [E]
  std::vector<Source> sources;   // [R]

  ncclDataType_t wireType() const { return quant == ncclMoeQuantNone ? type : ncclMoeFloat8e4m3; }
  size_t rowBytes() const { return static_cast<size_t>(hidden) * elementBytes(wireType()); }
  int wireScaleBytes() const; // of a received row
};

// The blocks of consecutive experts that NULL stands for.
std::vector<int> blockPlacement(int nExperts, int nRanks);

// One received row.
struct Row {
  int64_t row;     // index in the leading dimensions of the layout
  int source;      // rank
  int token;       //
  int k;           // its selection; -1 in RANK_MAJOR
  int localExpert; // -1 in RANK_MAJOR
};

// What one rank receives.
struct Delivery {
  int nLocal = 0;
  int64_t nRows = 0; // N
  int64_t span = 0;  // rows of the leading dimensions that delivery may touch
  std::vector<Row> rows;
  std::vector<int> expertCounts;  // [L]
  std::vector<int> expertOffsets; // EXPERT_MAJOR: [L+1]
};

// The output buffers of one rank.  An empty vector stands for NULL.
struct DispatchImage {
  std::vector<uint8_t> x;
  std::vector<uint8_t> scales;
  std::vector<int> topkIdx;
  std::vector<float> weights;
  std::vector<int> count;
  std::vector<int> expertCounts;
  std::vector<int> expertOffsets;
};

class Reference {
 public:
  explicit Reference(const DispatchProblem& problem);

  const DispatchProblem& problem() const { return problem_; }
  const Delivery& delivery(int rank) const { return deliveries_[rank]; }
  // Rows that recvX and the tensors beside it must have; EXPERT_PADDED: what the layout fixes.
  int64_t rowsNeeded(int rank) const { return deliveries_[rank].span; }
  // The row that selection k of a token has on its expert's rank, or -1; in RANK_MAJOR the token's row there.
  int64_t rowOf(int source, int token, int k) const;
  // The rank of a selection, or -1.
  int rankOf(int source, int token, int k) const;
  int localExpertOf(int expert) const { return localExpert_[expert]; }

  // Writes into an image of poison what dispatch must deliver to rank; capacity is recvCapacity.
  void dispatch(int rank, int64_t capacity, DispatchImage* image) const;

 private:
  DispatchProblem problem_;
  std::vector<int> localExpert_; // [E]
  std::vector<Delivery> deliveries_;
  std::vector<std::vector<int64_t>> rowOf_; // [R][T*K]
  std::vector<Source> cast_;                // with quant: [R], rows and scales after the cast
};

// Compares two images; "" or a sentence that names the first difference.
std::string compareDispatch(const Reference& reference, int rank, const DispatchImage& expected,
                            const DispatchImage& got);

// ---- combine

struct CombineProblem {
  ncclDataType_t type = ncclBfloat16;
  int hidden = 16;
  bool exact = false;
  bool cast = false; // ncclMoeQuantFp8
  bool weighted = false;
  bool withGradWeights = false;
  std::vector<std::vector<uint8_t>> x;         // [R] of [rows, H]
  std::vector<std::vector<float>> weights;     // [R] of [rows]
  std::vector<std::vector<float>> gradWeights; // [R] of [rows] or, RANK_MAJOR, [N, K]
};

struct CombineImage {
  std::vector<uint8_t> out;           // [T, H]
  std::vector<float> gradTopkWeights; // [T, K]
};

// What combine must return to rank, to the bit: FP32 sums in the order that the header fixes.
void expectCombine(const Reference& reference, const CombineProblem& problem, int rank, CombineImage* image);

// Compares with the expectation and, for finite sums, with sums in FP64 within the error that the number of roundings
// allows, so that the expectation itself is held to what combine means.  "" or a sentence.
std::string compareCombine(const Reference& reference, const CombineProblem& problem, int rank,
                           const CombineImage& expected, const CombineImage& got);

} // namespace moe::test
