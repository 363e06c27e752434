// The gradient of prefix_attention's queries on tensor cores. With P = exp(scale * q k^T - lse) and
// dS = P * (dO v^T - D), dq = scale * dS k.
//
// A block walks the keys that its rows see, as in attend.cuh: no sum is shared between blocks. The
// scores are computed a second time for the keys' gradients, which costs two products of seven and
// needs no atomics. A warp has 16 rows, and keeps their queries and dO: there are registers for
// keys on their way. query_gradient_pairs.cuh has another form, for chips whose copies need none.
#pragma once

#include <algorithm>

#include "cuda/kernels/prefix_attention/attend.cuh"

namespace glmkern::cuda {

// A block's queries and their dO, to two tiles of shared memory one after the other.
template <class T, int kChannels, int kThreads, bool kWide>
__device__ void load_gradient_rows(const AttentionGradients& a, const QueryTask& task) {
  const auto load = [&](uint4* tile, const PackedRows<const T>& rows) {
    load_tile<T, kChannels, kMmaRows, kThreads, kWide>(tile, task.rows - task.row,
                                                       static_cast<int>(a.shape.channels),
                                                       [&](int r) { return rows(task.row + r); });
  };
  load(dynamic_shared_memory, rows_of<T>(a, a.q, task.q_at, task.group));
  load(dynamic_shared_memory + kMmaRows * kRowChunks<kChannels>,
       rows_of<T>(a, a.dout, task.token * static_cast<int>(a.dout.stride), task.group));
}

template <class Policy, class T, int kChannels, bool kWide>
struct QueryGradient {
  static constexpr int kThreads = kMmaRows / 16 * kWarp;
  using Keys = StagedKeys<Policy, T, kChannels, kMmaKeys, kThreads, kWide>;
  static constexpr int kBytes = std::max(Keys::kBytes, 2 * kMmaRows * kRowChunks<kChannels> * 16);

  static __device__ void run(const AttentionGradients& a, int block, int all_blocks) {
    const QueryTask task = task_of_packed(a, a.sequences, kMmaRows, block, all_blocks);
    if (task.is_idle()) return;
    const KeyBlocks<T, kMmaKeys> blocks(a, task, task.seen(kMmaRows, a.heads));

    const int warp_row = threadIdx.x / kWarp * 16, row = task.row + warp_row;
    KeptRows<kChannels, 1> queries, douts;
    load_gradient_rows<T, kChannels, kThreads, kWide>(a, task);
    __syncthreads();
    queries.load(dynamic_shared_memory, warp_row);
    douts.load(dynamic_shared_memory + kMmaRows * kRowChunks<kChannels>, warp_row);
    __syncthreads();  // no warp needs the tiles any more that the keys take the place of

    const RowNumbers* const of_rows = a.numbers + numbers_at(a, task.group, task.token);
    RowNumbers numbers[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + threadIdx.x % kWarp / 4 + 8 * half;
      if (r < task.rows) numbers[half] = of_rows[r];
    }
    float dq[1][kChannels / 8][4] = {};
    Keys staged(dynamic_shared_memory, static_cast<int>(a.shape.channels));
    for_each_block<Policy>(
        staged, blocks, 0, blocks.count, [&](int step, const KeyBlock<T>& block) {
          float p[1][2][4] = {}, ds[1][2][4] = {};
          add_products<Policy, T>(p, queries, staged.keys(step));
          add_products<Policy, T>(ds, douts, staged.values(step));
          subtract_numbers(p, true, a.slope, [&](int, int, int e) { return numbers[e / 2].lse; });
          subtract_numbers(ds, false, 1, [&](int, int, int e) { return numbers[e / 2].delta; });
          hide_unseen(p, blocks, block, 0, row, 0);
#pragma unroll
          for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
              ds[0][j][e] *= p[0][j][e];
            }
          }
          add_weighted_rows<Policy, T, kChannels>(dq, {as_fragment<T>(ds[0][0], ds[0][1])},
                                                  staged.keys(step), 0);
        });

    scale_rows(dq[0], {a.scale, a.scale});
    __syncthreads();  // no warp needs a tile any more that the results take the place of
    store_results<kChannels, kWide>(a, task, row, dq,
                                    dynamic_shared_memory + warp_row * kRowChunks<kChannels>,
                                    static_cast<T*>(a.dq));
  }
};

}  // namespace glmkern::cuda
