// The kernels of linear_cross_entropy for the CPU: each computes some of the rows, on the calling
// thread.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "ops/dtype.h"

namespace glmkern {

// Rows of logits and their classes; softmax rows replace the logits.
struct CrossEntropyRows {
  int64_t classes;
  float* logits;          // [rows, classes]
  const int64_t* labels;  // [rows]
  float* loss;            // [rows], logsumexp(logits) - q logits
  float smoothing;        // s of q = (1 - s) onehot(label) + s / classes
  bool gradient;          // whether logits become softmax - q
};

GLMKERN_CPU_KERNEL(void cross_entropy_rows(const CrossEntropyRows&, int64_t begin, int64_t end))

// Elements begin <= i < end: to[i] = from[i] * factor, from in type `from_type`, to in `to_type`.
GLMKERN_CPU_KERNEL(void scaled_copy(DType from_type, const void* from, float factor, DType to_type,
                                    void* to, int64_t begin, int64_t end))

}  // namespace glmkern
