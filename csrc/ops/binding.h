// What the bindings share. Python checks the public arguments; these checks guard direct calls.
#pragma once

#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ops/dtype.h"

namespace glmkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::runtime_error(sentence);
}

// For values that only the caller can mend, a ValueError in Python.
inline void require_value(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

inline DType dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: throw std::runtime_error(std::string(op) + " serves float32, float16 and bfloat16");
  }
}

inline float* floats_of(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// `tensor` is contiguous, lies where `like` lies and has `numel` elements of type `dtype`.
inline void require_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                         ScalarType dtype, int64_t numel) {
  const std::string which = std::string(op) + ": " + name;
  require(tensor.device() == like.device(), which + " is on another device");
  require(tensor.scalar_type() == dtype, which + " has another dtype");
  require(tensor.is_contiguous(), which + " is not contiguous");
  require(tensor.numel() == numel, which + " must have " + std::to_string(numel) +
                                       " elements, not " + std::to_string(tensor.numel()));
}

}  // namespace glmkern
