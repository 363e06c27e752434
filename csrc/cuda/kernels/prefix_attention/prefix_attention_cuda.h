// The kernels of prefix_attention for NVIDIA GPUs; glmkern/ops/prefix_attention.py has the
// formulas.
//
// The query heads of a group are packed, so that a block of keys is read once for all of them: row
// r of a sequence and a group is head r % heads of token r / heads.
#pragma once

#include <cstdint>

#include "ops/divisor.h"
#include "ops/prefix_attention.h"

namespace glmkern::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// The prefix in the queries' dtype; sequence b's begins at element b * sequence_stride.
struct SeenPrefix {
  const void *keys, *values;
  int64_t sequence_stride;  // 0: all see the same
};

// What the kernels of both passes and of decoding know.
struct AttentionInputs {
  template <class Arguments>
  AttentionInputs(const Arguments& a, const SeenPrefix& prefix)
      : shape(a.shape),
        scale(a.scale),
        slope(a.scale * kLog2E),
        q(a.q),
        k(a.k),
        v(a.v),
        prefix(prefix),
        heads(a.shape.heads),
        query_heads(a.shape.groups * a.shape.heads) {}

  AttentionShape shape;
  float scale;
  float slope;  // of exponents of 2
  AttentionTokens q, k, v;
  SeenPrefix prefix;
  Divisor heads;
  int64_t query_heads;  // of all groups
};

// The forward of a packed batch, or of one that decodes. `splits` blocks share the keys of a row,
// `span` blocks of keys each. With more than one, their results go to partial [splits, rows,
// channels] and lse [splits, rows], a row a head of a token.
struct Attend : AttentionInputs {
  using AttentionInputs::AttentionInputs;

  PackedSequences sequences{};  // of a packed batch
  int64_t rows = 0, room = 0;   // of a batch that decodes: PrefixAttentionDecode's
  const int64_t* cache_lens = nullptr;
  const int64_t* q_lens = nullptr;
  int splits = 1, span = 0;
  void* out = nullptr;
  float* partial = nullptr;
  float* lse = nullptr;
};

// Of a row: its log-sum-exp, as an exponent of 2 on tensor cores and of e otherwise, and
// rowsum(dO * O).
struct alignas(8) RowNumbers {
  float lse, delta;
};

// The gradients of the keys and values of one segment, [keys, groups, channels]. Blocks share the
// rows that see a key, and their sums go to partial [2, splits, keys, groups, channels], of which a
// key may have fewer; without it no rows are shared, and dk and dv are of the queries' dtype.
struct KeyGradients {
  int64_t keys = 0;
  int splits = 0;            // the most that a key has
  int pair_blocks = 0;       // of the tokens' keys: of two tiles, as KeyShare says
  int rows_of_split = 0;     // of the prefix
  bool by_sequence = false;  // of the prefix: each split has rows of one sequence
  void *dk = nullptr, *dv = nullptr;
  float* partial = nullptr;
};

struct AttentionGradients : AttentionInputs {
  using AttentionInputs::AttentionInputs;

  AttentionTokens dout{};
  PackedSequences sequences{};
  const RowNumbers* numbers = nullptr;  // [groups, tokens * heads]
  void* dq = nullptr;
  KeyGradients token_keys, prefix_keys;
  // Of the launch: first come those for the tokens' keys, then the prefix's, then the queries.
  int64_t own_blocks = 0, key_blocks = 0;
};

// Whether tensor cores take these inputs on the current device; else float arithmetic does.
bool attention_has_products(const AttentionShape& shape);

// The sizes of blocks, which decide how work is shared out.
struct AttentionTile {
  int rows, keys;
};
AttentionTile attend_tile(const Attend& a);
int keys_of_a_block(const AttentionShape& shape);        // of the keys' gradients,
int rows_of_key_gradients(const AttentionShape& shape);  // and of a step of theirs

// The rest is queued on `stream`, a cudaStream_t, and throws std::runtime_error if a kernel does
// not start.

void attend(const Attend& a, void* stream);
// out [rows, tokens, heads, channels] from what the splits of decoding wrote.
void combine_splits(const Attend& a, void* stream);

// prepared [B, 2, P, groups, channels] in the queries' dtype: keys and values as each sequence sees
// them; without dropout B is 1.
void prepare_prefix(const AttentionShape& shape, const AttentionPrefix& prefix,
                    const PackedSequences& sequences, void* prepared, void* stream);

// numbers [groups, tokens * heads].
void row_numbers(const PrefixAttentionBackward& a, RowNumbers* numbers, void* stream);
// dq, where it has a place, and the gradients of both segments' keys.
void attention_gradients(AttentionGradients a, void* stream);
// The sums over the splits; those of the prefix with the factors of its dropout.
void add_token_splits(const AttentionGradients& a, void* stream);
void add_prefix_splits(const AttentionGradients& a, const AttentionPrefix& prefix, void* stream);

}  // namespace glmkern::cuda
