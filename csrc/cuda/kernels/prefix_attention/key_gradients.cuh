// The gradients of prefix_attention's keys and values on tensor cores, of the tokens and of the
// prefix. With P and dS as in query_gradient.cuh, dk = scale * dS^T q and dv = P^T dO.
//
// A block has 64 keys, and walks the packed rows that see them; rows come through shared memory. A
// token's keys are seen by its sequence from that token on, the prefix's by the whole batch. Where
// each sequence drops others of the prefix, a split has one sequence's rows. Two warps share 32
// keys, or 16, so that each has one gradient of them in registers:
//
//     warp of    keeps     finds, of a step's rows               passes on    adds up
//     dv         keys      P^T = exp(scale * keys q^T - lse)     P^T          dv += P^T dO
//     dk         values    values dO^T - D                                    dk += dS^T q
//
// dS^T is the product of both. In lane (g, t) are keys g and g + 8 of each 16, and rows 2 t and
// 2 t + 1, or channels, of each 8.
//
// Where keys are few, several blocks share the rows of one. Each writes its own sums, and these are
// added in a fixed order: no atomics, the same bits on every run.
#pragma once

#include <algorithm>

#include "cuda/device/passed_sums.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/device/staged_rows.cuh"
#include "cuda/kernels/prefix_attention/attention_mma.h"
#include "cuda/kernels/prefix_attention/key_task.cuh"

namespace glmkern::cuda {

// Zeros in place of P where rows do not see a warp's keys. Rows from `seen_by_all` on see all of
// them, and each key before the last is seen by the rows of one token more.
template <int kKeyTiles, int kTiles>
__device__ void hide_from_rows(float (&p)[kKeyTiles][kTiles][4], int row, int seen_by_all,
                               int heads) {
  if (row >= seen_by_all) return;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kKeyTiles; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int later = 16 * kKeyTiles - 1 - (16 * i + g + e / 2 * 8);  // keys after this one
      const int unseeing = seen_by_all - later * heads - row - 2 * t - e % 2;
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        if (8 * j < unseeing) p[i][j][e] = 0;
      }
    }
  }
}

template <class Policy, class T, int kChannels, int kKeyTiles, bool kWide>
struct KeyGradient {
  static constexpr int kKeys = 16 * kKeyTiles, kPairs = kMmaRows / kKeys;  // of a pair
  static constexpr int kThreads = 2 * kPairs * kWarp;
  using Stages = WithStages<Policy, 4>;
  static constexpr int kRows = kMmaGradientRows, kAhead = Stages::kStages - 1;
  static constexpr int kTileChunks = kMmaRows * kRowChunks<kChannels>;
  using Rows = StagedRows<Stages, T, kChannels, kRows, kThreads, kWide>;
  using Found = PassedSums<kKeyTiles, kRows / 8>;
  static constexpr int kRowBytes = 2 * Rows::kBytes;
  static constexpr int kBytes = std::max(2 * kTileChunks * 16, kRowBytes + kPairs * Found::kBytes);

