// quant_linear on tensor cores: weights of 4 or 8 bits, activations of half or bfloat16.
#pragma once

#include <cstdint>

#include "ops/quant_linear.h"

namespace glmkern::cuda {

// A block has `tokens` tokens and `warps` warps beside each other, each with results of its own;
// `depth` times as many share the steps of the sum.
struct MmaTile {
  int tokens, warps, depth;
};

constexpr MmaTile kForwardTiles[] = {{8, 1, 8}, {16, 1, 4}, {32, 4, 1}, {64, 4, 1}};
constexpr MmaTile kBackwardTiles[] = {{8, 1, 4}, {16, 1, 4}, {32, 4, 1}, {64, 4, 1}};
// Where 16-byte accesses do not fit: more registers for addresses, so fewer tokens.
constexpr MmaTile kNarrowTile = {16, 1, 4};

constexpr int kForwardRows = 32;    // of the weight, a warp
constexpr int kForwardBytes = 64;   // of each, a step of a warp
constexpr int kBackwardBytes = 32;  // of each row of the weight, a warp: its columns
constexpr int backward_rows(int depth) { return 32 * (depth > 1 ? depth : 2); }  // of a step

// How a product is shared out. It depends on its shape and its tensors' alignment alone, so that a
// result's bits do too.
struct MmaPlan {
  MmaTile tile;
  bool wide;
  int token_blocks, result_blocks;
  int steps, splits;  // of the sum
  int64_t blocks() const { return int64_t{token_blocks} * result_blocks * splits; }
};

MmaPlan plan_mma(const QuantLinear& a);

// Whether the kernels take `a` on the current device: before sm_80 there is no bfloat16.
bool mma_serves(const QuantLinear& a);

// y, on `stream`; partial [splits, rows, columns] is memory for the sums of several splits.
void mma(const QuantLinear& a, const MmaPlan& plan, float* partial, void* stream);

// Its parts: sums, or results where there is one split, and the results from the sums.
void mma_sm75(const QuantLinear& a, const MmaPlan& plan, float* partial, void* stream);
void mma_sm80(const QuantLinear& a, const MmaPlan& plan, float* partial, void* stream);

}  // namespace glmkern::cuda
