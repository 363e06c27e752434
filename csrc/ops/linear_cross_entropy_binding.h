// Tensors in, tensors out: the schemas of glmkern/ops/linear_cross_entropy.py, once for every
// device. A Device has `forward` and `backward`, which run the kernels; working memory is allocated
// where the tensor beside the arguments lies. The labels are values, for a Device to check where
// reading them is free.
#pragma once

#include <optional>
#include <tuple>

#include "ops/binding.h"
#include "ops/linear_cross_entropy.h"
#include "ops/quant_linear_binding.h"

namespace glmkern {

template <class Device>
std::tuple<Tensor, Tensor> linear_cross_entropy_fwd(const Tensor& hidden, const Tensor& packed,
                                                    const std::optional<Tensor>& scale,
                                                    int64_t bits, const Tensor& labels,
                                                    const std::optional<Tensor>& token_weight,
                                                    std::optional<int64_t> ignore_index,
                                                    double label_smoothing, bool hidden_grad) {
  const char* op = "linear_cross_entropy_fwd";
  require(hidden.dim() == 2, std::string(op) + ": hidden must be [T, H]");
  LinearCrossEntropyForward a{};
  a.tokens = hidden.size(0);
  a.hidden_size = hidden.size(1);
  require_like(op, "hidden", hidden, hidden, hidden.scalar_type(), a.tokens * a.hidden_size);
  std::optional<Tensor> scale_as_float;
  a.weight = quant_linear_weight(op, hidden, packed, scale, bits, scale_as_float);
  a.classes = a.weight.n;
  require(a.weight.k == a.hidden_size,
          std::string(op) + ": hidden must be [T, H] and weight [V, H]");
  require_like(op, "labels", labels, hidden, ScalarType::Long, a.tokens);
  if (token_weight.has_value()) {
    require_like(op, "token_weight", *token_weight, hidden, ScalarType::Float, a.tokens);
    a.token_weight = static_cast<const float*>(token_weight->const_data_ptr());
  }
  a.dtype = dtype_of(op, hidden);
  a.hidden = hidden.const_data_ptr();
  a.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  a.ignore_index = ignore_index;
  a.label_smoothing = static_cast<float>(label_smoothing);

  Tensor loss = torch::stable::new_empty(hidden, {}, ScalarType::Float);
  Tensor dhidden =
      hidden_grad ? torch::stable::new_zeros(hidden, {a.tokens, a.hidden_size}, ScalarType::Float)
                  : torch::stable::new_empty(hidden, {0}, ScalarType::Float);
  a.loss = floats_of(loss);
  a.dhidden = hidden_grad ? floats_of(dhidden) : nullptr;
  Device::forward(a, hidden);
  return {loss, dhidden};
}

template <class Device>
Tensor linear_cross_entropy_bwd(const Tensor& dloss, const Tensor& dhidden, ScalarType dtype) {
  const char* op = "linear_cross_entropy_bwd";
  require_like(op, "dloss", dloss, dhidden, ScalarType::Float, 1);
  require_like(op, "dhidden", dhidden, dhidden, ScalarType::Float, dhidden.numel());
  const auto sizes = dhidden.sizes();
  Tensor result = torch::stable::new_empty(dhidden, {sizes.data(), sizes.size()}, dtype);
  const LinearCrossEntropyBackward a{
      dtype_of(op, result), dhidden.numel(), static_cast<const float*>(dloss.const_data_ptr()),
      static_cast<const float*>(dhidden.const_data_ptr()), result.mutable_data_ptr()};
  Device::backward(a, dhidden);
  return result;
}

}  // namespace glmkern
