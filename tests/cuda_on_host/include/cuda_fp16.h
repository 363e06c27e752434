// Stands in for the CUDA toolkit's header of this name. See cuda_runtime.h.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

namespace cuda_on_host {

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(fraction), -24);  // subnormal
  if (exponent == 31) {
    magnitude = fraction ? NAN : INFINITY;
  } else if (exponent > 0) {
    magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return std::copysign(magnitude, bits >> 15 ? -1.0f : 1.0f);
}

// All halves as floats: tensor cores ask for many.
struct Halves {
  float as_float[1 << 16];
  Halves() {
    for (int bits = 0; bits < 1 << 16; bits++) as_float[bits] = half_to_float(bits);
  }
};
inline const Halves halves;

}  // namespace cuda_on_host

inline float __half2float(__half x) { return cuda_on_host::halves.as_float[x.bits]; }

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

struct __half2 {
  __half x, y;
};

// Sums and products of two halves are exact in float: each result is rounded once.
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) - __half2float(b.x),
                           __half2float(a.y) - __half2float(b.y));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) * __half2float(b.x),
                           __half2float(a.y) * __half2float(b.y));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto fma = [](__half a, __half b, __half c) {
    return __float2half_rn(std::fma(__half2float(a), __half2float(b), __half2float(c)));
  };
  return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}
