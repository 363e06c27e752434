// Codes of 4 and 8 bits as floats, exactly, in two instructions each and a shift a word. The
// instruction that converts an integer runs at a quarter of their rate or less.
//
// A float of 2^(23 - p) to 2^(24 - p) has its ones at bit p of its mantissa. So a code at bits p on
// of a word becomes a float where it lies: the bits around it are masked out, and those of
// 2^(23 - p) put above it. Codes are two's complement: a flipped sign bit adds 2^(bits - 1). With 4
// bits and p = 4:
//
//     word             .... .... .... cccc ....      & mask
//     sign and magic   0100 1001 ... 1000 0000       ^
//     as a float       2^19 + 8 + code               - (2^19 + 8), exact
//
// The mantissa has 23 bits, so that codes above bit 16 are shifted down first, all by one shift.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device/ptx.cuh"

namespace glmkern::cuda {

// The code at bits `at` on of `word`, at + kBits <= 23.
template <int kBits>
__device__ float code_at(uint32_t word, int at) {
  const uint32_t mask = ((1u << kBits) - 1) << at;
  const uint32_t sign = 1u << (kBits - 1) << at;
  const uint32_t magic = static_cast<uint32_t>(127 + 23 - at) << 23;
  // nvcc makes two of `(word & mask) ^ (magic | sign)`.
  const uint32_t bits = lop3<kAndXor>(word, mask, magic | sign);
  float result;
  memcpy(&result, &bits, sizeof result);
  return result - static_cast<float>((1 << (23 - at)) + (1 << (kBits - 1)));
}

// The columns of kCount codes in `words`. Of 4 bits, an even column has the high half of its byte.
template <int kBits, int kCount>
__device__ void decode(const uint32_t* words, float (&column)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    const int at = (kBits == 4 ? i ^ 1 : i) * kBits;
    const uint32_t word = words[at / 32];
    column[i] = code_at<kBits>(at % 32 < 16 ? word : word >> 16, at % 16);
  }
}

}  // namespace glmkern::cuda
