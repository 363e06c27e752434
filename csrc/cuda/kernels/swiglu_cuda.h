// The kernels of swiglu for NVIDIA GPUs.
#pragma once

#include "ops/swiglu.h"

namespace glmkern::cuda {

// Queued on `stream`, a cudaStream_t. Throws std::runtime_error if a kernel does not start.
void swiglu_fwd(const SwigluForward& arguments, void* stream);
void swiglu_bwd(const SwigluBackward& arguments, void* stream);

}  // namespace glmkern::cuda
