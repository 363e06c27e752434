// prefix_attention on NVIDIA GPUs: its registration, how work is shared out, and the memory that
// takes. The kernels are in cuda/kernels/prefix_attention.
#include <algorithm>
#include <cmath>

#include "cuda/forced_splits.h"
#include "cuda/kernels/prefix_attention/prefix_attention_cuda.h"
#include "cuda/library.h"
#include "cuda/torch_calls.h"
#include "ops/ceil_div.h"
#include "ops/prefix_attention_binding.h"

namespace glmkern {
namespace {

// Blocks to aim at for the keys of tokens and prefix together, which share them by their products:
// about one for each of an A100's 108 multiprocessors. Blocks of queries follow and fill what is
// left, and the fewer blocks the fewer sums. A block has rows enough to outweigh its sums. All are
// fixed, and so are the bits of a sum: on every chip, and whatever else is asked for.
constexpr double kBlocks = 96;
constexpr int64_t kRowsOfASplit = 256;
constexpr int64_t kKeysOfABlock = 64;
// Keys of a split of decoding: enough that reading them outweighs writing its result, and the most
// splits. Prompts have tiles enough of their own.
constexpr int64_t kKeysOfASplit = 128;
constexpr int64_t kSplits = 64;

// Kernels count the elements of a tensor in 32 bits.
void require_elements(int64_t count) {
  require(count < int64_t{1} << 31, "prefix_attention: a tensor has more than 2^31 elements");
}

// Of results and of the prefix, `copies` of it; `rows` of a batch that decodes.
void require_counts(const AttentionShape& shape, int64_t copies, int64_t rows = 1) {
  require_elements(rows * shape.tokens * shape.groups * shape.heads * shape.channels);
  require_elements(copies * 2 * shape.prefix * shape.groups * shape.channels);
}

// The prefix in the queries' dtype, with the dropout of each sequence, and its memory.
struct Prepared {
  Prepared(const AttentionShape& shape, const AttentionPrefix& prefix,
           const PackedSequences& sequences, const Tensor& like, void* stream)
      : seen{prefix.keys, prefix.values, 0} {
    const int64_t count = shape.prefix * shape.groups * shape.channels;
    if (count == 0 || (prefix.p == 0 && shape.prefix_dtype == shape.dtype)) return;
    const int64_t copies = prefix.p > 0 ? sequences.count : 1;
    const ScalarType type = scalar_type_of(shape.dtype);
    memory = torch::stable::new_empty(like, {copies, 2, count}, type);
    cuda::prepare_prefix(shape, prefix, sequences, memory->mutable_data_ptr(), stream);
    const char* keys = static_cast<const char*>(memory->const_data_ptr());
    seen = {keys, keys + count * (shape.dtype == DType::kFloat ? 4 : 2),
            prefix.p > 0 ? 2 * count : 0};
  }

