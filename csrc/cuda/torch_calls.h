// torch's own operators, and memory as a tensor for them: both through libtorch's stable ABI.
#pragma once

#include <array>
#include <initializer_list>

#include "ops/binding.h"

namespace glmkern {

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kHalf: return ScalarType::Half;
    case DType::kBFloat16: return ScalarType::BFloat16;
    default: return ScalarType::Float;
  }
}

// A tensor over memory that lies where `like` does and outlives it. One that is only read is const.
inline Tensor view_of(const void* data, ScalarType dtype, std::initializer_list<int64_t> sizes,
                      std::initializer_list<int64_t> strides, const Tensor& like) {
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.begin(), sizes.size()},
                                  {strides.begin(), strides.size()}, like.device(), dtype);
}

// `name`.`overload` with all arguments of its schema, for operators that return a tensor.
template <class... Arguments>
Tensor call_torch(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace glmkern
