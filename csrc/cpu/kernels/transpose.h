// A square of numbers in registers, transposed.
#pragma once

#include <utility>

#include "cpu/kernels/vec.h"

namespace glmkern::CPU_ISA {
namespace {

// Swaps the lanes of `a` that have the bit kStep with those of `b` that have it not.
template <int kStep, class V, int... kLane>
inline void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  const V first = a;
  a = __builtin_shufflevector(first, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(first, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
}

// Lane i of vector j to lane j of vector i, V being Vec or Bits: first within blocks of two lanes,
// then of four, ...
template <int kStep = 1, class V>
inline void transpose(V (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) {
    if (!(i & kStep)) {
      exchange<kStep>(square[i], square[i + kStep], std::make_integer_sequence<int, kLanes>{});
    }
  }
  if constexpr (2 * kStep < kLanes) transpose<2 * kStep>(square);
}

template <int... kLane>
inline void zip(Vec a, Vec b, Vec& first, Vec& second, std::integer_sequence<int, kLane...>) {
  first = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes)...);
  second = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes + kLanes / 2)...);
}

// The vectors' lanes in turn, lane i of vector j becoming number i * kCount + j of them all. A step
// takes numbers of the first half and of the second in turn.
template <int kCount, int kSteps = kCount>
inline void interleave(Vec (&v)[kCount]) {
  if constexpr (kSteps > 1) {
    Vec next[kCount];
    for (int i = 0; i < kCount / 2; i++) {
      zip(v[i], v[i + kCount / 2], next[2 * i], next[2 * i + 1],
          std::make_integer_sequence<int, kLanes>{});
    }
    for (int i = 0; i < kCount; i++) v[i] = next[i];
    interleave<kCount, kSteps / 2>(v);
  }
}

}  // namespace
}  // namespace glmkern::CPU_ISA
