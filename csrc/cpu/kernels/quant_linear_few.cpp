// quant_linear forward of a few rows on the CPU. Nothing is reused but x itself, so the weight goes
// from memory to registers, and x is arranged once in the order of the weight's words.
#include <algorithm>
#include <cmath>

#include "cpu/kernels/quant_linear_cpu.h"
#include "cpu/kernels/weight_codes.h"
#include "cpu/scratch.h"

namespace glmkern::CPU_ISA {
namespace {

constexpr int64_t kBytes = sizeof(Bits);  // of a vector of words
constexpr int64_t kAhead = 4096;  // bytes: the hardware stops prefetching at the end of a page

// kColumns rows of the weight, first + c * apart, read a vector of words at a time.
template <int kColumns>
struct Streams {
  const uint8_t* rows;
  int64_t stride, row_bytes;

  Streams(const QuantLinear& a, int64_t first, int64_t apart)
      : rows(a.weight + first * a.row_bytes), stride(apart * a.row_bytes), row_bytes(a.row_bytes) {}

  int64_t whole() const { return row_bytes / kBytes; }
  bool has_rest() const { return row_bytes % kBytes != 0; }

  void load(int64_t i, Bits (&words)[kColumns]) const {
    for (int c = 0; c < kColumns; c++) {
      const uint8_t* p = rows + c * stride + i * kBytes;
      prefetch(p + kAhead);
      words[c] = load_words(p);
    }
  }

  // Apart, because a call within a loop makes the compiler spill all that the loop holds.
  void load_rest(Bits (&words)[kColumns]) const {
    const int64_t begin = whole() * kBytes;
    for (int c = 0; c < kColumns; c++) {
      words[c] = load_words(rows + c * stride + begin, row_bytes - begin);
    }
  }
};

// Columns begin <= n < end of the result, one of either half at a time: two streams of weights hide
// more of the memory's latency than one, and what comes of x from the cache serves both.
template <class Product>
inline void in_two_streams(const Product& product, int64_t begin, int64_t end) {
  const int64_t half = (end - begin) / 2;
  for (int64_t n = begin; n < begin + half; n++) product.template columns<2>(n, half);
  if ((end - begin) % 2 != 0) product.template columns<1>(end - 1, 0);
}

template <class T>
inline void store_result(const QuantLinear& a, int64_t m, int64_t n, float y) {
  if (a.scale != nullptr) y *= a.scale[n];
  if (a.bias != nullptr) y += load(static_cast<const T*>(a.bias) + n, Tail{1})[0];
  store(static_cast<T*>(a.y) + m * a.n + n, broadcast(y), Tail{1});
}

// kRows rows of x as floats, [rows, padded_depth(k)]: vector j of a vector of words holds column j
// of every word, divided by the power of two that comes with that column's codes.
template <class Codes, class T, int kRows>
struct FloatProduct {
  // Enough to hide the latency of additions. The bits must not depend on which columns go together,
  // as that is up to the threads.
  static constexpr int kSums = kRows >= 4 ? 1 : 4 / kRows;
  const QuantLinear& a;
  const float* arranged;

