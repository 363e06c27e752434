// bias_dropout_add as the kernels see it: raw pointers to contiguous rows.
// glmkern/ops/bias_dropout.py defines the op.
#pragma once

#include <cstdint>

#include "ops/dtype.h"
#include "ops/sequences.h"

namespace glmkern {

// Which elements are dropped; an element's index counts from the start of its sequence.
struct DropoutRows {
  double p;
  const int64_t* seed;        // [2]
  PackedSequences sequences;  // a token is a row
};

// y = factor * (x + bias) + residual; factor is 0, or 1 / (1 - p) for an element that is kept.
struct BiasDropoutForward {
  DType dtype;
  int64_t rows, hidden;
  DropoutRows dropout;   // with p = 0 its pointers are null
  const void* x;         // [rows, hidden]
  const void* bias;      // [hidden] or null
  const void* residual;  // [rows, hidden]
  void* y;               // [rows, hidden]
};

// dx = factor * dy; dbias = sum of dx over the rows. The rows are summed in `splits` pieces of
// ceil(rows / splits) rows, and the pieces in order: the bits depend on the shape alone.
struct BiasDropoutBackward {
  DType dtype;
  int64_t rows, hidden, splits;
  DropoutRows dropout;
  const void* dy;  // [rows, hidden]
  void* dx;        // [rows, hidden]
  void* dbias;     // [hidden] or null
  float* partial;  // [splits, hidden], null without dbias
};

}  // namespace glmkern
