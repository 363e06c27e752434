// prefix_attention in float arithmetic: float32, more than 128 channels, and what the tensor cores
// of a chip lack. It serves tests and small models, so that it aims at few lines first.
//
// A block has kScalarRows packed rows of one sequence and group, and walks the keys that they see,
// kScalarKeys at a time; for the gradients of keys, it has so many keys and walks rows. Scores come
// from pieces of both in shared memory:
//
//     thread i     row i / 8, and of the 32 keys i % 8, i % 8 + 8, + 16 and + 24
//
// Then a thread has one channel of all the block's rows, and adds up the keys' values, weighted.
// More channels than threads have blocks of their own, which make the scores again.
#include "cuda/kernels/prefix_attention/attention_scalar.h"

#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/kernels/prefix_attention/attention.cuh"
#include "cuda/kernels/prefix_attention/key_task.cuh"
#include "ops/ceil_div.h"

namespace glmkern::cuda {
namespace {

constexpr int kThreads = kScalarChannels;
constexpr int kLanes = kThreads / kScalarRows;  // that share a row's scores
constexpr int kEach = kScalarKeys / kLanes;     // scores of a row that a thread has
constexpr int kPiece = 32;                      // channels in shared memory

// Of a row's channels, a thread's and the block's.
struct Slice {
  __device__ explicit Slice(int channels)
      : count((channels + kScalarChannels - 1) / kScalarChannels),
        channel(blockIdx.x % count * kScalarChannels + threadIdx.x),
        block(blockIdx.x / count),
        exists(channel < channels) {}

