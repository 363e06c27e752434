// The tensors of glmkern/ops/prefix_attention.py's schemas, checked and measured.
#pragma once

#include <optional>
#include <string>

#include "ops/binding.h"

namespace glmkern {

// q and its like [tokens, groups * heads, channels], k and v [tokens, groups, channels], the prefix
// [prefix, groups, channels]. `heads` are the query heads of one group.
struct AttentionShape {
  DType dtype, prefix_dtype;
  int64_t tokens, groups, heads, channels, prefix;
};

// Heads and channels side by side, tokens at any distance: `x` itself or, otherwise, a copy.
inline Tensor with_dense_heads(const Tensor& x) {
  const int64_t channels = x.size(x.dim() - 1);
  const bool dense = x.stride(x.dim() - 1) == 1 && x.stride(x.dim() - 2) == channels;
  return dense ? x : torch::stable::contiguous(x);
}

// q [.., heads, channels], k and v [.., groups, channels], both prefixes or none.
inline AttentionShape attention_shape(const std::string& op, const Tensor& q, const Tensor& k,
                                      const Tensor& v, const std::optional<Tensor>& prefix_k,
                                      const std::optional<Tensor>& prefix_v) {
  const int64_t dim = q.dim();
  require(dim >= 3 && k.dim() == dim && v.dim() == dim,
          op + ": q, k and v need tokens, heads and channels");
  AttentionShape shape{};
  shape.dtype = shape.prefix_dtype = dtype_of(op.c_str(), q);
  shape.tokens = q.size(dim - 3);
  shape.channels = q.size(dim - 1);
  shape.groups = k.size(dim - 2);
  require(shape.channels > 0 && shape.groups > 0 && q.size(dim - 2) % shape.groups == 0,
          op + ": the number of query heads must be a multiple of the number of groups");
  shape.heads = q.size(dim - 2) / shape.groups;
  for (const Tensor* x : {&k, &v}) {
    require(x->device() == q.device() && x->scalar_type() == q.scalar_type(),
            op + ": k and v must have q's dtype and device");
    require(x->numel() == k.numel() && x->size(dim - 3) == k.size(dim - 3) &&
                x->size(dim - 2) == shape.groups && x->size(dim - 1) == shape.channels,
            op + ": k and v must have the same shape and q's channels");
  }
  require(prefix_k.has_value() == prefix_v.has_value(),
          op + ": give both prefix_k and prefix_v, or neither");
  if (!prefix_k.has_value()) return shape;
  shape.prefix = prefix_k->size(0);
  shape.prefix_dtype = dtype_of(op.c_str(), *prefix_k);
  require(shape.prefix_dtype == DType::kFloat || shape.prefix_dtype == shape.dtype,
          op + ": the prefix must be float32 or of q's dtype");
  for (const Tensor* x : {&*prefix_k, &*prefix_v}) {
    require(x->dim() == 3 && x->device() == q.device() &&
                x->scalar_type() == prefix_k->scalar_type() && x->size(0) == shape.prefix &&
                x->size(1) == shape.groups && x->size(2) == shape.channels,
            op + ": prefix_k and prefix_v must be [P, groups, channels], of one dtype");
  }
  return shape;
}

}  // namespace glmkern
