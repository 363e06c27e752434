// Stands in for the CUDA toolkit's header of this name. See cuda_runtime.h.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(fraction), -24);  // subnormal
  if (exponent == 31) {
    magnitude = fraction ? NAN : INFINITY;
  } else if (exponent > 0) {
    magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return std::copysign(magnitude, x.bits >> 15 ? -1.0f : 1.0f);
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds past 65504
  // Count in units of the last place, at least 2^-24; nearbyint rounds to even, and a carry into
  // the next exponent is an ordinary carry of the bits.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units))};
}
