// The kernel of rope for NVIDIA GPUs.
#pragma once

#include "ops/rope.h"

namespace glmkern::cuda {

// Queued on `stream`, a cudaStream_t. Throws std::runtime_error if the kernel does not start.
void rope(const Rope& arguments, void* stream);

}  // namespace glmkern::cuda
