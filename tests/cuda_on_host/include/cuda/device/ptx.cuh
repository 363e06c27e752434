// Stands in for csrc/cuda/device/ptx.cuh: the same functions on the machine of machine/machine.h,
// inlined so that an error's place is the kernel's.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "async_copies.h"
#include "tensor_cores.h"

namespace glmkern::cuda {

constexpr int kDeviceArch = 0;

__forceinline__ void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  cuda_on_host::mma_m16n8k8(c, a, b);
}
__forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  __half) {
  cuda_on_host::mma_m16n8k16(c, a, b, cuda_on_host::Half::kFloat16);
}
__forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  __nv_bfloat16) {
  cuda_on_host::mma_m16n8k16(c, a, b, cuda_on_host::Half::kBFloat16);
}

template <int kMatrices>
__forceinline__ void load_matrices(uint32_t (&m)[kMatrices], const void* row) {
  cuda_on_host::load_matrices(m, kMatrices, row, false);
}
template <int kMatrices>
__forceinline__ void load_transposed(uint32_t (&m)[kMatrices], const void* row) {
  cuda_on_host::load_matrices(m, kMatrices, row, true);
}

__forceinline__ void copy_async(void* shared, const void* global, int bytes = 16) {
  cuda_on_host::copy_async(shared, global, bytes);
}
__forceinline__ void commit_copies() { cuda_on_host::commit_copies(); }
template <int kPending>
__forceinline__ void wait_for_copies() {
  cuda_on_host::wait_for_copies(kPending);
}

__forceinline__ void store_16(void* global, uint4 bits) {
  *static_cast<Vector16*>(global) = Vector16{bits.x, bits.y, bits.z, bits.w};
}

__forceinline__ void keep_loads_below() {}

__forceinline__ float exp2_approximate(float x) { return std::exp2(x); }

constexpr int kAndXor = (0xf0 & 0xcc) ^ 0xaa, kAndOr = (0xf0 & 0xcc) | 0xaa;
template <int kTable>
__forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++) {  // the bits of a, b and c that choose bit i of the table
    if (!(kTable >> i & 1)) continue;
    result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

}  // namespace glmkern::cuda
