// Philox4x32-10 in vectors: the dropout of glmkern/ops/philox.py, the same mask bit for bit.
//
//   const Dropout dropout(seed, p);                   seed: int64 [2] = (seed, offset); 0 < p < 1
//   dropout.factors(sequence_id, first, n, factors);  factors[j] = 0 where element first + j of
//                                                     the sequence is dropped, else 1 / (1 - p)
//   dropout.for_each_vec(sequence_id, first, n, f);   f(j, lanes, Vec of the factors from j on)
//
// `first` is a multiple of 4: a counter gives four elements. Nothing past n floats is written.
#pragma once

#include "cpu/kernels/vec.h"

namespace glmkern::CPU_ISA {
namespace {

// Each lane of 64 bits holds one counter's word in its lower half. What the upper half holds does
// not matter: the product reads lower halves only, and no other step moves bits downwards.
typedef uint64_t Words __attribute__((vector_size(4 * kLanes)));
constexpr int kCounters = kLanes / 2;

inline Words broadcast_word(uint64_t word) { return Words{} + word; }

// The 64-bit products of the lower halves.
inline Words multiply(Words a, Words b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Words>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The counters of a vector, from the first one on, in the order that `interleave` undoes.
inline Words count_from(uint64_t first) {
#if defined(__AVX512F__)
  return broadcast_word(first) + Words{0, 4, 1, 5, 2, 6, 3, 7};
#elif defined(__AVX2__)
  return broadcast_word(first) + Words{0, 2, 1, 3};
#else
  return broadcast_word(first) + Words{0, 1};
#endif
}

// Elements are counter by counter; ab holds the first two of every counter's elements, cd the other
// two. Returns the elements of the first half of the counters, or of the second.
template <int kHalf>
inline Bits interleave(Words ab, Words cd) {
#if defined(__AVX512F__)
  constexpr int n = kCounters;
  return reinterpret_cast<Bits>(__builtin_shufflevector(ab, cd, kHalf, n + kHalf, 2 + kHalf,
                                                        n + 2 + kHalf, 4 + kHalf, n + 4 + kHalf,
                                                        6 + kHalf, n + 6 + kHalf));
#elif defined(__AVX2__)
  return reinterpret_cast<Bits>(
      __builtin_shufflevector(ab, cd, kHalf, 4 + kHalf, 2 + kHalf, 6 + kHalf));
#else
  return reinterpret_cast<Bits>(__builtin_shufflevector(ab, cd, kHalf, 2 + kHalf));
#endif
}

class Dropout {
 public:
  Dropout(const int64_t* seed, double p)
      : offset_(seed[1]), scale_(1.0f / static_cast<float>(1.0 - p)) {
    const double threshold = __builtin_nearbyint(p * 0x1p32);
    if (threshold >= 0x1p32) scale_ = 0.0f;  // not even the largest number is kept
    threshold_ = threshold >= 0x1p32 ? ~0u : static_cast<uint32_t>(threshold);
    uint32_t a = static_cast<uint32_t>(seed[0]), b = static_cast<uint64_t>(seed[0]) >> 32;
    for (int round = 0; round < kRounds; round++) {
      keys_[round][0] = a;
      keys_[round][1] = b;
      a += 0x9E3779B9u;
      b += 0xBB67AE85u;
    }
  }

  template <class F>
  void for_each_vec(int64_t sequence_id, int64_t first, int64_t n, F f) const {
    int64_t j = 0;
    for (; j + 2 * kStreams * kLanes <= n; j += 2 * kStreams * kLanes) {
      Vec factors[2 * kStreams];
      draw<kStreams>(sequence_id, first + j, factors);
      for (int k = 0; k < 2 * kStreams; k++) f(j + k * kLanes, Full{}, factors[k]);
    }
    while (j < n) {
      Vec factors[2];
      draw<1>(sequence_id, first + j, factors);
      for (int k = 0; k < 2 && j < n; k++, j += kLanes) {
        const int rest = static_cast<int>(n - j);
        rest >= kLanes ? f(j, Full{}, factors[k]) : f(j, Tail{rest}, factors[k]);
      }
    }
  }

  void factors(int64_t sequence_id, int64_t first, int64_t n, float* result) const {
    for_each_vec(sequence_id, first, n,
                 [&](int64_t j, auto lanes, Vec factor) { store(result + j, factor, lanes); });
  }

 private:
  static constexpr int kRounds = 10;

  // A round waits for the round before it; three independent streams keep the multipliers busy, and
  // four would no longer fit into the 16 registers of AVX2.
  static constexpr int kStreams = 3;

  // The factors of 2 * kCount * kLanes elements.
  template <int kCount>
  void draw(int64_t sequence_id, int64_t first, Vec* factors) const {
    const Words factor_a = broadcast_word(0xD2511F53u), factor_c = broadcast_word(0xCD9E8D57u);
    Words a[kCount], b[kCount], c[kCount], d[kCount];
    for (int s = 0; s < kCount; s++) {
      a[s] = count_from(static_cast<uint64_t>(first) / 4 + s * kCounters);
      b[s] = broadcast_word(sequence_id);
      c[s] = broadcast_word(offset_);
      d[s] = broadcast_word(offset_ >> 32);
    }
    for (int round = 0; round < kRounds; round++) {
      for (int s = 0; s < kCount; s++) {
        const Words product_a = multiply(factor_a, a[s]), product_c = multiply(factor_c, c[s]);
        a[s] = (product_c >> 32) ^ b[s] ^ keys_[round][0];
        c[s] = (product_a >> 32) ^ d[s] ^ keys_[round][1];
        b[s] = product_c;
        d[s] = product_a;
      }
    }
    for (int s = 0; s < kCount; s++) {
      const Words ab = (a[s] & 0xFFFFFFFFu) | (b[s] << 32);
      const Words cd = (c[s] & 0xFFFFFFFFu) | (d[s] << 32);
      factors[2 * s] = factor_of(interleave<0>(ab, cd));
      factors[2 * s + 1] = factor_of(interleave<1>(ab, cd));
    }
  }

  Vec factor_of(Bits random) const { return random < threshold_ ? Vec{} : broadcast(scale_); }

  uint64_t offset_;
  uint64_t keys_[kRounds][2];
  uint32_t threshold_;
  float scale_;
};

}  // namespace
}  // namespace glmkern::CPU_ISA
