// prefix_attention in float arithmetic: float32, more than 128 channels, and what the tensor cores
// of a chip lack.
#pragma once

#include "cuda/kernels/prefix_attention/prefix_attention_cuda.h"

namespace glmkern::cuda {

constexpr int kScalarRows = 16;       // of a block, or keys
constexpr int kScalarKeys = 32;       // of a step, or rows
constexpr int kScalarChannels = 128;  // of a block's results

void attend_scalar(const Attend& a, int64_t blocks, void* stream);
void gradients_scalar(const AttentionGradients& a, int64_t query_blocks, void* stream);

}  // namespace glmkern::cuda
