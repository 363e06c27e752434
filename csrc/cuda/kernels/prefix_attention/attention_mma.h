// prefix_attention on tensor cores: half and bfloat16, up to 128 channels.
#pragma once

#include "cuda/kernels/prefix_attention/prefix_attention_cuda.h"

namespace glmkern::cuda {

constexpr int kMmaChannels = 128;
constexpr int kMmaRows = 64;          // of a block, or its keys
constexpr int kMmaFewRows = 16;       // of a block of one warp, where they suffice
constexpr int kMmaKeys = 16;          // of a step,
constexpr int kMmaGradientRows = 16;  // or its rows

// Whether all rows allow 16 bytes at a time.
bool fits_wide(const Attend& a);
bool fits_wide(const AttentionGradients& a);

void attend_sm75(const Attend& a, int64_t blocks, void* stream);
void attend_sm80(const Attend& a, int64_t blocks, void* stream);
void gradients_sm75(const AttentionGradients& a, int64_t blocks, void* stream);
void gradients_sm80(const AttentionGradients& a, int64_t blocks, void* stream);

}  // namespace glmkern::cuda
