// The kernels of quant_linear for NVIDIA GPUs.
#pragma once

#include "ops/quant_linear.h"

namespace glmkern::cuda {

// A rectangle of a weight of codes, and where it goes as numbers.
struct Slab {
  DType dtype;  // of the result
  int bits;     // of a code, 4 or 8
  int64_t rows, columns;
  const uint8_t* codes;  // the first row's first byte; with 4 bits it holds columns 0 and 1
  int64_t row_bytes;     // from one row to the next
  const float* scale;    // [rows]
  void* result;          // [rows, columns], contiguous
};

// The L2 cache of the current device.
int64_t l2_bytes();

// All are queued on `stream`, a cudaStream_t, and throw std::runtime_error if a kernel does not
// start.

// result = codes * scale, rounded once.
void dequantize(const Slab& slab, void* stream);

// Products of so few rows of x in float32 with codes.
constexpr int64_t kGemvTokens = 8;
void gemv_fp32_fwd(const QuantLinear& arguments, void* stream);
// Sums of parts of the depth go through partial [splits, rows, k], which one split does not need.
int64_t gemv_fp32_bwd_splits(const QuantLinear& arguments);
void gemv_fp32_bwd(const QuantLinear& arguments, int64_t splits, float* partial, void* stream);

}  // namespace glmkern::cuda
