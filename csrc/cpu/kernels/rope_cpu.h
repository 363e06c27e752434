// The kernels of rope for the CPU: each computes some of the tokens, on the calling thread.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "ops/rope.h"

namespace glmkern {

// Tokens begin <= token < end.
GLMKERN_CPU_KERNEL(void rope(const Rope&, int64_t begin, int64_t end))

}  // namespace glmkern
