// Sums and maxima over the threads of a warp and of a block, in an order that depends on the block
// size alone.
#pragma once

#include <cmath>

#include <cuda_runtime.h>

namespace glmkern::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

struct Sum {
  static constexpr float kNeutral = 0;
  __device__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
  static constexpr float kNeutral = -INFINITY;
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over kLanes neighbouring lanes; each of them gets the result.
template <int kLanes = kWarp, class Combine>
__device__ float warp_reduce(float x, Combine combine) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  return x;
}

// Every thread gets the result; the block is whole warps. `partial` is shared memory. Two calls in
// a row need different `partial`s: one barrier then keeps a slow reader of the first safe.
template <class Combine>
__device__ float block_reduce(float x, float (&partial)[kMaxWarps], Combine combine) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = warp_reduce(x, combine);
  if (lane == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_reduce(lane < warps ? partial[lane] : Combine::kNeutral, combine);
}

__device__ inline float block_sum(float x, float (&partial)[kMaxWarps]) {
  return block_reduce(x, partial, Sum{});
}

__device__ inline float block_max(float x, float (&partial)[kMaxWarps]) {
  return block_reduce(x, partial, Max{});
}

}  // namespace glmkern::cuda
