// The gradient of prefix_attention's queries on tensor cores. With P = exp(scale * q k^T - lse) and
// dS = P * (dO v^T - D), dq = scale * dS k.
//
// A block walks the keys that its rows see, as in attend.cuh: no sum is shared between blocks. The
// scores are computed a second time for the keys' gradients, which costs two products of seven and
// needs no atomics.
#pragma once

#include "cuda/kernels/prefix_attention/attend.cuh"

namespace glmkern::cuda {

template <class Policy, class T, int kChannels, int kWarps, int kKeys, bool kWide>
__device__ void query_gradient(const AttentionGradients& a) {
  constexpr int kRows = 16 * kWarps, kThreads = kWarps * kWarp;
  constexpr int kRowsChunks = kRows * kRowChunks<kChannels>;
  using Keys = StagedKeys<Policy, T, kChannels, kKeys, kThreads, kWide>;
  const QueryTask task = task_of_packed(a, a.sequences, kRows, blockIdx.x, gridDim.x);
  if (task.is_idle()) return;
  const KeyBlocks<T, kKeys> blocks(a, task, task.seen(kRows, a.heads));

  const int channels = static_cast<int>(a.shape.channels);
  const int lane = threadIdx.x % kWarp, g = lane / 4;
  const int warp_row = threadIdx.x / kWarp * 16, row = task.row + warp_row;
  KeptRows<kChannels> queries, douts;
  const auto load = [&](uint4* tile, const PackedRows<const T>& rows) {
    load_tile<T, kChannels, kRows, kThreads, kWide>(tile, task.rows - task.row, channels,
                                                    [&](int r) { return rows(task.row + r); });
  };
  load(dynamic_shared_memory, rows_of<T>(a, a.q, task.q_at, task.group));
  load(dynamic_shared_memory + kRowsChunks,
       rows_of<T>(a, a.dout, task.token * static_cast<int>(a.dout.stride), task.group));
  __syncthreads();
  queries.load(dynamic_shared_memory, warp_row);
  douts.load(dynamic_shared_memory + kRowsChunks, warp_row);
  __syncthreads();  // no warp needs the tiles any more that the keys take the place of

  const int seen[2] = {task.seen_by(row + g, a.heads), task.seen_by(row + g + 8, a.heads)};
  const int least_seen = task.seen_by(row, a.heads);
  const RowNumbers* const of_rows = a.numbers + numbers_at(a, task.group, task.token);
  RowNumbers numbers[2] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + g + 8 * half;
    if (r < task.rows) numbers[half] = of_rows[r];
  }
  const float slope = a.scale * kLog2E;
  float dq[kChannels / 8][4] = {};
  Keys staged(dynamic_shared_memory, channels);
  for_each_block<Policy>(staged, blocks, 0, blocks.count, [&](int step, const KeyBlock<T>& block) {
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      const int at = key * kRowChunks<kChannels>;
      float p[2][4] = {}, ds[2][4] = {};
      add_products<Policy, T, kChannels>(p, queries, staged.keys(step) + at);
      add_products<Policy, T, kChannels>(ds, douts, staged.values(step) + at);
#pragma unroll
      for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          p[j][e] = exp2_approximate(fmaf(p[j][e], slope, -numbers[e / 2].lse));
        }
      }
      if (blocks.seen_of(block, least_seen) < kKeys) {
        hide_unseen(p, {blocks.seen_of(block, seen[0]) - key, blocks.seen_of(block, seen[1]) - key},
                    0);
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) ds[j][e] = p[j][e] * (ds[j][e] - numbers[e / 2].delta);
      }
      add_weighted_rows<Policy, T, kChannels>(dq, as_fragment<T>(ds[0], ds[1]), staged.keys(step),
                                              key);
    }
  });

  scale_rows(dq, {a.scale, a.scale});
  store_results<kChannels, kWide>(a, task, warp_row, dq, static_cast<T*>(a.dq));
}

}  // namespace glmkern::cuda
