// The sum of a token's rows by a warp, through its ring (row_mover.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/row_mover.cuh"

namespace moe {

// Sixteen bytes of a row as floats, and back.
template <class T> struct Vec;
template <> struct Vec<float> {
  static constexpr int kElems = 4;
  static __device__ __forceinline__ void load(const uint4& v, float* f) {
    f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y), f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ uint4 store(const float* f) {
    return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
  }
};
template <> struct Vec<__nv_bfloat16> {
  static constexpr int kElems = 8;
  static __device__ __forceinline__ void load(const uint4& v, float* f) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      f[2 * i] = __uint_as_float(words[i] << 16);
      f[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint4 store(const float* f) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};
template <> struct Vec<__half> {
  static constexpr int kElems = 8;
  static __device__ __forceinline__ void load(const uint4& v, float* f) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      f[2 * i] = pair.x;
      f[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ uint4 store(const float* f) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const __half2 pair = __floats2half2_rn(f[2 * i], f[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

struct RowList {
  const uint4* rows[64];
  float weights[32];
};

// How the rows of a list are added.
enum class Sum {
  plain,    // as they are
  weighted, // times their weights, each product rounded
  mixed     // the first nOwn weighted, and their sum rounded to the type; that is added after nBefore of the others
};

template <int kElems> __device__ __forceinline__ void add(float* acc, const float* f) {
#pragma unroll
  for (int e = 0; e < kElems; e++) acc[e] = __fadd_rn(acc[e], f[e]);
}
template <int kElems> __device__ __forceinline__ void addProduct(float* acc, float w, const float* f) {
#pragma unroll
  for (int e = 0; e < kElems; e++) acc[e] = __fadd_rn(acc[e], __fmul_rn(w, f[e]));
}

// out = the sum of nRows >= 1 rows of nVec vectors.
template <class T, Sum kSum>
__device__ __forceinline__ void sumRows(const RowList& list, int nRows, int nOwn, int nBefore, int nVec, uint4* ring,
                                        uint4* out) {
  constexpr int kElems = Vec<T>::kElems;
  const int lane = threadIdx.x & 31;
  const int nItems = nRows * ((nVec + 32 * kPieceVectors - 1) / (32 * kPieceVectors));
  ring += lane;
  int issueRow = 0, issueVec = lane, issueSlot = 0, issued = 0;
  const auto issue = [&] {
    if (issued < nItems) {
      const uint4* row = list.rows[issueRow] + issueVec;
      uint4* slot = ring + issueSlot * (kPieceVectors * 32);
#pragma unroll
      for (int u = 0; u < kPieceVectors; u++) {
        if (issueVec + 32 * u < nVec) copyAsync(slot + 32 * u, row + 32 * u);
      }
      issued++;
      issueSlot = issueSlot == kRingPieces - 1 ? 0 : issueSlot + 1;
      if (++issueRow == nRows) {
        issueRow = 0;
        issueVec += 32 * kPieceVectors;
      }
    }
    commitCopies();
  };
#pragma unroll 1
  for (int n = 0; n < kRingPieces - 1; n++) issue();
  int readSlot = 0;
#pragma unroll 1
  for (int v = lane; v - lane < nVec; v += 32 * kPieceVectors) {
    float acc[kPieceVectors][kElems] = {};
    float own[kSum == Sum::mixed ? kPieceVectors : 1][kElems] = {};
#pragma unroll 1
    for (int row = 0; row < nRows; row++) {
      issue();
      awaitCopies<kRingPieces - 1>();
      const uint4* slot = ring + readSlot * (kPieceVectors * 32);
      readSlot = readSlot == kRingPieces - 1 ? 0 : readSlot + 1;
#pragma unroll
      for (int u = 0; u < kPieceVectors; u++) {
        float f[kElems];
        Vec<T>::load(slot[32 * u], f);
        if constexpr (kSum == Sum::plain) add<kElems>(acc[u], f);
        if constexpr (kSum == Sum::weighted) addProduct<kElems>(acc[u], list.weights[row], f);
        if constexpr (kSum == Sum::mixed) {
          if (row < nOwn) {
            addProduct<kElems>(own[u], list.weights[row], f);
            if (row == nOwn - 1) Vec<T>::load(Vec<T>::store(own[u]), own[u]);
          } else {
            if (row - nOwn == nBefore) add<kElems>(acc[u], own[u]);
            add<kElems>(acc[u], f);
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kPieceVectors; u++) {
      if (kSum == Sum::mixed && nBefore == nRows - nOwn) add<kElems>(acc[u], own[u]);
      if (v + 32 * u < nVec) storeVector(out + v + 32 * u, Vec<T>::store(acc[u]));
    }
  }
}

} // namespace moe
