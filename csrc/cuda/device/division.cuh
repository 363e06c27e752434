// Division of numbers that are not negative, also by one that the host knows: then a product and a
// shift.
#pragma once

#include <cuda_runtime.h>

#include "ops/divisor.h"

namespace glmkern::cuda {

// Rounded up.
__device__ inline int ceil_quotient(int n, int by) { return (n + by - 1) / by; }

__device__ inline int quotient(int n, const Divisor& divisor) {
  return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * divisor.multiplier >> divisor.shift);
}
__device__ inline int remainder(int n, const Divisor& divisor) {
  return n - quotient(n, divisor) * divisor.by;
}

}  // namespace glmkern::cuda