  template <int kColumns>
  void columns(int64_t first, int64_t apart) const {
    constexpr int64_t kPerVector = Codes::kPerWord * kLanes;
    const int64_t length = padded_depth(a.k);
    const Streams<kColumns> streams(a, first, apart);
    Vec parts[kColumns][kRows][kSums] = {};
    Bits words[kColumns];
    const auto add = [&](int64_t i) {
      const float* x = arranged + i * kPerVector;
#pragma GCC unroll 8
      for (int j = 0; j < Codes::kPerWord; j++) {
#pragma GCC unroll 2
        for (int c = 0; c < kColumns; c++) {
          const Vec w = Codes::unpack_scaled(words[c], j);
#pragma GCC unroll 4
          for (int m = 0; m < kRows; m++) {
            parts[c][m][j % kSums] += w * load(x + m * length + j * kLanes, Full{});
          }
        }
      }
    };
    for (int64_t i = 0; i < streams.whole(); i++) {
      streams.load(i, words);
      add(i);
    }
    if (streams.has_rest()) {
      streams.load_rest(words);
      add(streams.whole());
    }
    for (int c = 0; c < kColumns; c++) {
      for (int m = 0; m < kRows; m++) {
        Vec sum = parts[c][m][0];
        for (int i = 1; i < kSums; i++) sum += parts[c][m][i];
        store_result<T>(a, m, first + c * apart, sum_lanes(sum));
      }
    }
  }
};

template <class Codes>
void arrange_floats(const float* x, int64_t length, float* arranged) {
  constexpr int64_t kPerWord = Codes::kPerWord, kWords = kLanes * kPerWord;
  for (int64_t first = 0; first < length; first += kWords) {
    for (int64_t j = 0; j < kPerWord; j++) {
      const float factor = 1.0f / Codes::scale_of(j);
      for (int64_t lane = 0; lane < kLanes; lane++) {
        arranged[first + j * kLanes + lane] = x[first + lane * kPerWord + j] * factor;
      }
    }
  }
}

#if defined(__AVX2__)
// One row of x against int4 codes, in integers: half the instructions of floats, and the sum is
// exact. x is in fixed point: its largest number has all bits of kDigits digits to the base 256, in
// [-128, 127], but the first and the sign. Codes count from -8: 0 .. 15 times a digit, two such
// products added, are below 2^12 and are summed in 16 bits for kRun vectors of words.
template <class T>
constexpr int kDigitsOf = sizeof(T) == 4 ? 4 : 3;
constexpr int64_t kRun = 4;
// Of a row of x: 32 bits must hold the sums of two digits in one.
constexpr int64_t kLongest = 1 << 16;

typedef int8_t Digits __attribute__((vector_size(kLanes)));

#if defined(__AVX512F__)
using Integers = __m512i;
inline Integers sum_products(Integers codes, Integers digits) {
  return _mm512_maddubs_epi16(codes, digits);
}
inline Integers sum_neighbours(Integers shorts) {
  return _mm512_madd_epi16(shorts, _mm512_set1_epi16(1));
}
inline Integers add16(Integers a, Integers b) { return _mm512_add_epi16(a, b); }
#else
using Integers = __m256i;
inline Integers sum_products(Integers codes, Integers digits) {
  return _mm256_maddubs_epi16(codes, digits);
}
inline Integers sum_neighbours(Integers shorts) {
  return _mm256_madd_epi16(shorts, _mm256_set1_epi16(1));
}
inline Integers add16(Integers a, Integers b) { return _mm256_add_epi16(a, b); }
#endif

typedef int64_t Wide __attribute__((vector_size(4 * kLanes)));  // half as many lanes

template <int... kLane>
inline Wide add_halves(Ints v, std::integer_sequence<int, kLane...>) {
  return __builtin_convertvector(__builtin_shufflevector(v, v, kLane...), Wide) +
         __builtin_convertvector(__builtin_shufflevector(v, v, (kLane + kLanes / 2)...), Wide);
}

// The sum over the lanes of low + 2^16 high.
inline int64_t sum_wide(Ints low, Ints high) {
  constexpr auto kHalf = std::make_integer_sequence<int, kLanes / 2>{};
  const Wide wide = add_halves(low, kHalf) + add_halves(high, kHalf) * 65536;
  int64_t sum = 0;
  for (int lane = 0; lane < kLanes / 2; lane++) sum += wide[lane];
  return sum;
}

// What stands before a row's digits.
struct FixedPoint {
  double unit;
  int64_t sum;  // of the row, in units
};
constexpr int64_t kHeader = 64;  // bytes, so that digits are aligned as vectors are

inline Integers load_digits(const int8_t* p) {
  Integers digits;
  std::memcpy(&digits, p, sizeof digits);
  return digits;
}

template <class T>
struct DigitProduct {
  static constexpr int kDigits = kDigitsOf<T>;
  const QuantLinear& a;
  const int8_t* arranged;

  template <int kColumns>
  void columns(int64_t first, int64_t apart) const {
    const Streams<kColumns> streams(a, first, apart);
    const int8_t* digits = arranged + kHeader;
    Ints sums[kColumns][kDigits] = {};
    Integers run[kColumns][kDigits] = {};
    Bits words[kColumns];
    const auto add = [&](int64_t i) {
      Integers low[kColumns], high[kColumns];
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; c++) {
        const Bits codes = words[c] ^ 0x88888888u;
        low[c] = reinterpret_cast<Integers>(codes & 0x0F0F0F0Fu);
        high[c] = reinterpret_cast<Integers>((codes >> 4) & 0x0F0F0F0Fu);
      }
      const int8_t* x = digits + 2 * kDigits * kBytes * i;
#pragma GCC unroll 4
      for (int d = 0; d < kDigits; d++) {
        const Integers even = load_digits(x + d * kBytes);
        const Integers odd = load_digits(x + (kDigits + d) * kBytes);
#pragma GCC unroll 2
        for (int c = 0; c < kColumns; c++) {
          run[c][d] = add16(run[c][d], sum_products(high[c], even));
          run[c][d] = add16(run[c][d], sum_products(low[c], odd));
        }
      }
    };
    const auto end_run = [&] {
      for (int c = 0; c < kColumns; c++) {
        for (int d = 0; d < kDigits; d++) {
          sums[c][d] += reinterpret_cast<Ints>(sum_neighbours(run[c][d]));
          run[c][d] = Integers{};
        }
      }
    };
    int64_t i = 0;
    for (; i + kRun <= streams.whole(); i += kRun) {
#pragma GCC unroll 1  // four steps at once spill
      for (int64_t step = 0; step < kRun; step++) {
        streams.load(i + step, words);
        add(i + step);
      }
      end_run();
    }
    for (; i < streams.whole(); i++) {
      streams.load(i, words);
      add(i);
    }
    end_run();
    if (streams.has_rest()) {
      streams.load_rest(words);
      add(i);
      end_run();
    }
    FixedPoint row;
    std::memcpy(&row, arranged, sizeof row);
    for (int c = 0; c < kColumns; c++) {
      const Ints low = sums[c][0] + (sums[c][1] << 8);
      const Ints high = kDigits == 3 ? sums[c][2] : sums[c][2] + (sums[c][kDigits - 1] << 8);
      const int64_t total = sum_wide(low, high) - 8 * row.sum;
      store_result<T>(a, 0, first + c * apart, static_cast<float>(total * row.unit));
    }
  }
};

// Lanes kFirst, kFirst + 2, ... of two vectors.
template <int kFirst, int... kLane>
inline Ints every_other(Ints a, Ints b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane + kFirst)...);
}

