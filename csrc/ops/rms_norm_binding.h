// Tensors in, tensors out: the schemas of glmkern/ops/rms_norm.py, once for every device. A Device
// has `forward` and `backward`, which run the kernels, and `weight_grad_splits`.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "ops/binding.h"
#include "ops/rms_norm.h"

namespace glmkern {

inline void require_rms_norm_rows(const char* op, const Tensor& x, const Tensor& weight) {
  require(x.dim() >= 1 && x.size(x.dim() - 1) > 0,
          std::string(op) + ": x needs a last dimension that is not empty");
  require_like(op, "x", x, x, x.scalar_type(), x.numel());
  require_like(op, "weight", weight, x, x.scalar_type(), x.size(x.dim() - 1));
}

inline RmsNormForward rms_norm_forward_arguments(const char* op, const Tensor& x,
                                                 const Tensor& weight, double eps, const Tensor& y,
                                                 const Tensor& rstd) {
  RmsNormForward a{};
  a.dtype = dtype_of(op, x);
  a.hidden = x.size(x.dim() - 1);
  a.rows = x.numel() / a.hidden;
  a.eps = static_cast<float>(eps);
  a.x = x.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.y = y.mutable_data_ptr();
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  return a;
}

// float32 [...] for an x of [..., hidden].
inline Tensor empty_rms_norm_rstd(const Tensor& x) {
  const auto sizes = x.sizes();
  return torch::stable::new_empty(x, {sizes.data(), sizes.size() - 1}, ScalarType::Float);
}

template <class Device>
std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps) {
  require_rms_norm_rows("rms_norm_fwd", x, weight);
  Tensor y = torch::stable::empty_like(x), rstd = empty_rms_norm_rstd(x);
  Device::forward(rms_norm_forward_arguments("rms_norm_fwd", x, weight, eps, y, rstd), x);
  return {y, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                    const Tensor& weight, double eps) {
  require_rms_norm_rows("add_rms_norm_fwd", x, weight);
  require_like("add_rms_norm_fwd", "residual", residual, x, x.scalar_type(), x.numel());
  Tensor y = torch::stable::empty_like(x), h = torch::stable::empty_like(x),
         rstd = empty_rms_norm_rstd(x);
  RmsNormForward a = rms_norm_forward_arguments("add_rms_norm_fwd", x, weight, eps, y, rstd);
  a.residual = residual.const_data_ptr();
  a.h = h.mutable_data_ptr();
  Device::forward(a, x);
  return {y, h, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                        const Tensor& rstd, const std::optional<Tensor>& dresidual,
                                        bool weight_grad) {
  const char* op = "rms_norm_bwd";
  require_rms_norm_rows(op, x, weight);
  RmsNormBackward a{};
  a.dtype = dtype_of(op, x);
  a.hidden = x.size(x.dim() - 1);
  a.rows = x.numel() / a.hidden;
  require_like(op, "dy", dy, x, x.scalar_type(), x.numel());
  require_like(op, "rstd", rstd, x, ScalarType::Float, a.rows);
  Tensor dx = torch::stable::empty_like(x);
  a.dy = dy.const_data_ptr();
  a.x = x.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.rstd = static_cast<const float*>(rstd.const_data_ptr());
  a.dx = dx.mutable_data_ptr();
  if (dresidual.has_value()) {
    require_like(op, "dresidual", *dresidual, x, x.scalar_type(), x.numel());
    a.dresidual = dresidual->const_data_ptr();
  }
  Tensor dweight = torch::stable::new_empty(weight, {weight_grad ? a.hidden : 0});
  std::optional<Tensor> partial;
  if (weight_grad) {
    a.splits = Device::weight_grad_splits(a.rows);
    partial = torch::stable::new_empty(x, {a.splits, a.hidden}, ScalarType::Float);
    a.partial = static_cast<float*>(partial->mutable_data_ptr());
    a.dweight = dweight.mutable_data_ptr();
  }
  Device::backward(a, x);
  return {dx, dweight};
}

}  // namespace glmkern
