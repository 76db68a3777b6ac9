// What the collectives have to deliver, worked out from the seed by plain loops over tokens and experts.  Shares no
// code with the library.
#pragma once

#include <cstdint>
#include <vector>

#include "perf/moe/routing_source.h"

namespace moe::perf {

// One measured case.
struct Shape {
  int nRanks = 0;
  int nTokens = 0;   // T, the same on every rank
  int maxTokens = 0; // that the routing is made for: at least T
  int hidden = 0;
  int topK = 0;
  int nExperts = 0;
  ncclMoeLayout_t layout = ncclMoeLayoutRankMajor;
  int align = 1;
  ncclDataType_t type = ncclBfloat16;        // of the rows given to dispatch
  ncclDataType_t recvType = ncclBfloat16;    // of the rows that it delivers
  ncclDataType_t combineType = ncclBfloat16; // of combine
  ncclMoeQuant_t quant = ncclMoeQuantNone;
  ncclMoeScaleLayout_t scaleLayout = ncclMoeScaleRowMajor;
  int scaleBytes = 0; // of a delivered row
  bool weightsInside = false;
  bool exact = false;
  ncclMoeQuant_t combineQuant = ncclMoeQuantNone;
  uint64_t seed = 0;

  size_t sendRowBytes() const;
  size_t recvRowBytes() const;
  size_t combineRowBytes() const;
};
Shape shapeOf(const Options& options, int nRanks, int nTokens);

// Block placement, as the header describes it.
int nLocalExperts(const Shape& shape, int rank);
int firstExpert(const Shape& shape, int rank);
int rankOfExpert(const Shape& shape, int expert);

// The selections of all ranks' tokens.
class Routing {
 public:
  Routing(const Shape& shape, const RoutingSource& source);
  const int* of(int rank, int token) const { return &idx_[(static_cast<size_t>(rank) * nTokens_ + token) * topK_]; }

 private:
  size_t nTokens_, topK_;
  std::vector<int> idx_;
};

// A row that a rank receives.
struct DeliveredRow {
  int source;
  int token;
  int k; // the selection it serves; -1 in RANK_MAJOR, where it serves all of this rank's
};

// What one rank receives.
struct Delivery {
  int64_t nRows = 0; // N: rows of recvX in use, padding of groups included
  std::vector<DeliveredRow> rows;
  std::vector<int32_t> rowAt; // [nSlots] index into rows, -1: no token
  std::vector<int> counts;    // [L]
  std::vector<int> offsets;   // [L+1], EXPERT_MAJOR
};
Delivery deliveryOf(const Shape& shape, const Routing& routing, int rank);

// N of a rank without building its delivery; the slots of all planes in EXPERT_PADDED.
int64_t slotsOf(const Shape& shape, const Routing& routing, int rank);
int64_t mostSlotsOf(const Shape& shape, int rank); // with any routing

// Bytes that move, means over ranks.
struct Traffic {
  double wireDispatch = 0; // to other ranks: each (token, rank) once: row, scales, K ids and K weights of 4 bytes
  double wireCombine = 0;  // from other ranks: each (token, rank) one row; one of each selection with EXACT
  double allDispatch = 0;  // rows and scales that dispatch delivers, of the own rank too
  double allCombine = 0;   // rows that combine reads, of the own rank too
};
Traffic trafficOf(const Shape& shape, const Routing& routing);

// Rows that cross from one rank to another in dispatch, and back in combine: one for each token, or each selection.
int64_t rowsBetween(const Shape& shape, const Routing& routing, int from, int to, bool perSelection);

// The data.
void tokenRow(const Shape& shape, int rank, int token, void* row);                  // what is given to dispatch
void tokenScales(const Shape& shape, int rank, int token, void* scales);            // type fp8
float tokenWeight(const Shape& shape, int rank, int token, int k);                  // topkWeights
void receivedRow(const Shape& shape, int rank, int token, void* row, void* scales); // what dispatch makes of it
// What the rank's experts return for that token: of one selection, or of all of the rank's (k = -1).
void expertRow(const Shape& shape, int holder, const DeliveredRow& what, void* row);
// The token's row after combine, in the order that the header prescribes.
void combinedRow(const Shape& shape, const Routing& routing, int rank, int token, void* row);

} // namespace moe::perf
