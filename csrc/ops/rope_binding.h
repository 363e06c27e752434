// Tensors in, tensors out: the schemas of glmkern/ops/rope.py, once for every device. A Device has
// `check_positions(positions, tokens, table)` and `check_slots(slots, tokens, entries)`, for where
// reading them is free, and `run`.
#pragma once

#include <optional>
#include <tuple>

#include "ops/binding.h"
#include "ops/rope.h"

namespace glmkern {

// The arguments that all four ops share, and the tensors that they point to.
struct RopeArguments {
  Tensor cos_sin, positions;
  Rope rope;
};

template <class Device>
RopeArguments rope_arguments(const std::string& op, const Tensor& x, int64_t tokens,
                             int64_t channels, const Tensor& cos_sin, const Tensor& positions) {
  require(cos_sin.dim() == 3 && cos_sin.size(2) == 2 && 2 * cos_sin.size(1) <= channels,
          op + ": cos_sin must be [positions, R, 2] with 2R <= " + std::to_string(channels) +
              ", the channels");
  RopeArguments a{torch::stable::contiguous(cos_sin), torch::stable::contiguous(positions), {}};
  require_like(op.c_str(), "cos_sin", a.cos_sin, x, cos_sin.scalar_type(), cos_sin.numel());
  require_like(op.c_str(), "positions", a.positions, x, ScalarType::Long, tokens);
  a.rope.dtype = dtype_of(op.c_str(), x);
  a.rope.table_dtype = dtype_of(op.c_str(), cos_sin);
  a.rope.tokens = tokens;
  a.rope.channels = channels;
  a.rope.pairs = cos_sin.size(1);
  a.rope.cos_sin = a.cos_sin.const_data_ptr();
  a.rope.positions = static_cast<const int64_t*>(a.positions.const_data_ptr());
  Device::check_positions(a.rope.positions, tokens, cos_sin.size(0));
  return a;
}

// x [T, heads, C] itself where its channels are contiguous, else a copy.
inline Tensor rope_contiguous_channels(const std::string& op, const char* name, const Tensor& x) {
  require(x.dim() == 3, op + ": " + name + " must be [T, heads, C]");
  return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
}

inline StridedHeads rope_strided_heads(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

template <class Device>
Tensor rope_one_tensor(const char* op, const Tensor& any_strides, const Tensor& cos_sin,
                       const Tensor& positions, bool inverse) {
  const Tensor x = rope_contiguous_channels(op, "x", any_strides);
  RopeArguments a = rope_arguments<Device>(op, x, x.size(0), x.size(2), cos_sin, positions);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  a.rope.inverse = inverse;
  a.rope.groups = 1;
  a.rope.heads[0] = {x.size(1), true,   rope_strided_heads(x), rope_strided_heads(y),
                     nullptr,   nullptr};
  Device::run(a.rope, x);
  return y;
}

template <class Device>
Tensor rope_fwd(const Tensor& x, const Tensor& cos_sin, const Tensor& positions) {
  return rope_one_tensor<Device>("rope_fwd", x, cos_sin, positions, false);
}

template <class Device>
Tensor rope_bwd(const Tensor& dy, const Tensor& cos_sin, const Tensor& positions) {
  return rope_one_tensor<Device>("rope_bwd", dy, cos_sin, positions, true);
}

// A row of q, k and v, parts 0, 1 and 2: all heads of one part after all heads of the other, or
// interleaved: q, k and v of one head side by side.
struct QkvLayout {
  QkvLayout(const std::string& op, int64_t heads, int64_t groups, int64_t channels,
            bool interleaved)
      : heads(heads), groups(groups), channels(channels), interleaved(interleaved) {
    require(heads > 0 && groups > 0, op + ": heads and groups must be positive");
    require(!interleaved || heads == groups,
            op + ": interleaved heads need as many groups as heads");
  }

  int64_t width() const { return (heads + 2 * groups) * channels; }
  int64_t count(int part) const { return part == 0 ? heads : groups; }

  // Where a part starts in a row of elements of `bytes` bytes.
  void* start(int part, const void* row, int64_t bytes) const {
    const int64_t heads_before = interleaved || part == 0 ? part : heads + (part - 1) * groups;
    return const_cast<char*>(static_cast<const char*>(row)) + heads_before * channels * bytes;
  }

  StridedHeads part_of(const Tensor& rows, int part, int64_t bytes) const {
    return {start(part, rows.const_data_ptr(), bytes), rows.stride(0),
            interleaved ? 3 * channels : channels};
  }

  int64_t heads, groups, channels;
  bool interleaved;
};

// The rows of qkv with contiguous channels, and how they are split.
struct QkvRows {
  QkvRows(const std::string& op, const Tensor& any_strides, int64_t heads, int64_t groups,
          bool interleaved)
      : rows(contiguous_channels(op, any_strides)),
        layout(op, heads, groups, rows.size(1) / (heads + 2 * groups), interleaved) {
    require(layout.width() == rows.size(1),
            op + ": a row of qkv must hold heads + 2 groups heads of one size");
  }

  static Tensor contiguous_channels(const std::string& op, const Tensor& qkv) {
    require(qkv.dim() == 2, op + ": qkv must be [T, (heads + 2 groups) * C]");
    return qkv.stride(1) == 1 ? qkv : torch::stable::contiguous(qkv);
  }

  Tensor rows;
  QkvLayout layout;
};

// Writes q, k and v, `parts`; those of k and v at `slots`, or in order.
template <class Device>
void rotate_qkv(const char* op, const QkvRows& qkv, const std::optional<Tensor>& bias,
                const Tensor& cos_sin, const Tensor& positions, const Tensor (&parts)[3],
                const int64_t* slots) {
  const QkvLayout& layout = qkv.layout;
  RopeArguments a =
      rope_arguments<Device>(op, qkv.rows, qkv.rows.size(0), layout.channels, cos_sin, positions);
  const int64_t bytes = bytes_of(a.rope.dtype);
  std::optional<Tensor> bias_row;
  if (bias.has_value()) {
    bias_row = torch::stable::contiguous(*bias);
    require_like(op, "bias", *bias_row, qkv.rows, qkv.rows.scalar_type(), layout.width());
  }
  a.rope.groups = 3;
  for (int part = 0; part < 3; part++) {
    a.rope.heads[part] = {
        layout.count(part),
        part < 2,
        layout.part_of(qkv.rows, part, bytes),
        rope_strided_heads(parts[part]),
        bias_row.has_value() ? layout.start(part, bias_row->const_data_ptr(), bytes) : nullptr,
        part == 0 ? nullptr : slots};
  }
  Device::run(a.rope, qkv.rows);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> qkv_rope_fwd(const Tensor& any_strides,
                                                const std::optional<Tensor>& bias,
                                                const Tensor& cos_sin, const Tensor& positions,
                                                int64_t heads, int64_t groups, bool interleaved) {
  const char* op = "qkv_rope_fwd";
  const QkvRows qkv(op, any_strides, heads, groups, interleaved);
  const int64_t tokens = qkv.rows.size(0), channels = qkv.layout.channels;
  const Tensor parts[3] = {torch::stable::new_empty(qkv.rows, {tokens, heads, channels}),
                           torch::stable::new_empty(qkv.rows, {tokens, groups, channels}),
                           torch::stable::new_empty(qkv.rows, {tokens, groups, channels})};
  rotate_qkv<Device>(op, qkv, bias, cos_sin, positions, parts, nullptr);
  return {parts[0], parts[1], parts[2]};
}

template <class Device>
Tensor qkv_rope_cache_fwd(const Tensor& any_strides, const std::optional<Tensor>& bias,
                          const Tensor& cos_sin, const Tensor& positions, int64_t heads,
                          int64_t groups, bool interleaved, const Tensor& keys,
                          const Tensor& values, const Tensor& slots) {
  const char* op = "qkv_rope_cache_fwd";
  const QkvRows qkv(op, any_strides, heads, groups, interleaved);
  const int64_t tokens = qkv.rows.size(0), channels = qkv.layout.channels;
  for (const Tensor& entries : {keys, values}) {
    require(entries.dim() == 3 && entries.size(0) == keys.size(0) && entries.size(1) == groups &&
                entries.size(2) == channels && entries.scalar_type() == qkv.rows.scalar_type() &&
                entries.device() == qkv.rows.device(),
            std::string(op) +
                ": keys and values must be [entries, groups, C] of qkv's dtype and device");
    require(entries.stride(2) == 1 && entries.stride(1) == channels,
            std::string(op) + ": an entry of keys or values is not contiguous");
  }
  const Tensor places = torch::stable::contiguous(slots);
  require_like(op, "slots", places, qkv.rows, ScalarType::Long, tokens);
  const auto* slot_of = static_cast<const int64_t*>(places.const_data_ptr());
  Device::check_slots(slot_of, tokens, keys.size(0));
  const Tensor parts[3] = {torch::stable::new_empty(qkv.rows, {tokens, heads, channels}), keys,
                           values};
  rotate_qkv<Device>(op, qkv, bias, cos_sin, positions, parts, slot_of);
  return parts[0];
}

template <class Device>
Tensor qkv_rope_bwd(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos_sin,
                    const Tensor& positions, bool interleaved) {
  const char* op = "qkv_rope_bwd";
  const Tensor parts[3] = {rope_contiguous_channels(op, "dq", dq),
                           rope_contiguous_channels(op, "dk", dk),
                           rope_contiguous_channels(op, "dv", dv)};
  const int64_t tokens = dq.size(0), channels = dq.size(2);
  const QkvLayout layout(op, dq.size(1), dk.size(1), channels, interleaved);
  RopeArguments a = rope_arguments<Device>(op, dq, tokens, channels, cos_sin, positions);
  Tensor dqkv = torch::stable::new_empty(dq, {tokens, layout.width()});
  a.rope.inverse = true;
  a.rope.groups = 3;
  for (int part = 0; part < 3; part++) {
    const Tensor& x = parts[part];
    require(x.scalar_type() == dq.scalar_type() && x.device() == dq.device() &&
                x.size(0) == tokens && x.size(1) == layout.count(part) && x.size(2) == channels,
            std::string(op) +
                ": dq must be [T, heads, C], and dk and dv [T, groups, C] of dq's "
                "dtype and device");
    a.rope.heads[part] = {layout.count(part),
                          part < 2,
                          rope_strided_heads(x),
                          layout.part_of(dqkv, part, bytes_of(a.rope.dtype)),
                          nullptr,
                          nullptr};
  }
  Device::run(a.rope, dq);
  return dqkv;
}

}  // namespace glmkern
