// Rows of half or bfloat16 that pass through shared memory, as tiles of matrix_tile.cuh and in the
// steps of staged_tile.cuh.
#pragma once

#include "cuda/device/matrix_tile.cuh"
#include "cuda/device/staged_tile.cuh"

namespace glmkern::cuda {

template <class Policy, class T, int kChannels, int kRows, int kThreads, bool kWide>
class StagedRows {
 public:
  using Tile = StagedTile<Policy, T, kRows * kRowChunks<kChannels>, kThreads, kWide>;
  static constexpr int kBytes = Tile::kBytes;

  __device__ explicit StagedRows(uint4* memory) : tile_(memory) {}

  // Channel c of row r is at from(r, c). Of rows `count` exist, and of channels `channels`.
  template <class From>
  __device__ void start(int step, int count, int channels, From from) {
    tile_.start(
        step,
        [&](Number i) {
          const int row = row_of(i), channel = 8 * (i.thread % kRowChunks<kChannels>);
          return Chunk<T>{from(row, channel), row < count ? channels - channel : 0};
        },
        place);
  }
  __device__ void finish(int step) { tile_.finish(step, place); }

  __device__ const uint4* rows(int step) const { return tile_.chunks(step); }

 private:
  // A thread has chunks of one column, some rows apart. Written so that all of them take one
  // computation, and constants.
  using Number = ChunkNumber<kThreads>;
  static constexpr int kRowsApart = kThreads / kRowChunks<kChannels>;
  static_assert(kThreads % kRowChunks<kChannels> == 0);

  static __device__ int row_of(Number i) {
    return i.thread / kRowChunks<kChannels> + i.k * kRowsApart;
  }
  // That of place_in_tile: rows apart differ in the bits of kRowsApart and higher ones.
  static __device__ unsigned place(Number i) {
    return (place_in_tile<kChannels>(i.thread) ^ i.k * kRowsApart % 8) + i.k * kThreads;
  }

  Tile tile_;
};

}  // namespace glmkern::cuda
