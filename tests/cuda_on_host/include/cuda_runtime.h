// Stands in for the CUDA toolkit's header of this name, so that a C++ compiler can build csrc/cuda
// and a CPU run it, on the machine of machine/machine.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// A parameter that a kernel reads where it lies.
#define __grid_constant__
// The thread that launches runs one block at a time, so a block's shared memory can be its own.
#define __shared__ thread_local

using dim3 = cuda_on_host::Dim3;
inline const dim3 &threadIdx = cuda_on_host::place.thread, &blockIdx = cuda_on_host::place.block,
                  &blockDim = cuda_on_host::place.block_size, &gridDim = cuda_on_host::place.grid;

inline void __syncthreads() { cuda_on_host::block_barrier(); }
inline void __syncwarp(unsigned mask = cuda_on_host::kAllLanes) {
  cuda_on_host::warp_barrier(mask);
}

namespace cuda_on_host {

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle_bits(mask, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_host::shuffle(mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::place.lane() ^ distance);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::place.lane() + distance);
}

inline int __any_sync(unsigned mask, int predicate) {
  int found = predicate != 0;
  const auto work = [](const cuda_on_host::Parts& parts) {
    int any = 0;
    for (void* part : parts) any |= part != nullptr && *static_cast<int*>(part);
    for (void* part : parts) {
      if (part != nullptr) *static_cast<int*>(part) = any;
    }
  };
  cuda_on_host::together(mask, work, &found);
  return found;
}

inline void __trap() { throw std::logic_error("a kernel for other chips runs"); }

struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) [[gnu::may_alias]] uint2 {
  unsigned x, y;
};
// Accesses of 16 bytes, as on a GPU: of a struct's members the compiler would make four.
typedef unsigned Vector16 __attribute__((vector_size(16), may_alias));
inline uint32_t __ldg(const uint32_t* p) { return *p; }
inline uint4 __ldg(const uint4* p) {
  const Vector16 bits = *reinterpret_cast<const Vector16*>(p);
  return {bits[0], bits[1], bits[2], bits[3]};
}
inline uint4 __ldcs(const uint4* p) { return __ldg(p); }

// Byte i of the result is that of y:x that nibble i of the selector names.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

enum cudaDeviceAttr { cudaDevAttrL2CacheSize = 38 };
// A chip for each version of the code: programs keep what they know of a device.
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_host::code_version >= 80 ? 0 : 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_on_host::l2_bytes;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = cuda_on_host::code_version;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > cuda_on_host::kMaxThreads || grid.y > 65535 || grid.z > 65535 ||
      config->dynamicSmemBytes > cuda_on_host::kMaxSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  // Not a kernel's code yet: its accesses, to the arguments of this launch, are not reported.
  const auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(arguments...); };
  using Call = decltype(call);
  cuda_on_host::run({grid, block, config->dynamicSmemBytes, reinterpret_cast<const void*>(kernel),
                     [](const void* call) { (*static_cast<Call*>(call))(); }, &call});
  return cudaSuccess;
}

inline float __fdividef(float x, float y) { return x / y; }
