// swiglu on NVIDIA GPUs from sm_75. Memory bounds it: every element is read once and written once,
// 16 bytes at a time, past what the caches hold for others.
//
// A thread has one vector of y [rows, width] and the two of x [rows, 2, width] that belong to it.
// With 2 rows of 3 vectors, numbered as the threads that access them:
//
//     y   0 1 2          x   gate 0 1 2   up 0 1 2
//         3 4 5                   3 4 5      3 4 5
//
// The row comes from one division. Rows that 16-byte accesses do not fit (an odd width, an
// unaligned tensor) take the same kernel with single elements.
#include "cuda/kernels/swiglu_cuda.h"

#include "cuda/device/flat.cuh"
#include "cuda/device/vec.cuh"

namespace glmkern::cuda {
namespace {

// Below -87.3 exp leaves the range that __fdividef divides by, and 0 is right.
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads) swiglu_forward_kernel(SwigluForward a) {
  using V = Vec<T, kWidth>;
  const int64_t i = flat_element<kWidth>();
  if (i >= a.rows * a.width) return;
  const T* __restrict__ x = static_cast<const T*>(a.x) + i + i / a.width * a.width;
  const V gate = load_once<kWidth>(x), up = load_once<kWidth>(x + a.width);
  V y;
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    const float g = to_float(gate.element[k]);
    y.element[k] = from_float<T>(g * sigmoid(g) * to_float(up.element[k]));
  }
  store(static_cast<T*>(a.y) + i, y);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads) swiglu_backward_kernel(SwigluBackward a) {
  using V = Vec<T, kWidth>;
  const int64_t i = flat_element<kWidth>();
  if (i >= a.rows * a.width) return;
  const int64_t i_gate = i + i / a.width * a.width;
  const T* __restrict__ x = static_cast<const T*>(a.x) + i_gate;
  const V dy = load_once<kWidth>(static_cast<const T*>(a.dy) + i);
  const V gate = load_once<kWidth>(x), up = load_once<kWidth>(x + a.width);
  V dgate, dup;
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    const float g = to_float(gate.element[k]), upstream = to_float(dy.element[k]);
    const float s = sigmoid(g);
    const float slope = s * (1.0f + g * (1.0f - s));
    dgate.element[k] = from_float<T>(upstream * to_float(up.element[k]) * slope);
    dup.element[k] = from_float<T>(upstream * (g * s));
  }
  T* __restrict__ dx = static_cast<T*>(a.dx) + i_gate;
  store(dx, dgate);
  store(dx + a.width, dup);
}

}  // namespace

void swiglu_fwd(const SwigluForward& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_width<T>(a.width, {a.x, a.y}, [&](auto w) {
      constexpr int kWidth = decltype(w)::value;
      launch_flat<kWidth>("swiglu_fwd", swiglu_forward_kernel<T, kWidth>, a.rows * a.width, stream,
                          a);
    });
  });
}

void swiglu_bwd(const SwigluBackward& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_width<T>(a.width, {a.dy, a.x, a.dx}, [&](auto w) {
      constexpr int kWidth = decltype(w)::value;
      launch_flat<kWidth>("swiglu_bwd", swiglu_backward_kernel<T, kWidth>, a.rows * a.width, stream,
                          a);
    });
  });
}

}  // namespace glmkern::cuda
