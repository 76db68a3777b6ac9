#include "perf/moe/checker.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "perf/moe/numeric.h"
#include "perf/moe/perf_error.h"

namespace moe::perf {

namespace {

constexpr size_t stageBytes = size_t{4} << 20; // what crosses to the host at a time

// Counts differing elements.
int64_t countWrong(const uint8_t* have, const uint8_t* want, size_t bytes, size_t elementBytes) {
  if (bytes == 0 || memcmp(have, want, bytes) == 0) return 0;
  int64_t wrong = 0;
  for (size_t i = 0; i < bytes; i += elementBytes) wrong += memcmp(have + i, want + i, elementBytes) != 0 ? 1 : 0;
  return wrong;
}

// Compares a tensor of nRows rows, and the guard behind it, with what expect writes for each row; expect leaves a row
// that must be untouched as it is, which is poisoned.
using Expect = std::function<void(int64_t row, uint8_t* bytes)>;
ncclResult_t checkRows(Device& device, const void* tensor, int64_t nRows, size_t rowBytes, size_t elementBytes,
                       const Expect& expect, int64_t* wrong) {
  const auto* at = static_cast<const uint8_t*>(tensor);
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(stageBytes / std::max<size_t>(1, rowBytes)));
  std::vector<uint8_t> have(std::max(guardBytes, rowBytes * std::min(step, std::max<int64_t>(1, nRows))));
  std::vector<uint8_t> want(std::max(guardBytes, rowBytes));
  for (int64_t begin = 0; begin < nRows; begin += step) {
    const int64_t end = std::min(nRows, begin + step);
    PERFCHECK(device.copyOut(have.data(), at + begin * rowBytes, (end - begin) * rowBytes));
    for (int64_t row = begin; row < end; row++) {
      memset(want.data(), poisonByte, rowBytes);
      expect(row, want.data());
      *wrong += countWrong(have.data() + (row - begin) * rowBytes, want.data(), rowBytes, elementBytes);
    }
  }
  PERFCHECK(device.copyOut(have.data(), at + nRows * rowBytes, guardBytes));
  memset(want.data(), poisonByte, guardBytes);
  *wrong += countWrong(have.data(), want.data(), guardBytes, elementBytes);
  return ncclSuccess;
}

// Writes a tensor row by row.
using Produce = std::function<void(int64_t row, uint8_t* bytes)>;
ncclResult_t writeRows(Device& device, void* tensor, int64_t nRows, size_t rowBytes, const Produce& produce) {
  if (nRows == 0 || rowBytes == 0) return ncclSuccess;
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(stageBytes / rowBytes));
  std::vector<uint8_t> stage(rowBytes * std::min(step, nRows));
  for (int64_t begin = 0; begin < nRows; begin += step) {
    const int64_t end = std::min(nRows, begin + step);
    for (int64_t row = begin; row < end; row++) produce(row, stage.data() + (row - begin) * rowBytes);
    PERFCHECK(device.copyIn(static_cast<uint8_t*>(tensor) + begin * rowBytes, stage.data(), (end - begin) * rowBytes));
  }
  return ncclSuccess;
}

// The delivered row at a slot; NULL where none is.
const DeliveredRow* rowAt(const Delivery& d, int64_t slot) {
  if (slot >= static_cast<int64_t>(d.rowAt.size()) || d.rowAt[slot] < 0) return nullptr;
  return &d.rows[d.rowAt[slot]];
}

ncclResult_t poison(Device& device, void* tensor, size_t bytes) {
  return tensor == nullptr ? ncclSuccess : device.fill(tensor, poisonByte, bytes + guardBytes);
}

