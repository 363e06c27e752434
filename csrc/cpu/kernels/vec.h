// A vector of floats as wide as the instruction set that the file is compiled for, and how float32,
// float16 and bfloat16 get in and out of it. GCC's and Clang's vector types give + - * / and
// comparisons; this file adds memory, conversions and sums.
//
// Everything lies in an unnamed namespace: an inline function with external linkage would be merged
// over the files of all instruction sets, and an older chip could meet the AVX-512 one.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ops/dtype.h"

namespace glmkern::CPU_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Bits16 __attribute__((vector_size(2 * kLanes)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// f(T{}) with the element type that `dtype` names.
template <class F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat: return f(float{});
    case DType::kHalf: return f(Half{});
    case DType::kBFloat16: return f(BFloat16{});
  }
}

inline Vec as_float(Bits bits) { return reinterpret_cast<Vec>(bits); }
inline Bits as_bits(Vec v) { return reinterpret_cast<Bits>(v); }
inline Vec largest(Vec a, Vec b) { return a > b ? a : b; }

// Written out: a zero vector plus x would cost an addition, as -0.0f + 0.0f is not -0.0f.
inline Vec broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

// widen: the stored form of kLanes elements to floats. narrow: back, rounded to nearest even.
// The unmasked 512-bit intrinsics warn of an uninitialised value inside GCC 12's header.
#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xFFFF;
inline Bits extend(Bits16 stored) {
  return reinterpret_cast<Bits>(
      _mm512_maskz_cvtepu16_epi32(kAll, reinterpret_cast<__m256i>(stored)));
}
inline Bits16 truncate(Bits bits) {
  return reinterpret_cast<Bits16>(
      _mm512_maskz_cvtepi32_epi16(kAll, reinterpret_cast<__m512i>(bits)));
}
inline Vec widen(Half, Bits16 stored) {
  return _mm512_maskz_cvtph_ps(kAll, reinterpret_cast<__m256i>(stored));
}
inline Bits16 narrow(Half, Vec v) {
  return reinterpret_cast<Bits16>(_mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline Bits extend(Bits16 stored) {
  return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(stored)));
}
inline Bits16 truncate(Bits bits) {
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(bits), __m256i{});
  return reinterpret_cast<Bits16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
inline Vec widen(Half, Bits16 stored) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(stored)); }
inline Bits16 narrow(Half, Vec v) {
  return reinterpret_cast<Bits16>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__SSE2__)
inline Bits extend(Bits16 stored) {
  long long bits;
  std::memcpy(&bits, &stored, sizeof bits);
  return reinterpret_cast<Bits>(_mm_unpacklo_epi16(_mm_cvtsi64_si128(bits), __m128i{}));
}
inline Bits16 truncate(Bits bits) {
  // Sign-extended first: the pack instruction saturates signed numbers.
  const __m128i low = _mm_srai_epi32(_mm_slli_epi32(reinterpret_cast<__m128i>(bits), 16), 16);
  const long long packed = _mm_cvtsi128_si64(_mm_packs_epi32(low, low));
  Bits16 result;
  std::memcpy(&result, &packed, sizeof result);
  return result;
}
#else
inline Bits extend(Bits16 stored) { return __builtin_convertvector(stored, Bits); }
inline Bits16 truncate(Bits bits) { return __builtin_convertvector(bits, Bits16); }
#endif

