// Which kernels of prefix_attention serve a call, and in how many blocks.
#include "cuda/device/sequences.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/kernels/code_version.h"
#include "cuda/kernels/prefix_attention/attention_mma.h"
#include "cuda/kernels/prefix_attention/attention_scalar.h"
#include "ops/ceil_div.h"

namespace glmkern::cuda {
namespace {

constexpr int64_t kHalves = 8;  // in 16 bytes

bool fits_wide(const AttentionTokens& x) {
  return x.stride % kHalves == 0 && x.row_stride % kHalves == 0 && aligned_to_16(x.data);
}

// Of all rows that are read; those of results are contiguous.
bool fits_wide(const AttentionInputs& a) {
  return a.shape.channels % kHalves == 0 && a.prefix.sequence_stride % kHalves == 0 &&
         aligned_to_16(a.prefix.keys) && aligned_to_16(a.prefix.values) && fits_wide(a.q) &&
         fits_wide(a.k) && fits_wide(a.v);
}

// For the keys of the tokens,
int64_t own_blocks_of(const AttentionGradients& a, int tile_keys) {
  const KeyGradients& own = a.token_keys;
  return slots_of(own.keys, 1, 2 * tile_keys, a.sequences.count) * a.shape.groups * own.pair_blocks;
}

// and of the prefix.
int64_t prefix_blocks_of(const AttentionGradients& a, int tile_keys) {
  return ceil_div(a.prefix_keys.keys, tile_keys) * a.shape.groups * a.prefix_keys.splits;
}

template <class Arguments, class Kernel>
void on_tensor_cores(Kernel sm75, Kernel sm80, const Arguments& a, int64_t blocks, void* stream) {
  (code_version() >= 80 ? sm80 : sm75)(a, blocks, stream);
}

}  // namespace

bool fits_wide(const Attend& a) {
  return fits_wide(static_cast<const AttentionInputs&>(a)) && aligned_to_16(a.out) &&
         aligned_to_16(a.partial);
}

bool fits_wide(const AttentionGradients& a) {
  bool fits = fits_wide(static_cast<const AttentionInputs&>(a)) && fits_wide(a.dout);
  for (const KeyGradients& segment : {a.token_keys, a.prefix_keys}) {
    fits = fits && aligned_to_16(segment.dk) && aligned_to_16(segment.dv) &&
           aligned_to_16(segment.partial);
  }
  return fits && aligned_to_16(a.dq);
}

bool attention_has_products(const AttentionShape& shape) {
  if (shape.dtype == DType::kFloat || shape.channels > kMmaChannels) return false;
  return shape.dtype == DType::kHalf || code_version() >= 80;
}

AttentionTile attend_tile(const Attend& a) {
  if (!attention_has_products(a.shape)) return {kScalarRows, kScalarKeys};
  const bool few =
      a.cache_lens != nullptr && fits_wide(a) && a.shape.tokens * a.shape.heads <= kMmaFewRows;
  return {few ? kMmaFewRows : kMmaRows, kMmaKeys};
}

int keys_of_a_block(const AttentionShape& shape) {
  return attention_has_products(shape) ? kMmaRows : kScalarRows;
}

int rows_of_key_gradients(const AttentionShape& shape) {
  return attention_has_products(shape) ? kMmaGradientRows : kScalarKeys;
}

void attend(const Attend& a, void* stream) {
  const AttentionTile tile = attend_tile(a);
  const int64_t tiles =
      a.cache_lens == nullptr
          ? slots_of(a.shape.tokens, a.shape.heads, tile.rows, a.sequences.count)
          : a.rows * a.splits * ceil_div(a.shape.tokens * a.shape.heads, tile.rows);
  const int64_t blocks = tiles * a.shape.groups;
  if (!attention_has_products(a.shape)) return attend_scalar(a, blocks, stream);
  on_tensor_cores(attend_sm75, attend_sm80, a, blocks, stream);
}

void attention_gradients(AttentionGradients a, void* stream) {
  const bool products = attention_has_products(a.shape);
  const int tile = keys_of_a_block(a.shape);
  a.own_blocks = own_blocks_of(a, tile);
  a.key_blocks = a.own_blocks + prefix_blocks_of(a, tile);
  const int64_t slots = slots_of(a.shape.tokens, a.shape.heads, tile, a.sequences.count);
  const int64_t query_blocks = a.dq == nullptr ? 0 : slots * a.shape.groups;
  if (!products) return gradients_scalar(a, query_blocks, stream);
  on_tensor_cores(gradients_sm75, gradients_sm80, a, a.key_blocks + query_blocks, stream);
}

}  // namespace glmkern::cuda
