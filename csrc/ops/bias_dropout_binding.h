// Tensors in, tensors out: the schemas of glmkern/ops/bias_dropout.py, once for every device. A
// Device has `forward` and `backward`, which run the kernels, and `bias_grad_splits`.
#pragma once

#include <optional>
#include <tuple>

#include "ops/bias_dropout.h"
#include "ops/binding.h"

namespace glmkern {

inline void require_bias_dropout_rows(const std::string& op, const char* name, const Tensor& x) {
  require(x.dim() >= 1 && x.size(x.dim() - 1) > 0,
          op + ": " + name + " needs a last dimension that is not empty");
}

// What DropoutRows points to; the caller may have sliced it out of something wider.
struct BiasDropoutTensors {
  BiasDropoutTensors(const char* op, const Tensor& x, double p, const Tensor& seed,
                     const Tensor& cu_seqlens, const Tensor& sequence_ids)
      : seed(torch::stable::contiguous(seed)),
        cu_seqlens(torch::stable::contiguous(cu_seqlens)),
        sequence_ids(torch::stable::contiguous(sequence_ids)) {
    const int64_t sequences = sequence_ids.numel();
    require_like(op, "seed", this->seed, x, ScalarType::Long, 2);
    require_like(op, "sequence_ids", this->sequence_ids, x, ScalarType::Long, sequences);
    require_like(op, "cu_seqlens", this->cu_seqlens, x, ScalarType::Int, sequences + 1);
    rows = {p,
            static_cast<const int64_t*>(this->seed.const_data_ptr()),
            {sequences, static_cast<const int32_t*>(this->cu_seqlens.const_data_ptr()),
             static_cast<const int64_t*>(this->sequence_ids.const_data_ptr())}};
  }

  Tensor seed, cu_seqlens, sequence_ids;
  DropoutRows rows;
};

template <class Device>
Tensor bias_dropout_add_fwd(const Tensor& x, const std::optional<Tensor>& bias,
                            const Tensor& residual, double p, const std::optional<Tensor>& seed,
                            const std::optional<Tensor>& cu_seqlens,
                            const std::optional<Tensor>& sequence_ids) {
  const char* op = "bias_dropout_add_fwd";
  require_bias_dropout_rows(op, "x", x);
  BiasDropoutForward a{};
  a.dtype = dtype_of(op, x);
  a.hidden = x.size(x.dim() - 1);
  a.rows = x.numel() / a.hidden;
  require_like(op, "x", x, x, x.scalar_type(), x.numel());
  require_like(op, "residual", residual, x, x.scalar_type(), x.numel());
  std::optional<Tensor> bias_row;
  if (bias.has_value()) {
    bias_row = torch::stable::contiguous(*bias);
    require_like(op, "bias", *bias_row, x, x.scalar_type(), a.hidden);
    a.bias = bias_row->const_data_ptr();
  }
  std::optional<BiasDropoutTensors> dropout;
  if (p > 0) {
    require(seed.has_value() && cu_seqlens.has_value() && sequence_ids.has_value(),
            std::string(op) + ": dropout needs seed, cu_seqlens and sequence_ids");
    dropout.emplace(op, x, p, *seed, *cu_seqlens, *sequence_ids);
    a.dropout = dropout->rows;
  }
  Tensor y = torch::stable::empty_like(x);
  a.x = x.const_data_ptr();
  a.residual = residual.const_data_ptr();
  a.y = y.mutable_data_ptr();
  Device::forward(a, x);
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor> bias_dropout_add_bwd(const Tensor& dy, double p, const Tensor& seed,
                                                const Tensor& cu_seqlens,
                                                const Tensor& sequence_ids, bool bias_grad) {
  const char* op = "bias_dropout_add_bwd";
  require_bias_dropout_rows(op, "dy", dy);
  require_like(op, "dy", dy, dy, dy.scalar_type(), dy.numel());
  const BiasDropoutTensors dropout(op, dy, p, seed, cu_seqlens, sequence_ids);
  BiasDropoutBackward a{};
  a.dtype = dtype_of(op, dy);
  a.hidden = dy.size(dy.dim() - 1);
  a.rows = dy.numel() / a.hidden;
  a.dropout = dropout.rows;
  Tensor dx = torch::stable::empty_like(dy);
  a.dy = dy.const_data_ptr();
  a.dx = dx.mutable_data_ptr();
  Tensor dbias = torch::stable::new_empty(dy, {bias_grad ? a.hidden : 0});
  std::optional<Tensor> partial;
  if (bias_grad) {
    a.splits = Device::bias_grad_splits(a.rows);
    partial = torch::stable::new_empty(dy, {a.splits, a.hidden}, ScalarType::Float);
    a.partial = static_cast<float*>(partial->mutable_data_ptr());
    a.dbias = dbias.mutable_data_ptr();
  }
  Device::backward(a, dy);
  return {dx, dbias};
}

}  // namespace glmkern
