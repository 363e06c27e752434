// The element types that the kernels serve.
#pragma once

#include <cstdint>

namespace glmkern {

enum class DType { kFloat, kHalf, kBFloat16 };

static constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

}  // namespace glmkern
