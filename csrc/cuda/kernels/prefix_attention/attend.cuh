// The forward of prefix_attention and decoding on tensor cores: flash attention (Dao, 2023), with
// the prefix as one more segment of keys.
//
// A warp has 16 packed rows, or 32, and then what it reads of shared memory serves two products.
// All warps of a block walk the same blocks of keys, which come through shared memory. A warp keeps
// its queries as fragments, and its results in registers:
//
//     scores [16, keys] = queries [16, channels] keys^T      in lane (g, t) = (lane / 4, lane % 4)
//     out [16, channels] += weights [16, keys] values        rows g and g + 8, columns 2 t, 2 t + 1
//
// So the weights are where the second product needs them, and a row's maximum and sum are those of
// four lanes.
#pragma once

#include "cuda/device/shared_memory.cuh"
#include "cuda/device/staged_rows.cuh"
#include "cuda/kernels/prefix_attention/attention.cuh"
#include "cuda/kernels/prefix_attention/attention_mma.h"

namespace glmkern::cuda {

// Blocks of keys and their values, some steps ahead of their use.
template <class Policy, class T, int kChannels, int kKeys, int kThreads, bool kWide>
class StagedKeys {
 public:
  using Rows = StagedRows<Policy, T, kChannels, kKeys, kThreads, kWide>;
  static constexpr int kBytes = 2 * Rows::kBytes;

  __device__ StagedKeys(uint4* memory, int channels)
      : keys_(memory), values_(memory + Rows::kBytes / 16), channels_(channels) {}

  __device__ void start(int step, const KeyBlock<T>& block) {
    keys_.start(step, block.count, channels_, [&](int i, int c) { return block.key(i, c); });
    values_.start(step, block.count, channels_, [&](int i, int c) { return block.value(i, c); });
  }
  __device__ void finish(int step) {
    keys_.finish(step);
    values_.finish(step);
  }

  __device__ const uint4* keys(int step) const { return keys_.rows(step); }
  __device__ const uint4* values(int step) const { return values_.rows(step); }

 private:
  Rows keys_, values_;
  int channels_;
};

// f(step, block) for blocks begin to end, whose keys and values are there.
template <class Policy, class Keys, class Blocks, class F>
__device__ void for_each_block(Keys& staged, const Blocks& blocks, int begin, int end, F f) {
  const int steps = end - begin;
#pragma unroll
  for (int step = 0; step < Policy::kStages - 1; step++) {
    if (step < steps) {
      staged.start(step, blocks[begin + step]);
      staged.finish(step);
    }
    end_of_starts<Policy>();
  }
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    wait_for_tiles<Policy>();
    __syncthreads();
    const int ahead = step + Policy::kStages - 1;
    if (ahead < steps) staged.start(ahead, blocks[begin + ahead]);
    end_of_starts<Policy>();
    f(step, blocks[begin + step]);
    if (ahead < steps) staged.finish(ahead);
  }
}

// The running softmax of a lane's two rows. `sum` adds up this lane's columns, as powers of 2
// relative to `largest`. The row's largest exponent exceeds that by no more than kGrowth: as in
// FlashAttention-4, sums are not scaled for less.
struct Softmax {
  static constexpr float kGrowth = 8;  // powers up to 2^8 are as exact as those up to 1

  float largest[2] = {kLowest, kLowest};
  float sum[2] = {};

  // Makes `scores` powers. Where `largest` changes, f(factors) is to scale what is relative to it.
  template <int kTiles, class F>
  __device__ void update(float (&scores)[kTiles][4], float slope, F f) {
    float now[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = scores[0][2 * half];
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        most = fmaxf(most, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      now[half] = most * slope;
    }
    const bool grown[2] = {now[0] > largest[0] + kGrowth, now[1] > largest[1] + kGrowth};
    if (__any_sync(0xffffffffu, grown[0] || grown[1])) {
      float factors[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        factors[half] = grown[half] ? exp2_approximate(largest[half] - now[half]) : 1;
        if (grown[half]) largest[half] = now[half];
        sum[half] *= factors[half];
      }
      f(factors);
    }
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        scores[j][e] = exp2_approximate(fmaf(scores[j][e], slope, -largest[e / 2]));
        sum[e / 2] += scores[j][e];
      }
    }
  }

  __device__ void add_lanes() {
#pragma unroll
    for (float& s : sum) {
      s += __shfl_xor_sync(0xffffffffu, s, 1);
      s += __shfl_xor_sync(0xffffffffu, s, 2);
    }
  }
};

// `hidden` in place of what a warp's rows from `row` on do not see: column 0 is the block's key
// `first`. Few blocks have such numbers.
template <int kRowTiles, int kTiles, class Blocks, class Block>
__device__ void hide_unseen(float (&x)[kRowTiles][kTiles][4], const Blocks& blocks,
                            const Block& block, int first, int row, float hidden) {
  if (row >= blocks.first_row_of(block, first + 8 * kTiles - 1)) return;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTiles; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int seen_from = blocks.first_row_of(block, first + 8 * j + 2 * t + e % 2);
#pragma unroll
      for (int i = 0; i < kRowTiles; i++) {
        if (row + 16 * i + g + e / 2 * 8 < seen_from) x[i][j][e] = hidden;
      }
    }
  }
}

