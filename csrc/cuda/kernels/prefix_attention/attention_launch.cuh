// The kernels of prefix_attention on tensor cores, and the start of the one that fits.
#pragma once

#include <algorithm>

#include "cuda/device/launch.cuh"
#include "cuda/kernels/prefix_attention/attend.cuh"
#include "cuda/kernels/prefix_attention/attention_mma.h"
#include "cuda/kernels/prefix_attention/key_gradients.cuh"
#include "cuda/kernels/prefix_attention/query_gradient.cuh"

namespace glmkern::cuda {

template <class Policy, class T, int kChannels, int kWarps, int kKeys, bool kWide>
static __global__ void __launch_bounds__(kWarps* kWarp, 2)
    attend_mma_kernel(const __grid_constant__ Attend a) {
  if constexpr (Policy::kCompiled) {
    attend<Policy, T, kChannels, kWarps, kKeys, kWide>(a);
  } else {
    __trap();
  }
}

// Of a step of the queries' gradient: fewer where they wait in registers.
template <class Policy>
constexpr int kGradientKeys = Policy::kAsyncCopies ? 32 : 16;

template <class Policy, class T, int kChannels, bool kWide>
static __global__ void __launch_bounds__(kMmaWarps* kWarp, 2)
    query_gradient_mma_kernel(const __grid_constant__ AttentionGradients a) {
  if constexpr (Policy::kCompiled) {
    query_gradient<Policy, T, kChannels, kMmaWarps, kGradientKeys<Policy>, kWide>(a);
  } else {
    __trap();
  }
}

template <class Policy, class T, int kChannels, bool kWide>
static __global__ void __launch_bounds__(kMmaWarps* kWarp, 2)
    key_gradients_mma_kernel(const __grid_constant__ AttentionGradients a) {
  if constexpr (Policy::kCompiled) {
    key_gradients<Policy, T, kChannels, kMmaWarps, kMmaGradientRows, kWide>(a);
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

template <class Policy, class T, int kChannels, int kWarps, int kKeys, bool kWide>
void launch_attend(const Attend& a, int64_t blocks, void* stream) {
  using Keys = StagedKeys<Policy, T, kChannels, kKeys, kWarps * kWarp, kWide>;
  static_assert(Keys::kBytes <= Policy::kSharedBytes);
  launch_with_shared("prefix_attention_fwd",
                     attend_mma_kernel<Policy, T, kChannels, kWarps, kKeys, kWide>, blocks,
                     kWarps * kWarp, Keys::kBytes, stream, a);
}

template <class Policy, class T>
void launch_attend(const Attend& a, int64_t blocks, void* stream) {
  const bool few = attend_tile(a).rows == kMmaFewRows;
  with_channels(a.shape.channels, fits_wide(a), [&](auto channels, auto wide) {
    constexpr int kChannels = decltype(channels)::value;
    if constexpr (decltype(wide)::value) {
      if (few) return launch_attend<Policy, T, kChannels, 1, kMmaFewKeys, true>(a, blocks, stream);
    }
    launch_attend<Policy, T, kChannels, kMmaWarps, kMmaKeys, decltype(wide)::value>(a, blocks,
                                                                                    stream);
  });
}

template <class Policy, class T>
void launch_query_gradient(const AttentionGradients& a, int64_t blocks, void* stream) {
  with_channels(a.shape.channels, fits_wide(a), [&](auto channels, auto wide) {
    constexpr int kChannels = decltype(channels)::value, kThreads = kMmaWarps * kWarp;
    constexpr bool kWide = decltype(wide)::value;
    using Keys = StagedKeys<Policy, T, kChannels, kGradientKeys<Policy>, kThreads, kWide>;
    constexpr int kBytes = std::max(Keys::kBytes, 2 * kMmaRows * kRowChunks<kChannels> * 16);
    static_assert(kBytes <= Policy::kSharedBytes);
    launch_with_shared("prefix_attention_bwd",
                       query_gradient_mma_kernel<Policy, T, kChannels, kWide>, blocks, kThreads,
                       kBytes, stream, a);
  });
}

template <class Policy, class T>
void launch_key_gradients(const AttentionGradients& a, int64_t blocks, void* stream) {
  with_channels(a.shape.channels, fits_wide(a), [&](auto channels, auto wide) {
    constexpr int kChannels = decltype(channels)::value, kThreads = kMmaWarps * kWarp;
    constexpr bool kWide = decltype(wide)::value;
    using Rows = StagedRows<Policy, T, kChannels, kMmaGradientRows, kThreads, kWide>;
    constexpr int kBytes = 2 * Rows::Tile::kBytes + kMmaRows * kRowChunks<kChannels> * 16;
    static_assert(kBytes <= Policy::kSharedBytes);
    launch_with_shared("prefix_attention_bwd",
                       key_gradients_mma_kernel<Policy, T, kChannels, kWide>, blocks, kThreads,
                       kBytes, stream, a);
  });
}

}  // namespace glmkern::cuda
