#include "common/reference.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "common/cluster.h"

namespace moe::test {
namespace {

// A binary floating-point format with subnormals.
struct Format {
  int mantissaBits;
  int minExponent; // of a normal number
  int maxExponent;
  int exponentBits;
};

Format formatOf(ncclDataType_t type) {
  if (type == ncclFloat16) return Format{10, -14, 15, 5};
  if (type == ncclBfloat16) return Format{7, -126, 127, 8};
  return Format{23, -126, 127, 8};
}

double decode(const Format& f, uint32_t bits) {
  const uint32_t mantissa = bits & ((1u << f.mantissaBits) - 1);
  const uint32_t exponent = (bits >> f.mantissaBits) & ((1u << f.exponentBits) - 1);
  const double sign = (bits >> (f.mantissaBits + f.exponentBits)) & 1 ? -1.0 : 1.0;
  if (exponent == (1u << f.exponentBits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, f.minExponent - f.mantissaBits);
  return sign * std::ldexp(mantissa + std::ldexp(1.0, f.mantissaBits),
                           static_cast<int>(exponent) - 1 + f.minExponent - f.mantissaBits);
}

uint32_t encode(const Format& f, double value) {
  const uint32_t sign = (std::signbit(value) ? 1u : 0u) << (f.mantissaBits + f.exponentBits);
  const uint32_t infinity = ((1u << f.exponentBits) - 1) << f.mantissaBits;
  if (std::isnan(value)) return sign | infinity | (1u << (f.mantissaBits - 1));
  if (std::isinf(value)) return sign | infinity;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  int exponent = std::ilogb(magnitude);
  if (exponent < f.minExponent) exponent = f.minExponent;
  // In units of the last place; nearbyint rounds halves to even.  A carry into the next binade is right by itself.
  const double units = std::nearbyint(std::ldexp(magnitude, f.mantissaBits - exponent));
  const double rounded = std::ldexp(units, exponent - f.mantissaBits);
  if (rounded >= std::ldexp(1.0, f.maxExponent + 1)) return sign | infinity;
  if (rounded == 0) return sign;
  int outExponent = std::ilogb(rounded);
  if (outExponent < f.minExponent) {
    return sign | static_cast<uint32_t>(std::ldexp(rounded, f.mantissaBits - f.minExponent));
  }
  const double mantissa = std::ldexp(rounded, f.mantissaBits - outExponent) - std::ldexp(1.0, f.mantissaBits);
  return sign | (static_cast<uint32_t>(outExponent - f.minExponent + 1) << f.mantissaBits) |
         static_cast<uint32_t>(mantissa);
}

uint32_t loadBits(ncclDataType_t type, const void* element) {
  if (elementBytes(type) == 1) return *static_cast<const uint8_t*>(element);
  if (elementBytes(type) == 2) {
    uint16_t bits;
    memcpy(&bits, element, sizeof(bits));
    return bits;
  }
  uint32_t bits;
  memcpy(&bits, element, sizeof(bits));
  return bits;
}

// Which received row, if any, an index of the leading dimensions belongs to.
std::string rowName(const Delivery& delivery, int64_t row) {
  for (const Row& r : delivery.rows) {
    if (r.row == row) return format("row %lld (token %d of rank %d)", (long long)row, r.token, r.source);
  }
  return format("row %lld (receives no token)", (long long)row);
}

template <class T>
std::string compareInts(const char* name, const std::vector<T>& expected, const std::vector<T>& got) {
  if (expected.size() != got.size()) return format("%s: size %zu != %zu", name, got.size(), expected.size());
  for (size_t i = 0; i < expected.size(); i++) {
    if (memcmp(&expected[i], &got[i], sizeof(T)) != 0) {
      return format("%s[%zu] is %g, expected %g", name, i, static_cast<double>(got[i]),
                    static_cast<double>(expected[i]));
    }
  }
  return "";
}

// The FP8 of n FP32 elements, times its scale.
void castAndBack(std::vector<float>* row) {
  for (size_t first = 0; first < row->size(); first += NCCL_MOE_SCALE_BLOCK) {
    const size_t last = std::min(row->size(), first + NCCL_MOE_SCALE_BLOCK);
    float amax = 0x1p-64f;
    for (size_t i = first; i < last; i++) {
      if (std::fabs((*row)[i]) > amax) amax = std::fabs((*row)[i]); // false for a NaN
    }
    const float scale = amax / 448.0f;
    const float inverse = 448.0f / amax;
    for (size_t i = first; i < last; i++) {
      const float scaled = (*row)[i] * inverse;
      (*row)[i] = static_cast<float>(e4m3Value(nearestE4m3(scaled))) * scale;
    }
  }
}

// The fused cast of one row.
void quantise(const DispatchProblem& p, const uint8_t* x, uint8_t* q, uint8_t* scales) {
  memset(scales, 0, static_cast<size_t>(p.wireScaleBytes()));
  for (int first = 0, block = 0; first < p.hidden; first += NCCL_MOE_SCALE_BLOCK, block++) {
    const int last = first + NCCL_MOE_SCALE_BLOCK < p.hidden ? first + NCCL_MOE_SCALE_BLOCK : p.hidden;
    float amax = 0x1p-64f;
    for (int i = first; i < last; i++) {
      const float magnitude = std::fabs(loadElement(p.type, x + 2 * i));
      if (magnitude > amax) amax = magnitude; // false for a NaN
    }
    const float scale = amax / 448.0f;
    const float inverse = 448.0f / amax;
    int exponent = -127;
    while (exponent < 127 && std::ldexp(1.0, exponent) < static_cast<double>(scale)) exponent++;
    for (int i = first; i < last; i++) {
      const float value = loadElement(p.type, x + 2 * i);
      if (p.quant == ncclMoeQuantFp8) {
        const float scaled = value * inverse;
        q[i] = nearestE4m3(scaled);
      } else {
        const float scaled = value / static_cast<float>(std::ldexp(1.0, exponent));
        q[i] = nearestE4m3(scaled);
      }
    }
    if (p.quant == ncclMoeQuantFp8) {
      memcpy(scales + 4 * block, &scale, sizeof(scale));
    } else {
      scales[block] = static_cast<uint8_t>(exponent + 127);
    }
  }
}

} // namespace

size_t elementBytes(ncclDataType_t type) {
  if (type == ncclMoeFloat8e4m3) return 1;
  return type == ncclFloat32 ? 4 : 2;
}

float loadElement(ncclDataType_t type, const void* element) {
  uint32_t bits = loadBits(type, element);
  if (type == ncclMoeFloat8e4m3) return static_cast<float>(e4m3Value(static_cast<uint8_t>(bits)));
  if (type == ncclFloat16) return static_cast<float>(decode(formatOf(type), bits));
  if (type == ncclBfloat16) bits <<= 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

void storeElement(ncclDataType_t type, double value, void* element) {
  if (type == ncclMoeFloat8e4m3) {
    *static_cast<uint8_t*>(element) = nearestE4m3(value);
    return;
  }
  const uint32_t bits = encode(formatOf(type), value);
  if (elementBytes(type) == 4) {
    memcpy(element, &bits, 4);
  } else {
    const uint16_t half = static_cast<uint16_t>(bits);
    memcpy(element, &half, 2);
  }
}

double e4m3Value(uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  const double sign = (code & 0x80) != 0 ? -1.0 : 1.0;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(mantissa, -9);
  return sign * std::ldexp(8 + mantissa, exponent - 10);
}

uint8_t nearestE4m3(double value) {
  if (std::isnan(value)) return 0x7f;
  static const std::vector<double> values = [] {
    std::vector<double> all;
    all.reserve(256);
    for (int code = 0; code < 256; code++) all.push_back(e4m3Value(static_cast<uint8_t>(code)));
    return all;
  }();
  const double finite = std::isinf(value) ? std::copysign(1e300, value) : value;
  int best = -1;
  double bestDistance = std::numeric_limits<double>::infinity();
  for (int code = 0; code < 256; code++) {
    if ((code >= 0x80) != std::signbit(value)) continue;
    const double distance = std::fabs(values[code] - finite); // never less for a NaN
    if (distance < bestDistance || (distance == bestDistance && code % 2 == 0)) {
      best = code;
      bestDistance = distance;
    }
  }
  return static_cast<uint8_t>(best);
}

bool sameElement(ncclDataType_t type, const void* a, const void* b) {
  if (loadBits(type, a) == loadBits(type, b)) return true;
  return std::isnan(loadElement(type, a)) && std::isnan(loadElement(type, b));
}

int DispatchProblem::wireScaleBytes() const {
  const int blocks = (hidden + NCCL_MOE_SCALE_BLOCK - 1) / NCCL_MOE_SCALE_BLOCK;
  if (quant == ncclMoeQuantFp8) return 4 * blocks;
  if (quant == ncclMoeQuantFp8Ue8m0) return (blocks + 3) / 4 * 4;
  return scaleBytes;
}

std::vector<int> blockPlacement(int nExperts, int nRanks) {
  std::vector<int> map;
  for (int rank = 0; rank < nRanks; rank++) {
    const int count = nExperts / nRanks + (rank < nExperts % nRanks ? 1 : 0);
    map.insert(map.end(), static_cast<size_t>(count), rank);
  }
  return map;
}

Reference::Reference(const DispatchProblem& problem) : problem_(problem) {
  const DispatchProblem& p = problem_;
  const size_t nRanks = static_cast<size_t>(p.nRanks);
  const size_t nExperts = static_cast<size_t>(p.nExperts);
  localExpert_.assign(nExperts, -1);
  deliveries_.resize(nRanks);
  for (size_t e = 0; e < nExperts; e++) localExpert_[e] = deliveries_[p.expertToRank[e]].nLocal++;
  // selection[s][t*E + e]: which k of the token names the expert.
  std::vector<std::vector<int8_t>> selection(nRanks);
  rowOf_.resize(nRanks);
  cast_.resize(nRanks);
  for (size_t s = 0; s < nRanks; s++) {
    const Source& source = p.sources[s];
    const size_t nTokens = static_cast<size_t>(source.nTokens);
    const size_t topK = static_cast<size_t>(p.topK);
    selection[s].assign(nTokens * nExperts, -1);
    rowOf_[s].assign(nTokens * topK, -1);
    if (p.quant != ncclMoeQuantNone) {
      const size_t hidden = static_cast<size_t>(p.hidden);
      const size_t scaleBytes = static_cast<size_t>(p.wireScaleBytes());
      cast_[s].x.resize(nTokens * hidden);
      cast_[s].scales.resize(nTokens * scaleBytes);
      for (size_t t = 0; t < nTokens; t++) {
        quantise(p, &source.x[t * hidden * 2], &cast_[s].x[t * hidden], &cast_[s].scales[t * scaleBytes]);
      }
    }
    for (size_t t = 0; t < nTokens; t++) {
      for (size_t k = 0; k < topK; k++) {
        const int64_t expert = source.topkIdx[t * topK + k];
        if (expert >= 0) selection[s][t * nExperts + static_cast<size_t>(expert)] = static_cast<int8_t>(k);
      }
    }
  }
  for (int rank = 0; rank < p.nRanks; rank++) {
    Delivery& d = deliveries_[rank];
    d.expertCounts.assign(static_cast<size_t>(d.nLocal), 0);
    int64_t next = 0;
    if (p.layout == ncclMoeLayoutRankMajor) {
      for (int s = 0; s < p.nRanks; s++) {
        for (int t = 0; t < p.sources[s].nTokens; t++) {
          bool here = false;
          for (int e = 0; e < p.nExperts; e++) {
            if (p.expertToRank[e] != rank) continue;
            const int k = selection[s][static_cast<size_t>(t) * nExperts + static_cast<size_t>(e)];
            if (k < 0) continue;
            here = true;
            d.expertCounts[localExpert_[e]]++;
            rowOf_[s][t * p.topK + k] = next;
          }
          if (here) d.rows.push_back(Row{next++, s, t, -1, -1});
        }
      }
      d.nRows = d.span = next;
      continue;
    }
    const int64_t plane = static_cast<int64_t>(p.nRanks) * p.maxTokens;
    for (int e = 0; e < p.nExperts; e++) {
      if (p.expertToRank[e] != rank) continue;
      const int local = localExpert_[e];
      if (p.layout == ncclMoeLayoutExpertPadded) next = local * plane;
      d.expertOffsets.push_back(static_cast<int>(next));
      for (int s = 0; s < p.nRanks; s++) {
        for (int t = 0; t < p.sources[s].nTokens; t++) {
          const int k = selection[s][static_cast<size_t>(t) * nExperts + static_cast<size_t>(e)];
          if (k < 0) continue;
          d.rows.push_back(Row{next, s, t, k, local});
          d.expertCounts[local]++;
          rowOf_[s][t * p.topK + k] = next++;
        }
      }
      if (p.layout == ncclMoeLayoutExpertMajor) {
        while (next % p.expertAlignment != 0) next++;
      }
    }
    d.expertOffsets.push_back(static_cast<int>(next));
    if (p.layout == ncclMoeLayoutExpertPadded) {
      d.nRows = static_cast<int64_t>(d.rows.size());
      d.span = d.nLocal * plane;
      d.expertOffsets.clear();
    } else {
      d.nRows = d.span = next;
    }
  }
}

int64_t Reference::rowOf(int source, int token, int k) const { return rowOf_[source][token * problem_.topK + k]; }

int Reference::rankOf(int source, int token, int k) const {
  const int64_t expert = problem_.sources[source].topkIdx[token * problem_.topK + k];
  return expert < 0 ? -1 : problem_.expertToRank[expert];
}

void Reference::dispatch(int rank, int64_t capacity, DispatchImage* image) const {
  const DispatchProblem& p = problem_;
  const Delivery& d = deliveries_[rank];
  const size_t rowBytes = p.rowBytes();
  const size_t scaleBytes = static_cast<size_t>(p.wireScaleBytes());
  for (const Row& r : d.rows) {
    const Source& source = p.sources[r.source];
    const size_t token = static_cast<size_t>(r.token);
    const size_t index = static_cast<size_t>(r.row);
    const uint8_t* scales = nullptr;
    if (p.quant == ncclMoeQuantNone) {
      memcpy(&image->x[index * rowBytes], &source.x[token * rowBytes], rowBytes);
      if (scaleBytes != 0) scales = &source.scales[token * scaleBytes];
    } else {
      const Source& cast = cast_[r.source];
      memcpy(&image->x[index * rowBytes], &cast.x[token * rowBytes], rowBytes);
      scales = &cast.scales[token * scaleBytes];
    }
    if (!image->scales.empty() && p.scaleLayout == ncclMoeScaleRowMajor) {
      memcpy(&image->scales[index * scaleBytes], scales, scaleBytes);
    } else if (!image->scales.empty()) {
      const size_t words = scaleBytes / 4;
      const size_t plane = static_cast<size_t>(p.nRanks) * static_cast<size_t>(p.maxTokens);
      for (size_t w = 0; w < words; w++) {
        const size_t word = p.layout == ncclMoeLayoutExpertPadded ? (index / plane * words + w) * plane + index % plane
                                                                  : w * static_cast<size_t>(capacity) + index;
        memcpy(&image->scales[4 * word], &scales[4 * w], 4);
      }
    }
    if (p.layout == ncclMoeLayoutRankMajor) {
      for (int k = 0; k < p.topK; k++) {
        const bool here = rankOf(r.source, r.token, k) == rank;
        const size_t from = token * static_cast<size_t>(p.topK) + static_cast<size_t>(k);
        const size_t to = index * static_cast<size_t>(p.topK) + static_cast<size_t>(k);
        if (!image->topkIdx.empty()) {
          image->topkIdx[to] = here ? localExpert_[source.topkIdx[from]] : -1;
        }
        if (!image->weights.empty()) image->weights[to] = here ? source.topkWeights[from] : 0.0f;
      }
    } else if (!image->weights.empty()) {
      image->weights[index] = source.topkWeights[token * static_cast<size_t>(p.topK) + static_cast<size_t>(r.k)];
    }
  }
  if (!image->count.empty()) image->count[0] = static_cast<int>(d.nRows);
  for (size_t e = 0; e < d.expertCounts.size() && e < image->expertCounts.size(); e++) {
    image->expertCounts[e] = d.expertCounts[e];
  }
  if (!image->expertOffsets.empty()) image->expertOffsets = d.expertOffsets;
}

std::string compareDispatch(const Reference& reference, int rank, const DispatchImage& expected,
                            const DispatchImage& got) {
  const DispatchProblem& p = reference.problem();
  const Delivery& d = reference.delivery(rank);
  std::string difference = compareInts("recvCount", expected.count, got.count);
  if (difference.empty()) difference = compareInts("expertCounts", expected.expertCounts, got.expertCounts);
  if (difference.empty()) difference = compareInts("expertOffsets", expected.expertOffsets, got.expertOffsets);
  if (difference.empty()) difference = compareInts("recvTopkIdx", expected.topkIdx, got.topkIdx);
  if (difference.empty()) difference = compareInts("recvWeights", expected.weights, got.weights);
  if (difference.empty()) difference = compareInts("recvScales", expected.scales, got.scales);
  if (!difference.empty()) return difference;
  if (expected.x.size() != got.x.size()) return "recvX: sizes differ";
  const size_t rowBytes = p.rowBytes();
  const size_t element = elementBytes(p.wireType());
  for (size_t i = 0; i < got.x.size(); i += element) {
    if (memcmp(&expected.x[i], &got.x[i], element) == 0) continue;
    // Only the cast may choose which NaN it writes; everything else is a copy.
    if (p.quant != ncclMoeQuantNone && sameElement(ncclMoeFloat8e4m3, &expected.x[i], &got.x[i])) continue;
    return format("recvX %s element %zu is %g, expected %g", rowName(d, static_cast<int64_t>(i / rowBytes)).c_str(),
                  i % rowBytes / element, static_cast<double>(loadElement(p.wireType(), &got.x[i])),
                  static_cast<double>(loadElement(p.wireType(), &expected.x[i])));
  }
  return "";
}

void expectCombine(const Reference& reference, const CombineProblem& c, int rank, CombineImage* image) {
  const DispatchProblem& p = reference.problem();
  const Source& own = p.sources[rank];
  const size_t element = elementBytes(c.type);
  const size_t rowBytes = static_cast<size_t>(c.hidden) * element;
  const bool rankMajor = p.layout == ncclMoeLayoutRankMajor;
  std::vector<float> sum(static_cast<size_t>(c.hidden));
  std::vector<float> partial(static_cast<size_t>(c.hidden));
  // Adds the row that selection k has on its rank.
  const auto add = [&](int t, int k, std::vector<float>* to) {
    const size_t home = static_cast<size_t>(reference.rankOf(rank, t, k));
    const size_t row = static_cast<size_t>(reference.rowOf(rank, t, k));
    for (size_t i = 0; i < to->size(); i++) {
      float value = loadElement(c.type, &c.x[home][row * rowBytes + i * element]);
      if (c.weighted) value = value * c.weights[home][row];
      (*to)[i] = (*to)[i] + value;
    }
  };
  for (int t = 0; t < own.nTokens; t++) {
    sum.assign(sum.size(), 0.0f);
    if (c.exact) {
      for (int k = 0; k < p.topK; k++) {
        if (reference.rankOf(rank, t, k) >= 0) add(t, k, &sum);
      }
    } else {
      for (int home = 0; home < p.nRanks; home++) {
        partial.assign(partial.size(), 0.0f);
        bool any = false;
        for (int k = 0; k < p.topK; k++) {
          if (reference.rankOf(rank, t, k) != home || (rankMajor && any)) continue;
          add(t, k, &partial);
          any = true;
        }
        if (any && c.cast) castAndBack(&partial);
        for (size_t i = 0; any && i < sum.size(); i++) {
          if (c.cast) {
            sum[i] = sum[i] + partial[i];
            continue;
          }
          uint32_t rounded = 0;
          storeElement(c.type, partial[i], &rounded);
          sum[i] = sum[i] + loadElement(c.type, &rounded);
        }
      }
    }
    for (size_t i = 0; i < sum.size(); i++) {
      storeElement(c.type, sum[i], &image->out[static_cast<size_t>(t) * rowBytes + i * element]);
    }
    for (int k = 0; c.withGradWeights && k < p.topK; k++) {
      const int home = reference.rankOf(rank, t, k);
      float gradient = 0.0f;
      if (home >= 0) {
        const size_t row = static_cast<size_t>(reference.rowOf(rank, t, k));
        const size_t index = rankMajor ? row * static_cast<size_t>(p.topK) + static_cast<size_t>(k) : row;
        gradient = c.gradWeights[home][index];
      }
      image->gradTopkWeights[t * p.topK + k] = gradient;
    }
  }
}

std::string compareCombine(const Reference& reference, const CombineProblem& c, int rank, const CombineImage& expected,
                           const CombineImage& got) {
  const DispatchProblem& p = reference.problem();
  const size_t element = elementBytes(c.type);
  const size_t rowBytes = static_cast<size_t>(c.hidden) * element;
  if (expected.out.size() != got.out.size()) return "out: sizes differ";
  for (size_t i = 0; i < got.out.size(); i += element) {
    if (sameElement(c.type, &expected.out[i], &got.out[i])) continue;
    return format("out token %zu element %zu is %.9g, expected %.9g", i / rowBytes, i % rowBytes / element,
                  static_cast<double>(loadElement(c.type, &got.out[i])),
                  static_cast<double>(loadElement(c.type, &expected.out[i])));
  }
  const std::string difference = compareInts("gradTopkWeights", expected.gradTopkWeights, got.gradTopkWeights);
  if (!difference.empty()) return difference;
  // Half a unit in the last place of each rounding, relative to the magnitudes that were added.
  const Format f = formatOf(c.type);
  const double typeError = std::ldexp(1.0, -f.mantissaBits - 1);
  const double typeTiny = std::ldexp(1.0, f.minExponent - f.mantissaBits);
  const double floatError = std::ldexp(1.0, -24) * (2 * p.topK + 2);
  // A cast sum is off by half a unit of e4m3 in its own magnitude, or of the smallest number of its block; of that the
  // magnitude is at most this.
  const auto blockMagnitude = [&](int t, size_t i) {
    double most = 0;
    const size_t first = i / NCCL_MOE_SCALE_BLOCK * NCCL_MOE_SCALE_BLOCK;
    for (size_t j = first; j < std::min(static_cast<size_t>(c.hidden), first + NCCL_MOE_SCALE_BLOCK); j++) {
      for (int k = 0; k < p.topK; k++) {
        const int home = reference.rankOf(rank, t, k);
        if (home < 0) continue;
        const size_t row = static_cast<size_t>(reference.rowOf(rank, t, k));
        double value = loadElement(c.type, &c.x[home][row * rowBytes + j * element]);
        if (c.weighted) value *= c.weights[home][row];
        if (std::fabs(value) > most) most = std::fabs(value); // false for a NaN
      }
    }
    return most * p.topK;
  };
  for (int t = 0; t < p.sources[rank].nTokens; t++) {
    for (size_t i = 0; i < static_cast<size_t>(c.hidden); i++) {
      double sum = 0;
      double magnitude = 0;
      std::vector<bool> added(static_cast<size_t>(p.nRanks), false);
      for (int k = 0; k < p.topK; k++) {
        const int home = reference.rankOf(rank, t, k);
        if (home < 0) continue;
        if (p.layout == ncclMoeLayoutRankMajor && added[home]) continue;
        added[home] = true;
        const size_t row = static_cast<size_t>(reference.rowOf(rank, t, k));
        double value = loadElement(c.type, &c.x[home][row * rowBytes + i * element]);
        if (c.weighted) value *= c.weights[home][row];
        sum += value;
        magnitude += std::fabs(value);
      }
      const double value = loadElement(c.type, &got.out[static_cast<size_t>(t) * rowBytes + i * element]);
      if (!std::isfinite(value) || !std::isfinite(magnitude)) continue;
      double bound = magnitude * (2.5 * typeError + floatError) + (p.nRanks + 1) * typeTiny;
      if (c.cast) bound += magnitude * 0x1p-4 * 1.01 + p.nRanks * (blockMagnitude(t, i) / 448.0 * 0x1p-10 + 0x1p-64);
      if (std::fabs(value - sum) > bound) {
        return format("out token %d element %zu is %.9g, the sum in FP64 is %.9g", t, i, value, sum);
      }
    }
  }
  return "";
}

} // namespace moe::test
