// Starts a kernel; an error becomes an exception. cudaLaunchKernelEx instead of <<<>>> is plain
// C++: tests/cuda_on_host runs the launching code as well.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

namespace glmkern::cuda {

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            void* stream, Parameters... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": too many rows");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("the CUDA kernel ") + name +
                             " did not start: " + cudaGetErrorString(error));
  }
}

}  // namespace glmkern::cuda