// Scales in column-major order: word w of a slot lies at [w, slot] of its plane.
ncclResult_t checkScaleColumns(Device& device, const Buffers& b, const Case& c, int64_t* wrong) {
  const Shape& s = c.shape;
  const bool padded = s.layout == ncclMoeLayoutExpertPadded;
  const int64_t ld = padded ? int64_t{s.nRanks} * s.maxTokens : c.capacity;
  const int64_t nPlanes = padded ? nLocalExperts(s, c.rank) : 1;
  const int64_t words = s.scaleBytes / 4;
  std::vector<uint8_t> expected(static_cast<size_t>(nPlanes * words * ld) * 4, static_cast<uint8_t>(poisonByte));
  std::vector<uint8_t> row(s.recvRowBytes());
  std::vector<uint8_t> scales(s.scaleBytes);
  for (int64_t slot = 0; slot < static_cast<int64_t>(c.delivery.rowAt.size()); slot++) {
    const DeliveredRow* d = rowAt(c.delivery, slot);
    if (d == nullptr) continue;
    receivedRow(s, d->source, d->token, row.data(), scales.data());
    const int64_t plane = padded ? slot / ld : 0;
    const int64_t column = padded ? slot % ld : slot;
    for (int64_t w = 0; w < words; w++)
      memcpy(&expected[static_cast<size_t>((plane * words + w) * ld + column) * 4], &scales[w * 4], 4);
  }
  const size_t lineBytes = static_cast<size_t>(ld) * 4;
  return checkRows(
    device, b.recvScales, nPlanes * words, lineBytes, 4,
    [&](int64_t line, uint8_t* bytes) {
      if (lineBytes > 0) memcpy(bytes, &expected[line * lineBytes], lineBytes);
    },
    wrong);
}

ncclResult_t checkCounts(Device& device, const Buffers& b, const Case& c, int64_t* wrong) {
  const auto checkInts = [&](const void* tensor, const std::vector<int>& want) {
    return checkRows(
      device, tensor, static_cast<int64_t>(want.size()), 4, 4,
      [&](int64_t i, uint8_t* bytes) { memcpy(bytes, &want[i], 4); }, wrong);
  };
  PERFCHECK(checkInts(b.recvCount, {static_cast<int>(c.delivery.nRows)}));
  PERFCHECK(checkInts(b.expertCounts, c.delivery.counts));
  if (b.expertOffsets != nullptr) PERFCHECK(checkInts(b.expertOffsets, c.delivery.offsets));
  return ncclSuccess;
}

} // namespace

ncclResult_t writeInputs(Device& device, const Buffers& b, const Case& c) {
  const Shape& s = c.shape;
  PERFCHECK(writeRows(device, b.x, s.nTokens, s.sendRowBytes(),
                      [&](int64_t t, uint8_t* bytes) { tokenRow(s, c.rank, static_cast<int>(t), bytes); }));
  if (b.scales != nullptr)
    PERFCHECK(writeRows(device, b.scales, s.nTokens, s.scaleBytes,
                        [&](int64_t t, uint8_t* bytes) { tokenScales(s, c.rank, static_cast<int>(t), bytes); }));
  PERFCHECK(writeRows(device, b.topkIdx, s.nTokens, static_cast<size_t>(s.topK) * 8, [&](int64_t t, uint8_t* bytes) {
    const int* idx = c.routing.of(c.rank, static_cast<int>(t));
    for (int k = 0; k < s.topK; k++) {
      const int64_t id = idx[k];
      memcpy(bytes + k * 8, &id, 8);
    }
  }));
  return writeRows(device, b.topkWeights, s.nTokens, static_cast<size_t>(s.topK) * 4, [&](int64_t t, uint8_t* bytes) {
    for (int k = 0; k < s.topK; k++) {
      const float w = tokenWeight(s, c.rank, static_cast<int>(t), k);
      memcpy(bytes + k * 4, &w, 4);
    }
  });
}

ncclResult_t writeExpertRows(Device& device, const Buffers& b, const Case& c) {
  const Shape& s = c.shape;
  const size_t rowBytes = s.combineRowBytes();
  const auto nSlots = static_cast<int64_t>(c.delivery.rowAt.size());
  // NaNs where no row is.  EXPERT_PADDED has many more slots than rows.
  PERFCHECK(device.fill(b.expertX, 0xff, static_cast<size_t>(c.capacity) * rowBytes));
  for (int64_t begin = 0, end = 0; begin < nSlots; begin = end + 1) {
    for (end = begin; end < nSlots && rowAt(c.delivery, end) != nullptr;) end++;
    PERFCHECK(
      writeRows(device, static_cast<uint8_t*>(b.expertX) + begin * rowBytes, end - begin, rowBytes,
                [&](int64_t i, uint8_t* bytes) { expertRow(s, c.rank, *rowAt(c.delivery, begin + i), bytes); }));
  }
  return ncclSuccess;
}

