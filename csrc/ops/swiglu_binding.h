// Tensors in, tensors out: the schemas of glmkern/ops/swiglu.py, once for every device. A Device
// has `forward` and `backward`, which run the kernels.
#pragma once

#include <vector>

#include "ops/binding.h"
#include "ops/swiglu.h"

namespace glmkern {

// The width of one half of x's last dimension.
inline int64_t swiglu_width(const std::string& op, const Tensor& x) {
  require(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0,
          op + ": x's last dimension must hold two halves of one size");
  return x.size(x.dim() - 1) / 2;
}

template <class Device>
Tensor swiglu_fwd(const Tensor& x) {
  const char* op = "swiglu_fwd";
  SwigluForward a{};
  a.dtype = dtype_of(op, x);
  a.width = swiglu_width(op, x);
  a.rows = a.width > 0 ? x.numel() / (2 * a.width) : 0;
  require_like(op, "x", x, x, x.scalar_type(), x.numel());
  const auto x_sizes = x.sizes();
  std::vector<int64_t> sizes(x_sizes.begin(), x_sizes.end());
  sizes.back() = a.width;
  Tensor y = torch::stable::new_empty(x, sizes);
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  Device::forward(a, x);
  return y;
}

template <class Device>
Tensor swiglu_bwd(const Tensor& dy, const Tensor& x) {
  const char* op = "swiglu_bwd";
  SwigluBackward a{};
  a.dtype = dtype_of(op, x);
  a.width = swiglu_width(op, x);
  a.rows = a.width > 0 ? x.numel() / (2 * a.width) : 0;
  require_like(op, "x", x, x, x.scalar_type(), x.numel());
  require_like(op, "dy", dy, x, x.scalar_type(), x.numel() / 2);
  Tensor dx = torch::stable::empty_like(x);
  a.dy = dy.const_data_ptr();
  a.x = x.const_data_ptr();
  a.dx = dx.mutable_data_ptr();
  Device::backward(a, x);
  return dx;
}

}  // namespace glmkern
