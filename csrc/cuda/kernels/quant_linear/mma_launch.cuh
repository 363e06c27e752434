// The kernels of quant_linear on tensor cores, and the start of the one that a plan names.
#pragma once

#include <algorithm>

#include "cuda/device/launch.cuh"
#include "cuda/kernels/quant_linear/mma.h"
#include "cuda/kernels/quant_linear/mma_backward.cuh"
#include "cuda/kernels/quant_linear/mma_forward.cuh"

namespace glmkern::cuda {

// How many blocks a multiprocessor is to hold of those with 128 threads and no depth: registers
// suffice for the sums of so many tokens, without a spill.
constexpr int blocks_at_once(int tokens, int depth) { return depth > 1 ? 1 : tokens == 32 ? 3 : 2; }

template <class Policy, class T, int kBits, int kTokens, int kWarps, int kDepth, bool kWide>
static __global__ void __launch_bounds__(kWarps * kDepth * kWarp, blocks_at_once(kTokens, kDepth))
    mma_forward_kernel(const __grid_constant__ MmaArguments m) {
  if constexpr (Policy::kCompiled) {
    mma_forward<Policy, T, kBits, kTokens, kWarps, kDepth, kWide>(m);
  } else {
    __trap();
  }
}

template <class Policy, class T, int kBits, int kTokens, int kWarps, int kDepth, bool kWide>
static __global__ void __launch_bounds__(kWarps * kDepth * kWarp, blocks_at_once(kTokens, kDepth))
    mma_backward_kernel(const __grid_constant__ MmaArguments m) {
  if constexpr (Policy::kCompiled) {
    mma_backward<Policy, T, kBits, kTokens, kWarps, kDepth, kWide>(m);
  } else {
    __trap();
  }
}

template <class Policy, class T, int kBits, bool kBackward, int kTokens, int kWarps, int kDepth,
          bool kWide>
void launch_mma(const MmaArguments& m, int64_t blocks, void* stream) {
  if constexpr (kBackward) {
    using Tile = BackwardTile<T, kBits, kTokens, kWarps, kDepth>;
    static_assert(Tile::kColumns * kBits / 8 == kBackwardBytes);
    constexpr int kTileBytes =
        Tile::template Tokens<Policy, kWide>::kBytes + Tile::template Scales<Policy, kWide>::kBytes;
    static_assert(std::max(kTileBytes, Tile::kSumBytes) <= Policy::kSharedBytes);
    launch_with_shared("quant_linear_bwd",
                       mma_backward_kernel<Policy, T, kBits, kTokens, kWarps, kDepth, kWide>,
                       blocks, Tile::kThreads, std::max(kTileBytes, Tile::kSumBytes), stream, m);
  } else {
    using Tile = ForwardTile<T, kBits, kTokens, kWarps, kDepth>;
    static_assert(Tile::kRows == kForwardRows && Tile::kColumns * kBits / 8 == kForwardBytes);
    constexpr int kTileBytes = Tile::template Tokens<Policy, kWide>::kBytes;
    static_assert(std::max(kTileBytes, Tile::kSumBytes) <= Policy::kSharedBytes);
    launch_with_shared("quant_linear_fwd",
                       mma_forward_kernel<Policy, T, kBits, kTokens, kWarps, kDepth, kWide>, blocks,
                       Tile::kThreads, std::max(kTileBytes, Tile::kSumBytes), stream, m);
  }
}

template <class Policy, class T, int kBits, bool kBackward>
void launch_tile(const MmaArguments& m, const MmaPlan& plan, void* stream) {
  constexpr MmaTile kNarrow = kNarrowTile;
  if (!plan.wide) {
    return launch_mma<Policy, T, kBits, kBackward, kNarrow.tokens, kNarrow.warps, kNarrow.depth,
                      false>(m, plan.blocks(), stream);
  }
  const auto launch = [&](auto tokens, auto warps, auto depth) {
    if (plan.tile.tokens != decltype(tokens)::value) return;
    launch_mma<Policy, T, kBits, kBackward, decltype(tokens)::value, decltype(warps)::value,
               decltype(depth)::value, true>(m, plan.blocks(), stream);
  };
  constexpr const MmaTile(&kTiles)[4] = kBackward ? kBackwardTiles : kForwardTiles;
  launch(Int<kTiles[0].tokens>{}, Int<kTiles[0].warps>{}, Int<kTiles[0].depth>{});
  launch(Int<kTiles[1].tokens>{}, Int<kTiles[1].warps>{}, Int<kTiles[1].depth>{});
  launch(Int<kTiles[2].tokens>{}, Int<kTiles[2].warps>{}, Int<kTiles[2].depth>{});
  launch(Int<kTiles[3].tokens>{}, Int<kTiles[3].warps>{}, Int<kTiles[3].depth>{});
}

template <class Policy, class T>
void launch_plan(const QuantLinear& a, const MmaPlan& plan, float* partial, void* stream) {
  const MmaArguments m{a,          partial,           a.columns(),       plan.splits,
                       plan.steps, plan.token_blocks, plan.result_blocks};
  if (a.format == WeightFormat::kInt4) {
    a.backward ? launch_tile<Policy, T, 4, true>(m, plan, stream)
               : launch_tile<Policy, T, 4, false>(m, plan, stream);
  } else {
    a.backward ? launch_tile<Policy, T, 8, true>(m, plan, stream)
               : launch_tile<Policy, T, 8, false>(m, plan, stream);
  }
}

}  // namespace glmkern::cuda
