// Tensors in, tensors out: the schemas of glmkern/ops/prefix_attention.py, once for every device. A
// Device has `forward`, `backward` and `decode`, which run the kernels; working memory is allocated
// where the tensor beside the arguments lies. The lengths of sequences and rows are values, for a
// Device to check where reading them is free.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "ops/binding.h"
#include "ops/prefix_attention.h"

namespace glmkern {

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

// q, k and v with dense heads and the prefix made contiguous, and what the kernels know of them.
struct AttentionTensors {
  AttentionTensors(const std::string& op, const Tensor& any_q, const Tensor& any_k,
                   const Tensor& any_v, const std::optional<Tensor>& any_prefix_k,
                   const std::optional<Tensor>& any_prefix_v)
      : shape(attention_shape(op, any_q, any_k, any_v, any_prefix_k, any_prefix_v)),
        q(with_dense_heads(any_q)),
        k(with_dense_heads(any_k)),
        v(with_dense_heads(any_v)) {
    if (!any_prefix_k.has_value()) return;
    prefix_k = torch::stable::contiguous(*any_prefix_k);
    prefix_v = torch::stable::contiguous(*any_prefix_v);
    prefix.keys = prefix_k->const_data_ptr();
    prefix.values = prefix_v->const_data_ptr();
  }

  static AttentionTokens tokens_of(const Tensor& x) {
    const int64_t dim = x.dim();
    return {x.const_data_ptr(), x.stride(dim - 3), dim > 3 ? x.stride(dim - 4) : 0};
  }

  // The arguments that all three ops have.
  template <class Arguments>
  Arguments arguments(double scale) const {
    Arguments a{};
    a.shape = shape;
    a.scale = static_cast<float>(scale);
    a.q = tokens_of(q);
    a.k = tokens_of(k);
    a.v = tokens_of(v);
    a.prefix = prefix;
    return a;
  }

  AttentionShape shape;
  Tensor q, k, v;
  std::optional<Tensor> prefix_k, prefix_v;
  AttentionPrefix prefix{};
};

// The sequences of a packed batch, and the seed of the prefix's dropout where there is one.
struct AttentionSequences {
  AttentionSequences(const AttentionTensors& tensors, const Tensor& any_cu_seqlens,
                     const Tensor& any_ids, const std::optional<Tensor>& any_seed, double p)
      : cu_seqlens(torch::stable::contiguous(any_cu_seqlens)) {
    require(tensors.q.dim() == 3 && tensors.k.size(0) == tensors.q.size(0),
            "prefix_attention: q must be [T, N, C], and k and v have as many tokens");
    const int64_t count = cu_seqlens.numel() - 1;
    require(cu_seqlens.scalar_type() == ScalarType::Int && count >= 1 && any_ids.numel() == count,
            "prefix_attention: cu_seqlens must be int32 [B+1], and sequence_ids have B elements");
    require(cu_seqlens.device() == tensors.q.device(),
            "prefix_attention: cu_seqlens is on another device");
    packed = {count, static_cast<const int32_t*>(cu_seqlens.const_data_ptr()), nullptr};
    if (p == 0 || tensors.shape.prefix == 0) return;
    require(any_seed.has_value() && any_seed->numel() == 2 &&
                any_seed->scalar_type() == ScalarType::Long &&
                any_ids.scalar_type() == ScalarType::Long,
            "prefix_attention: dropout needs seed and sequence_ids in int64");
    require(any_seed->device() == tensors.q.device() && any_ids.device() == tensors.q.device(),
            "prefix_attention: seed or sequence_ids is on another device");
    ids = torch::stable::contiguous(any_ids);
    seed = torch::stable::contiguous(*any_seed);
    packed.ids = static_cast<const int64_t*>(ids->const_data_ptr());
    this->p = p;
  }

  template <class Arguments>
  void fill_in(Arguments& a) const {
    a.sequences = packed;
    a.prefix.p = p;
    if (p > 0) a.prefix.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }

  Tensor cu_seqlens;
  std::optional<Tensor> ids, seed;
  PackedSequences packed;
  double p = 0;
};

template <class Device>
std::tuple<Tensor, Tensor> prefix_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& prefix_k,
    const std::optional<Tensor>& prefix_v, const Tensor& cu_seqlens, const Tensor& sequence_ids,
    const std::optional<Tensor>& seed, double scale, double p) {
  const AttentionTensors tensors("prefix_attention_fwd", q, k, v, prefix_k, prefix_v);
  const AttentionSequences sequences(tensors, cu_seqlens, sequence_ids, seed, p);
  const AttentionShape& shape = tensors.shape;
  const int64_t query_heads = shape.groups * shape.heads;
  Tensor out = torch::stable::new_empty(q, {shape.tokens, query_heads, shape.channels});
  Tensor lse = torch::stable::new_empty(q, {shape.tokens, query_heads}, ScalarType::Float);
  auto a = tensors.arguments<PrefixAttentionForward>(scale);
  sequences.fill_in(a);
  a.out = out.mutable_data_ptr();
  a.lse = floats_of(lse);
  Device::forward(a, q);
  return {out, lse};
}

