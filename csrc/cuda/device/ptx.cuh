// The PTX instructions that CUDA C++ has no function for, each behind one. Nothing else contains
// assembly, so that tests/cuda_on_host can run all kernels: its header of this name has the same
// functions for the host.
//
// A fragment is a matrix spread over the registers of a warp. A register holds two neighbouring
// numbers of a row; with group = lane / 4 and t = lane % 4:
//
//     A [16, k]   a[0]: row group, columns 2t, 2t + 1     a[1]: row group + 8
//                 a[2], a[3] (k = 16): the same rows, 8 columns on
//     B [k, 8]    b[0]: column group, rows 2t, 2t + 1     b[1] (k = 16): 8 rows on
//     C [16, 8]   c[0], c[1]: row group, columns 2t, 2t + 1     c[2], c[3]: row group + 8
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace glmkern::cuda {

#ifdef __CUDA_ARCH__
constexpr int kDeviceArch = __CUDA_ARCH__;
#else
constexpr int kDeviceArch = 0;
#endif

// c += a b, in float, by a warp; a and b in half.
__device__ inline void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// The same from sm_80, in half or bfloat16. Where a chip lacks an instruction, a kernel that has
// it is never launched, and only has to compile.
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __half) {
  if constexpr (kDeviceArch >= 800) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    __trap();
  }
}
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __nv_bfloat16) {
  if constexpr (kDeviceArch >= 800) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    __trap();
  }
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Matrices of 8 rows of 16 bytes in shared memory, as fragments: register i gets matrix i. Lane l
// gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&m)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(m[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed.
__device__ inline void load_transposed(uint32_t (&m)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(m[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 16 bytes from global to shared memory past the registers and L1, from sm_80; reads `bytes`
// of them and writes zeros for the rest. The thread that copies sees them after wait_for_copies,
// others after a barrier too.
__device__ inline void copy_async(void* shared, const void* global, int bytes = 16) {
  if constexpr (kDeviceArch >= 800) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
  } else {
    __trap();
  }
}

// The copies since the last commit become a group.
__device__ inline void commit_copies() {
  if constexpr (kDeviceArch >= 800) {
    asm volatile("cp.async.commit_group;" ::: "memory");
  } else {
    __trap();
  }
}

// Waits until at most the latest kPending groups are still under way.
template <int kPending>
__device__ void wait_for_copies() {
  if constexpr (kDeviceArch >= 800) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  } else {
    __trap();
  }
}

// One store of 16 bytes to global memory: nvcc splits some assignments of a uint4 into four.
__device__ inline void store_16(void* global, uint4 bits) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

// Loads that follow stay below this line. It is no instruction, but ptxas moves nothing across it.
__device__ inline void keep_loads_below() { __syncwarp(); }

// 2^x, to two units of the last place.
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Any function of three bits, for each bit: f(0xf0, 0xcc, 0xaa) of it as kTable.
constexpr int kAndXor = (0xf0 & 0xcc) ^ 0xaa;  // (a & b) ^ c
constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;   // (a & b) | c
template <int kTable>
__device__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
}

}  // namespace glmkern::cuda
