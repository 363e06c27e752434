// The element types that the kernels serve.
#pragma once

namespace glmkern {

enum class DType { kFloat, kHalf, kBFloat16 };

}  // namespace glmkern
