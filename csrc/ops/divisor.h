// What division by a number that the host knows takes on a GPU; cuda/device/division.cuh divides.
#pragma once

#include <cstdint>

namespace glmkern {

// n / by = n * multiplier >> shift for 0 <= n < 2^31 (Granlund and Montgomery, "Division by
// invariant integers using multiplication", 1994).
struct Divisor {
  Divisor() = default;
  // 0 < divisor < 2^31
  explicit Divisor(int64_t divisor) : by(static_cast<int>(divisor)) {
    while ((int64_t{1} << (shift - 31)) < divisor) shift++;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  int by = 1, shift = 31;
  uint32_t multiplier = 1u << 31;
};

}  // namespace glmkern
