// The kernels of bias_dropout_add for the CPU: each computes some of the rows, on the calling
// thread.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "ops/bias_dropout.h"

namespace glmkern {

// Rows begin <= row < end. The backward adds these rows' share of dbias to `partial` [hidden],
// unless it is null.
GLMKERN_CPU_KERNEL(void bias_dropout_add_fwd(const BiasDropoutForward&, int64_t begin, int64_t end))
GLMKERN_CPU_KERNEL(void bias_dropout_add_bwd(const BiasDropoutBackward&, int64_t begin, int64_t end,
                                             float* partial))

// Columns begin <= column < end of dbias, from all the partial sums.
GLMKERN_CPU_KERNEL(void bias_dropout_add_dbias(const BiasDropoutBackward&, int64_t begin,
                                               int64_t end))

}  // namespace glmkern
