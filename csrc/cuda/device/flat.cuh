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

template <int kWidth, class... Parameters>
void launch_flat(const char* name, void (*kernel)(Parameters...), int64_t elements, void* stream,
                 Parameters... arguments) {
  const int64_t blocks = ceil_div(elements, static_cast<int64_t>(kFlatThreads) * kWidth);
  launch(name, kernel, blocks, kFlatThreads, stream, arguments...);
}

}  // namespace glmkern::cuda
