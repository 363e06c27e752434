// The gradients of prefix_attention's keys and values on tensor cores, of the tokens and of the
// prefix. With P and dS as in query_gradient.cuh, dk = scale * dS^T q and dv = P^T dO.
//
// A block has 16 keys a warp, and walks the packed rows that see them; rows come through shared
// memory. A token's keys are seen by its sequence from that token on, the prefix's by the whole
// batch. Where each sequence drops others of the prefix, a split has one sequence's rows. In lane
// (g, t):
//
//     P^T [16, rows] = keys [16, channels] q^T       keys g and g + 8, rows 2 t and 2 t + 1
//     dv [16, channels] += P^T dO                    keys g and g + 8, channels 2 t and 2 t + 1
//
// Where keys are few, several blocks share the rows of one. Each writes its own sums, and these are
// added in a fixed order: no atomics, the same bits on every run.
#pragma once

#include "cuda/device/matrix_tile.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/kernels/prefix_attention/attention.cuh"
#include "cuda/kernels/prefix_attention/key_task.cuh"

namespace glmkern::cuda {

// Packed rows of q, or of dout, some steps ahead of their use.
template <class Policy, class T, int kChannels, int kRows, int kThreads, bool kWide>
class StagedRows {
 public:
  using Tile = StagedTile<Policy, T, kRows * kRowChunks<kChannels>, kThreads, kWide>;

  __device__ StagedRows(uint4* memory, const PackedRows<const T>& from, int count)
      : tile_(memory), from_(from), count_(count) {}

  // Rows from `row` on.
  __device__ void start(int step, int row) {
    tile_.start(
        step,
        [&](unsigned i) {
          const int r = row + i / kRowChunks<kChannels>, channel = i % kRowChunks<kChannels> * 8;
          return Chunk<T>{from_(r, channel), r < count_ ? from_.channels - channel : 0};
        },
        place_in_tile<kChannels>);
  }
  __device__ void finish(int step) { tile_.finish(step, place_in_tile<kChannels>); }

  __device__ const uint4* rows(int step) const { return tile_.chunks(step); }

 private:
  Tile tile_;
  PackedRows<const T> from_;
  int count_;
};

template <class Policy, class T, int kChannels, int kWarps, int kRows, bool kWide>
__device__ void key_gradients(const AttentionGradients& a) {
  constexpr int kKeys = 16 * kWarps, kThreads = kWarps * kWarp, kTiles = kRows / 8;
  constexpr int kKeysChunks = kKeys * kRowChunks<kChannels>;
  using Rows = StagedRows<Policy, T, kChannels, kRows, kThreads, kWide>;
  const KeyTask<T> task(a, blockIdx.x, kKeys, kRows);
  if (task.is_idle()) return;

  const int channels = static_cast<int>(a.shape.channels);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int warp_key = threadIdx.x / kWarp * 16, key = task.key + warp_key;
  // Keys pass through shared memory that rows take afterwards; the values stay behind it.
  uint4* const values_tile = dynamic_shared_memory + 2 * Rows::Tile::kBytes / 16;
  KeptRows<kChannels> keys;
  static_assert(kKeysChunks * 16 <= 2 * Rows::Tile::kBytes);
  load_tile<T, kChannels, kKeys, kThreads, kWide>(
      dynamic_shared_memory, task.keys - task.key, channels,
      [&](int r) { return task.k + (task.key + r) * task.k_stride; });
  load_tile<T, kChannels, kKeys, kThreads, kWide>(
      values_tile, task.keys - task.key, channels,
      [&](int r) { return task.v + (task.key + r) * task.v_stride; });
  __syncthreads();
  keys.load(dynamic_shared_memory, warp_key);
  __syncthreads();  // no warp needs the tile any more that rows take the place of
  const RowsInMemory<kChannels> values(values_tile, warp_key);

  const float slope = a.scale * kLog2E;
  // The first row that sees this lane's first key, and how many later the second one's is.
  const int seen_from = task.first_row_of(key + g), later = task.first_row_of(8);
  float dk[kChannels / 8][4] = {}, dv[kChannels / 8][4] = {};
  Rows q(dynamic_shared_memory, task.q, task.rows);
  Rows dout(dynamic_shared_memory + Rows::Tile::kBytes / 16, task.dout, task.rows);
  const int steps = ceil_quotient(task.end - task.begin, kRows);
#pragma unroll
  for (int step = 0; step < Policy::kStages - 1; step++) {
    if (step < steps) {
      q.start(step, task.begin + step * kRows);
      dout.start(step, task.begin + step * kRows);
      q.finish(step);
      dout.finish(step);
    }
    end_of_starts<Policy>();
  }
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    wait_for_tiles<Policy>();
    __syncthreads();
    const int ahead = step + Policy::kStages - 1, row = task.begin + step * kRows;
    if (ahead < steps) q.start(ahead, task.begin + ahead * kRows);

    RowNumbers numbers[kTiles][2] = {};  // on their way while the products are made
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int r = row + 8 * j + 2 * t + e;
        if (r < task.rows) numbers[j][e] = a.numbers[task.first_number + r];
      }
    }
    float p[kTiles][4] = {}, ds[kTiles][4] = {};
    add_products<Policy, T, kChannels>(p, keys, q.rows(step));
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        p[j][e] = exp2_approximate(fmaf(p[j][e], slope, -numbers[j][e % 2].lse));
        if (row + 8 * j + 2 * t + e % 2 < seen_from + e / 2 * later) p[j][e] = 0;
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      add_weighted_rows<Policy, T, kChannels>(dv, as_fragment<T>(p[j], p[j + 1]), dout.rows(step),
                                              8 * j);
    }
    // One of them at a time waits in registers.
    if (ahead < steps) {
      q.finish(ahead);
      dout.start(ahead, task.begin + ahead * kRows);
    }
    end_of_starts<Policy>();
    add_products<Policy, T, kChannels>(ds, values, dout.rows(step));
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) ds[j][e] = p[j][e] * (ds[j][e] - numbers[j][e % 2].delta);
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      add_weighted_rows<Policy, T, kChannels>(dk, as_fragment<T>(ds[j], ds[j + 1]), q.rows(step),
                                              8 * j);
    }
    if (ahead < steps) dout.finish(ahead);
  }

  scale_rows(dk, {a.scale, a.scale});
  __syncthreads();  // no warp needs a tile any more that the results take the place of
  // Made anew: the loop has no registers for what only the end needs.
  const KeyTask<T> ended(a, blockIdx.x, kKeys, kRows);
  const int left = ended.keys - ended.key - warp_key;
  ended.with_results(a, [&](auto* dk_of, auto* dv_of, int64_t stride) {
    using Result = std::remove_reference_t<decltype(*dk_of)>;
    const auto store = [&](uint4* tile, const float (&sums)[kChannels / 8][4], Result* results) {
      const auto to = [&](int r) { return results + (ended.key + warp_key + r) * stride; };
      if constexpr (std::is_same_v<Result, float>) {
        store_float_rows<kChannels, kWide>(sums, left, channels, to);
      } else {
        store_rows<T, kChannels, kWide>(tile, sums, left, channels, to);
      }
    };
    uint4* const tile = dynamic_shared_memory + warp_key * kRowChunks<kChannels>;
    store(tile, dk, dk_of);
    store(tile + kKeysChunks, dv, dv_of);
  });
}

}  // namespace glmkern::cuda
