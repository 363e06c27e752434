// linear_cross_entropy as the kernels see it. glmkern/ops/linear_cross_entropy.py defines the op.
#pragma once

#include <cstdint>
#include <optional>

#include "ops/dtype.h"
#include "ops/quant_linear.h"

namespace glmkern {

// loss = sum over the rows whose label is not ignore_index of token_weight * (logsumexp(logits) -
// q logits), with logits = hidden weight^T and q = (1 - s) onehot(label) + s / classes, s being the
// label smoothing. dhidden is the loss's gradient.
struct LinearCrossEntropyForward {
  DType dtype;  // of hidden
  int64_t tokens, hidden_size, classes;
  const void* hidden;                   // [tokens, hidden_size]
  QuantLinear weight;                   // [classes, hidden_size] alone, without x and y
  const int64_t* labels;                // [tokens]
  const float* token_weight;            // [tokens]; null: 1 / the number of labelled rows
  std::optional<int64_t> ignore_index;  // none: every row is labelled
  float label_smoothing;
  float* loss;     // one number
  float* dhidden;  // [tokens, hidden_size], zeros are there already; null: not wanted
};

// dhidden = dloss * the forward's dhidden, rounded to `dtype`.
struct LinearCrossEntropyBackward {
  DType dtype;  // of the result
  int64_t elements;
  const float* dloss;    // one number
  const float* dhidden;  // [elements], the forward's
  void* result;          // [elements]
};

}  // namespace glmkern
