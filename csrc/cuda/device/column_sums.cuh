// Sums over the rows of a matrix [rows, hidden], in an order that depends on the shape alone.
//
// A block sums the rows of a split for a tile of columns (row_tiles.cuh): each warp its own rows in
// registers, then the warps' sums in shared memory, in order. launch_split_sums sums the splits:
//
//     row     0 1 2 3 4 5 6     3 splits of ceil(7 / 3) rows
//     split   0 0 0 1 1 1 2     result = split 0 + split 1 + split 2
#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/device/row_tiles.cuh"
#include "cuda/device/vec.cuh"

namespace glmkern::cuda {

// The block's sums for a tile of columns, of those of its warps' threads, in order: write(column,
// sum) gets them, one by one. The memory it shares is static: a barrier lies between two calls.
template <int kWidth, class Write>
__device__ void sum_groups(int64_t tile, int64_t hidden, const float (&sum)[kWidth], Write write) {
  constexpr int kColumns = kWarp * kWidth;
  // Column k of each lane side by side, and so far from column k + 1 that neither the writing of
  // one column by all lanes nor the reading of neighbouring columns has two words in a bank.
  constexpr int kStride = kWidth == 1 ? kWarp : kWarp + kWarp / kWidth;
  __shared__ float sums[kGroups][kWidth * kStride];
  const int group = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kWidth; k++) sums[group][k * kStride + lane] = sum[k];
  __syncthreads();
  for (int c = threadIdx.x; c < kColumns && tile * kColumns + c < hidden; c += kTileThreads) {
    const int at = c % kWidth * kStride + c / kWidth;
    float total = sums[0][at];
#pragma unroll
    for (int g = 1; g < kGroups; g++) total += sums[g][at];
    write(tile * kColumns + c, total);
  }
}

// add(row, sum) adds this thread's columns of a row begin <= row < end to sum; write(column, sum)
// as above. Once a kernel.
template <int kWidth, class Add, class Write>
__device__ void sum_columns(int64_t tile, int64_t hidden, int64_t begin, int64_t end, Add add,
                            Write write) {
  float sum[kWidth] = {};
  if (column_of<kWidth>(tile) < hidden) {
    for_each_row(begin, end, [&](int64_t row) { add(row, sum); });
  }
  sum_groups<kWidth>(tile, hidden, sum, write);
}

// result [hidden] from partial [splits, hidden].
template <class T>
static __global__ void __launch_bounds__(kTileThreads)
    split_sums_kernel(const float* __restrict__ partial, int64_t splits, int64_t hidden,
                      T* __restrict__ result) {
  const int64_t mine = column_of<1>(blockIdx.x);
  sum_columns<1>(
      blockIdx.x, hidden, 0, splits,
      [&](int64_t split, float (&sum)[1]) { sum[0] += partial[split * hidden + mine]; },
      [&](int64_t column, float sum) { result[column] = from_float<T>(sum); });
}

template <class T>
static void launch_split_sums(const char* name, const float* partial, int64_t splits,
                              int64_t hidden, void* result, void* stream) {
  launch(name, split_sums_kernel<T>, tiles_of_row<1>(hidden), kTileThreads, stream, partial, splits,
         hidden, static_cast<T*>(result));
}

}  // namespace glmkern::cuda
