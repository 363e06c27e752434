// Philox4x32-10 (Salmon et al., 2011): the dropout of glmkern/ops/philox.py, the same mask bit for
// bit. Element i of a sequence is lane i % 4 of counter i / 4.
//
//   const Dropout dropout(p);           on the host, for a kernel's argument; 0 < p < 1
//   const Philox philox(seed);          once a thread; seed: int64 [2] in device memory
//   philox.draw(sequence_id, counter)   the four lanes, 32 random bits each
//   dropout.factor(bits)                0 where the element is dropped, else 1 / (1 - p)
//   draw_factors(philox, dropout, sequence_id, i, factors)      of the elements from i on
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

namespace glmkern::cuda {

struct Dropout {
  explicit Dropout(double p) : scale(1.0f / static_cast<float>(1.0 - p)) {
    const double rounded = std::nearbyint(p * 0x1p32);
    if (rounded >= 0x1p32) scale = 0.0f;  // not even the largest number is kept
    threshold = rounded >= 0x1p32 ? ~0u : static_cast<uint32_t>(rounded);
  }

  __device__ float factor(uint32_t bits) const { return bits < threshold ? 0.0f : scale; }

  uint32_t threshold;
  float scale;
};

class Philox {
 public:
  struct Lanes {
    uint32_t bits[4];
  };

  __device__ explicit Philox(const int64_t* seed) {
    const uint64_t key = seed[0], offset = seed[1];
    offset_low_ = static_cast<uint32_t>(offset);
    offset_high_ = static_cast<uint32_t>(offset >> 32);
    uint32_t a = static_cast<uint32_t>(key), b = static_cast<uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < kRounds; round++) {
      keys_[round][0] = a;
      keys_[round][1] = b;
      a += 0x9E3779B9u;
      b += 0xBB67AE85u;
    }
  }

  // Of `counter` the lower 32 bits count.
  __device__ Lanes draw(uint32_t sequence_id, int64_t counter) const {
    uint32_t a = static_cast<uint32_t>(counter), b = sequence_id;
    uint32_t c = offset_low_, d = offset_high_;
#pragma unroll
    for (int round = 0; round < kRounds; round++) {
      const uint64_t product_a = uint64_t{0xD2511F53u} * a;
      const uint64_t product_c = uint64_t{0xCD9E8D57u} * c;
      a = static_cast<uint32_t>(product_c >> 32) ^ b ^ keys_[round][0];
      c = static_cast<uint32_t>(product_a >> 32) ^ d ^ keys_[round][1];
      b = static_cast<uint32_t>(product_c);
      d = static_cast<uint32_t>(product_a);
    }
    return {{a, b, c, d}};
  }

 private:
  static constexpr int kRounds = 10;

  uint32_t keys_[kRounds][2];
  uint32_t offset_low_, offset_high_;
};

// Of elements i, i + 1, ... of a sequence. A vector of several begins with a counter, i % 4 == 0,
// and shares its draws; a single element draws a whole counter.
template <int kWidth>
__device__ void draw_factors(const Philox& philox, const Dropout& dropout, int64_t sequence_id,
                             int64_t i, float (&factors)[kWidth]) {
  static_assert(kWidth == 1 || kWidth % 4 == 0);
  const uint32_t id = static_cast<uint32_t>(sequence_id);
  if constexpr (kWidth == 1) {
    const Philox::Lanes lanes = philox.draw(id, i / 4);
    uint32_t bits = lanes.bits[0];
#pragma unroll
    for (int lane = 1; lane < 4; lane++) bits = i % 4 == lane ? lanes.bits[lane] : bits;
    factors[0] = dropout.factor(bits);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; k += 4) {
      const Philox::Lanes lanes = philox.draw(id, i / 4 + k / 4);
#pragma unroll
      for (int lane = 0; lane < 4; lane++) factors[k + lane] = dropout.factor(lanes.bits[lane]);
    }
  }
}

}  // namespace glmkern::cuda
