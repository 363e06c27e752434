// The arguments of a call as prefix_attention's kernels take them: rows of queries, runs of keys.
#pragma once

#include <algorithm>
#include <optional>

#include "cpu/kernels/prefix_attention_cpu.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"
#include "ops/binding.h"
#include "ops/prefix_attention.h"

namespace glmkern {

inline const char* element_of(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * bytes_of(dtype);
}

inline char* element_of(void* data, DType dtype, int64_t index) {
  return static_cast<char*>(data) + index * bytes_of(dtype);
}

// Head `head` of token `token` of row `row`.
inline const char* element_of(const AttentionShape& shape, const AttentionTokens& x, int64_t row,
                              int64_t token, int64_t head) {
  return element_of(x.data, shape.dtype,
                    row * x.row_stride + token * x.stride + head * shape.channels);
}

// `count` keys and values of one group, from token `token` of row `row` on.
inline KeyRun key_run(const AttentionShape& shape, const AttentionTokens& k,
                      const AttentionTokens& v, int64_t row, int64_t token, int64_t count,
                      int64_t group) {
  return {shape.dtype,
          element_of(shape, k, row, token, group),
          element_of(shape, v, row, token, group),
          k.stride,
          v.stride,
          count};
}

// Query rows of one group, from token `token` of row `row` on; `first_out` is that token in out and
// lse, counted over all rows. Rows, keys and what they see are the caller's to fill in.
inline AttentionRows query_rows(const AttentionShape& shape, float scale, const AttentionTokens& q,
                                int64_t row, int64_t token, void* out, float* lse,
                                int64_t first_out, int64_t group) {
  const int64_t head = group * shape.heads;
  const int64_t out_head = first_out * shape.groups * shape.heads + head;
  AttentionRows a{};
  a.dtype = shape.dtype;
  a.groups = shape.groups;
  a.heads = shape.heads;
  a.channels = shape.channels;
  a.scale = scale;
  a.q = element_of(shape, q, row, token, head);
  a.q_stride = q.stride;
  a.out = element_of(out, shape.dtype, out_head * shape.channels);
  a.lse = lse != nullptr ? lse + out_head : nullptr;
  return a;
}

// The prefix as it is, or as every sequence's dropout leaves it: float32 [sequences, 2, prefix,
// groups, channels], rounded to q's dtype.
class PrefixKeys {
 public:
  PrefixKeys(const AttentionShape& shape, const AttentionPrefix& prefix)
      : shape_(shape), prefix_(prefix) {}

  // Draws the dropout of all sequences; memory is allocated where `like` lies.
  void drop(const PackedSequences& sequences, const Tensor& like) {
    if (prefix_.p == 0) return;
    const int64_t row = shape_.groups * shape_.channels, count = shape_.prefix * row;
    dropped_ = torch::stable::new_empty(like, {sequences.count * 2 * count}, ScalarType::Float);
    const DroppedPrefix all{shape_.dtype, shape_.prefix_dtype, count, prefix_.keys, prefix_.values,
                            prefix_.p,    prefix_.seed,        0,     nullptr};
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_drop);
    for_each_row(sequences.count * shape_.prefix, 2 * row, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        DroppedPrefix one = all;
        one.sequence_id = sequences.ids[i / shape_.prefix];
        one.result = floats_of(*dropped_) + i / shape_.prefix * 2 * count;
        kernel(one, i % shape_.prefix * row, (i % shape_.prefix + 1) * row);
      }
    });
  }

  KeyRun of(int64_t sequence, int64_t group) const {
    if (shape_.prefix == 0) return {};
    const int64_t row = shape_.groups * shape_.channels, first = group * shape_.channels;
    if (!is_dropped()) {
      return {shape_.prefix_dtype,
              element_of(prefix_.keys, shape_.prefix_dtype, first),
              element_of(prefix_.values, shape_.prefix_dtype, first),
              row,
              row,
              shape_.prefix};
    }
    const int64_t count = shape_.prefix * row;
    const float* keys = floats_of(*dropped_) + sequence * 2 * count + first;
    return {DType::kFloat, keys, keys + count, row, row, shape_.prefix};
  }

  bool is_dropped() const { return dropped_.has_value(); }

 private:
  AttentionShape shape_;
  AttentionPrefix prefix_;
  std::optional<Tensor> dropped_;
};

}  // namespace glmkern
