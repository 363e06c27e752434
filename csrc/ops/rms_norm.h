// rms_norm as the kernels see it: raw pointers to contiguous rows, all of one dtype unless typed.
// glmkern/ops/rms_norm.py defines the op.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace glmkern {

// h = x + residual, rounded to the dtype (h = x without a residual); y = h * rstd * weight.
struct RmsNormForward {
  DType dtype;
  int64_t rows, hidden;
  float eps;
  const void* x;         // [rows, hidden]
  const void* residual;  // [rows, hidden] or null
  const void* weight;    // [hidden]
  void* y;               // [rows, hidden]
  void* h;               // [rows, hidden], null without a residual
  float* rstd;           // [rows]
};

// dx = rstd * (g - x * rstd^2 * mean(g * x)) + dresidual with g = dy * weight;
// dweight = sum over the rows of dy * x * rstd. The rows are summed in `splits` pieces of
// ceil(rows / splits) rows, and the pieces in order: the bits depend on the shape alone.
struct RmsNormBackward {
  DType dtype;
  int64_t rows, hidden, splits;
  const void* dy;         // [rows, hidden]
  const void* x;          // [rows, hidden], the normalised rows: h where there was a residual
  const void* weight;     // [hidden]
  const float* rstd;      // [rows]
  const void* dresidual;  // [rows, hidden] or null
  void* dx;               // [rows, hidden]
  void* dweight;          // [hidden] or null
  float* partial;         // [splits, hidden], null without dweight
};

}  // namespace glmkern
