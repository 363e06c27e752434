// Kernels that sum nothing: a thread has one vector of a contiguous matrix, in the order of memory.
// Neighbouring threads touch neighbouring addresses, and rows of every length fill the blocks.
#pragma once

#include <initializer_list>

#include "cuda/device/launch.cuh"
#include "cuda/device/vec.cuh"
#include "ops/ceil_div.h"

namespace glmkern::cuda {

constexpr int kFlatThreads = 128;  // small blocks: the one row of a decoded token fills several

// The first element of this thread's vector; it may lie past the end.
template <int kWidth>
__device__ int64_t flat_element() {
  return (static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x) * kWidth;
}

// sum += the vectors at `partial`, one of each split, in order.
template <int kWidth>
__device__ void add_splits_of(const float* partial, int64_t splits, int64_t distance,
                              float (&sum)[kWidth]) {
  float terms[kWidth];
#pragma unroll 4
  for (int64_t split = 0; split < splits; split++) {
    load_floats(partial + split * distance, terms);
#pragma unroll
    for (int k = 0; k < kWidth; k++) sum[k] += terms[k];
  }
}

template <int kWidth, class... Parameters>
void launch_flat(const char* name, void (*kernel)(Parameters...), int64_t elements, void* stream,
                 Parameters... arguments) {
  const int64_t blocks = ceil_div(elements, static_cast<int64_t>(kFlatThreads) * kWidth);
  launch(name, kernel, blocks, kFlatThreads, stream, arguments...);
}

}  // namespace glmkern::cuda
