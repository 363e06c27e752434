// Where the CUDA kernels run: on the tensors' device and on its current stream.
#pragma once

#include <functional>

#include "ops/binding.h"

// The dispatch key that cuda/<op>.cpp registers its kernels for. tests/cuda_on_host compiles the
// same files for tensors of the CPU.
#ifndef GLMKERN_CUDA_KEY
#define GLMKERN_CUDA_KEY CUDA
#endif

namespace glmkern {

// f(stream) with `tensor`'s device current; stream is a cudaStream_t.
void on_device_of(const Tensor& tensor, const std::function<void(void* stream)>& f);

}  // namespace glmkern
