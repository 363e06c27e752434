// Tiles of half or bfloat16 in shared memory, rows of kChannels numbers, and the products of tensor
// cores with them. ptx.cuh says what fragments are.
//
// A chunk is 16 bytes of a row. Its place depends on the row, so that neither eight chunks of a row
// nor one chunk of eight rows have a bank in common:
//
//     chunk        0 1 2 3 4 5 6 7
//     of row 0     0 1 2 3 4 5 6 7
//     of row 1     1 0 3 2 5 4 7 6
//     of row 2     2 3 0 1 6 7 4 5
#pragma once

#include "cuda/device/policy.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/staged_tile.cuh"
#include "cuda/device/vec.cuh"

namespace glmkern::cuda {

template <int kChannels>
constexpr int kRowChunks = kChannels / 8;

// Of the i-th chunk, row by row.
template <int kChannels>
__device__ unsigned place_in_tile(unsigned i) {
  return i ^ i / kRowChunks<kChannels> % 8;
}

// Chunk `first` + `further` of a row. The two have no bit in common, and `first` is a constant: of
// the places of a row's chunks few are computed, and the rest lie at constant distances.
template <int kChannels>
__device__ unsigned chunk_place(unsigned row, unsigned first, unsigned further) {
  const unsigned place = row * kRowChunks<kChannels> + (further ^ row % 8);
  return (place ^ (first & 7u)) + (first & ~7u);
}

// 16 rows by 16 columns, as the instruction's A.
struct Fragment {
  uint32_t pairs[4];
};

// Columns 16 k to 16 k + 15 of the tile's rows from `row` on.
template <int kChannels>
__device__ Fragment load_fragment(const uint4* tile, int row, int k) {
  const unsigned lane = threadIdx.x % kWarp;
  Fragment f;
  load_matrices(f.pairs, tile + chunk_place<kChannels>(row + lane % 16, 2 * k, lane / 16));
  return f;
}

// kRowTiles times 16 rows of kChannels that a warp keeps. Of what it reads from shared memory each
// part serves all of them.
template <int kChannels, int kRowTiles>
class KeptRows {
 public:
  __device__ void load(const uint4* tile, int row) {
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
      for (int k = 0; k < kChannels / 16; k++) {
        parts_[i][k] = load_fragment<kChannels>(tile, row + 16 * i, k);
      }
    }
  }

  // Columns 16 k to 16 k + 15 of the i-th 16 rows.
  __device__ const Fragment& part(int i, int k) const { return parts_[i][k]; }

  // f(pair) for the bits of each two numbers.
  template <class F>
  __device__ void for_each(F f) {
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
      for (int k = 0; k < kChannels / 16; k++) {
#pragma unroll
        for (int pair = 0; pair < 4; pair++) f(parts_[i][k].pairs[pair]);
      }
    }
  }

 private:
  Fragment parts_[kRowTiles][kChannels / 16];
};

// sums [16 kRowTiles, 8 kTiles] += rows [16 kRowTiles, kChannels] times the tile's first 8 kTiles
// rows, transposed.
template <class Policy, class T, int kChannels, int kRowTiles, int kTiles>
__device__ void add_products(float (&sums)[kRowTiles][kTiles][4],
                             const KeptRows<kChannels, kRowTiles>& rows, const uint4* tile) {
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kChannels / 16; k += 2) {
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
      uint32_t b[4];
      load_matrices(b, tile + chunk_place<kChannels>(8 * j + lane % 8, 2 * k, lane / 8));
#pragma unroll
      for (int i = 0; i < kRowTiles; i++) {
        Policy::mma(sums[i][j], rows.part(i, k).pairs, {b[0], b[1]}, T{});
        Policy::mma(sums[i][j], rows.part(i, k + 1).pairs, {b[2], b[3]}, T{});
      }
    }
  }
}