  std::optional<Tensor> memory;
  cuda::SeenPrefix seen;
};

Tensor new_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

// How many blocks share the rows of `keys` keys, those of one block or two, in a segment of
// `all_keys` that has `share` of the products.
int64_t blocks_sharing(const PrefixAttentionBackward& a, double share, int64_t keys,
                       int64_t all_keys) {
  return std::llround(kBlocks * share / double(a.shape.groups * ceil_div(all_keys, keys)));
}

// The most that share the rows of a key.
int64_t most_splits(const PrefixAttentionBackward& a) {
  return ceil_div(a.shape.tokens * a.shape.heads, kRowsOfASplit);
}

// Of the products with keys, the tokens' share: a row sees half of its sequence, on the mean.
double share_of_tokens(const PrefixAttentionBackward& a) {
  const double seen = double(a.shape.tokens) / double(a.sequences.count) / 2;
  return seen / (seen + double(a.shape.prefix));
}

cuda::KeyGradients plan_tokens(const PrefixAttentionBackward& a) {
  const int64_t wanted =
      blocks_sharing(a, share_of_tokens(a), 2 * kKeysOfABlock, a.shape.tokens) - 1;
  const int64_t splits = std::clamp<int64_t>(wanted, 1, most_splits(a));
  cuda::KeyGradients plan;
  plan.keys = a.shape.tokens;
  plan.splits = static_cast<int>(forced_splits > 0 ? forced_splits : splits);
  plan.pair_blocks = plan.splits + 1;  // the other tile has one at least
  plan.dk = a.dk;
  plan.dv = a.dv;
  return plan;
}

// Where nothing is dropped, the batch is one run of rows: every token sees the whole prefix.
cuda::KeyGradients plan_prefix(const PrefixAttentionBackward& a) {
  const int64_t rows = a.shape.tokens * a.shape.heads;
  const int64_t step = cuda::rows_of_key_gradients(a.shape);
  const int64_t splits = blocks_sharing(a, 1 - share_of_tokens(a), kKeysOfABlock, a.shape.prefix);
  const int64_t wanted =
      forced_splits > 0 ? forced_splits : std::clamp<int64_t>(splits, 1, most_splits(a));
  cuda::KeyGradients plan;
  plan.keys = a.shape.prefix;
  plan.rows_of_split = static_cast<int>(ceil_div(ceil_div(rows, wanted), step) * step);
  plan.by_sequence = a.prefix.p > 0;
  plan.splits = static_cast<int>(plan.by_sequence ? rows / plan.rows_of_split + a.sequences.count
                                                  : ceil_div(rows, plan.rows_of_split));
  plan.dk = a.dprefix_k;
  plan.dv = a.dprefix_v;
  return plan;
}

// Memory for the sums of a segment's splits.
Tensor new_sums(const cuda::KeyGradients& segment, const AttentionShape& shape,
                const Tensor& like) {
  return new_floats(like, 2 * segment.splits * segment.keys * shape.groups * shape.channels);
}

// Of a prefix that no row sees.
void no_gradient(const PrefixAttentionBackward& a, const Tensor& like) {
  const int64_t count = a.shape.prefix * a.shape.groups * a.shape.channels;
  for (const void* gradient : {a.dprefix_k, a.dprefix_v}) {
    Tensor all = view_of(gradient, scalar_type_of(a.shape.prefix_dtype), {count}, {1}, like);
    torch::stable::fill_(all, 0.0);
  }
}

struct PrefixAttentionCuda {
  static void forward(const PrefixAttentionForward& a, const Tensor& like) {
    if (a.shape.tokens * a.shape.heads == 0) return;
    require_counts(a.shape, a.prefix.p > 0 ? a.sequences.count : 1);
    for (const AttentionTokens& x : {a.q, a.k, a.v}) require_elements(a.shape.tokens * x.stride);
    on_device_of(like, [&](void* stream) {
      const Prepared prefix(a.shape, a.prefix, a.sequences, like, stream);
      cuda::Attend attend(a, prefix.seen);
      attend.sequences = a.sequences;
      attend.out = a.out;
      attend.lse = a.lse;
      cuda::attend(attend, stream);
    });
  }