  int count, channel, block;
  bool exists;
};

int64_t with_slices(int64_t blocks, const AttentionShape& shape) {
  return blocks * ceil_div(shape.channels, kScalarChannels);
}

// This thread's place among a block's scores.
__device__ int score_row() { return threadIdx.x / kLanes; }
__device__ int score_key(int i) { return threadIdx.x % kLanes + i * kLanes; }

// Rows, then keys, kPiece channels of each.
using Pieces = float[kScalarRows + kScalarKeys][kPiece + 1];

// scores += left [kScalarRows, channels] right [kScalarKeys, channels]^T; left(r) is where row r is
// while r < lefts, and so on. Rows past these count as zeros.
template <class Left, class Right>
__device__ __forceinline__ void add_products(Pieces& pieces, float (&scores)[kEach], Left left,
                                             int lefts, Right right, int rights, int channels) {
  for (int first = 0; first < channels; first += kPiece) {
    __syncthreads();
    for (int i = threadIdx.x; i < (kScalarRows + kScalarKeys) * kPiece; i += kThreads) {
      const int row = i / kPiece, channel = first + i % kPiece, key = row - kScalarRows;
      float x = 0;
      if (channel < channels && key < 0 && row < lefts) x = to_float(left(row)[channel]);
      if (channel < channels && key >= 0 && key < rights) x = to_float(right(key)[channel]);
      pieces[row][i % kPiece] = x;
    }
    __syncthreads();
    float sums[kEach] = {};  // of this piece: short sums round less
    for (int c = 0; c < kPiece; c++) {
      const float x = pieces[score_row()][c];
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        sums[i] = fmaf(x, pieces[kScalarRows + score_key(i)][c], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; i++) scores[i] += sums[i];
  }
}

// A block's weights, by key: read by rows, and written so that no bank is asked twice.
struct Weights {
  static constexpr int kStride = kScalarRows + 4;
  float of[kScalarKeys][kStride];

  __device__ void write(const float (&weights)[kEach]) {
#pragma unroll
    for (int i = 0; i < kEach; i++) of[score_key(i)][score_row()] = weights[i];
  }

  // sums[r] += the sum of weight times x over the keys, of which `left` are left; x(key) is this
  // thread's channel.
  template <class X>
  __device__ void add(float (&sums)[kScalarRows], int left, X x) const {
    for (int key = 0; key < kScalarKeys && key < left; key++) {
      const float value = x(key);
#pragma unroll
      for (int r = 0; r < kScalarRows; r++) sums[r] = fmaf(of[key][r], value, sums[r]);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    attend_scalar_kernel(const __grid_constant__ Attend a, int blocks) {
  __shared__ Pieces pieces;
  __shared__ Weights weights;
  __shared__ float shrink_of[kScalarRows], sum_of[kScalarRows];
  const int channels = static_cast<int>(a.shape.channels);
  const Slice slice(channels);
  const QueryTask task = task_of(a, kScalarRows, slice.block, blocks);
  if (task.is_idle()) return;
  const KeyBlocks<T, kScalarKeys> keys(a, task, keys_of(a, task, kScalarRows));
  const KeyRange range(a, task.split, keys.count);
  const auto q = rows_of<T>(a, a.q, task.q_at, task.group);
  const int row = task.row + score_row();

  float out[kScalarRows] = {}, largest = kLowest, sum = 0;
  for (int b = range.begin; b < range.end; b++) {
    const KeyBlock<T> block = keys[b];
    float scores[kEach] = {};
    add_products(
        pieces, scores, [&](int r) { return q(task.row + r); }, task.rows - task.row,
        [&](int key) { return block.key(key); }, block.count, channels);
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const bool hidden = row < keys.first_row_of(block, score_key(i));
      scores[i] = hidden ? -INFINITY : scores[i] * a.scale;
      most = fmaxf(most, scores[i]);
    }
    const float now = fmaxf(largest, warp_reduce<kLanes>(most, Max{}));
    const float shrink = expf(largest - now);
    float added = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      scores[i] = expf(scores[i] - now);
      added += scores[i];
    }
    sum = sum * shrink + warp_reduce<kLanes>(added, Sum{});
    largest = now;
    weights.write(scores);
    if (score_key(0) == 0) shrink_of[score_row()] = shrink;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kScalarRows; r++) out[r] *= shrink_of[r];
    if (slice.exists) {
      weights.add(out, block.count,
                  [&](int key) { return to_float(*block.value(key, slice.channel)); });
    }
  }

  const int64_t split = task.split * a.rows * a.shape.tokens * a.query_heads;
  if (score_key(0) == 0) {
    sum_of[score_row()] = sum;
    if (a.lse != nullptr && row < task.rows && slice.channel < kScalarChannels) {
      *results_of(a, a.lse + split, 1, task.token, task.group)(row) =
          sum == 0 ? -INFINITY : largest + logf(sum);
    }
  }
  __syncthreads();
  if (!slice.exists) return;
  const auto write = [&](auto* x) {
    const auto result = results_of(a, x, channels, task.token, task.group);
#pragma unroll
    for (int r = 0; r < kScalarRows; r++) {
      if (task.row + r >= task.rows) continue;
      result(task.row + r)[slice.channel] =
          from_float<std::decay_t<decltype(*x)>>(sum_of[r] == 0 ? 0 : out[r] / sum_of[r]);
    }
  };
  a.splits > 1 ? write(a.partial + split * channels) : write(static_cast<T*>(a.out));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    query_gradient_scalar_kernel(const __grid_constant__ AttentionGradients a, int blocks) {
  __shared__ Pieces pieces;
  __shared__ Weights weights;
  const int channels = static_cast<int>(a.shape.channels);
  const Slice slice(channels);
  const QueryTask task = task_of_packed(a, a.sequences, kScalarRows, slice.block, blocks);
  if (task.is_idle()) return;
  const KeyBlocks<T, kScalarKeys> keys(a, task, task.seen(kScalarRows, a.heads));
  const auto q = rows_of<T>(a, a.q, task.q_at, task.group);
  const auto dout = rows_of<T>(a, a.dout, task.token * static_cast<int>(a.dout.stride), task.group);
  const int row = task.row + score_row();
  RowNumbers numbers{};
  if (row < task.rows) numbers = a.numbers[numbers_at(a, task.group, task.token) + row];

  float dq[kScalarRows] = {};
  for (int b = 0; b < keys.count; b++) {
    const KeyBlock<T> block = keys[b];
    float p[kEach] = {}, ds[kEach] = {};
    add_products(
        pieces, p, [&](int r) { return q(task.row + r); }, task.rows - task.row,
        [&](int key) { return block.key(key); }, block.count, channels);
    add_products(
        pieces, ds, [&](int r) { return dout(task.row + r); }, task.rows - task.row,
        [&](int key) { return block.value(key); }, block.count, channels);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const bool hidden = row < keys.first_row_of(block, score_key(i));
      p[i] = hidden ? 0 : expf(p[i] * a.scale - numbers.lse);
      ds[i] = p[i] * (ds[i] - numbers.delta);
    }
    weights.write(ds);
    __syncthreads();
    if (slice.exists) {
      weights.add(dq, block.count,
                  [&](int key) { return to_float(*block.key(key, slice.channel)); });
    }
  }
  if (!slice.exists) return;
  const auto result = results_of(a, static_cast<T*>(a.dq), channels, task.token, task.group);
#pragma unroll
  for (int r = 0; r < kScalarRows; r++) {
    if (task.row + r >= task.rows) continue;
    result(task.row + r)[slice.channel] = from_float<T>(dq[r] * a.scale);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    key_gradients_scalar_kernel(const __grid_constant__ AttentionGradients a) {
  __shared__ Pieces pieces;
  __shared__ Weights of_p, of_ds;
  const int channels = static_cast<int>(a.shape.channels);
  const Slice slice(channels);
  const KeyTask<T> task(a, slice.block, kScalarRows, kScalarKeys);
  if (task.is_idle()) return;
  const int seen_from = task.first_row_of(task.key + score_row());

  float dk[kScalarRows] = {}, dv[kScalarRows] = {};
  for (int begin = task.begin; begin < task.end; begin += kScalarKeys) {
    const int count = task.end - begin;
    float p[kEach] = {}, ds[kEach] = {};
    add_products(
        pieces, p, [&](int r) { return task.k + int64_t{task.key + r} * task.k_stride; },
        task.keys - task.key, [&](int r) { return task.q(begin + r); }, count, channels);
    add_products(
        pieces, ds, [&](int r) { return task.v + int64_t{task.key + r} * task.v_stride; },
        task.keys - task.key, [&](int r) { return task.dout(begin + r); }, count, channels);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int row = begin + score_key(i);
      const RowNumbers numbers = row < task.end ? a.numbers[task.first_number + row] : RowNumbers{};
      p[i] = row < seen_from ? 0 : expf(p[i] * a.scale - numbers.lse);
      ds[i] = p[i] * (ds[i] - numbers.delta);
    }
    of_p.write(p);
    of_ds.write(ds);
    __syncthreads();
    if (!slice.exists) continue;
    of_p.add(dv, count, [&](int r) { return to_float(task.dout(begin + r)[slice.channel]); });
    of_ds.add(dk, count, [&](int r) { return to_float(task.q(begin + r)[slice.channel]); });
  }
  if (!slice.exists) return;
  task.with_results(a, [&](auto* dk_of, auto* dv_of, int64_t stride) {
    using Result = std::remove_reference_t<decltype(*dk_of)>;
#pragma unroll
    for (int r = 0; r < kScalarRows; r++) {
      if (task.key + r >= task.keys) continue;
      const int64_t at = (task.key + r) * stride + slice.channel;
      dk_of[at] = from_float<Result>(dk[r] * a.scale);
      dv_of[at] = from_float<Result>(dv[r]);
    }
  });
}

}  // namespace

void attend_scalar(const Attend& a, int64_t blocks, void* stream) {
  with_dtype(a.shape.dtype, [&](auto element) {
    launch("prefix_attention_fwd", attend_scalar_kernel<decltype(element)>,
           with_slices(blocks, a.shape), kThreads, stream, a, static_cast<int>(blocks));
  });
}

void gradients_scalar(const AttentionGradients& a, int64_t query_blocks, void* stream) {
  with_dtype(a.shape.dtype, [&](auto element) {
    using T = decltype(element);
    if (query_blocks > 0) {
      launch("prefix_attention_bwd", query_gradient_scalar_kernel<T>,
             with_slices(query_blocks, a.shape), kThreads, stream, a,
             static_cast<int>(query_blocks));
    }
    launch("prefix_attention_bwd", key_gradients_scalar_kernel<T>,
           with_slices(a.key_blocks, a.shape), kThreads, stream, a);
  });
}

}  // namespace glmkern::cuda