// sums [16 kRowTiles, kChannels] += weights [16 kRowTiles, 16] times the tile's 16 rows from `row`
// on.
template <class Policy, class T, int kChannels, int kRowTiles>
__device__ void add_weighted_rows(float (&sums)[kRowTiles][kChannels / 8][4],
                                  const Fragment (&weights)[kRowTiles], const uint4* tile,
                                  int row) {
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kChannels / 8; j += 2) {
    if (j > 0 && j % 4 == 0) Policy::part_loads();
    uint32_t b[4];
    load_transposed(b, tile + chunk_place<kChannels>(row + lane % 16, j, lane / 16));
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
      Policy::mma(sums[i][j], weights[i].pairs, {b[0], b[1]}, T{});
      Policy::mma(sums[i][j + 1], weights[i].pairs, {b[2], b[3]}, T{});
    }
  }
}

// Two neighbouring results [16, 8], rounded, as the 16 columns of a fragment.
template <class T>
__device__ Fragment as_fragment(const float (&left)[4], const float (&right)[4]) {
  return {{rounded_pair(left[0], left[1], T{}), rounded_pair(left[2], left[3], T{}),
           rounded_pair(right[0], right[1], T{}), rounded_pair(right[2], right[3], T{})}};
}

// Results [16, 8 kTiles] times the factors of a lane's two rows.
template <int kTiles>
__device__ void scale_rows(float (&sums)[kTiles][4], const float (&factors)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) sums[j][e] *= factors[e / 2];
  }
}

// kRows rows of memory to a tile: row r is at from(r), r < count; zeros for the rest, and past
// `channels`.
template <class T, int kChannels, int kRows, int kThreads, bool kWide, class From>
__device__ void load_tile(uint4* tile, int count, int channels, From from) {
  constexpr int kChunks = kRowChunks<kChannels>;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool exists = row < count && 8 * chunk < channels;
    const Chunk<T> c{exists ? from(row) + 8 * chunk : nullptr, exists ? channels - 8 * chunk : 0};
    tile[place_in_tile<kChannels>(i)] = read_chunk<kWide>(c);
  }
}

// Of a warp's 16 rows, those below `count` to to(row): 16 bytes at a time where memory allows.
// `tile` has room for 16 rows.
template <class T, int kChannels, bool kWide, class To>
__device__ void store_rows(uint4* tile, const float (&sums)[kChannels / 8][4], int count,
                           int channels, To to) {
  constexpr int kChunks = kRowChunks<kChannels>;
  const unsigned g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  uint32_t* const words = reinterpret_cast<uint32_t*>(tile);
#pragma unroll
  for (int j = 0; j < kChunks; j++) {
    words[4 * chunk_place<kChannels>(g, j, 0) + t] = rounded_pair(sums[j][0], sums[j][1], T{});
    words[4 * chunk_place<kChannels>(g + 8, j, 0) + t] = rounded_pair(sums[j][2], sums[j][3], T{});
  }
  __syncwarp();
#pragma unroll 4
  for (unsigned i = threadIdx.x % kWarp; i < 16 * kChunks; i += kWarp) {
    const int row = i / kChunks, chunk = i % kChunks, left = channels - 8 * chunk;
    if (row >= count || left <= 0) continue;
    const uint4 bits = tile[place_in_tile<kChannels>(i)];
    T* const p = to(row) + 8 * chunk;
    if constexpr (kWide) {
      store_16(p, bits);
    } else {
      T numbers[8];
      memcpy(numbers, &bits, sizeof bits);
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (k < left) p[k] = numbers[k];
      }
    }
  }
}

// The same as they are, in float.
template <int kChannels, bool kWide, class To>
__device__ void store_float_rows(const float (&sums)[kChannels / 8][4], int count, int channels,
                                 To to) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = g + 8 * half;
    if (row >= count) continue;
    float* const p = to(row);
#pragma unroll
    for (int j = 0; j < kChannels / 8; j++) {
      const int column = 8 * j + 2 * t;
      const float x = sums[j][2 * half], y = sums[j][2 * half + 1];
      if constexpr (kWide) {
        if (column < channels) store(p + column, Vec<float, 2>{x, y});
      } else {
        if (column < channels) p[column] = x;
        if (column + 1 < channels) p[column + 1] = y;
      }
    }
  }
}

}  // namespace glmkern::cuda
