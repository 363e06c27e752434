// The softmax of linear_cross_entropy on NVIDIA GPUs from sm_75; its products are quant_linear's.
// Memory bounds it, so a row is read once for its loss, and once more, from cache where it is small
// enough, to become a gradient.
//
// A block takes a row. A thread keeps the largest logit that it has seen and the sum of the
// exponentials below it, and rescales the sum when a larger one comes: no thread waits for another
// before the row's end.
//
// Where the number of classes is odd, rows start anywhere. Every row is split at addresses that
// 16-byte accesses need; the few elements before and behind them are taken one by one:
//
//     a row     | single | 16 bytes | 16 bytes | ... | 16 bytes | single |
#include "cuda/kernels/linear_cross_entropy_cuda.h"

#include <cfloat>
#include <type_traits>

#include "cuda/device/flat.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec.cuh"
#include "ops/ceil_div.h"

namespace glmkern::cuda {
namespace {

constexpr int kRowThreads = 512;  // divides the threads of every chip: 1,024, 1,536 or 2,048
constexpr int kScaleThreads = 256;

// f(i, width) for each piece of the row that is this thread's: `width`, a type that holds a
// constant, elements from i on.
template <class T, class F>
__device__ void for_each_piece(const T* row, int classes, F f) {
  constexpr int kWide = kVectorWidth<T>;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kWide);
  const int to_boundary = (kWide - past) % kWide;
  const int before = to_boundary < classes ? to_boundary : classes;
  const int wide = (classes - before) / kWide * kWide;
  for (int i = threadIdx.x * kWide; i < wide; i += blockDim.x * kWide) {
    f(before + i, std::integral_constant<int, kWide>{});
  }
  const int single = threadIdx.x;  // fewer than 2 * kWide in all, and a warp is more
  if (single < classes - wide) {
    f(single < before ? single : single + wide, std::integral_constant<int, 1>{});
  }
}

// Lowest instead of -inf: a logit of -inf beside it gives no NaN.
constexpr float kLowest = -FLT_MAX;

template <class T, bool kSmoothing>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_kernel(CrossEntropyRows a) {
  __shared__ float scratch[3][kMaxWarps];
  const int classes = static_cast<int>(a.classes);
  T* row = static_cast<T*>(a.logits) + static_cast<int64_t>(blockIdx.x) * a.classes;
  const int label = static_cast<int>(a.labels[blockIdx.x]);
  const float of_label = to_float(row[label]);

  float largest = kLowest, sum = 0, rest = 0;
  for_each_piece(row, classes, [&](int i, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const auto z = load<kWidth>(row + i);
    float largest_here = largest;
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      largest_here = fmaxf(largest_here, to_float(z.element[k]));
      if constexpr (kSmoothing) rest += to_float(z.element[k]) - of_label;
    }
    sum *= expf(largest - largest_here);
    largest = largest_here;
#pragma unroll
    for (int k = 0; k < kWidth; k++) sum += expf(to_float(z.element[k]) - largest);
  });
  const float row_largest = block_max(largest, scratch[0]);
  const float row_sum = block_sum(sum * expf(largest - row_largest), scratch[1]);
  if constexpr (kSmoothing) rest = block_sum(rest, scratch[2]);
  if (threadIdx.x == 0) {
    float loss = logf(row_sum) + (row_largest - of_label);
    if constexpr (kSmoothing) loss -= a.smoothing * (rest / classes);
    a.loss[blockIdx.x] = a.row_weight[blockIdx.x] * loss;
  }
  if (!a.gradient) return;

  // The sums' barriers lie between the threads' reads of the label's logit and this.
  const float each = kSmoothing ? a.smoothing / classes : 0;
  const float scale = 1 / row_sum;
  for_each_piece(row, classes, [&](int i, auto width) {
    constexpr int kWidth = decltype(width)::value;
    auto z = load<kWidth>(row + i);
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      const float p = expf(to_float(z.element[k]) - row_largest) * scale;
      const float q = (i + k == label ? 1 - a.smoothing : 0) + each;
      z.element[k] = from_float<T>(p - q);
    }
    store(row + i, z);
  });
}

// A vector of the gradient a thread.
template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads) scatter_kernel(ScatterRows a) {
  const int64_t i = flat_element<kWidth>();
  if (i >= a.count * a.width) return;
  const int64_t row = i / a.width, to = a.rows != nullptr ? a.rows[row] : row;
  const float weight = a.row_weight[row];
  const auto gradient = load<kWidth>(static_cast<const T*>(a.gradient) + i);
  float* result = a.result + i + (to - row) * a.width;
  constexpr int kAtOnce = kWidth > 1 ? kVectorWidth<float> : 1;
#pragma unroll
  for (int first = 0; first < kWidth; first += kAtOnce) {
    Vec<float, kAtOnce> y;
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) y.element[k] = to_float(gradient.element[first + k]) * weight;
    store(result + first, y);
  }
}

// result = dhidden * dloss, a vector of the result a thread.
template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(LinearCrossEntropyBackward a, bool aligned) {
  constexpr int kWide = kVectorWidth<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * kWide;
  const float factor = *a.dloss;
  T* result = static_cast<T*>(a.result);
  if (aligned && i + kWide <= a.elements) {
    float x[kWide];
    Vec<T, kWide> y;
    load_floats(a.dhidden + i, x);
#pragma unroll
    for (int k = 0; k < kWide; k++) y.element[k] = from_float<T>(x[k] * factor);
    store(result + i, y);
  } else {
    for (int64_t k = i; k < i + kWide && k < a.elements; k++) {
      result[k] = from_float<T>(a.dhidden[k] * factor);
    }
  }
}

}  // namespace

void cross_entropy_rows(const CrossEntropyRows& a, void* stream) {
  if (a.classes > 1 << 30) throw std::runtime_error("cross_entropy: more than 2^30 classes");
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t needed = ceil_div(a.classes, kVectorWidth<T> * kWarp) * kWarp;
    const int threads = static_cast<int>(needed < kRowThreads ? needed : kRowThreads);
    const auto kernel =
        a.smoothing > 0 ? cross_entropy_kernel<T, true> : cross_entropy_kernel<T, false>;
    launch("cross_entropy", kernel, a.rows, threads, stream, a);
  });
}

void scatter_rows(const ScatterRows& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_width<T>(a.width, {a.gradient, a.result}, [&](auto w) {
      constexpr int kWidth = decltype(w)::value;
      launch_flat<kWidth>("scatter_rows", scatter_kernel<T, kWidth>, a.count * a.width, stream, a);
    });
  });
}

void linear_cross_entropy_bwd(const LinearCrossEntropyBackward& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = aligned_to_16(a.dhidden) && aligned_to_16(a.result);
    launch("linear_cross_entropy_bwd", scale_kernel<T>,
           ceil_div(a.elements, kScaleThreads * kVectorWidth<T>), kScaleThreads, stream, a,
           aligned);
  });
}

}  // namespace glmkern::cuda
