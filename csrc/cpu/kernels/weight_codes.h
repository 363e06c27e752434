// How stored weights become vectors of floats. A row is read in 32-bit words, kLanes of them at a
// time; a word holds kPerWord consecutive columns.
//   unpack(words, j)        column j of every lane
//   unpack_scaled(words, j) the same times scale_of(j), a power of two, in fewer instructions
//   unpack_pair(words, j)   columns 2j and 2j + 1 as bfloat16, the low and high half of every lane,
//                           for codes that bfloat16 holds exactly: kIsBFloat16
#pragma once

#include <type_traits>

#include "cpu/kernels/vec.h"
#include "ops/quant_linear.h"

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

// Two floats that are bfloat16.
inline Bits as_pair(Vec low, Vec high) {
  return as_bits(low) >> 16 | (as_bits(high) & 0xFFFF0000u);
}

struct Int4 {
  static constexpr int kPerWord = 8;
  static constexpr bool kIsBFloat16 = true;
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
#if defined(__AVX512BF16__)
  static Bits unpack_pair(Bits words, int j) {
    // The permutation looks at the low five bits of an index: the fifth must not matter.
    const __m256i values =
        _mm256_setr_epi16(0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0,
                          0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80);
    const int up = 16 - shift_of(2 * j + 1);
    const Bits low = words >> shift_of(2 * j), high = up >= 0 ? words << up : words >> -up;
    const Bits codes = (low & 0xFFFFu) | (high & 0xFFFF0000u);
    return reinterpret_cast<Bits>(_mm512_maskz_permutexvar_epi16(
        ~0u, reinterpret_cast<__m512i>(codes), _mm512_maskz_broadcast_i64x4(0xFF, values)));
  }
#endif
};

struct Int8 {
  static constexpr int kPerWord = 4;
  static constexpr bool kIsBFloat16 = true;
  static constexpr float scale_of(int) { return 1; }
  static Vec unpack_scaled(Bits words, int j) { return unpack(words, j); }
  static Vec unpack(Bits words, int j) { return signed_field<8>(words, 8 * j); }
  static Bits unpack_pair(Bits words, int j) {
    return as_pair(unpack(words, 2 * j), unpack(words, 2 * j + 1));
  }
};

template <class T>
struct Dense {
  static constexpr int kPerWord = 4 / sizeof(T);
  static constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;
  static constexpr float scale_of(int) { return 1; }
  static Vec unpack_scaled(Bits words, int j) { return unpack(words, j); }
  static Vec unpack(Bits words, int j) {
    if constexpr (sizeof(T) == 4) {
      return as_float(words);
    } else {
      return widen(T{}, truncate((words >> (16 * j)) & 0xFFFFu));
    }
  }
  static Bits unpack_pair(Bits words, int) { return words; }
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

// Of a row that ends after `bytes` more bytes; zeros past its end.
inline Bits load_words(const uint8_t* p, int64_t bytes) {
  if (bytes >= static_cast<int64_t>(sizeof(Bits))) return load_words(p);
  Bits words{};
  if (bytes > 0) std::memcpy(&words, p, bytes);
  return words;
}

}  // namespace
}  // namespace glmkern::CPU_ISA
