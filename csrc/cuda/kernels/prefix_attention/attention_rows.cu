// What prefix_attention needs beside its products: the prefix as each sequence sees it, two numbers
// a row for the backward, and the sums of what several blocks wrote. Memory bounds all of it.
#include "cuda/device/division.cuh"
#include "cuda/device/flat.cuh"
#include "cuda/device/philox.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/sequences.cuh"
#include "cuda/kernels/prefix_attention/attention.cuh"
#include "cuda/kernels/prefix_attention/key_task.cuh"
#include "cuda/kernels/prefix_attention/prefix_attention_cuda.h"

namespace glmkern::cuda {
namespace {

constexpr int kVector = 4;        // elements of a thread: 16 bytes of floats
constexpr int kLanesOfARow = 16;  // that share a row's delta, kChannels each at a time
constexpr int kChannels = 8;
constexpr int kRowThreads = 128;

// The prefix's keys, then its values: element i of 2 * count.
template <class T, int kWidth>
__device__ void load_prefix(const AttentionPrefix& prefix, DType dtype, int64_t count, int64_t i,
                            float (&x)[kWidth]) {
  const void* half = i < count ? prefix.keys : prefix.values;
  const int64_t at = i < count ? i : i - count;
  if (dtype == DType::kFloat) {
    load_floats(static_cast<const float*>(half) + at, x);
  } else {
    load_floats(static_cast<const T*>(half) + at, x);
  }
}

// prepared [B, 2, count], a vector a thread: rounded, multiplied by the dropout's factor, rounded.
template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads)
    prepare_prefix_kernel(const __grid_constant__ AttentionPrefix prefix, DType dtype,
                          int64_t count, Dropout dropout, const int64_t* __restrict__ ids,
                          int64_t vectors, T* __restrict__ prepared) {
  const int64_t element = flat_element<kWidth>();
  if (element >= vectors * kWidth) return;
  const int64_t sequence = element / (2 * count), i = element % (2 * count);
  float x[kWidth], factors[kWidth];
  load_prefix<T>(prefix, dtype, count, i, x);
  if (prefix.p > 0) draw_factors(Philox(prefix.seed), dropout, ids[sequence], i, factors);
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    x[k] = to_float(from_float<T>(x[k]));
    if (prefix.p > 0) x[k] *= factors[k];
  }
  write_row(prepared + element, kWidth, x);
}

// numbers [groups, tokens * heads]: some lanes share a row [channels] of dout and out.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    row_numbers_kernel(const T* __restrict__ dout, int64_t dout_stride, const T* __restrict__ out,
                       const float* __restrict__ lse, int64_t rows, int query_heads, int heads,
                       int channels, float base, RowNumbers* __restrict__ numbers) {
  const int64_t row = blockIdx.x * int64_t{kRowThreads / kLanesOfARow} + threadIdx.x / kLanesOfARow;
  const int64_t there = row < rows ? row : rows - 1;
  const int64_t token = there / query_heads;
  const int head = static_cast<int>(there % query_heads);
  float delta = 0;
  for (int i = threadIdx.x % kLanesOfARow * kChannels; i < channels;
       i += kLanesOfARow * kChannels) {
    float left[kChannels], right[kChannels];
    read_row(dout + token * dout_stride + head * int64_t{channels} + i, channels - i, left);
    read_row(out + there * channels + i, channels - i, right);
#pragma unroll
    for (int k = 0; k < kChannels; k++) delta = fmaf(left[k], right[k], delta);
  }
  delta = warp_reduce<kLanesOfARow>(delta, Sum{});
  if (row >= rows || threadIdx.x % kLanesOfARow != 0) return;
  const int64_t at = (head / heads * (rows / query_heads) + token) * heads + head % heads;
  numbers[at] = {lse[row] * base, delta};
}

