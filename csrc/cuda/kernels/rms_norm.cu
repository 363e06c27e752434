// rms_norm on NVIDIA GPUs from sm_75. Memory bounds it, so the design has one aim: to read and
// write every element once, 16 bytes at a time.
//
// A block works on one row at a time. Its threads take the row's vectors round robin, so that
// neighbouring threads touch neighbouring addresses; with 4 threads and kVectors = 2:
//
//     vector   0 1 2 3   4 5 6 7
//     thread   0 1 2 3   0 1 2 3
//
// They keep them in registers between the sum over the row and the result. Rows longer than that,
// and rows that 16-byte accesses do not fit (an odd length, an unaligned tensor), take the same
// kernel with kVectors = 0, which reads the row a second time, from cache.
#include "cuda/kernels/rms_norm_cuda.h"

#include <initializer_list>

#include "cuda/device/column_sums.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec.cuh"
#include "ops/ceil_div.h"

namespace glmkern::cuda {
namespace {

constexpr int kMaxThreads = 256;  // 4,096 halfs are two vectors a thread: enough loads in flight

// f(v, i) for each vector of the row that is this thread's: its v-th, which starts at element i.
template <int kWidth, int kVectors, class F>
__device__ void for_each_vector(int hidden, F f) {
  const int stride = blockDim.x * kWidth;
  if constexpr (kVectors > 0) {
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      const int i = threadIdx.x * kWidth + v * stride;
      if (i < hidden) f(v, i);
    }
  } else {
    for (int i = threadIdx.x * kWidth; i < hidden; i += stride) f(0, i);
  }
}

template <class T, int kWidth, int kVectors, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_forward_kernel(RmsNormForward a) {
  using V = Vec<T, kWidth>;
  __shared__ float scratch[kMaxWarps];
  const int hidden = static_cast<int>(a.hidden);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * a.hidden;
  const T* __restrict__ x = static_cast<const T*>(a.x) + row;
  const T* __restrict__ weight = static_cast<const T*>(a.weight);
  T* __restrict__ y = static_cast<T*>(a.y) + row;

  V kept[kVectors > 0 ? kVectors : 1];  // h, which is x without a residual
  float squares = 0;
  for_each_vector<kWidth, kVectors>(hidden, [&](int v, int i) {
    V h = kVectors > 0 || kResidual ? load_once<kWidth>(x + i) : load<kWidth>(x + i);
    if constexpr (kResidual) {
      const V residual = load_once<kWidth>(static_cast<const T*>(a.residual) + row + i);
#pragma unroll
      for (int k = 0; k < kWidth; k++) {
        h.element[k] = from_float<T>(to_float(h.element[k]) + to_float(residual.element[k]));
      }
      store(static_cast<T*>(a.h) + row + i, h);
    }
#pragma unroll
    for (int k = 0; k < kWidth; k++) squares += to_float(h.element[k]) * to_float(h.element[k]);
    if constexpr (kVectors > 0) kept[v] = h;
  });

  const float rstd = 1.0f / sqrtf(block_sum(squares, scratch) / hidden + a.eps);
  if (threadIdx.x == 0) a.rstd[blockIdx.x] = rstd;

  for_each_vector<kWidth, kVectors>(hidden, [&](int v, int i) {
    if constexpr (kVectors == 0) {
      kept[0] = load<kWidth>(kResidual ? static_cast<const T*>(a.h) + row + i : x + i);
    }
    const V w = load<kWidth>(weight + i);
    V result;
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      const float normalised = to_float(kept[v].element[k]) * rstd;
      result.element[k] = from_float<T>(normalised * to_float(w.element[k]));
    }
    store(y + i, result);
  });
}

