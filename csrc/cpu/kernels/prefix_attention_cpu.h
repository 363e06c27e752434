// What the kernels of prefix_attention work on: the query rows of one group of one sequence, and
// the keys and values that they see.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "ops/ceil_div.h"
#include "ops/dtype.h"

namespace glmkern {

constexpr int64_t kSetRows = 128;  // query rows that go through the keys together

// Sums of gradients have rows of this many channels, whole vectors on every instruction set.
inline int64_t padded_channels(int64_t channels) { return ceil_div(channels, 32) * 32; }

// Keys and values [count, channels] of one group.
struct KeyRun {
  DType dtype;  // float32 is rounded to the queries' dtype
  const void *keys, *values;
  int64_t key_stride, value_stride;  // elements from one key to the next
  int64_t count;
};

// The query heads of one group: row r is head r % heads of token r / heads. Pointers are to the
// sequence's first token and the group's first head.
struct AttentionRows {
  DType dtype;
  int64_t groups, heads, channels;  // `heads` of one group
  int64_t begin, end;               // the rows
  float scale;
  KeyRun prefix, own;
  int64_t visible;  // how many of its own keys token 0 sees; each next token sees one more
  const void* q;
  int64_t q_stride;  // elements from one token to the next
  void* out;         // tokens groups * heads * channels elements apart
  float* lse;        // tokens groups * heads elements apart; null where nobody asks
};

// Sums of the gradients of a run's keys and values, [count, padded_channels].
struct KeySums {
  float *keys, *values;  // null: not wanted
};

struct AttentionGradient {
  AttentionRows rows;  // out and lse are the forward's results
  const void* dout;
  int64_t dout_stride;
  void* dq;  // laid out as out; null: not wanted
  KeySums prefix, own;
};

// The prefix as one sequence's dropout leaves it, in float32 rounded to `dtype`.
struct DroppedPrefix {
  DType dtype, prefix_dtype;
  int64_t count;  // elements of the keys, and of the values
  const void *keys, *values;
  double p;
  const int64_t* seed;  // [2]
  int64_t sequence_id;
  float* result;  // [2, count]; -0 where dropped, and nowhere else
};

// Floats that one set of rows takes in `partial`, whatever the instruction set.
inline int64_t partial_size(int64_t channels) { return kSetRows * (channels + 2); }

// Writes out and lse of at most kSetRows rows, from the keys with key_begin <= index < key_end; the
// prefix's come first. With `partial` the result stays there, to be combined.
GLMKERN_CPU_KERNEL(void prefix_attention_fwd(const AttentionRows&, int64_t key_begin,
                                             int64_t key_end, float* partial))

// Writes out and lse from the partial results of `splits` ranges of keys, which it overwrites.
GLMKERN_CPU_KERNEL(void prefix_attention_combine(const AttentionRows&, int64_t splits,
                                                 float* partials))

// Writes dq and adds to the sums, for any number of rows.
GLMKERN_CPU_KERNEL(void prefix_attention_bwd(const AttentionGradient&))

// Elements begin <= i < end of both keys and values.
GLMKERN_CPU_KERNEL(void prefix_attention_drop(const DroppedPrefix&, int64_t begin, int64_t end))

// sums += factor * more in the elements that `dropped` [rows, stride] kept; sums and more are
// [rows, padded_channels].
GLMKERN_CPU_KERNEL(void prefix_attention_add_kept(const float* dropped, int64_t stride,
                                                  int64_t rows, int64_t channels, float factor,
                                                  const float* more, float* sums))

// result [channels] = factor * the sum of `count` parts, in order.
GLMKERN_CPU_KERNEL(void prefix_attention_sum(DType dtype, int64_t channels, float factor,
                                             const float* const* parts, int64_t count,
                                             void* result))

}  // namespace glmkern
