// The inner loop of every matrix product here: a tile of results that stays in registers.
//
//   c [rows, vecs * kLanes] (+)= a [rows, depth] b [depth, vecs * kLanes]
//
// Every step of the depth loads kTileVecs vectors of b, spreads kTileRows numbers of a and makes
// their products; 14 x 2 of 32 AVX-512 registers, or 6 x 2 of 16, hold the sums. b should lie in
// the L1 cache; a may have any strides, so that an operand is used where it lies, transposed or
// not. What c holds is added at the end: sums of short runs round less than one long sum.
//
// An element of a and b is kTerms terms of the sum: a float, or two bfloat16 side by side.
#pragma once

#include <array>
#include <utility>

#include "cpu/kernels/vec.h"
#include "ops/ceil_div.h"

namespace glmkern::CPU_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * kLanes;

// Element (i, p) of a matrix is data[i * row + p * depth].
struct Operand {
  const float* data;
  int64_t row, depth;
};

#if defined(__AVX512BF16__)
constexpr int kMostTerms = 2;
#else
constexpr int kMostTerms = 1;
#endif

template <int kTerms>
inline Vec add_product(Vec sum, Vec left, Vec right) {
#if defined(__AVX512BF16__)
  if constexpr (kTerms == 2) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left),
                            reinterpret_cast<__m512bh>(right));
  }
#endif
  return sum + left * right;
}

template <int kRows, int kVecs, int kTerms>
void multiply_tile(Operand a, const float* b, int64_t b_stride, int64_t depth, float* c,
                   int64_t c_stride, bool add) {
  Vec sums[kRows][kVecs] = {};
  // Twice a turn: a short loop's speed would depend on where in the file the linker puts it.
#pragma GCC unroll 2
  for (int64_t p = 0; p < depth; p++) {
    Vec right[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; j++) right[j] = load(b + p * b_stride + j * kLanes, Full{});
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      const Vec left = broadcast(a.data[i * a.row + p * a.depth]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; j++) {
        sums[i][j] = add_product<kTerms>(sums[i][j], left, right[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; j++) {
      float* target = c + i * c_stride + j * kLanes;
      store(target, add ? load(target, Full{}) + sums[i][j] : sums[i][j], Full{});
    }
  }
}

using MultiplyTile = decltype(&multiply_tile<1, 1, 1>);

template <int kVecs, int kTerms, int... kRows>
constexpr std::array<MultiplyTile, sizeof...(kRows)> tiles(std::integer_sequence<int, kRows...>) {
  return {multiply_tile<kRows + 1, kVecs, kTerms>...};
}

// The tile for 1 <= rows <= kTileRows.
template <int kVecs, int kTerms = 1>
inline MultiplyTile tile_of(int64_t rows) {
  static constexpr auto kTiles = tiles<kVecs, kTerms>(std::make_integer_sequence<int, kTileRows>{});
  return kTiles[rows - 1];
}

// Rows in strips of at most kTileRows, of equal height give or take one: no tile computes nothing.
struct Strips {
  int64_t rows, count;
  explicit Strips(int64_t rows) : rows(rows), count(ceil_div(rows, kTileRows)) {}
  int64_t begin(int64_t strip) const { return strip * rows / count; }
  int64_t height(int64_t strip) const { return begin(strip + 1) - begin(strip); }
};

// The product for any number of rows.
template <int kVecs>
inline void multiply(int64_t rows, Operand a, const float* b, int64_t b_stride, int64_t depth,
                     float* c, int64_t c_stride, bool add) {
  const Strips strips(rows);
  for (int64_t s = 0; s < strips.count; s++) {
    const int64_t begin = strips.begin(s);
    const Operand strip{a.data + begin * a.row, a.row, a.depth};
    tile_of<kVecs>(strips.height(s))(strip, b, b_stride, depth, c + begin * c_stride, c_stride,
                                     add);
  }
}

}  // namespace
}  // namespace glmkern::CPU_ISA
