// How blocks share a matrix [rows, hidden] where a thread stays with its columns: a block has a
// tile of columns and a split of consecutive rows. Its warps' lanes are the tile's vectors, and
// each of its kGroups warps takes every kGroups-th row of the split. With kGroups = 2, splits of 4
// rows:
//
//     row     0 1 2 3   4 5 6 7   8
//     warp    0 1 0 1   0 1 0 1   0
//     split   0 0 0 0   1 1 1 1   2
#pragma once

#include <cstdint>

#include "cuda/device/reduce.cuh"
#include "ops/ceil_div.h"

namespace glmkern::cuda {

constexpr int kGroups = 8;
constexpr int kTileThreads = kGroups * kWarp;

template <int kWidth>
constexpr int64_t tiles_of_row(int64_t hidden) {
  return ceil_div(hidden, kWarp * kWidth);
}

// What this block has where a row is `tiles` tiles and a split `piece` rows: rows begin <= row <
// end.
struct RowTile {
  __device__ RowTile(int64_t rows, int64_t piece, unsigned tiles)
      : tile(blockIdx.x % tiles), split(blockIdx.x / tiles), begin(split * piece) {
    end = begin + piece < rows ? begin + piece : rows;
  }

  unsigned tile, split;
  int64_t begin, end;
};

// The first of this thread's kWidth columns; it may lie past the row.
template <int kWidth>
__device__ int64_t column_of(int64_t tile) {
  return (tile * kWarp + threadIdx.x % kWarp) * kWidth;
}

// f(row) for each of this warp's rows begin <= row < end.
template <class F>
__device__ void for_each_row(int64_t begin, int64_t end, F f) {
  for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kGroups) f(row);
}

}  // namespace glmkern::cuda
