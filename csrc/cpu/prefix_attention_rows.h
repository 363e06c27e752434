// The tensors of a call as prefix_attention's kernels take them.
#pragma once

#include <algorithm>
#include <optional>

#include "cpu/kernels/prefix_attention_cpu.h"
#include "cpu/parallel.h"
#include "ops/prefix_attention_binding.h"
#include "ops/sequences.h"

namespace glmkern {

inline const char* element_of(const Tensor& x, int64_t index) {
  return static_cast<const char*>(x.const_data_ptr()) + index * x.element_size();
}

inline char* mutable_element_of(const Tensor& x, int64_t index) {
  return static_cast<char*>(x.mutable_data_ptr()) + index * x.element_size();
}

// `count` keys and values of one group; first_k and first_v are the elements where they start in k
// and v [.., tokens, groups, channels].
inline KeyRun key_run(const AttentionShape& shape, const Tensor& k, const Tensor& v,
                      int64_t first_k, int64_t first_v, int64_t count, int64_t group) {
  const int64_t dim = k.dim(), offset = group * shape.channels;
  return {dtype_of("prefix_attention", k),
          element_of(k, first_k + offset),
          element_of(v, first_v + offset),
          k.stride(dim - 3),
          v.stride(dim - 3),
          count};
}

// Query rows of one group. They start at element `first_q` of q [.., tokens, heads, channels] and
// at token `first_out` of out and lse. Rows, keys and what they see are the caller's to fill in.
inline AttentionRows query_rows(const AttentionShape& shape, double scale, const Tensor& q,
                                int64_t first_q, const Tensor& out,
                                const std::optional<Tensor>& lse, int64_t first_out,
                                int64_t group) {
  const int64_t head = group * shape.heads;
  const int64_t out_head = first_out * shape.groups * shape.heads + head;
  AttentionRows a{};
  a.dtype = shape.dtype;
  a.groups = shape.groups;
  a.heads = shape.heads;
  a.channels = shape.channels;
  a.scale = static_cast<float>(scale);
  a.q = element_of(q, first_q + head * shape.channels);
  a.q_stride = q.stride(q.dim() - 3);
  a.out = mutable_element_of(out, out_head * shape.channels);
  a.lse = lse.has_value() ? floats_of(*lse) + out_head : nullptr;
  return a;
}

// The prefix as it is, or as every sequence's dropout leaves it: float32 [sequences, 2, prefix,
// groups, channels], rounded to q's dtype.
class Prefix {
 public:
  Prefix(const AttentionShape& shape, const std::optional<Tensor>& k,
         const std::optional<Tensor>& v)
      : shape_(shape) {
    if (!k.has_value()) return;
    k_ = torch::stable::contiguous(*k);
    v_ = torch::stable::contiguous(*v);
  }

  void drop(const Tensor& sequence_ids, const std::optional<Tensor>& seed, double p) {
    const int64_t sequences = sequence_ids.numel(), row = shape_.groups * shape_.channels;
    const int64_t count = shape_.prefix * row;
    if (p == 0 || count == 0) return;
    require(seed.has_value() && seed->numel() == 2 && seed->scalar_type() == ScalarType::Long &&
                sequence_ids.scalar_type() == ScalarType::Long,
            "prefix_attention: dropout needs seed and sequence_ids in int64");
    const Tensor ids = torch::stable::contiguous(sequence_ids);
    const Tensor key = torch::stable::contiguous(*seed);
    dropped_ = torch::stable::new_empty(*k_, {sequences * 2 * count}, ScalarType::Float);
    DroppedPrefix a{shape_.dtype,
                    shape_.prefix_dtype,
                    count,
                    k_->const_data_ptr(),
                    v_->const_data_ptr(),
                    p,
                    static_cast<const int64_t*>(key.const_data_ptr()),
                    0,
                    nullptr};
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_drop);
    for_each_row(sequences * shape_.prefix, 2 * row, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        DroppedPrefix one = a;
        one.sequence_id = static_cast<const int64_t*>(ids.const_data_ptr())[i / shape_.prefix];
        one.result = floats_of(*dropped_) + i / shape_.prefix * 2 * count;
        kernel(one, i % shape_.prefix * row, (i % shape_.prefix + 1) * row);
      }
    });
  }

  KeyRun of(int64_t sequence, int64_t group) const {
    if (shape_.prefix == 0) return {};
    if (!dropped_.has_value()) return key_run(shape_, *k_, *v_, 0, 0, shape_.prefix, group);
    const int64_t row = shape_.groups * shape_.channels, count = shape_.prefix * row;
    const float* keys = floats_of(*dropped_) + sequence * 2 * count + group * shape_.channels;
    return {DType::kFloat, keys, keys + count, row, row, shape_.prefix};
  }

  Tensor new_like() const {
    return torch::stable::new_empty(*k_, {shape_.prefix, shape_.groups, shape_.channels});
  }

  bool is_dropped() const { return dropped_.has_value(); }

 private:
  AttentionShape shape_;
  std::optional<Tensor> k_, v_, dropped_;
};

// The sequences of a packed batch; ValueError where they do not fit the tokens.
class Spans {
 public:
  Spans(const Tensor& cu_seqlens, const Tensor& sequence_ids, int64_t tokens)
      : cu_seqlens_(torch::stable::contiguous(cu_seqlens)) {
    require(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.numel() >= 2 &&
                sequence_ids.numel() == count(),
            "prefix_attention: cu_seqlens must be int32 [B+1], and sequence_ids have B elements");
    require_spans("prefix_attention", ends(), count(), tokens);
  }

  int64_t count() const { return cu_seqlens_.numel() - 1; }
  int64_t begin(int64_t sequence) const { return ends()[sequence]; }
  int64_t end(int64_t sequence) const { return ends()[sequence + 1]; }
  int64_t length(int64_t sequence) const { return end(sequence) - begin(sequence); }

  int64_t sequence_of(int64_t token) const {
    return std::upper_bound(ends(), ends() + count() + 1, token) - ends() - 1;
  }

 private:
  const int32_t* ends() const { return static_cast<const int32_t*>(cu_seqlens_.const_data_ptr()); }

  Tensor cu_seqlens_;
};

}  // namespace glmkern