  static __device__ void run(const AttentionGradients& a, int block) {
    const KeyTask<T> task(a, block, kMmaRows, kRows);
    if (task.is_idle()) return;
    const int warp = threadIdx.x / kWarp, pair = warp % kPairs, t = threadIdx.x % 4;
    const bool of_dv = warp < kPairs;
    const int warp_key = kKeys * pair;
    const auto load = [&](uint4* tile, const T* from, int stride) {
      load_tile<T, kChannels, kMmaRows, kThreads, kWide>(
          tile, task.keys - task.key, static_cast<int>(a.shape.channels),
          [&](int r) { return from + (task.key + r) * stride; });
    };
    load(dynamic_shared_memory, task.k, task.k_stride);
    load(dynamic_shared_memory + kTileChunks, task.v, task.v_stride);
    __syncthreads();
    KeptRows<kChannels, kKeyTiles> kept;
    kept.load(dynamic_shared_memory + (of_dv ? 0 : kTileChunks), warp_key);
    __syncthreads();  // no warp needs the tiles any more that rows take the place of

    const int seen_by_all = task.first_row_of(task.key + warp_key + kKeys - 1);
    const int number_at = 2 * task.first_number + (of_dv ? 0 : 1);  // lse or D
    Rows q(dynamic_shared_memory), dout(dynamic_shared_memory + Rows::kBytes / 16);
    const auto start = [&](int step, int row) {
      const int left = task.rows - row, channels = static_cast<int>(a.shape.channels);
      q.start(step, left, channels, [&](int r, int c) { return task.q(row + r, c); });
      dout.start(step, left, channels, [&](int r, int c) { return task.dout(row + r, c); });
    };
    const auto finish = [&](int step) {
      q.finish(step);
      dout.finish(step);
    };
    const Found found(dynamic_shared_memory + kRowBytes / 16);
    float sums[kKeyTiles][kChannels / 8][4] = {};  // dv or dk
#pragma unroll
    for (int step = 0; step < kAhead; step++) {
      const int row = task.begin + step * kRows;
      if (row < task.end) {
        start(step, row);
        finish(step);
      }
      end_of_starts<Stages>();
    }
#pragma unroll 1
    for (int row = task.begin, step = 0; row < task.end; row += kRows, step++) {
      wait_for_tiles<Stages>();
      __syncthreads();
      const float* const numbers = &a.numbers->lse + (number_at + 2 * (row + 2 * t));
      float number[kRows / 8][2] = {};  // on their way while the products are made
#pragma unroll
      for (int j = 0; j < kRows / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (row + 2 * t + 8 * j + e < task.rows) number[j][e] = numbers[2 * (8 * j + e)];
        }
      }
      float x[kKeyTiles][kRows / 8][4] = {};  // P^T, or dP^T - D, then dS^T
      add_products<Policy, T>(x, kept, of_dv ? q.rows(step) : dout.rows(step));
      subtract_numbers(x, of_dv, a.slope, [&](int, int j, int e) { return number[j][e % 2]; });
      if (of_dv) {
        hide_from_rows(x, row, seen_by_all, static_cast<int>(a.shape.heads));
        found.put(pair, x);
      }
      const bool more = row + kAhead * kRows < task.end;
      if (more) start(step + kAhead, row + kAhead * kRows);
      end_of_starts<Stages>();
      __syncthreads();
      if (!of_dv) found.get(pair, x, [](float& ds, float p) { ds *= p; });
#pragma unroll
      for (int j = 0; j < kRows / 8; j += 2) {
        Fragment weights[kKeyTiles];
#pragma unroll
        for (int i = 0; i < kKeyTiles; i++) weights[i] = as_fragment<T>(x[i][j], x[i][j + 1]);
        add_weighted_rows<Policy, T, kChannels>(sums, weights,
                                                of_dv ? dout.rows(step) : q.rows(step), 8 * j);
      }
      if (more) finish(step + kAhead);
    }

    __syncthreads();  // no warp needs a tile any more that the results take the place of
    // Made anew: the loop has no registers for what only the end needs.
    const KeyTask<T> ended(a, block, kMmaRows, kRows);
    ended.with_results(a, [&](auto* dk, auto* dv, int64_t stride) {
      using Result = std::remove_reference_t<decltype(*dk)>;
      Result* const results = of_dv ? dv : dk;
      const float factor = of_dv ? 1 : a.scale;
      const int channels = static_cast<int>(a.shape.channels);
#pragma unroll
      for (int i = 0; i < kKeyTiles; i++) {
        const int tile_key = warp_key + 16 * i, key = ended.key + tile_key;
        const auto to = [&](int r) { return results + (key + r) * stride; };
        scale_rows(sums[i], {factor, factor});
        if constexpr (std::is_same_v<Result, float>) {
          store_float_rows<kChannels, kWide>(sums[i], ended.keys - key, channels, to);
        } else {
          uint4* const tile = dynamic_shared_memory + (of_dv ? 0 : kTileChunks);
          store_rows<T, kChannels, kWide>(tile + tile_key * kRowChunks<kChannels>, sums[i],
                                          ended.keys - key, channels, to);
        }
      }
    });
  }
};

}  // namespace glmkern::cuda
