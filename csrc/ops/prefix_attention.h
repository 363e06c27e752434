// prefix_attention as the kernels see it: raw pointers, strides in elements.
// glmkern/ops/prefix_attention.py defines the ops.
#pragma once

#include <cstdint>

#include "ops/dtype.h"
#include "ops/sequences.h"

namespace glmkern {

// q and its like [tokens, groups * heads, channels], k and v [tokens, groups, channels], the prefix
// [prefix, groups, channels]. `heads` are the query heads of one group:
//
//     query head   0 1 2 3 4 5 6 7     groups = 2, heads = 4
//     group        0 0 0 0 1 1 1 1
struct AttentionShape {
  DType dtype, prefix_dtype;
  int64_t tokens, groups, heads, channels, prefix;
};

// Heads and channels of a token lie side by side, tokens at any distance.
struct AttentionTokens {
  const void* data;
  int64_t stride;      // from one token to the next
  int64_t row_stride;  // from one row of a decode batch to the next; 0 for a packed batch
};

// The keys and values that every token sees, of float32 or the queries' dtype, and their dropout.
struct AttentionPrefix {
  const void *keys, *values;  // [prefix, groups, channels], null without a prefix
  double p;                   // 0 without a prefix
  const int64_t* seed;        // [2], null where p is 0
};

// A token sees the prefix, itself and the tokens before it in its sequence. lse is the natural
// logarithm of the sum of exp(scale * q k) over what it sees.
struct PrefixAttentionForward {
  AttentionShape shape;
  float scale;
  AttentionTokens q, k, v;
  AttentionPrefix prefix;
  PackedSequences sequences;  // ids are null where p is 0
  void* out;                  // [tokens, groups * heads, channels]
  float* lse;                 // [tokens, groups * heads]
};

// The sums over a batch are rounded once. A gradient that is not wanted has no memory.
struct PrefixAttentionBackward {
  AttentionShape shape;
  float scale;
  AttentionTokens q, k, v, dout;
  AttentionPrefix prefix;
  PackedSequences sequences;
  const void* out;   // the forward's
  const float* lse;  // the forward's
  bool token_grad, prefix_grad;
  void* dq;                     // [tokens, groups * heads, channels]
  void *dk, *dv;                // [tokens, groups, channels]
  void *dprefix_k, *dprefix_v;  // [prefix, groups, channels], in the prefix's dtype
};

// Query i of row b sees the prefix and the first cache_lens[b] - q_lens[b] + i + 1 entries of the
// row's cache; i < q_lens[b]. `shape.tokens` is the room for queries of one row.
struct PrefixAttentionDecode {
  AttentionShape shape;
  float scale;
  int64_t rows, room;         // room for cache entries of one row
  AttentionTokens q, k, v;    // [rows, tokens, ..], [rows, room, ..]
  AttentionPrefix prefix;     // without dropout
  const int64_t* cache_lens;  // [rows]
  const int64_t* q_lens;      // [rows]
  void* out;                  // [rows, tokens, groups * heads, channels]; zeros are there already
};

}  // namespace glmkern