#if !defined(__AVX2__)
// The FPU does the rounding and the subnormals (Maratyszcza's FP16 library, fp16_ieee_*): multiply
// by a power of two to move the exponent, add a number whose last bit is the result's last bit.
inline Vec widen(Half, Bits16 stored) {
  const Bits word = extend(stored) << 16;
  const Bits shifted = word + word;
  const Vec normal = as_float((shifted >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const Vec subnormal = as_float((shifted >> 17) | (126u << 23)) - 0.5f;
  const Bits magnitude = shifted < (1u << 27) ? as_bits(subnormal) : as_bits(normal);
  return as_float((word & 0x80000000u) | magnitude);
}
inline Bits16 narrow(Half, Vec v) {
  const Bits word = as_bits(v);
  const Bits shifted = word + word;
  const Bits exponent = shifted & 0xFF000000u;
  const Bits bias = exponent < 0x71000000u ? Bits{} + 0x71000000u : exponent;
  const Vec scaled = as_float(word & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
  const Bits rounded = as_bits(as_float((bias >> 1) + 0x07800000u) + scaled);
  const Bits magnitude = ((rounded >> 13) & 0x7C00u) + (rounded & 0x0FFFu);
  const Bits nan = Bits{} + 0x7E00u;
  const Bits result = ((word & 0x80000000u) >> 16) | (shifted > 0xFF000000u ? nan : magnitude);
  return truncate(result);
}
#endif

inline Vec widen(BFloat16, Bits16 stored) { return as_float(extend(stored) << 16); }
inline Bits16 narrow(BFloat16, Vec v) {
  const Bits bits = as_bits(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40;
  return truncate(v == v ? rounded : quiet_nan);
}

inline Vec widen(float, Vec stored) { return stored; }
inline Vec narrow(float, Vec v) { return v; }

template <class T>
using Stored = decltype(narrow(T{}, Vec{}));

// How many lanes of a vector are elements: all of them, or the rest of a row.
struct Full {};
struct Tail {
  int count;
};

template <class T>
inline Vec load(const T* p, Full) {
  Stored<T> stored;
  std::memcpy(&stored, p, sizeof stored);
  return widen(T{}, stored);
}

// The lanes past the tail are zero.
template <class T>
inline Vec load(const T* p, Tail tail) {
  Stored<T> stored{};
  std::memcpy(&stored, p, tail.count * sizeof(T));
  return widen(T{}, stored);
}

template <class T>
inline void store(T* p, Vec v, Full) {
  const Stored<T> stored = narrow(T{}, v);
  std::memcpy(p, &stored, sizeof stored);
}

template <class T>
inline void store(T* p, Vec v, Tail tail) {
  const Stored<T> stored = narrow(T{}, v);
  std::memcpy(p, &stored, tail.count * sizeof(T));
}

// Into the L2 cache: the L1 is full of the current row.
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// A large output has left the caches before anyone reads it. Streamed past them it costs one pass
// over memory, where an ordinary store first reads the line it overwrites. Rows must be aligned.
constexpr int64_t kStreamingBytes = 16 << 20;

template <class T>
inline bool worth_streaming(const T* rows, int64_t count, int64_t hidden) {
  return count * hidden * static_cast<int64_t>(sizeof(T)) >= kStreamingBytes &&
         hidden % kLanes == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Stored<T>) == 0;
}

template <class T>
inline void stream(T* p, Vec v, Full) {
  const Stored<T> stored = narrow(T{}, v);
#if defined(__AVX512F__)
  if constexpr (sizeof stored == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(stored));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof stored == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(stored));
    return;
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof stored == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(stored));
    return;
  }
#endif
  std::memcpy(p, &stored, sizeof stored);
}

template <class T>
inline void stream(T* p, Vec v, Tail tail) {
  store(p, v, tail);
}

// Orders streamed stores before whatever tells another thread that they are done.
inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// v as it comes back after a store and a load.
template <class T>
inline Vec round_to(Vec v) {
  return widen(T{}, narrow(T{}, v));
}

// Added and taken away, it rounds a float to an integer, which is then in the low bits of the sum.
constexpr float kRound = 0x1.8p23f;

// 2^n for the n that `shifted` = n + kRound holds, -126 <= n <= 127.
inline Vec power_of_two(Vec shifted) {
  return as_float((as_bits(shifted) - as_bits(broadcast(kRound)) + 127) << 23);
}

// e^x to about one ulp: 2^n e^r with |r| <= ln(2) / 2, the polynomial of Cephes' expf. It is 0
// below -87.33, where results would be subnormal; above 88.37 it is e^88.37, still finite.
inline Vec exp(Vec x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Vec bounded = x > 88.37f ? broadcast(88.37f) : x;
  const Vec shifted = bounded * kLog2E + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (bounded - n * kLn2High) - n * kLn2Low;
  Vec series = r * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  const Vec fraction = series * (r * r) + r + 1.0f;
  return x < -87.33f ? Vec{} : fraction * power_of_two(shifted);
}

// 2^x to about one ulp; 0 below -126, where results would be subnormal. x < 127.
inline Vec exp2(Vec x) {
  const Vec shifted = x + kRound;
  const Vec r = x - (shifted - kRound);
  Vec series = r * 1.5353362e-4f + 1.3398874e-3f;  // minimax on [-1/2, 1/2]
  series = series * r + 9.6184369e-3f;
  series = series * r + 5.5503324e-2f;
  series = series * r + 2.40226477e-1f;
  series = series * r + 6.93147182e-1f;
  series = series * r + 1.0f;
  return x < -126.0f ? Vec{} : series * power_of_two(shifted);
}

// Lane i gets lane i + kDistance, and those at the end the first ones.
template <int kDistance, int... kLane>
inline Vec rotated(Vec v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, ((kLane + kDistance) % kLanes)...);
}

template <int kDistance = kLanes / 2>
inline float sum_lanes(Vec v) {
  v += rotated<kDistance>(v, std::make_integer_sequence<int, kLanes>{});
  if constexpr (kDistance == 1) {
    return v[0];
  } else {
    return sum_lanes<kDistance / 2>(v);
  }
}

// f(i, lanes) for every vector of n elements, i its first element.
template <class F>
inline void for_each_vec(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, Full{});
  if (i < n) f(i, Tail{static_cast<int>(n - i)});
}

// The sum of term(i, lanes) over n elements, in an order that depends on n alone. Four running
// sums, because one would wait for the latency of each addition.
template <class F>
inline float sum_over(int64_t n, F term) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; k++) sums[k] += term(i + k * kLanes, Full{});
  }
  for (; i + kLanes <= n; i += kLanes) sums[0] += term(i, Full{});
  if (i < n) sums[1] += term(i, Tail{static_cast<int>(n - i)});
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace glmkern::CPU_ISA