// Rounds a warp's results, of rows from `row` on, to where they belong in x. `tile` has room for
// them, and nobody needs what is there.
template <int kChannels, bool kWide, int kRowTiles, class T>
__device__ void store_results(const AttentionInputs& a, const QueryTask& task, int row,
                              const float (&sums)[kRowTiles][kChannels / 8][4], uint4* tile, T* x) {
  const int channels = static_cast<int>(a.shape.channels);
  const auto result = results_of(a, x, channels, task.token, task.group);
#pragma unroll
  for (int i = 0; i < kRowTiles; i++) {
    const int first = row + 16 * i;
    store_rows<T, kChannels, kWide>(tile + 16 * i * kRowChunks<kChannels>, sums[i],
                                    task.rows - first, channels,
                                    [&](int r) { return result(first + r); });
  }
}

// What a warp found for its rows, as results and their log-sum-exp, or as those of a split. The
// task is made anew: the loop has no registers for what only the end needs.
template <class T, int kChannels, int kWarps, bool kWide, int kRowTiles>
__device__ void store_attended(const Attend& a, Softmax (&softmax)[kRowTiles],
                               float (&out)[kRowTiles][kChannels / 8][4]) {
  const QueryTask task = task_of(a, 16 * kRowTiles * kWarps, blockIdx.x, gridDim.x);
  const int channels = static_cast<int>(a.shape.channels);
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int warp_row = threadIdx.x / kWarp * 16 * kRowTiles;
  const int64_t split = task.split * a.rows * a.shape.tokens * a.query_heads;
#pragma unroll
  for (int i = 0; i < kRowTiles; i++) {
    const int row = task.row + warp_row + 16 * i;
    softmax[i].add_lanes();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float sum = softmax[i].sum[half];
      factor[half] = sum == 0 ? 0 : 1 / sum;
      const int r = row + g + 8 * half;
      if (a.lse == nullptr || t != 0 || r >= task.rows) continue;
      const float power = softmax[i].largest[half] + log2f(sum);
      *results_of(a, a.lse + split, 1, task.token, task.group)(r) =
          sum == 0 ? -INFINITY : power / kLog2E;
    }
    scale_rows(out[i], factor);
    if (a.splits > 1) {
      const auto partial =
          results_of(a, a.partial + split * channels, channels, task.token, task.group);
      store_float_rows<kChannels, kWide>(out[i], task.rows - row, channels,
                                         [&](int r) { return partial(row + r); });
    }
  }
  if (a.splits > 1) return;
  __syncthreads();  // no warp needs a tile any more that the results take the place of
  store_results<kChannels, kWide>(a, task, task.row + warp_row, out,
                                  dynamic_shared_memory + warp_row * kRowChunks<kChannels>,
                                  static_cast<T*>(a.out));
}

template <class Policy, class T, int kChannels, int kWarps, int kRowTiles, bool kWide>
__device__ void attend(const Attend& a) {
  constexpr int kWarpRows = 16 * kRowTiles, kRows = kWarpRows * kWarps;
  constexpr int kKeys = kMmaKeys, kThreads = kWarps * kWarp;
  using Keys = StagedKeys<Policy, T, kChannels, kKeys, kThreads, kWide>;
  static_assert(kRows * kRowChunks<kChannels> * 16 <= Keys::kBytes);
  const QueryTask task = task_of(a, kRows, blockIdx.x, gridDim.x);
  if (task.is_idle()) return;
  const KeyBlocks<T, kKeys> blocks(a, task, keys_of(a, task, kRows));
  const KeyRange range(a, task.split, blocks.count);
  if (range.begin >= range.end) return;

  const int channels = static_cast<int>(a.shape.channels);
  const int warp_row = threadIdx.x / kWarp * kWarpRows, row = task.row + warp_row;
  KeptRows<kChannels, kRowTiles> queries;
  load_tile<T, kChannels, kRows, kThreads, kWide>(
      dynamic_shared_memory, task.rows - task.row, channels,
      [&, rows = rows_of<T>(a, a.q, task.q_at, task.group)](int r) { return rows(task.row + r); });
  __syncthreads();
  queries.load(dynamic_shared_memory, warp_row);
  __syncthreads();  // no warp needs the tile any more that the keys take the place of
  // The largest score is that of the largest product: the sign is the queries'.
  const float slope = a.scale == 0 ? 1 : fabsf(a.scale) * kLog2E;
  if (a.scale <= 0) {
    queries.for_each([&](uint32_t& pair) { pair = a.scale < 0 ? pair ^ 0x80008000u : 0; });
  }

  Softmax softmax[kRowTiles];
  float out[kRowTiles][kChannels / 8][4] = {};
  Keys staged(dynamic_shared_memory, channels);
  for_each_block<Policy>(
      staged, blocks, range.begin, range.end, [&](int step, const KeyBlock<T>& block) {
        float scores[kRowTiles][2][4] = {};
        add_products<Policy, T>(scores, queries, staged.keys(step));
        hide_unseen(scores, blocks, block, 0, row, -INFINITY);
        Fragment weights[kRowTiles];
#pragma unroll
        for (int i = 0; i < kRowTiles; i++) {
          softmax[i].update(scores[i], slope,
                            [&](const float (&factors)[2]) { scale_rows(out[i], factors); });
          weights[i] = as_fragment<T>(scores[i][0], scores[i][1]);
        }
        add_weighted_rows<Policy, T, kChannels>(out, weights, staged.values(step), 0);
      });

  store_attended<T, kChannels, kWarps, kWide>(a, softmax, out);
}

}  // namespace glmkern::cuda
