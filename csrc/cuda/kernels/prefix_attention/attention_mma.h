// prefix_attention on tensor cores: half and bfloat16, up to 128 channels.
#pragma once

#include "cuda/kernels/prefix_attention/prefix_attention_cuda.h"

namespace glmkern::cuda {

constexpr int kMmaChannels = 128;
constexpr int kMmaWarps = 4;  // of a block, each with 16 rows, or keys
constexpr int kMmaRows = 16 * kMmaWarps;
constexpr int kMmaKeys = 32;          // of a step
constexpr int kMmaFewRows = 16;       // of a block of one warp, where they suffice
constexpr int kMmaFewKeys = 16;       // of its steps
constexpr int kMmaGradientRows = 16;  // of a step of the keys' gradients

// Whether all rows allow 16 bytes at a time.
bool fits_wide(const Attend& a);
bool fits_wide(const AttentionGradients& a);

void attend_sm75(const Attend& a, int64_t blocks, void* stream);
void attend_sm80(const Attend& a, int64_t blocks, void* stream);
void query_gradient_sm75(const AttentionGradients& a, int64_t blocks, void* stream);
void query_gradient_sm80(const AttentionGradients& a, int64_t blocks, void* stream);
void key_gradients_sm75(const AttentionGradients& a, int64_t blocks, void* stream);
void key_gradients_sm80(const AttentionGradients& a, int64_t blocks, void* stream);

}  // namespace glmkern::cuda
