// What the kernels of prefix_attention share: the rows and the keys that a block has.
#pragma once

#include <climits>

#include "cuda/device/division.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/sequences.cuh"
#include "cuda/kernels/prefix_attention/prefix_attention_cuda.h"

namespace glmkern::cuda {

// The largest score of a row that has seen no key. With -inf, the difference of two is no number.
constexpr float kLowest = -3.4028234663852886e38f;

// Rows of one group: tokens at any distance, their heads side by side. Elements are counted in 32
// bits, in one sum: an address is then two instructions.
template <class T>
struct PackedRows {
  T* data;
  int at;  // of the first token's first head
  int stride, channels;
  Divisor heads;

  __device__ T* operator()(int row, int channel = 0) const {
    return data + (at + quotient(row, heads) * stride + remainder(row, heads) * channels + channel);
  }
};

// The rows of a block that walks keys: of one sequence and one group, from `row` on.
struct QueryTask {
  int group, sequence, split;
  int row, rows;         // the first one, and all that the sequence has
  int q_at, k_at, v_at;  // elements of q, k and v before the sequence's first token
  int token;             // that token's number in what is written
  int before;            // keys of the sequence that its first query sees beside its own

  __device__ bool is_idle() const { return row < 0 || row >= rows; }

  // How many of the sequence's keys row r sees,
  __device__ int seen_by(int r, const Divisor& heads) const {
    return before + quotient(r, heads) + 1;
  }
  // some row of the block sees,
  __device__ int seen(int tile_rows, const Divisor& heads) const {
    return seen_by((row + tile_rows < rows ? row + tile_rows : rows) - 1, heads);
  }
  // and some row of the sequence sees.
  __device__ int all_seen(const Divisor& heads) const { return seen_by(rows - 1, heads); }
};

// A sequence's last tiles see the most keys; they start first.
__device__ inline QueryTask task_of_packed(const AttentionInputs& a,
                                           const PackedSequences& sequences, int tile_rows,
                                           int block, int blocks) {
  const int groups = static_cast<int>(a.shape.groups), heads = static_cast<int>(a.shape.heads);
  const int slot = (blocks - 1 - block) / groups;
  const SequenceTile tile =
      find_tile(sequences, static_cast<int>(a.shape.tokens), heads, tile_rows, slot);
  QueryTask task{};
  task.group = block % groups;
  task.sequence = tile.sequence;
  task.row = tile.tile * tile_rows;
  task.rows = tile.tokens * heads;
  task.q_at = tile.first_token * static_cast<int>(a.q.stride);
  task.k_at = tile.first_token * static_cast<int>(a.k.stride);
  task.v_at = tile.first_token * static_cast<int>(a.v.stride);
  task.token = tile.first_token;
  return task;
}

// What a row of a batch that decodes has: entries of its cache, of which `tokens` are new. Lengths
// that do not fit are cut.
struct DecodedRow {
  __device__ DecodedRow(const Attend& a, int row)
      : entries(static_cast<int>(cut(a.cache_lens[row], a.room))),
        tokens(static_cast<int>(cut(a.q_lens[row], cut(a.shape.tokens, entries)))) {}

  int entries, tokens;

 private:
  static __device__ int64_t cut(int64_t length, int64_t most) {
    return length < 0 ? 0 : length < most ? length : most;
  }
};

// Decoding's blocks: all tiles and groups of a split follow each other.
__device__ inline QueryTask task_of_decoding(const Attend& a, int tile_rows, int block) {
  const int groups = static_cast<int>(a.shape.groups), heads = static_cast<int>(a.shape.heads);
  const int queries = static_cast<int>(a.shape.tokens);  // room for them
  const int tiles = ceil_quotient(queries * heads, tile_rows);
  const int sequence = block / groups / tiles / a.splits;
  const DecodedRow decoded(a, sequence);
  QueryTask task{};
  task.group = block % groups;
  task.row = block / groups % tiles * tile_rows;
  task.split = block / groups / tiles % a.splits;
  task.rows = decoded.tokens * heads;
  task.q_at = sequence * static_cast<int>(a.q.row_stride);
  task.k_at = sequence * static_cast<int>(a.k.row_stride);
  task.v_at = sequence * static_cast<int>(a.v.row_stride);
  task.token = sequence * queries;
  task.before = decoded.entries - decoded.tokens;
  return task;
}

__device__ inline QueryTask task_of(const Attend& a, int tile_rows, int block, int blocks) {
  return a.cache_lens == nullptr ? task_of_packed(a, a.sequences, tile_rows, block, blocks)
                                 : task_of_decoding(a, tile_rows, block);
}

// The keys that the block walks. In decoding all tiles of a sequence have the same splits, which
// their combination counts.
__device__ inline int keys_of(const Attend& a, const QueryTask& task, int tile_rows) {
  return a.cache_lens == nullptr ? task.seen(tile_rows, a.heads) : task.all_seen(a.heads);
}

// This group's rows of q, or of dout, from element `at` on.
template <class T>
__device__ PackedRows<const T> rows_of(const AttentionInputs& a, const AttentionTokens& x, int at,
                                       int group) {
  const int channels = static_cast<int>(a.shape.channels);
  at += group * static_cast<int>(a.shape.heads) * channels;
  return {static_cast<const T*>(x.data), at, static_cast<int>(x.stride), channels, a.heads};
}

// Those of a result [tokens, heads, channels]; one number a row where channels is 1.
template <class T>
__device__ PackedRows<T> results_of(const AttentionInputs& a, T* x, int channels, int token,
                                    int group) {
  const int heads = static_cast<int>(a.query_heads);
  const int head = token * heads + group * static_cast<int>(a.shape.heads);
  return {x, head * channels, heads * channels, channels, a.heads};
}

// Where the numbers of a group's rows begin, from a token on: [groups, tokens * heads].
__device__ inline int numbers_at(const AttentionInputs& a, int group, int token) {
  return (group * static_cast<int>(a.shape.tokens) + token) * static_cast<int>(a.shape.heads);
}

// Of products of queries and keys, the powers P = 2^(slope * x - lse); of those of dO and values,
// x - D. number(i, j, e) is lse or D.
template <int kRowTiles, int kTiles, class Number>
__device__ void subtract_numbers(float (&x)[kRowTiles][kTiles][4], bool powers, float slope,
                                 Number number) {
#pragma unroll
  for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        x[i][j][e] = fmaf(x[i][j][e], powers ? slope : 1, -number(i, j, e));
        if (powers) x[i][j][e] = exp2_approximate(x[i][j][e]);
      }
    }
  }
}