template <int kDigits>
inline void store_digits(Ints x, int8_t* target) {
  for (int d = 0; d < kDigits; d++) {
    const Ints digit = x << 24 >> 24;
    const Digits bytes = __builtin_convertvector(digit, Digits);
    std::memcpy(target + d * kBytes, &bytes, sizeof bytes);
    x = (x - digit) >> 8;
  }
}

// False where x is not finite, as then it has no largest number, or too long.
template <int kDigits>
bool arrange_digits(const float* x, int64_t length, int8_t* arranged) {
  if (length > kLongest) return false;
  Vec largest_of{}, difference{};
  for (int64_t i = 0; i < length; i += kLanes) {
    const Vec v = load(x + i, Full{});
    largest_of = largest(largest_of, largest(v, -v));
    difference += v - v;
  }
  if (sum_lanes(difference) != 0) return false;
  float bound = 0;
  for (int lane = 0; lane < kLanes; lane++) bound = std::max(bound, largest_of[lane]);
  int exponent;
  std::frexp(bound, &exponent);
  const int shift = 8 * kDigits - 2 - exponent;
  // In two steps, as 2^shift may be no float.
  const float half = std::ldexp(1.0f, shift / 2), rest = std::ldexp(1.0f, shift - shift / 2);

  constexpr auto kSequence = std::make_integer_sequence<int, kLanes>{};
  Ints low{}, high{};
  int8_t* digits = arranged + kHeader;
  for (int64_t i = 0; i < length; i += 2 * kLanes) {
    const Ints a = __builtin_convertvector(load(x + i, Full{}) * half * rest, Ints);
    const Ints b = __builtin_convertvector(load(x + i + kLanes, Full{}) * half * rest, Ints);
    low += (a & 0xFFFF) + (b & 0xFFFF);
    high += (a >> 16) + (b >> 16);
    // A vector of words has kBytes even columns, in the high halves of its bytes, and as many odd.
    int8_t* target = digits + i / (2 * kBytes) * (2 * kDigits * kBytes) + i / 2 % kBytes;
    store_digits<kDigits>(every_other<0>(a, b, kSequence), target);
    store_digits<kDigits>(every_other<1>(a, b, kSequence), target + kDigits * kBytes);
  }
  const FixedPoint row{std::ldexp(1.0, -shift), sum_wide(low, high)};
  std::memcpy(arranged, &row, sizeof row);
  return true;
}
#endif

}  // namespace

FewArranged quant_linear_arrange(const QuantLinear& a, float* arranged) {
  const int64_t length = padded_depth(a.k);
  float* x = thread_scratch(length);
  FewArranged how = FewArranged::kFloats;
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t m = 0; m < a.rows; m++) {
      std::fill_n(x, length, 0.0f);
      for_each_vec(a.k, [&](int64_t i, auto lanes) {
        store(x + i, load(static_cast<const T*>(a.x) + m * a.k + i, lanes), lanes);
      });
#if defined(__AVX2__)
      if (a.rows == 1 && a.format == WeightFormat::kInt4 &&
          arrange_digits<kDigitsOf<T>>(x, length, reinterpret_cast<int8_t*>(arranged))) {
        how = FewArranged::kDigits;
        return;
      }
#endif
      with_codes(a.format, [&](auto codes) {
        arrange_floats<decltype(codes)>(x, length, arranged + m * length);
      });
    }
  });
  return how;
}

void quant_linear_few(const QuantLinear& a, [[maybe_unused]] FewArranged how, const float* arranged,
                      int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
#if defined(__AVX2__)
    if (how == FewArranged::kDigits) {
      in_two_streams(DigitProduct<T>{a, reinterpret_cast<const int8_t*>(arranged)}, begin, end);
      return;
    }
#endif
    with_codes(a.format, [&](auto codes) {
      using Codes = decltype(codes);
      switch (a.rows) {
        case 1: return in_two_streams(FloatProduct<Codes, T, 1>{a, arranged}, begin, end);
        case 2: return in_two_streams(FloatProduct<Codes, T, 2>{a, arranged}, begin, end);
        case 3: return in_two_streams(FloatProduct<Codes, T, 3>{a, arranged}, begin, end);
        case 4: return in_two_streams(FloatProduct<Codes, T, 4>{a, arranged}, begin, end);
      }
    });
  });
}

}  // namespace glmkern::CPU_ISA
