// The kernels of linear_cross_entropy for NVIDIA GPUs, beside quant_linear's products.
#pragma once

#include "ops/linear_cross_entropy.h"

namespace glmkern::cuda {

// Rows of logits, all of which have a label.
struct CrossEntropyRows {
  DType dtype;  // of the logits
  int64_t rows, classes;
  void* logits;             // [rows, classes]
  const int64_t* labels;    // [rows], each from 0 to classes - 1
  const float* row_weight;  // [rows]
  float* loss;              // [rows], row_weight * (logsumexp(logits) - q logits)
  float smoothing;          // s of q = (1 - s) onehot(label) + s / classes
  bool gradient;            // whether the logits become softmax(logits) - q
};

// Rows of a gradient in float32, weighted, to where they belong: result[rows[i]] = row_weight[i] *
// gradient[i].
struct ScatterRows {
  DType dtype;  // of the gradient
  int64_t count, width;
  const void* gradient;     // [count, width]
  const float* row_weight;  // [count]
  const int64_t* rows;      // [count]; null: row i goes to row i
  float* result;            // [at least max(rows) + 1, width]
};

// Queued on `stream`, a cudaStream_t. Throws std::runtime_error if a kernel does not start.
void cross_entropy_rows(const CrossEntropyRows& arguments, void* stream);
void scatter_rows(const ScatterRows& arguments, void* stream);
void linear_cross_entropy_bwd(const LinearCrossEntropyBackward& arguments, void* stream);

}  // namespace glmkern::cuda
