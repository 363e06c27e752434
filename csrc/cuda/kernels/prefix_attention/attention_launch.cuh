// The kernels of prefix_attention on tensor cores, and the start of the one that fits.
#pragma once

#include <algorithm>

#include "cuda/device/launch.cuh"
#include "cuda/kernels/prefix_attention/attend.cuh"
#include "cuda/kernels/prefix_attention/attention_mma.h"
#include "cuda/kernels/prefix_attention/key_gradients.cuh"
#include "cuda/kernels/prefix_attention/query_gradient_pairs.cuh"

namespace glmkern::cuda {

template <class Policy, class T, int kChannels, int kWarps, int kRowTiles, bool kWide>
static __global__ void __launch_bounds__(kWarps* kWarp, 2)
    attend_mma_kernel(const __grid_constant__ Attend a) {
  if constexpr (Policy::kCompiled) {
    attend<Policy, T, kChannels, kWarps, kRowTiles, kWide>(a);
  } else {
    __trap();
  }
}

// Tiles of 16 rows that a warp has: one where what it walks passes through registers.
template <class Policy, bool kWide>
constexpr int kRowTiles = Policy::kAsyncCopies && kWide ? 2 : 1;

// The kernels of a launch for all gradients.
template <class Policy, class T, int kChannels, bool kWide>
struct Gradients {
  static constexpr int kTiles = Policy::kAsyncCopies ? kRowTiles<Policy, kWide> : 2;
  using Keys = KeyGradient<Policy, T, kChannels, kTiles, kWide>;
  using Queries = std::conditional_t<Policy::kAsyncCopies,
                                     QueryGradientInPairs<Policy, T, kChannels, kTiles, kWide>,
                                     QueryGradient<Policy, T, kChannels, kWide>>;
  static constexpr int kThreads = Keys::kThreads, kBlocks = 256 / kThreads;  // a multiprocessor
  static constexpr int kBytes = std::max(Keys::kBytes, Queries::kBytes);
  static_assert(kThreads == Queries::kThreads && kBytes <= Policy::kSharedBytes);
};

template <class Policy, class T, int kChannels, bool kWide>
static __global__ void __launch_bounds__(Gradients<Policy, T, kChannels, kWide>::kThreads,
                                         Gradients<Policy, T, kChannels, kWide>::kBlocks)
    gradients_mma_kernel(const __grid_constant__ AttentionGradients a) {
  if constexpr (Policy::kCompiled) {
    using Kernels = Gradients<Policy, T, kChannels, kWide>;
    const int block = blockIdx.x, key_blocks = static_cast<int>(a.key_blocks);
    if (block < key_blocks) return Kernels::Keys::run(a, block);
    Kernels::Queries::run(a, block - key_blocks, gridDim.x - key_blocks);
  } else {
    __trap();
  }
}

// f(channels, wide), types that hold constants: of a tile, and whether rows go by 16 bytes.
template <class F>
void with_channels(int64_t channels, bool wide, F f) {
  if (!wide) return f(Int<kMmaChannels>{}, std::false_type{});
  channels <= 64 ? f(Int<64>{}, std::true_type{}) : f(Int<kMmaChannels>{}, std::true_type{});
}

template <class Policy, class T, int kChannels, int kWarps, int kRowTiles, bool kWide>
void launch_attend(const Attend& a, int64_t blocks, void* stream) {
  using Keys = StagedKeys<Policy, T, kChannels, kMmaKeys, kWarps * kWarp, kWide>;
  static_assert(Keys::kBytes <= Policy::kSharedBytes);
  launch_with_shared("prefix_attention_fwd",
                     attend_mma_kernel<Policy, T, kChannels, kWarps, kRowTiles, kWide>, blocks,
                     kWarps * kWarp, Keys::kBytes, stream, a);
}

template <class Policy, class T>
void launch_attend(const Attend& a, int64_t blocks, void* stream) {
  const bool few = attend_tile(a).rows == kMmaFewRows;
  with_channels(a.shape.channels, fits_wide(a), [&](auto channels, auto wide) {
    constexpr int kChannels = decltype(channels)::value;
    constexpr bool kWide = decltype(wide)::value;
    if constexpr (kWide) {
      if (few) return launch_attend<Policy, T, kChannels, 1, 1, true>(a, blocks, stream);
    }
    constexpr int kTiles = kRowTiles<Policy, kWide>, kWarps = kMmaRows / 16 / kTiles;
    launch_attend<Policy, T, kChannels, kWarps, kTiles, kWide>(a, blocks, stream);
  });
}

template <class Policy, class T>
void launch_gradients(const AttentionGradients& a, int64_t blocks, void* stream) {
  with_channels(a.shape.channels, fits_wide(a), [&](auto channels, auto wide) {
    constexpr int kChannels = decltype(channels)::value;
    constexpr bool kWide = decltype(wide)::value;
    using Kernels = Gradients<Policy, T, kChannels, kWide>;
    launch_with_shared("prefix_attention_bwd", gradients_mma_kernel<Policy, T, kChannels, kWide>,
                       blocks, Kernels::kThreads, Kernels::kBytes, stream, a);
  });
}

}  // namespace glmkern::cuda