// Keys and values that are read together; `own` ones are those of the sequence's tokens.
template <class T>
struct KeyBlock {
  const T *keys, *values;
  int k_at, v_at;  // of the segment's first key, as in PackedRows,
  int k_stride, v_stride;
  int first;  // and this one's number
  int count;  // that are there from `first` on, though a block has no more than kKeys
  bool own;

  __device__ const T* key(int i, int channel = 0) const {
    return keys + (k_at + (first + i) * k_stride + channel);
  }
  __device__ const T* value(int i, int channel = 0) const {
    return values + (v_at + (first + i) * v_stride + channel);
  }
};

// Of the prefix's keys and a sequence's own, each in blocks of its own.
__device__ inline int count_blocks(int prefix, int own, int block_keys) {
  return ceil_quotient(prefix, block_keys) + ceil_quotient(own, block_keys);
}

// Blocks of kKeys keys count from the prefix's first. The sequence's own begin with a new block:
//
//     blocks of 32      0              1              2             3
//     keys              prefix 0-31    prefix 32-39   own 0-31      own 32-63
//
// What is the same for all blocks stays in the kernel's argument: loops have no registers for it.
template <class T, int kKeys>
class KeyBlocks {
 public:
  __device__ KeyBlocks(const AttentionInputs& a, const QueryTask& task, int seen)
      : count(count_blocks(static_cast<int>(a.shape.prefix), seen, kKeys)),
        a_(a),
        seen_(seen),
        before_(task.before),
        k_at_(task.k_at + task.group * static_cast<int>(a.shape.channels)),
        v_at_(task.v_at + task.group * static_cast<int>(a.shape.channels)),
        prefix_at_(task.sequence * static_cast<int>(a.prefix.sequence_stride) +
                   task.group * static_cast<int>(a.shape.channels)) {}

  __device__ KeyBlock<T> operator[](int i) const {
    const int prefix = static_cast<int>(a_.shape.prefix);
    const int prefix_blocks = ceil_quotient(prefix, kKeys);
    const int prefix_stride = static_cast<int>(a_.shape.groups * a_.shape.channels);
    const bool own = i >= prefix_blocks;
    const int first = (own ? i - prefix_blocks : i) * kKeys;
    return {static_cast<const T*>(own ? a_.k.data : a_.prefix.keys),
            static_cast<const T*>(own ? a_.v.data : a_.prefix.values),
            own ? k_at_ : prefix_at_,
            own ? v_at_ : prefix_at_,
            own ? static_cast<int>(a_.k.stride) : prefix_stride,
            own ? static_cast<int>(a_.v.stride) : prefix_stride,
            first,
            (own ? seen_ : prefix) - first,
            own};
  }

  // The first packed row that sees the block's i-th key; past the prefix's end none does.
  __device__ int first_row_of(const KeyBlock<T>& block, int i) const {
    if (!block.own) return i < block.count ? 0 : INT_MAX;
    return (block.first + i - before_) * static_cast<int>(a_.shape.heads);
  }

  int count;

 private:
  const AttentionInputs& a_;
  int seen_, before_, k_at_, v_at_, prefix_at_;
};

// The blocks of keys that a split has.
struct KeyRange {
  __device__ KeyRange(const Attend& a, int split, int count)
      : begin(split * a.span), end(begin + a.span < count ? begin + a.span : count) {
    if (a.splits == 1) begin = 0, end = count;
  }

  int begin, end;
};

}  // namespace glmkern::cuda
