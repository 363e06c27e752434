// 16 bytes of elements at a time, and float arithmetic on them.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/device/ptx.cuh"
#include "ops/dtype.h"

namespace glmkern::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest even.
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// Two numbers in a register, the first one in the lower half.
template <class Pair>
__device__ uint32_t bits_of(Pair pair) {
  static_assert(sizeof(Pair) == 4);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
template <class Pair>
__device__ Pair pair_of(uint32_t bits) {
  Pair pair;
  memcpy(&pair, &bits, sizeof pair);
  return pair;
}

__device__ inline uint32_t rounded_pair(float a, float b, __half) {
  return bits_of(__floats2half2_rn(a, b));
}
__device__ inline uint32_t rounded_pair(float a, float b, __nv_bfloat16) {
  return bits_of(__floats2bfloat162_rn(a, b));
}

// f(T{}) with the element type that `dtype` names.
template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat: return f(float{});
    case DType::kHalf: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
  }
}

template <class T>
constexpr int kVectorWidth = 16 / sizeof(T);

// kWidth elements that are loaded and stored at once: kVectorWidth<T> of them, or 1, or
// what makes 8 bytes.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vec {
  T element[kWidth];
};

template <int kWidth, class T>
__device__ Vec<T, kWidth> load(const T* p) {
  Vec<T, kWidth> v;
  if constexpr (kWidth == 1) {
    v.element[0] = *p;
  } else if constexpr (sizeof v == 8) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    memcpy(&v, &bits, sizeof v);
  } else {
    static_assert(sizeof v == 16);
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    memcpy(&v, &bits, sizeof v);
  }
  return v;
}

// For what is read only once: it should not push the weight, which every block reads, out of cache.
template <int kWidth, class T>
__device__ Vec<T, kWidth> load_once(const T* p) {
  if constexpr (kWidth == 1) {
    return load<1>(p);
  } else {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
    Vec<T, kWidth> v;
    memcpy(&v, &bits, sizeof v);
    return v;
  }
}

// kWidth elements as floats; by 16 bytes where these divide them, and p is aligned to 16 then.
template <class T, int kWidth>
__device__ void load_floats(const T* p, float (&x)[kWidth]) {
  constexpr int kAtOnce = kWidth % kVectorWidth<T> == 0 ? kVectorWidth<T> : 1;
#pragma unroll
  for (int i = 0; i < kWidth; i += kAtOnce) {
    const Vec<T, kAtOnce> v = load<kAtOnce>(p + i);
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) x[i + k] = to_float(v.element[k]);
  }
}

template <class T, int kWidth>
__device__ void store(T* p, const Vec<T, kWidth>& v) {
  if constexpr (kWidth == 1) {
    *p = v.element[0];
  } else if constexpr (sizeof v == 8) {
    uint2 bits;
    memcpy(&bits, &v, sizeof bits);
    *reinterpret_cast<uint2*>(p) = bits;
  } else {
    uint4 bits;
    memcpy(&bits, &v, sizeof bits);
    store_16(p, bits);
  }
}

// Stores floats as load_floats loads them.
template <int kWidth>
__device__ void store_floats(float* p, const float (&x)[kWidth]) {
  constexpr int kAtOnce = kWidth % kVectorWidth<float> == 0 ? kVectorWidth<float> : 1;
#pragma unroll
  for (int i = 0; i < kWidth; i += kAtOnce) {
    Vec<float, kAtOnce> v;
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) v.element[k] = x[i + k];
    store(p + i, v);
  }
}

// How many of a row's kCount numbers an access has.
template <class T, int kCount>
constexpr int kRowWidth = kCount < kVectorWidth<T> ? kCount : kVectorWidth<T>;

// The numbers at p of which `left` exist, at once where memory allows; zeros for the rest.
template <class T, int kCount>
__device__ void read_row(const T* p, int left, float (&numbers)[kCount]) {
  constexpr int kAtOnce = kRowWidth<T, kCount>;
  if (left >= kCount && reinterpret_cast<uintptr_t>(p) % (kAtOnce * sizeof(T)) == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += kAtOnce) {
      const Vec<T, kAtOnce> v = load<kAtOnce>(p + i);
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) numbers[i + k] = to_float(v.element[k]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++) numbers[i] = i < left ? to_float(p[i]) : 0;
  }
}

// Rounds and writes those of a row's results that exist, `left`: at once where memory allows.
template <class T, int kCount>
__device__ void write_row(T* p, int left, const float (&results)[kCount]) {
  constexpr int kAtOnce = kRowWidth<T, kCount>;
  if (left >= kCount && reinterpret_cast<uintptr_t>(p) % (kAtOnce * sizeof(T)) == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += kAtOnce) {
      Vec<T, kAtOnce> v;
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) v.element[k] = from_float<T>(results[i + k]);
      store(p + i, v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (i < left) p[i] = from_float<T>(results[i]);
    }
  }
}

inline bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <int N>
using Int = std::integral_constant<int, N>;

// Whether all rows of `columns` elements allow 16 bytes at a time, in each of `tensors`; a null one
// does not matter.
template <class T>
bool fits_wide_rows(int64_t columns, std::initializer_list<const void*> tensors) {
  bool fits = columns % kVectorWidth<T> == 0;
  for (const void* tensor : tensors) fits = fits && aligned_to_16(tensor);
  return fits;
}

// f(width) with the elements of an access to such rows, a type that holds a constant.
template <class T, class F>
void with_width(int64_t columns, std::initializer_list<const void*> tensors, F f) {
  fits_wide_rows<T>(columns, tensors) ? f(Int<kVectorWidth<T>>{}) : f(Int<1>{});
}

}  // namespace glmkern::cuda
