// Starts a kernel; an error becomes an exception. cudaLaunchKernelEx instead of <<<>>> is plain
// C++: tests/cuda_on_host runs the launching code as well.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

namespace glmkern::cuda {

inline void require_success(const char* name, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("the CUDA kernel ") + name +
                             " did not start: " + cudaGetErrorString(error));
  }
}

// With `shared_bytes` of dynamic shared memory.
template <class... Parameters>
void launch_with_shared(const char* name, void (*kernel)(Parameters...), int64_t blocks,
                        int threads, size_t shared_bytes, void* stream, Parameters... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": too many rows");
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) {
    require_success(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  require_success(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            void* stream, Parameters... arguments) {
  launch_with_shared(name, kernel, blocks, threads, 0, stream, arguments...);
}

}  // namespace glmkern::cuda
