// Weights of 4 and 8 bits as pairs of halves or bfloat16, exactly.
//
// Bits that are put into the fraction of a number with a fixed exponent make it larger by their
// value; subtracting that number again leaves the value. 0x6400 is 1,024 in half and has 10 bits of
// fraction, 0x4300 is 128 in bfloat16 and has 7. A code q in two's complement becomes q + 8 when
// its sign bit is flipped, so that one constant flips the bit, sets the exponent, and is
// subtracted:
//
//     (q & 15) ^ 0x6408  =  1024 + q + 8,     0x6408 = 1032
//
// A packed word holds 8 columns, the even one of each byte in its high nibble, or 4 columns.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device/vec.cuh"

namespace glmkern::cuda {

// Arithmetic on two numbers in a register.
template <class T>
struct PairOf;
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

template <class T>
__device__ uint32_t subtract(uint32_t a, uint32_t b) {
  using Pair = typename PairOf<T>::Type;
  return bits_of(__hsub2(pair_of<Pair>(a), pair_of<Pair>(b)));
}
template <class T>
__device__ uint32_t multiply(uint32_t a, uint32_t b) {
  using Pair = typename PairOf<T>::Type;
  return bits_of(__hmul2(pair_of<Pair>(a), pair_of<Pair>(b)));
}
// Byte i of a into byte 0, byte i of b into byte 2. The others do not matter.
template <int i>
__device__ uint32_t join_bytes(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, i | i << 4 | (4 + i) << 8 | (4 + i) << 12);
}

// The codes in bits 0 to 3, and in bits 4 to 7, of both halves of a register.
template <class T>
__device__ uint32_t low_nibbles(uint32_t t) {
  constexpr uint32_t kMagic = std::is_same_v<T, __half> ? 0x64086408u : 0x43084308u;
  return subtract<T>(lop3<kAndXor>(t, 0x000f000fu, kMagic), kMagic);
}
template <class T>
__device__ uint32_t high_nibbles(uint32_t t) {
  if constexpr (std::is_same_v<T, __half>) {
    // 1024 + 16 (q + 8), of which a sixteenth less 72 is q: exact, and spares a shift.
    constexpr uint32_t kMagic = 0x64806480u, kSixteenth = 0x2c002c00u, kMinus72 = 0xd480d480u;
    return bits_of(__hfma2(pair_of<__half2>(lop3<kAndXor>(t, 0x00f000f0u, kMagic)),
                           pair_of<__half2>(kSixteenth), pair_of<__half2>(kMinus72)));
  } else {
    return low_nibbles<T>(t >> 4);
  }
}

// The codes in bits 0 to 7 of both halves of a register.
template <class T>
__device__ uint32_t low_bytes(uint32_t t) {
  if constexpr (std::is_same_v<T, __half>) {
    constexpr uint32_t kMagic = 0x64806480u;  // 1024 + q + 128, 0x6480 = 1152
    return subtract<T>(lop3<kAndXor>(t, 0x00ff00ffu, kMagic), kMagic);
  } else {
    // Seven bits of fraction: the lower bits, less 128 where the sign bit is set.
    constexpr uint32_t kMagic = 0x43004300u;
    return subtract<T>(lop3<kAndOr>(t, 0x007f007fu, kMagic), lop3<kAndOr>(t, 0x00800080u, kMagic));
  }
}

// Codes of kBits bits in a word of one row, as pairs of neighbouring columns.
template <class T, int kBits>
__device__ void decode_columns(uint32_t word, uint32_t (&pairs)[16 / kBits]) {
  if constexpr (kBits == 4) {
    const uint32_t even = word >> 4;
    pairs[0] = low_nibbles<T>(join_bytes<0>(even, word));
    pairs[1] = low_nibbles<T>(join_bytes<1>(even, word));
    pairs[2] = low_nibbles<T>(join_bytes<2>(even, word));
    pairs[3] = low_nibbles<T>(join_bytes<3>(even, word));
  } else {
    pairs[0] = low_bytes<T>(__byte_perm(word, 0, 0x1100));
    pairs[1] = low_bytes<T>(__byte_perm(word, 0, 0x3322));
  }
}

// Words of row n and of row n + 1: a pair of rows for each of their columns.
template <class T, int kBits>
__device__ void decode_rows(uint32_t row, uint32_t next_row, uint32_t (&pairs)[32 / kBits]) {
  const uint32_t joined[4] = {join_bytes<0>(row, next_row), join_bytes<1>(row, next_row),
                              join_bytes<2>(row, next_row), join_bytes<3>(row, next_row)};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (kBits == 4) {
      pairs[2 * i] = high_nibbles<T>(joined[i]);
      pairs[2 * i + 1] = low_nibbles<T>(joined[i]);
    } else {
      pairs[i] = low_bytes<T>(joined[i]);
    }
  }
}

}  // namespace glmkern::cuda
