// Kernels of which test_cuda_resources.py knows what the compiled code must contain.
#include "cuda/device/ptx.cuh"
#include "cuda/device/vec.cuh"

namespace glmkern::cuda {
namespace {

// An array that is indexed at run time lies in local memory.
template <class T, int kCount>
__global__ void __launch_bounds__(256) spilling_kernel(const T* x, T* y, int first) {
  T kept[kCount];
#pragma unroll
  for (int i = 0; i < kCount; i++) kept[i] = x[i * 256 + threadIdx.x];
  for (int i = first; i < kCount; i += 3) y[i] = kept[i];
}

// A loop with one of each: a copy to shared memory, fragments and products.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    product_kernel(const __half* x, float* y, int turns) {
  __shared__ uint4 tile[32 * kWarps];
  float c[4] = {};
#pragma unroll 1
  for (int turn = 0; turn < turns; turn++) {
    if (threadIdx.x + turn < 1000) copy_async(tile + threadIdx.x, x + 8 * threadIdx.x);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    uint32_t a[4], b[2], first[2];
    load_matrices(a, tile + threadIdx.x % 32);
    load_transposed(b, tile + threadIdx.x % 16);
    mma_m16n8k16(c, a, b, __half{});
    first[0] = a[0], first[1] = a[1];
    mma_m16n8k8(c, first, b[0]);
    __syncthreads();
  }
  store_floats(y + 4 * threadIdx.x, c);
}

}  // namespace

void launch_planted(const float* x, float* y, const __half* z) {
  spilling_kernel<float, 16><<<1, 256>>>(x, y, 1);
  product_kernel<4><<<1, 128>>>(z, y, 9);
}

}  // namespace glmkern::cuda
