// The kernels of bias_dropout_add for NVIDIA GPUs.
#pragma once

#include "ops/bias_dropout.h"

namespace glmkern::cuda {

// In how many pieces the rows are divided between blocks, those of dbias's partial sums too.
int64_t bias_dropout_splits(int64_t rows);

// Queued on `stream`, a cudaStream_t. Throws std::runtime_error if a kernel does not start.
void bias_dropout_add_fwd(const BiasDropoutForward& arguments, void* stream);
void bias_dropout_add_bwd(const BiasDropoutBackward& arguments, void* stream);

}  // namespace glmkern::cuda