ncclResult_t poisonDispatch(Device& device, const Buffers& b, const Case& c) {
  const Shape& s = c.shape;
  const auto slots = static_cast<size_t>(c.capacity);
  const size_t perRow = s.layout == ncclMoeLayoutRankMajor ? s.topK : 1;
  PERFCHECK(poison(device, b.recvX, slots * s.recvRowBytes()));
  PERFCHECK(poison(device, b.recvScales, slots * s.scaleBytes));
  PERFCHECK(poison(device, b.recvTopkIdx, slots * perRow * 4));
  PERFCHECK(poison(device, b.recvWeights, slots * perRow * 4));
  PERFCHECK(poison(device, b.recvCount, 4));
  PERFCHECK(poison(device, b.expertCounts, c.delivery.counts.size() * 4));
  return poison(device, b.expertOffsets, c.delivery.offsets.size() * 4);
}

ncclResult_t poisonCombine(Device& device, const Buffers& b, const Case& c) {
  return poison(device, b.out, static_cast<size_t>(c.shape.nTokens) * c.shape.combineRowBytes());
}

ncclResult_t checkDispatch(Device& device, const Buffers& b, const Case& c, int64_t* wrong) {
  const Shape& s = c.shape;
  std::vector<uint8_t> row(s.recvRowBytes());
  std::vector<uint8_t> scales(s.scaleBytes);
  PERFCHECK(checkRows(
    device, b.recvX, c.capacity, s.recvRowBytes(), typeBytes(s.recvType),
    [&](int64_t slot, uint8_t* bytes) {
      const DeliveredRow* d = rowAt(c.delivery, slot);
      if (d != nullptr) receivedRow(s, d->source, d->token, bytes, scales.data());
    },
    wrong));
  if (s.scaleBytes > 0 && s.scaleLayout == ncclMoeScaleColumnMajor) {
    PERFCHECK(checkScaleColumns(device, b, c, wrong));
  } else if (s.scaleBytes > 0) {
    PERFCHECK(checkRows(
      device, b.recvScales, c.capacity, s.scaleBytes, 1,
      [&](int64_t slot, uint8_t* bytes) {
        const DeliveredRow* d = rowAt(c.delivery, slot);
        if (d != nullptr) receivedRow(s, d->source, d->token, row.data(), bytes);
      },
      wrong));
  }
  const int first = firstExpert(s, c.rank);
  const int last = firstExpert(s, c.rank + 1);
  const auto here = [&](int expert) { return expert >= first && expert < last; };
  if (s.layout != ncclMoeLayoutRankMajor) {
    PERFCHECK(checkRows(
      device, b.recvWeights, c.capacity, 4, 4,
      [&](int64_t slot, uint8_t* bytes) {
        const DeliveredRow* d = rowAt(c.delivery, slot);
        if (d == nullptr) return;
        const float weight = tokenWeight(s, d->source, d->token, d->k);
        memcpy(bytes, &weight, 4);
      },
      wrong));
    return checkCounts(device, b, c, wrong);
  }
  const size_t lineBytes = static_cast<size_t>(s.topK) * 4;
  PERFCHECK(checkRows(
    device, b.recvTopkIdx, c.capacity, lineBytes, 4,
    [&](int64_t slot, uint8_t* bytes) {
      const DeliveredRow* d = rowAt(c.delivery, slot);
      if (d == nullptr) return;
      const int* idx = c.routing.of(d->source, d->token);
      for (int k = 0; k < s.topK; k++) {
        const int local = here(idx[k]) ? idx[k] - first : -1;
        memcpy(bytes + k * 4, &local, 4);
      }
    },
    wrong));
  PERFCHECK(checkRows(
    device, b.recvWeights, c.capacity, lineBytes, 4,
    [&](int64_t slot, uint8_t* bytes) {
      const DeliveredRow* d = rowAt(c.delivery, slot);
      if (d == nullptr) return;
      const int* idx = c.routing.of(d->source, d->token);
      for (int k = 0; k < s.topK; k++) {
        const float weight = here(idx[k]) ? tokenWeight(s, d->source, d->token, k) : 0.0f;
        memcpy(bytes + k * 4, &weight, 4);
      }
    },
    wrong));
  return checkCounts(device, b, c, wrong);
}

ncclResult_t checkCombine(Device& device, const Buffers& b, const Case& c, int64_t* wrong) {
  const Shape& s = c.shape;
  return checkRows(
    device, b.out, s.nTokens, s.combineRowBytes(), typeBytes(s.combineType),
    [&](int64_t t, uint8_t* bytes) { combinedRow(s, c.routing, c.rank, static_cast<int>(t), bytes); }, wrong);
}

} // namespace moe::perf