// A block takes `piece` consecutive rows: one, or with kWeightGrad a split. Its threads then add up
// the split's share of dweight for the columns that are theirs, in registers, or in global memory
// where a row does not fit into registers.
template <class T, int kWidth, int kVectors, bool kWeightGrad>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_backward_kernel(RmsNormBackward a, int64_t piece) {
  using V = Vec<T, kWidth>;
  __shared__ float scratch[2][kMaxWarps];
  const int hidden = static_cast<int>(a.hidden);
  const T* __restrict__ weight = static_cast<const T*>(a.weight);
  float* partial = a.partial + (kWeightGrad ? blockIdx.x * a.hidden : 0);
  const int64_t first = blockIdx.x * piece;
  const int64_t last = first + piece < a.rows ? first + piece : a.rows;

  constexpr int kKept = kVectors > 0 ? kVectors : 1;
  // 8 vectors of dy beside those of x and the sums would spill: they are read again, from cache.
  constexpr bool kKeepDy = kVectors > 0 && !(kWeightGrad && kVectors == 8);
  float dweight[kKept][kWidth] = {};
  if constexpr (kWeightGrad && kVectors == 0) {
    for_each_vector<kWidth, 0>(hidden, [&](int, int i) { store_floats(partial + i, dweight[0]); });
  }

  for (int64_t r = first; r < last; r++) {
    const int64_t row = r * a.hidden;
    const T* __restrict__ x = static_cast<const T*>(a.x) + row;
    const T* __restrict__ dy = static_cast<const T*>(a.dy) + row;
    const T* __restrict__ dresidual = static_cast<const T*>(a.dresidual);
    T* __restrict__ dx = static_cast<T*>(a.dx) + row;
    const float rstd = a.rstd[r];

    V kept_x[kKept], kept_dy[kKeepDy ? kKept : 1];
    float dot = 0;
    for_each_vector<kWidth, kVectors>(hidden, [&](int v, int i) {
      const V x_v = load<kWidth>(x + i), dy_v = load<kWidth>(dy + i), w = load<kWidth>(weight + i);
#pragma unroll
      for (int k = 0; k < kWidth; k++) {
        dot += to_float(dy_v.element[k]) * to_float(w.element[k]) * to_float(x_v.element[k]);
      }
      if constexpr (kVectors > 0) kept_x[v] = x_v;
      if constexpr (kKeepDy) kept_dy[v] = dy_v;
    });
    const float slope = rstd * rstd * (block_sum(dot, scratch[r % 2]) / hidden);

    for_each_vector<kWidth, kVectors>(hidden, [&](int v, int i) {
      if constexpr (kVectors == 0) {
        kept_x[0] = load<kWidth>(x + i);
        if constexpr (kWeightGrad) load_floats(partial + i, dweight[0]);
      }
      if constexpr (!kKeepDy) kept_dy[0] = load<kWidth>(dy + i);
      const V& dy_v = kept_dy[kKeepDy ? v : 0];
      const V w = load<kWidth>(weight + i);
      V other{}, result;
      if (dresidual != nullptr) other = load_once<kWidth>(dresidual + row + i);
#pragma unroll
      for (int k = 0; k < kWidth; k++) {
        const float x_k = to_float(kept_x[v].element[k]), dy_k = to_float(dy_v.element[k]);
        const float gradient = rstd * (dy_k * to_float(w.element[k]) - x_k * slope);
        result.element[k] = from_float<T>(gradient + to_float(other.element[k]));
        if constexpr (kWeightGrad) dweight[v][k] += dy_k * (x_k * rstd);
      }
      if constexpr (kWeightGrad && kVectors == 0) store_floats(partial + i, dweight[0]);
      store(dx + i, result);
    });
  }

  if constexpr (kWeightGrad && kVectors > 0) {
    for_each_vector<kWidth, kVectors>(hidden,
                                      [&](int v, int i) { store_floats(partial + i, dweight[v]); });
  }
}

// f(width, vectors, threads), the first two as types that hold constants: how a block covers a row.
// `tensors` are all that is accessed 16 bytes at a time.
template <class T, class F>
void with_cover(int64_t hidden, std::initializer_list<const void*> tensors, F f) {
  constexpr int kWide = kVectorWidth<T>;
  if (hidden > 1 << 30) throw std::runtime_error("rms_norm: rows of more than 2^30 elements");
  const bool wide = fits_wide_rows<T>(hidden, tensors);
  const int64_t vectors = wide ? hidden / kWide : hidden;
  const auto threads = [&](int64_t each) {
    const int64_t needed = ceil_div(vectors, each * kWarp) * kWarp;
    return static_cast<int>(needed < kMaxThreads ? needed : kMaxThreads);
  };
  if (!wide) return f(Int<1>{}, Int<0>{}, threads(1));
  if (vectors <= kMaxThreads) return f(Int<kWide>{}, Int<1>{}, threads(1));
  if (vectors <= 2 * kMaxThreads) return f(Int<kWide>{}, Int<2>{}, threads(2));
  if (vectors <= 4 * kMaxThreads) return f(Int<kWide>{}, Int<4>{}, threads(4));
  if constexpr (kWide == 4) {  // 8,192 elements of any type
    if (vectors <= 8 * kMaxThreads) return f(Int<kWide>{}, Int<8>{}, threads(8));
  }
  return f(Int<kWide>{}, Int<0>{}, kMaxThreads);
}

template <class T, bool kResidual>
void forward(const RmsNormForward& a, void* stream) {
  with_cover<T>(a.hidden, {a.x, a.residual, a.weight, a.y, a.h}, [&](auto w, auto v, int threads) {
    launch("rms_norm_fwd",
           rms_norm_forward_kernel<T, decltype(w)::value, decltype(v)::value, kResidual>, a.rows,
           threads, stream, a);
  });
}

template <class T, bool kWeightGrad>
void backward(const RmsNormBackward& a, void* stream) {
  const int64_t piece = kWeightGrad ? ceil_div(a.rows, a.splits) : 1;
  const int64_t blocks = kWeightGrad ? a.splits : a.rows;
  const std::initializer_list<const void*> tensors = {a.dy,        a.x,  a.weight,
                                                      a.dresidual, a.dx, a.partial};
  with_cover<T>(a.hidden, tensors, [&](auto w, auto v, int threads) {
    launch("rms_norm_bwd",
           rms_norm_backward_kernel<T, decltype(w)::value, decltype(v)::value, kWeightGrad>, blocks,
           threads, stream, a, piece);
  });
  if constexpr (kWeightGrad) {
    launch_split_sums<T>("rms_norm_dweight", a.partial, a.splits, a.hidden, a.dweight, stream);
  }
}

}  // namespace

void rms_norm_fwd(const RmsNormForward& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    a.residual != nullptr ? forward<T, true>(a, stream) : forward<T, false>(a, stream);
  });
}

void rms_norm_bwd(const RmsNormBackward& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    a.dweight != nullptr ? backward<T, true>(a, stream) : backward<T, false>(a, stream);
  });
}

}  // namespace glmkern::cuda
