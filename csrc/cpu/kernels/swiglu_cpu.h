// The kernels of swiglu for the CPU: each computes some of the elements, on the calling thread.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "ops/swiglu.h"

namespace glmkern {

// Elements begin <= element < end of the output [rows, width], or of dy.
GLMKERN_CPU_KERNEL(void swiglu_fwd(const SwigluForward&, int64_t begin, int64_t end))
GLMKERN_CPU_KERNEL(void swiglu_bwd(const SwigluBackward&, int64_t begin, int64_t end))

}  // namespace glmkern
