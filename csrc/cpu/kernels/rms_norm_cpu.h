// The kernels of rms_norm for the CPU: each computes some of the rows, on the calling thread.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "ops/rms_norm.h"

namespace glmkern {

// Rows begin <= row < end. The backward adds these rows' share of dweight to `partial` [hidden],
// unless it is null.
GLMKERN_CPU_KERNEL(void rms_norm_fwd(const RmsNormForward&, int64_t begin, int64_t end))
GLMKERN_CPU_KERNEL(void rms_norm_bwd(const RmsNormBackward&, int64_t begin, int64_t end,
                                     float* partial))

// Columns begin <= column < end of dweight, from all the partial sums.
GLMKERN_CPU_KERNEL(void rms_norm_dweight(const RmsNormBackward&, int64_t begin, int64_t end))

}  // namespace glmkern
