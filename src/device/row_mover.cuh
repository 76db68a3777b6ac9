// Copies of rows by a warp, on their way through a ring in shared memory.
//
// Registers hold too few bytes to hide the memory's latency on a few SMs.  So each lane copies its vectors into places
// of its own by cp.async, several pieces ahead of the one that it stores (or adds, row_sum.cuh); no lane touches
// another's places, so waiting for its own copies is all the synchronisation there is.
#pragma once

#include "device/primitives.cuh"

namespace moe {

constexpr int kPieceVectors = 2; // of a lane in a piece of a row
constexpr int kRingPieces = 7;
constexpr int kRingBytes = kRingPieces * kPieceVectors * 32 * sizeof(uint4); // of a warp

__device__ __forceinline__ void copyAsync(uint4* shared, const uint4* global) {
  asm volatile(
    "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
    "l"(global)
    : "memory");
}
__device__ __forceinline__ void commitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kYounger> __device__ __forceinline__ void awaitCopies() { // but for so many groups
  asm volatile("cp.async.wait_group %0;" ::"n"(kYounger) : "memory");
}

class RowMover {
 public:
  __device__ __forceinline__ explicit RowMover(uint4* ring) : ring_(ring + (threadIdx.x & 31)) {}

  // Begins to read nVec vectors.
  __device__ __forceinline__ void start(const void* from, int nVec) {
    from_ = static_cast<const uint4*>(from);
    nVec_ = nVec;
    at_ = threadIdx.x & 31;
#pragma unroll 1
    for (int piece = 0; piece < kRingPieces; piece++) load(ring_ + piece * kPieceVectors * 32);
  }
  // Writes them.
  __device__ __forceinline__ void finish(uint4* to) {
    uint4* piece = ring_;
    for (int v = threadIdx.x & 31; v < nVec_; v += 32 * kPieceVectors) {
      awaitCopies<kRingPieces - 1>();
      uint4 data[kPieceVectors];
#pragma unroll
      for (int u = 0; u < kPieceVectors; u++) data[u] = piece[32 * u];
#pragma unroll
      for (int u = 0; u < kPieceVectors; u++) {
        if (v + 32 * u < nVec_) storeVector(to + v + 32 * u, data[u]);
      }
      load(piece);
      piece = piece == ring_ + (kRingPieces - 1) * kPieceVectors * 32 ? ring_ : piece + kPieceVectors * 32;
    }
  }

 private:
  // The row's next piece, if there is one.
  __device__ __forceinline__ void load(uint4* piece) {
#pragma unroll
    for (int u = 0; u < kPieceVectors; u++) {
      if (at_ + 32 * u < nVec_) copyAsync(piece + 32 * u, from_ + at_ + 32 * u);
    }
    commitCopies();
    at_ += 32 * kPieceVectors;
  }

  uint4* const ring_; // this lane's places
  const uint4* from_ = nullptr;
  int nVec_ = 0, at_ = 0;
};

} // namespace moe
