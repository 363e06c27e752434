// The gradient of prefix_attention's queries as in query_gradient.cuh, by two warps that share 32
// rows, or 16: what a warp reads of shared memory serves twice as many products, which an A100's
// tensor cores need. Beside results of 32 rows there are registers for their queries or for their
// dO. Each warp adds up products with half of a step's keys, and needs what the other finds:
//
//     warp of    keeps      finds, of all keys                      passes on        adds up
//     queries    queries    P = exp(scale * queries keys^T - lse)   the other half   dq += dS keys
//     dO         dO         dO values^T - D                         the other half   dq += dS keys
//
// dS is the product of both. At the end one warp gets the other's sums.
#pragma once

#include "cuda/device/passed_sums.cuh"
#include "cuda/kernels/prefix_attention/query_gradient.cuh"

namespace glmkern::cuda {

template <class Policy, class T, int kChannels, int kRowTiles, bool kWide>
struct QueryGradientInPairs {
  static constexpr int kRows = 16 * kRowTiles, kPairs = kMmaRows / kRows;  // of a pair
  static constexpr int kThreads = 2 * kPairs * kWarp, kKeys = 2 * kMmaKeys;
  using Stages = WithStages<Policy, 2>;
  using Keys = StagedKeys<Stages, T, kChannels, kKeys, kThreads, kWide>;
  using Found = PassedSums<kRowTiles, kMmaKeys / 8>;
  using Sums = PassedSums<kRowTiles, kChannels / 8>;
  static constexpr int kBytes = Keys::kBytes + 2 * kPairs * Found::kBytes;
  static_assert(2 * kMmaRows * kRowChunks<kChannels> * 16 <= kBytes);
  static_assert(kPairs * Sums::kBytes <= kBytes);

  static __device__ void run(const AttentionGradients& a, int block, int all_blocks) {
    const QueryTask task = task_of_packed(a, a.sequences, kMmaRows, block, all_blocks);
    if (task.is_idle()) return;
    const KeyBlocks<T, kKeys> blocks(a, task, task.seen(kMmaRows, a.heads));

    const int warp = threadIdx.x / kWarp, pair = warp % kPairs, half = warp / kPairs;
    const bool of_queries = half == 0;
    const int row = task.row + kRows * pair;
    load_gradient_rows<T, kChannels, kThreads, kWide>(a, task);
    __syncthreads();
    KeptRows<kChannels, kRowTiles> kept;
    kept.load(dynamic_shared_memory + half * kMmaRows * kRowChunks<kChannels>, kRows * pair);
    __syncthreads();  // no warp needs the tiles any more that the keys take the place of

    float number[kRowTiles][2] = {};  // lse or D
    const RowNumbers* const of_rows = a.numbers + numbers_at(a, task.group, task.token);
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; i++) {
      const int r = row + threadIdx.x % kWarp / 4 + 8 * i;
      if (r < task.rows) number[i / 2][i % 2] = of_queries ? of_rows[r].lse : of_rows[r].delta;
    }
    Keys staged(dynamic_shared_memory, static_cast<int>(a.shape.channels));
    const Found found(dynamic_shared_memory + Keys::kBytes / 16);
    float dq[kRowTiles][kChannels / 8][4] = {};
    for_each_block<Stages>(
        staged, blocks, 0, blocks.count, [&](int step, const KeyBlock<T>& block) {
          const uint4* const tile = of_queries ? staged.keys(step) : staged.values(step);
          const auto find = [&](float (&x)[kRowTiles][2][4], int key) {
            add_products<Policy, T>(x, kept, tile + key * kRowChunks<kChannels>);
            subtract_numbers(x, of_queries, a.slope,
                             [&](int i, int, int e) { return number[i][e / 2]; });
            if (of_queries) hide_unseen(x, blocks, block, key, row, 0);
          };
          float others[kRowTiles][2][4] = {}, ds[kRowTiles][2][4] = {};
          find(others, kMmaKeys * (1 - half));
          found.put(warp, others);
          find(ds, kMmaKeys * half);
          __syncthreads();
          found.get(warp ^ kPairs, ds, [](float& x, float y) { x *= y; });
          Fragment weights[kRowTiles];
#pragma unroll
          for (int i = 0; i < kRowTiles; i++) weights[i] = as_fragment<T>(ds[i][0], ds[i][1]);
          add_weighted_rows<Policy, T, kChannels>(dq, weights, staged.keys(step), kMmaKeys * half);
        });

    __syncthreads();  // no warp needs a tile any more that the sums take the place of
    const Sums sums(dynamic_shared_memory);
    if (!of_queries) sums.put(pair, dq);
    __syncthreads();
    if (!of_queries) return;
    sums.get(pair, dq, [&](float& x, float y) { x = a.scale * (x + y); });
    __syncwarp();  // no lane needs the sums any more that the results take the place of
    // Made anew: the loop has no registers for what only the end needs.
    const QueryTask ended = task_of_packed(a, a.sequences, kMmaRows, block, all_blocks);
    store_results<kChannels, kWide>(
        a, ended, row, dq, dynamic_shared_memory + pair * Sums::kBytes / 16, static_cast<T*>(a.dq));
  }
};

}  // namespace glmkern::cuda