// A row of a token that decodes: the mean of its splits' results, weighted by the exponentials of
// their lse. A warp has a row, and a lane every 32nd channel.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    combine_splits_kernel(const __grid_constant__ Attend a, int tile_keys) {
  const int64_t heads = a.query_heads, rows = a.rows * a.shape.tokens * heads;
  const int64_t row = blockIdx.x * int64_t{kRowThreads / kWarp} + threadIdx.x / kWarp;
  if (row >= rows) return;
  const DecodedRow decoded(a, static_cast<int>(row / heads / a.shape.tokens));
  if (row / heads % a.shape.tokens >= decoded.tokens) return;  // its result is zero
  // No other split has keys of this row's sequence.
  const int blocks = count_blocks(static_cast<int>(a.shape.prefix), decoded.entries, tile_keys);
  const int splits = ceil_quotient(blocks, a.span);
  float largest = -INFINITY;
  for (int s = 0; s < splits; s++) largest = fmaxf(largest, a.lse[s * rows + row]);
  const int channels = static_cast<int>(a.shape.channels);
  for (int channel = threadIdx.x % kWarp; channel < channels; channel += kWarp) {
    float sum = 0, result = 0;
    for (int s = 0; s < splits; s++) {
      const float weight = expf(a.lse[s * rows + row] - largest);
      sum += weight;
      result = fmaf(weight, a.partial[(s * rows + row) * channels + channel], result);
    }
    static_cast<T*>(a.out)[row * channels + channel] = from_float<T>(result / sum);
  }
}

// The gradient of a segment's keys and values: element i of 2 * count, the sum over its splits. A
// key has `row` elements.
template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads)
    add_splits_kernel(const __grid_constant__ KeyGradients segment,
                      const __grid_constant__ PackedSequences sequences, int tile_keys, int row) {
  const int64_t i = flat_element<kWidth>(), count = segment.keys * row;
  if (i >= 2 * count) return;
  const int64_t at = i < count ? i : i - count;
  int splits = segment.splits;
  if (segment.pair_blocks > 0) {
    const int key = static_cast<int>(at / row);
    const SequenceCursor sequence(sequences, key);
    const int tile = (key - sequence.begin) / tile_keys;
    const int tokens = sequence.end - sequence.begin;
    const int its = KeyShare::splits_of(tile, tokens, tile_keys, segment.pair_blocks);
    if (its < splits) splits = its;  // never more than there are, whatever cu_seqlens holds
  }
  const float* const partial = segment.partial + (i < count ? 0 : segment.splits * count) + at;
  float sum[kWidth] = {};
  add_splits_of(partial, splits, count, sum);
  write_row(static_cast<T*>(i < count ? segment.dk : segment.dv) + at, kWidth, sum);
}

// The gradient of the prefix's keys and values where each sequence dropped others: element i of
// 2 * count, the sum over a sequence's splits times its dropout's factor, over all sequences.
template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads)
    add_dropped_kernel(const __grid_constant__ PackedSequences sequences, int tokens, int heads,
                       int rows_of_split, int64_t splits, int64_t count,
                       const float* __restrict__ partial, const int64_t* __restrict__ seed,
                       Dropout dropout, T* __restrict__ dk, T* __restrict__ dv) {
  const int64_t i = flat_element<kWidth>();
  if (i >= 2 * count) return;
  const int64_t at = i < count ? i : i - count;
  partial += (i < count ? 0 : splits * count) + at;
  const Philox philox(seed);
  float total[kWidth] = {};
  for (int64_t split = 0; split < splits;) {
    const SequenceTile slot =
        find_tile(sequences, tokens, heads, rows_of_split, static_cast<int>(split));
    const int tiles = ceil_quotient(slot.tokens * heads, rows_of_split);
    float sum[kWidth] = {}, terms[kWidth], factors[kWidth];
    for (int tile = slot.tile; tile < tiles; tile++, split++) {
      load_floats(partial + split * count, terms);
#pragma unroll
      for (int k = 0; k < kWidth; k++) sum[k] += terms[k];
    }
    if (slot.tile >= tiles) {  // an idle slot
      split++;
      continue;
    }
    draw_factors(philox, dropout, sequences.ids[slot.sequence], i, factors);
#pragma unroll
    for (int k = 0; k < kWidth; k++) total[k] = fmaf(sum[k], factors[k], total[k]);
  }
  write_row((i < count ? dk : dv) + at, kWidth, total);
}

