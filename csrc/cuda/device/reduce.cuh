// Sums over the threads of a warp and of a block, in an order that depends on the block size alone.
#pragma once

#include <cuda_runtime.h>

namespace glmkern::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

// Every lane gets the sum.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

// Every thread gets the sum; the block is whole warps. `partial` is shared memory. Two calls in a
// row need different `partial`s: one barrier then keeps a slow reader of the first safe.
__device__ inline float block_sum(float x, float (&partial)[kMaxWarps]) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace glmkern::cuda
