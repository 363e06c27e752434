// swiglu as the kernels see it: raw pointers to contiguous rows. glmkern/ops/swiglu.py defines it.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace glmkern {

// y = silu(gate) * up
struct SwigluForward {
  DType dtype;
  int64_t rows, width;
  const void* x;  // [rows, 2, width]: gate, up
  void* y;        // [rows, width]
};

// With s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s.
struct SwigluBackward {
  DType dtype;
  int64_t rows, width;
  const void* dy;  // [rows, width]
  const void* x;   // [rows, 2, width]
  void* dx;        // [rows, 2, width]
};

}  // namespace glmkern