template <class T>
void add_splits(const AttentionGradients& a, const KeyGradients& segment, void* stream) {
  const int64_t row = a.shape.groups * a.shape.channels;
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch_flat<kWidth>("prefix_attention_bwd", add_splits_kernel<T, kWidth>,
                        2 * segment.keys * row, stream, segment, a.sequences,
                        keys_of_a_block(a.shape), static_cast<int>(row));
  };
  row % kVector == 0 ? run(Int<kVector>{}) : run(Int<1>{});
}

int64_t size_of(const AttentionShape& shape) {
  return shape.prefix * shape.groups * shape.channels;
}

}  // namespace

void prepare_prefix(const AttentionShape& shape, const AttentionPrefix& prefix,
                    const PackedSequences& sequences, void* prepared, void* stream) {
  const int64_t count = size_of(shape), copies = prefix.p > 0 ? sequences.count : 1;
  with_dtype(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch_flat<kWidth>("prefix_attention_prefix", prepare_prefix_kernel<T, kWidth>,
                          copies * 2 * count, stream, prefix, shape.prefix_dtype, count,
                          Dropout(prefix.p), sequences.ids, copies * 2 * count / kWidth,
                          static_cast<T*>(prepared));
    };
    const bool wide =
        count % kVector == 0 && aligned_to_16(prefix.keys) && aligned_to_16(prefix.values);
    wide ? run(Int<kVector>{}) : run(Int<1>{});
  });
}

void row_numbers(const PrefixAttentionBackward& a, RowNumbers* numbers, void* stream) {
  const int64_t query_heads = a.shape.groups * a.shape.heads, rows = a.shape.tokens * query_heads;
  const float base = attention_has_products(a.shape) ? kLog2E : 1;
  with_dtype(a.shape.dtype, [&](auto element) {
    using T = decltype(element);
    launch("prefix_attention_bwd", row_numbers_kernel<T>,
           ceil_div(rows, kRowThreads / kLanesOfARow), kRowThreads, stream,
           static_cast<const T*>(a.dout.data), a.dout.stride, static_cast<const T*>(a.out), a.lse,
           rows, static_cast<int>(query_heads), static_cast<int>(a.shape.heads),
           static_cast<int>(a.shape.channels), base, numbers);
  });
}

void combine_splits(const Attend& a, void* stream) {
  const int64_t rows = a.rows * a.shape.tokens * a.query_heads;
  with_dtype(a.shape.dtype, [&](auto element) {
    launch("prefix_attention_decode", combine_splits_kernel<decltype(element)>,
           ceil_div(rows, kRowThreads / kWarp), kRowThreads, stream, a, attend_tile(a).keys);
  });
}

void add_token_splits(const AttentionGradients& a, void* stream) {
  with_dtype(a.shape.dtype,
             [&](auto element) { add_splits<decltype(element)>(a, a.token_keys, stream); });
}

void add_prefix_splits(const AttentionGradients& a, const AttentionPrefix& prefix, void* stream) {
  const KeyGradients& keys = a.prefix_keys;
  const int64_t count = size_of(a.shape);
  with_dtype(a.shape.prefix_dtype, [&](auto element) {
    using T = decltype(element);
    if (!keys.by_sequence) return add_splits<T>(a, keys, stream);
    const auto run = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch_flat<kWidth>(
          "prefix_attention_bwd", add_dropped_kernel<T, kWidth>, 2 * count, stream, a.sequences,
          static_cast<int>(a.shape.tokens), static_cast<int>(a.shape.heads), keys.rows_of_split,
          static_cast<int64_t>(keys.splits), count, static_cast<const float*>(keys.partial),
          prefix.seed, Dropout(prefix.p), static_cast<T*>(keys.dk), static_cast<T*>(keys.dv));
    };
    count % kVector == 0 ? run(Int<kVector>{}) : run(Int<1>{});
  });
}

}  // namespace glmkern::cuda
