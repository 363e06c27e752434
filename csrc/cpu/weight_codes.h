// How stored weights become vectors of floats. A row is read in 32-bit words, kLanes of them at a
// time; a word holds kPerWord consecutive columns.
//   unpack(words, j)        column j of every lane
//   unpack_scaled(words, j) the same times scale_of(j), a power of two, in fewer instructions
#pragma once

#include "../quant_linear.h"
#include "vec.h"

namespace glmkern::CPU_ISA {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// The low bits of every lane, from bit `shift` on, as a signed number.
template <int kBits>
inline Vec signed_field(Bits words, int shift) {
  const Ints high = reinterpret_cast<Ints>(words << (32 - kBits - shift));
  return __builtin_convertvector(high >> (32 - kBits), Vec);
}

// A number of 0 .. 2^20 - 1 in the fraction of a float with the exponent of 2^23 is 2^23 plus that
// number: a field is masked out where it is, its sign bit flipped (so that it counts from -2^(kBits
// - 1)), and 2^23 and that offset taken away again. Fields too far up are brought down first.
constexpr int kFractionBits = 20;

constexpr int position(int shift) { return shift < kFractionBits ? shift : shift - kFractionBits; }

template <int kBits>
inline Vec scaled_field(Bits words, int shift) {
  const int at = position(shift);
  const uint32_t mask = ((1u << kBits) - 1) << at, sign = 1u << (kBits - 1) << at;
  const Bits source = shift < kFractionBits ? words : words >> kFractionBits;
  const Bits two_to_23 = as_bits(broadcast(0x1p23f));
  return as_float((source & mask) ^ (two_to_23 | sign)) - (0x1p23f + sign);
}

struct Int4 {
  static constexpr int kPerWord = 8;
  // The even column of a byte is in its high nibble.
  static constexpr int shift_of(int j) { return 8 * (j / 2) + (j % 2 == 0 ? 4 : 0); }
  static constexpr float scale_of(int j) { return 1 << position(shift_of(j)); }
  static Vec unpack_scaled(Bits words, int j) { return scaled_field<4>(words, shift_of(j)); }
  static Vec unpack(Bits words, int j) {
    const int shift = shift_of(j);
#if defined(__AVX512F__)
    // The permutation looks at the low four bits of an index alone.
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_maskz_permutexvar_ps(kAll, reinterpret_cast<__m512i>(words >> shift), values);
#else
    return signed_field<4>(words, shift);
#endif
  }
};

struct Int8 {
  static constexpr int kPerWord = 4;
  static constexpr float scale_of(int) { return 1; }
  static Vec unpack_scaled(Bits words, int j) { return unpack(words, j); }
  static Vec unpack(Bits words, int j) { return signed_field<8>(words, 8 * j); }
};

template <class T>
struct Dense {
  static constexpr int kPerWord = 4 / sizeof(T);
  static constexpr float scale_of(int) { return 1; }
  static Vec unpack_scaled(Bits words, int j) { return unpack(words, j); }
  static Vec unpack(Bits words, int j) {
    if constexpr (sizeof(T) == 4) {
      return as_float(words);
    } else {
      return widen(T{}, truncate((words >> (16 * j)) & 0xFFFFu));
    }
  }
};

// f(Codes{}) with the codes that `format` names.
template <class F>
inline void with_codes(WeightFormat format, F f) {
  switch (format) {
    case WeightFormat::kInt4: return f(Int4{});
    case WeightFormat::kInt8: return f(Int8{});
    case WeightFormat::kHalf: return f(Dense<Half>{});
    case WeightFormat::kBFloat16: return f(Dense<BFloat16>{});
    case WeightFormat::kFloat: return f(Dense<float>{});
  }
}

inline Bits load_words(const uint8_t* p) {
  Bits words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// Of a row that ends after `bytes` more bytes; zeros behind its end.
inline Bits load_words(const uint8_t* p, int64_t bytes) {
  if (bytes >= static_cast<int64_t>(sizeof(Bits))) return load_words(p);
  Bits words{};
  if (bytes > 0) std::memcpy(&words, p, bytes);
  return words;
}

}  // namespace
}  // namespace glmkern::CPU_ISA
