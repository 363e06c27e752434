// Division that rounds up.
#pragma once

#include <cstdint>

namespace glmkern {

// ceil(a / b) for a >= 0 and b > 0. Static, so that the CPU kernels of two instruction sets never
// share a copy of it.
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace glmkern
