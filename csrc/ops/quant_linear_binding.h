// Tensors in, tensors out: the schemas of glmkern/ops/quant_linear.py, once for every device. A
// Device has `run(QuantLinear, like)`.
#pragma once

#include <optional>
#include <vector>

#include "ops/binding.h"
#include "ops/quant_linear.h"

namespace glmkern {

inline WeightFormat quant_weight_format(const char* op, const Tensor& packed, int64_t bits) {
  switch (packed.scalar_type()) {
    case ScalarType::Char: return bits == 4 ? WeightFormat::kInt4 : WeightFormat::kInt8;
    case ScalarType::Half: return WeightFormat::kHalf;
    case ScalarType::BFloat16: return WeightFormat::kBFloat16;
    case ScalarType::Float: return WeightFormat::kFloat;
    default:
      throw std::runtime_error(std::string(op) +
                               " serves weights of int8 codes, float32, "
                               "float16 and bfloat16");
  }
}

// float32, contiguous, whatever floating type the scale has.
inline Tensor scale_in_float32(const Tensor& scale) {
  if (scale.scalar_type() == ScalarType::Float) return scale;
  Tensor result = torch::stable::new_empty(scale, {scale.numel()}, ScalarType::Float);
  torch::stable::copy_(result, scale);
  return result;
}

// The weight alone, checked to be where `like` is; `scale_as_float` keeps its scale alive.
inline QuantLinear quant_linear_weight(const char* op, const Tensor& like, const Tensor& packed,
                                       const std::optional<Tensor>& scale, int64_t bits,
                                       std::optional<Tensor>& scale_as_float) {
  require(packed.dim() == 2, std::string(op) + ": the packed weight must have two dimensions");
  require_like(op, "the packed weight", packed, like, packed.scalar_type(), packed.numel());
  QuantLinear a{};
  a.format = quant_weight_format(op, packed, bits);
  a.n = packed.size(0);
  a.k = packed.size(1) * (a.format == WeightFormat::kInt4 ? 2 : 1);
  a.row_bytes = packed.size(1) * packed.element_size();
  a.weight = static_cast<const uint8_t*>(packed.const_data_ptr());
  if (a.format == WeightFormat::kInt4 || a.format == WeightFormat::kInt8) {
    require(scale.has_value(), std::string(op) + ": codes need their scale");
    require_like(op, "scale", *scale, like, scale->scalar_type(), a.n);
    scale_as_float = scale_in_float32(*scale);
    a.scale = static_cast<const float*>(scale_as_float->const_data_ptr());
  }
  return a;
}

template <class Device>
Tensor quant_linear_product(const char* op, bool backward, const Tensor& x, const Tensor& packed,
                            const std::optional<Tensor>& scale, int64_t bits,
                            const std::optional<Tensor>& bias) {
  std::optional<Tensor> scale_as_float;
  QuantLinear a = quant_linear_weight(op, x, packed, scale, bits, scale_as_float);
  a.dtype = dtype_of(op, x);
  a.backward = backward;
  require(x.dim() >= 1 && x.size(x.dim() - 1) == a.depth(),
          std::string(op) + ": x's last dimension must be " + std::to_string(a.depth()));
  require_like(op, "x", x, x, x.scalar_type(), x.numel());
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  a.rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); i++) a.rows *= sizes[i];
  sizes.back() = a.columns();
  Tensor y = torch::stable::new_empty(x, sizes);
  if (bias.has_value()) {
    require_like(op, "bias", *bias, x, x.scalar_type(), a.n);
    a.bias = bias->const_data_ptr();
  }
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  Device::run(a, x);
  return y;
}

template <class Device>
Tensor quant_linear_fwd(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& scale,
                        int64_t bits, const std::optional<Tensor>& bias) {
  return quant_linear_product<Device>("quant_linear_fwd", false, x, packed, scale, bits, bias);
}

template <class Device>
Tensor quant_linear_bwd(const Tensor& dy, const Tensor& packed, const std::optional<Tensor>& scale,
                        int64_t bits) {
  return quant_linear_product<Device>("quant_linear_bwd", true, dy, packed, scale, bits,
                                      std::nullopt);
}

}  // namespace glmkern
