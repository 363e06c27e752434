// How kernels with tensor cores differ between generations of chips. A policy is a template
// argument rather than a question for __CUDA_ARCH__, so that as PTX the path of an old chip runs on
// a new one.
#pragma once

#include "cuda/device/ptx.cuh"

namespace glmkern::cuda {

// Turing: products of half, 16 x 8 x 8, and copies to shared memory through registers.
struct Sm75 {
  static constexpr bool kAsyncCopies = false;
  static constexpr int kStages = 2;
  static constexpr int kSharedBytes = 32 * 1024;  // of a block: two fit a multiprocessor
  // Newer chips have Sm80's code; PTX of sm_75 is what runs this one there.
  static constexpr bool kCompiled = kDeviceArch == 0 || kDeviceArch < 800;

  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             __half) {
    mma_m16n8k8(c, {a[0], a[1]}, b[0]);
    mma_m16n8k8(c, {a[2], a[3]}, b[1]);
  }

  // Else ptxas moves all loads of a product before it, which takes more registers than there are.
  static __device__ void part_loads() { keep_loads_below(); }
};

// Ampere and all that came later: half and bfloat16, 16 x 8 x 16, and copies past the registers.
struct Sm80 {
  static constexpr bool kAsyncCopies = true;
  static constexpr int kStages = 3;
  static constexpr int kSharedBytes = 49 * 1024;  // likewise, on chips with 100 KiB
  static constexpr bool kCompiled = kDeviceArch == 0 || kDeviceArch >= 800;

  template <class T>
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             T type) {
    mma_m16n8k16(c, a, b, type);
  }
  static __device__ void part_loads() {}
};

// With another number of stages, where copies are asynchronous: two for large tiles, four for small
// ones. A power of two, so that finding a step's stage is no division.
template <class Policy, int kCount>
struct WithStages : Policy {
  static constexpr int kStages = Policy::kAsyncCopies ? kCount : 2;
};

}  // namespace glmkern::cuda
