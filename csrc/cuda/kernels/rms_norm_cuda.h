// The kernels of rms_norm for NVIDIA GPUs.
#pragma once

#include "ops/rms_norm.h"

namespace glmkern::cuda {

// Queued on `stream`, a cudaStream_t. Throws std::runtime_error if a kernel does not start.
void rms_norm_fwd(const RmsNormForward& arguments, void* stream);
void rms_norm_bwd(const RmsNormBackward& arguments, void* stream);

}  // namespace glmkern::cuda