// Memory for the gradient of x, or none: a tensor without elements.
inline Tensor empty_attention_gradient(const Tensor& x, bool wanted) {
  if (!wanted) return torch::stable::new_empty(x, {0});
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_bwd(
    const Tensor& any_dout, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& prefix_k, const std::optional<Tensor>& prefix_v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens, const Tensor& sequence_ids,
    const std::optional<Tensor>& seed, double scale, double p, bool token_grad, bool prefix_grad) {
  const char* op = "prefix_attention_bwd";
  const AttentionTensors tensors(op, q, k, v, prefix_k, prefix_v);
  const AttentionSequences sequences(tensors, cu_seqlens, sequence_ids, seed, p);
  require_like(op, "out", out, q, q.scalar_type(), q.numel());
  require_like(op, "lse", lse, q, ScalarType::Float, q.numel() / tensors.shape.channels);
  require(any_dout.scalar_type() == q.scalar_type() && any_dout.device() == q.device() &&
              any_dout.dim() == 3 && any_dout.numel() == q.numel() &&
              any_dout.size(0) == q.size(0) && any_dout.size(2) == q.size(2),
          std::string(op) + ": dout must be like q");
  const Tensor dout = with_dense_heads(any_dout);
  auto a = tensors.arguments<PrefixAttentionBackward>(scale);
  sequences.fill_in(a);
  a.dout = AttentionTensors::tokens_of(dout);
  a.out = out.const_data_ptr();
  a.lse = static_cast<const float*>(lse.const_data_ptr());
  a.token_grad = token_grad;
  a.prefix_grad = prefix_grad && prefix_k.has_value();

  Tensor dq = empty_attention_gradient(q, a.token_grad);
  Tensor dk = empty_attention_gradient(k, a.token_grad);
  Tensor dv = empty_attention_gradient(v, a.token_grad);
  Tensor dprefix_k = empty_attention_gradient(a.prefix_grad ? *prefix_k : q, a.prefix_grad);
  Tensor dprefix_v = empty_attention_gradient(a.prefix_grad ? *prefix_v : q, a.prefix_grad);
  a.dq = dq.mutable_data_ptr();
  a.dk = dk.mutable_data_ptr();
  a.dv = dv.mutable_data_ptr();
  a.dprefix_k = dprefix_k.mutable_data_ptr();
  a.dprefix_v = dprefix_v.mutable_data_ptr();
  Device::backward(a, q);
  return {dq, dk, dv, dprefix_k, dprefix_v};
}

template <class Device>
Tensor prefix_attention_decode_fwd(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& any_cache_lens,
                                   const std::optional<Tensor>& prefix_k,
                                   const std::optional<Tensor>& prefix_v, const Tensor& any_q_lens,
                                   double scale) {
  const char* op = "prefix_attention_decode_fwd";
  const AttentionTensors tensors(op, q, k_cache, v_cache, prefix_k, prefix_v);
  require(q.dim() == 4 && k_cache.size(0) == q.size(0) && v_cache.size(0) == q.size(0),
          std::string(op) + ": q and the caches must have the same number of rows");
  const Tensor cache_lens = torch::stable::contiguous(any_cache_lens);
  const Tensor q_lens = torch::stable::contiguous(any_q_lens);
  require_like(op, "cache_lens", cache_lens, q, ScalarType::Long, q.size(0));
  require_like(op, "q_lens", q_lens, q, ScalarType::Long, q.size(0));
  const AttentionShape& shape = tensors.shape;
  auto a = tensors.arguments<PrefixAttentionDecode>(scale);
  a.rows = q.size(0);
  a.room = k_cache.size(1);
  a.cache_lens = static_cast<const int64_t*>(cache_lens.const_data_ptr());
  a.q_lens = static_cast<const int64_t*>(q_lens.const_data_ptr());
  Tensor out = torch::stable::new_zeros(
      q, {a.rows, shape.tokens, shape.groups * shape.heads, shape.channels});
  a.out = out.mutable_data_ptr();
  Device::decode(a, q);
  return out;
}

}  // namespace glmkern