  static void backward(const PrefixAttentionBackward& a, const Tensor& like) {
    const int64_t rows = a.shape.groups * a.shape.tokens * a.shape.heads;
    const bool prefix_grad = a.prefix_grad && a.shape.prefix > 0;
    if (!(a.token_grad || prefix_grad)) return;
    if (rows == 0) return prefix_grad ? no_gradient(a, like) : void();
    require_counts(a.shape, a.prefix.p > 0 ? a.sequences.count : 1);
    for (const AttentionTokens& x : {a.q, a.k, a.v, a.dout}) {
      require_elements(a.shape.tokens * x.stride);
    }
    on_device_of(like, [&](void* stream) {
      const Prepared prefix(a.shape, a.prefix, a.sequences, like, stream);
      Tensor numbers = new_floats(like, 2 * rows);
      auto* const numbers_of_rows = static_cast<cuda::RowNumbers*>(numbers.mutable_data_ptr());
      cuda::row_numbers(a, numbers_of_rows, stream);
      cuda::AttentionGradients gradients(a, prefix.seen);
      gradients.dout = a.dout;
      gradients.sequences = a.sequences;
      gradients.numbers = numbers_of_rows;
      std::optional<Tensor> token_sums, prefix_sums;
      if (a.token_grad) {
        gradients.dq = a.dq;
        gradients.token_keys = plan_tokens(a);
        if (gradients.token_keys.splits > 1) {
          token_sums = new_sums(gradients.token_keys, a.shape, like);
          gradients.token_keys.partial = floats_of(*token_sums);
        }
      }
      if (prefix_grad) {
        gradients.prefix_keys = plan_prefix(a);
        prefix_sums = new_sums(gradients.prefix_keys, a.shape, like);
        gradients.prefix_keys.partial = floats_of(*prefix_sums);
      }
      cuda::attention_gradients(gradients, stream);
      if (token_sums) cuda::add_token_splits(gradients, stream);
      if (prefix_sums) cuda::add_prefix_splits(gradients, a.prefix, stream);
    });
  }

  // The division of keys depends on the sizes of prefix, cache and queries, and on alignment: a
  // row's result is the same whatever else is in the batch.
  static void decode(const PrefixAttentionDecode& a, const Tensor& like) {
    const int64_t rows = a.rows * a.shape.tokens * a.shape.groups * a.shape.heads;
    if (rows == 0) return;
    require_counts(a.shape, 1, a.rows);
    require_elements(a.rows * a.q.row_stride);
    for (const AttentionTokens& x : {a.k, a.v}) require_elements(a.rows * x.row_stride);
    on_device_of(like, [&](void* stream) {
      const Prepared prefix(a.shape, a.prefix, {}, like, stream);
      cuda::Attend attend(a, prefix.seen);
      attend.rows = a.rows;
      attend.room = a.room;
      attend.cache_lens = a.cache_lens;
      attend.q_lens = a.q_lens;
      attend.out = a.out;
      const cuda::AttentionTile tile = cuda::attend_tile(attend);
      const int64_t blocks = ceil_div(a.shape.prefix, tile.keys) + ceil_div(a.room, tile.keys);
      const int64_t tiles = ceil_div(a.shape.tokens * a.shape.heads, tile.rows);
      int64_t wanted = std::min(ceil_div(a.shape.prefix + a.room, kKeysOfASplit), kSplits / tiles);
      if (forced_splits > 0) wanted = forced_splits;
      attend.span = static_cast<int>(ceil_div(blocks, std::max<int64_t>(wanted, 1)));
      attend.splits = static_cast<int>(ceil_div(blocks, std::max(attend.span, 1)));
      std::optional<Tensor> partial, lse;
      if (attend.splits > 1) {
        partial = new_floats(like, attend.splits * rows * a.shape.channels);
        lse = new_floats(like, attend.splits * rows);
        attend.partial = floats_of(*partial);
        attend.lse = floats_of(*lse);
      }
      cuda::attend(attend, stream);
      if (attend.splits > 1) cuda::combine_splits(attend, stream);
    });
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cuda, GLMKERN_CUDA_KEY, m) {
  using glmkern::PrefixAttentionCuda;
  m.impl("prefix_attention_fwd", TORCH_BOX(&glmkern::prefix_attention_fwd<PrefixAttentionCuda>));
  m.impl("prefix_attention_bwd", TORCH_BOX(&glmkern::prefix_attention_bwd<PrefixAttentionCuda>));
  m.impl("prefix_attention_decode_fwd",
         TORCH_BOX(&glmkern::prefix_attention_decode_fwd<PrefixAttentionCuda>));
}
