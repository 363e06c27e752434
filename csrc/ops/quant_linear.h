// quant_linear as the kernels see it. glmkern/ops/quant_linear.py defines the op and the packing.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace glmkern {

// What a row of the weight holds: codes with one scale a row, or the numbers themselves.
enum class WeightFormat { kInt4, kInt8, kHalf, kBFloat16, kFloat };

// Forward y = x weight^T + bias; backward, without bias, y = x weight: x is then dy, y is dx.
struct QuantLinear {
  DType dtype;  // of x, bias and y
  WeightFormat format;
  bool backward;
  int64_t rows;           // of x and y
  int64_t n, k;           // the weight's shape
  int64_t row_bytes;      // of the weight
  const void* x;          // [rows, k], backward [rows, n]
  const uint8_t* weight;  // [n, row_bytes]
  const float* scale;     // [n], null for a dense weight
  const void* bias;       // [n] or null
  void* y;                // [rows, n], backward [rows, k]

  bool has_codes() const { return format == WeightFormat::kInt4 || format == WeightFormat::kInt8; }
  int64_t depth() const { return backward ? n : k; }    // that is summed over
  int64_t columns() const { return backward ? k : n; }  // of the result
};

}  // namespace glmkern
