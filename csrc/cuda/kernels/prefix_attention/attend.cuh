// The forward of prefix_attention and decoding on tensor cores: flash attention (Dao, 2023), with
// the prefix as one more segment of keys.
//
// A block has 16 packed rows a warp. All warps walk the same blocks of keys, which come through
// shared memory. A warp keeps its queries as fragments, and its results in registers:
//
//     scores [16, keys] = queries [16, channels] keys^T      in lane (g, t) = (lane / 4, lane % 4)
//     out [16, channels] += weights [16, keys] values        rows g and g + 8, columns 2 t, 2 t + 1
//
// So the weights are where the second product needs them, and a row's maximum and sum are those of
// four lanes.
#pragma once

#include "cuda/device/matrix_tile.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/kernels/prefix_attention/attention.cuh"

namespace glmkern::cuda {

// Blocks of keys and their values, some steps ahead of their use.
template <class Policy, class T, int kChannels, int kKeys, int kThreads, bool kWide>
class StagedKeys {
 public:
  using Tile = StagedTile<Policy, T, kKeys * kRowChunks<kChannels>, kThreads, kWide>;
  static constexpr int kBytes = 2 * Tile::kBytes;

  __device__ StagedKeys(uint4* memory, int channels)
      : keys_(memory), values_(memory + Tile::kBytes / 16), channels_(channels) {}

  __device__ void start(int step, const KeyBlock<T>& block) {
    const auto source = [&](auto from) {
      return [&, from](unsigned i) {
        const int key = i / kRowChunks<kChannels>, channel = i % kRowChunks<kChannels> * 8;
        return Chunk<T>{from(key, channel), key < block.count ? channels_ - channel : 0};
      };
    };
    const auto keys = [&](int i, int channel) { return block.key(i, channel); };
    const auto values = [&](int i, int channel) { return block.value(i, channel); };
    keys_.start(step, source(keys), place_in_tile<kChannels>);
    values_.start(step, source(values), place_in_tile<kChannels>);
  }
  __device__ void finish(int step) {
    keys_.finish(step, place_in_tile<kChannels>);
    values_.finish(step, place_in_tile<kChannels>);
  }

  __device__ const uint4* keys(int step) const { return keys_.chunks(step); }
  __device__ const uint4* values(int step) const { return values_.chunks(step); }

 private:
  Tile keys_, values_;
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

// The running softmax of a lane's two rows. `largest` is a row's largest exponent so far; `sum`
// adds up this lane's columns, as powers of 2 relative to it.
struct Softmax {
  float largest[2] = {kLowest, kLowest};
  float sum[2] = {};

  // Makes `scores` powers, and returns the factors for what is relative to the old maximum.
  template <int kTiles>
  __device__ void update(float (&scores)[kTiles][4], float slope, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = scores[0][2 * half];
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        most = fmaxf(most, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float now = fmaxf(largest[half], most * slope);
      shrink[half] = exp2_approximate(largest[half] - now);
      largest[half] = now;
      float added = 0;
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          scores[j][e] = exp2_approximate(fmaf(scores[j][e], slope, -now));
          added += scores[j][e];
        }
      }
      sum[half] = fmaf(sum[half], shrink[half], added);
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

// `hidden` in place of what a lane has in columns that its two rows do not see: row i sees the
// first seen[i].
template <int kTiles>
__device__ void hide_unseen(float (&x)[kTiles][4], const int (&seen)[2], float hidden) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTiles; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (8 * j + 2 * t + e % 2 >= seen[e / 2]) x[j][e] = hidden;
    }
  }
}

// Rounds a block's results to where they belong in x; the warp's begin with the block's row
// `warp_row`.
template <int kChannels, bool kWide, class T>
__device__ void store_results(const AttentionInputs& a, const QueryTask& task, int warp_row,
                              const float (&sums)[kChannels / 8][4], T* x) {
  const int channels = static_cast<int>(a.shape.channels), row = task.row + warp_row;
  const auto result = results_of(a, x, channels, task.token, task.group);
  __syncthreads();  // no warp needs a tile any more that the results take the place of
  store_rows<T, kChannels, kWide>(dynamic_shared_memory + warp_row * kRowChunks<kChannels>, sums,
                                  task.rows - row, channels,
                                  [&](int r) { return result(row + r); });
}

template <class Policy, class T, int kChannels, int kWarps, int kKeys, bool kWide>
__device__ void attend(const Attend& a) {
  constexpr int kRows = 16 * kWarps, kThreads = kWarps * kWarp, kTiles = kKeys / 8;
  using Keys = StagedKeys<Policy, T, kChannels, kKeys, kThreads, kWide>;
  static_assert(kRows * kRowChunks<kChannels> * 16 <= Keys::kBytes);
  const QueryTask task = task_of(a, kRows, blockIdx.x, gridDim.x);
  if (task.is_idle()) return;
  const KeyBlocks<T, kKeys> blocks(a, task, keys_of(a, task, kRows));
  const KeyRange range(a, task.split, blocks.count);
  if (range.begin >= range.end) return;

  const int channels = static_cast<int>(a.shape.channels);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int warp_row = threadIdx.x / kWarp * 16, row = task.row + warp_row;
  KeptRows<kChannels> queries;
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

  const int seen[2] = {task.seen_by(row + g, a.heads), task.seen_by(row + g + 8, a.heads)};
  const int least_seen = task.seen_by(row, a.heads);
  Softmax softmax;
  float out[kChannels / 8][4] = {};
  Keys staged(dynamic_shared_memory, channels);
  for_each_block<Policy>(
      staged, blocks, range.begin, range.end, [&](int step, const KeyBlock<T>& block) {
        float scores[kTiles][4] = {};
        add_products<Policy, T, kChannels>(scores, queries, staged.keys(step));
        if (blocks.seen_of(block, least_seen) < kKeys) {
          hide_unseen(scores, {blocks.seen_of(block, seen[0]), blocks.seen_of(block, seen[1])},
                      -INFINITY);
        }
        float shrink[2];
        softmax.update(scores, slope, shrink);
        scale_rows(out, shrink);
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          add_weighted_rows<Policy, T, kChannels>(out, as_fragment<T>(scores[j], scores[j + 1]),
                                                  staged.values(step), 8 * j);
        }
      });

  softmax.add_lanes();
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    factor[half] = softmax.sum[half] == 0 ? 0 : 1 / softmax.sum[half];
  }
  scale_rows(out, factor);
  const int64_t split = task.split * a.rows * a.shape.tokens * a.query_heads;
  if (a.lse != nullptr && t == 0) {
    const auto lse = results_of(a, a.lse + split, 1, task.token, task.group);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (row + g + 8 * half >= task.rows) continue;
      const float power = softmax.largest[half] + log2f(softmax.sum[half]);
      *lse(row + g + 8 * half) = softmax.sum[half] == 0 ? -INFINITY : power / kLog2E;
    }
  }
  if (a.splits > 1) {
    const auto partial =
        results_of(a, a.partial + split * channels, channels, task.token, task.group);
    store_float_rows<kChannels, kWide>(out, task.rows - row, channels,
                                       [&](int r) { return partial(row + r); });
    return;
  }
  store_results<kChannels, kWide>(a, task, warp_row, out, static_cast<T*>(a.out));
}

}  // namespace glmkern::cuda
