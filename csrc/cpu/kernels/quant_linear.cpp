// quant_linear on the CPU. Both directions read the one packed weight: a block of it is decoded
// into panels of kTileCols columns, and the tiles of all rows use them from the cache. Forward the
// columns of the result are the weight's rows, so words are transposed on their way; backward they
// are its columns, and lane L of vector j stands for column L * kPerWord + j until the end.
//
// Where the chip multiplies bfloat16, and x and the weight are such numbers, an element of panels
// and of packed x is two of them (kTerms = 2).
#include "cpu/kernels/quant_linear_cpu.h"

#include <algorithm>

#include "cpu/kernels/tile.h"
#include "cpu/kernels/transpose.h"
#include "cpu/kernels/weight_codes.h"
#include "cpu/scratch.h"

namespace glmkern::CPU_ISA {
namespace {

constexpr int kVecs = kColumnBlock / kLanes;       // of a column block
constexpr int kPanels = kColumnBlock / kTileCols;  // of a column block
constexpr int64_t kPanelSize = kDepthBlock * kTileCols;
// One column block has a cache line or a few of every row, so the hardware prefetches nothing.
constexpr int64_t kRowsAhead = 16;

// How many terms of the sum an element of panels and of packed x holds.
inline int terms_of(const QuantLinear& a) {
  const bool pairs = kMostTerms == 2 && !a.backward && a.dtype == DType::kBFloat16 &&
                     a.format != WeightFormat::kHalf && a.format != WeightFormat::kFloat;
  return pairs && a.k % 2 == 0 ? 2 : 1;
}

// Where vector `vec` of the columns lies in row `depth` of the decoded panels.
inline float* in_panels(float* panels, int64_t depth, int vec) {
  return panels + vec / kTileVecs * kPanelSize + depth * kTileCols + vec % kTileVecs * kLanes;
}

template <class Codes, int kTerms>
inline Vec unpack(Bits words, int j) {
  if constexpr (kTerms == 2) {
    return as_float(Codes::unpack_pair(words, j));
  } else {
    return Codes::unpack(words, j);
  }
}

// Weight rows column, column + 1, ... as columns; terms first_depth, first_depth + 1, ... of them.
template <class Codes, int kTerms>
void decode_forward(const QuantLinear& a, int64_t first_depth, int64_t depth, int64_t column,
                    float* panels) {
  const int vecs = std::min<int64_t>(kVecs, ceil_div(a.n - column, kTileCols) * kTileVecs);
  for (int vec = 0; vec < vecs; vec++) {
    const int64_t first_row = column + vec * kLanes;
    for (int64_t d = 0; d < depth; d += kLanes * Codes::kPerWord) {
      const int64_t byte = (first_depth + d) / Codes::kPerWord * 4;
      Bits block[kLanes];
      for (int r = 0; r < kLanes; r++) {
        const int64_t row = std::min(first_row + r, a.n - 1);
        const uint8_t* p = a.weight + row * a.row_bytes + byte;
        prefetch(p + kDepthBlock / Codes::kPerWord * 4);  // the row's next block
        block[r] = load_words(p, a.row_bytes - byte);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int w = 0; w < kLanes; w++) {
#pragma GCC unroll 8
        for (int j = 0; j < Codes::kPerWord / kTerms; j++) {
          float* target = in_panels(panels, (d + w * Codes::kPerWord) / kTerms + j, vec);
          store(target, unpack<Codes, kTerms>(block[w], j), Full{});
        }
      }
    }
  }
}

template <class Codes>
void decode_backward(const QuantLinear& a, int64_t first_depth, int64_t depth, int64_t column,
                     float* panels) {
  for (int64_t d = 0; d < depth; d++) {
    const int64_t row = first_depth + d;
    const Vec scale = broadcast(a.scale != nullptr ? a.scale[row] : 1.0f);
    for (int v = 0; v < kVecs / Codes::kPerWord; v++) {
      const int64_t byte = column / Codes::kPerWord * 4 + v * kLanes * 4;
      const uint8_t* p = a.weight + row * a.row_bytes + byte;
      prefetch(p + kRowsAhead * a.row_bytes);
      const Bits words = load_words(p, a.row_bytes - byte);
#pragma GCC unroll 8
      for (int j = 0; j < Codes::kPerWord; j++) {
        store(in_panels(panels, d, v * Codes::kPerWord + j), Codes::unpack(words, j) * scale,
              Full{});
      }
    }
  }
}

// sums [panel][rows][kTileCols] to y [rows, columns], rounded once.
template <class T>
void store_forward(const QuantLinear& a, int64_t begin, int64_t end, int64_t column,
                   const float* sums) {
  const int64_t columns = std::min(kColumnBlock, a.n - column);
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t row = begin; row < end; row++) {
    T* y = static_cast<T*>(a.y) + row * a.n + column;
    for_each_vec(columns, [&](int64_t i, auto lanes) {
      const float* tile = sums + (i / kTileCols * (end - begin) + row - begin) * kTileCols;
      Vec v = load(tile + i % kTileCols, Full{});
      if (a.scale != nullptr) v *= load(a.scale + column + i, lanes);
      if (bias != nullptr) v += load(bias + column + i, lanes);
      store(y + i, v, lanes);
    });
  }
}

template <class T, class Codes>
void store_backward(const QuantLinear& a, int64_t begin, int64_t end, int64_t column,
                    const float* sums) {
  constexpr int kPerWord = Codes::kPerWord;
  const int64_t columns = std::min(kColumnBlock, a.k - column);
  for (int64_t row = begin; row < end; row++) {
    float ordered[kColumnBlock];
    for (int vec = 0; vec < kVecs; vec += kPerWord) {
      Vec v[kPerWord];
      for (int j = 0; j < kPerWord; j++) {
        const int64_t panel = (vec + j) / kTileVecs;
        const float* tile = sums + (panel * (end - begin) + row - begin) * kTileCols;
        v[j] = load(tile + (vec + j) % kTileVecs * kLanes, Full{});
      }
      interleave(v);
      for (int j = 0; j < kPerWord; j++) store(ordered + (vec + j) * kLanes, v[j], Full{});
    }
    T* y = static_cast<T*>(a.y) + row * a.k + column;
    for_each_vec(columns,
                 [&](int64_t i, auto lanes) { store(y + i, load(ordered + i, Full{}), lanes); });
  }
}

template <class Codes, int kTerms>
void multiply_block(const QuantLinear& a, int64_t begin, int64_t end, int64_t column,
                    const float* packed) {
  const int64_t rows = end - begin;
  float* panels = thread_scratch(kPanels * kPanelSize + rows * kColumnBlock);
  float* sums = panels + kPanels * kPanelSize;
  const Strips strips(rows);
  const int64_t used = a.backward ? kColumnBlock : std::min(kColumnBlock, a.n - column);
  for (int64_t d = 0; d < a.depth(); d += kDepthBlock) {
    const int64_t depth = std::min(kDepthBlock, a.depth() - d);
    const auto decode = a.backward ? decode_backward<Codes> : decode_forward<Codes, kTerms>;
    decode(a, d, depth, column, panels);
    const int64_t elements = depth / kTerms;
    const float* x_block = packed + d / kTerms * rows;
    for (int64_t panel = 0; panel * kTileCols < used; panel++) {
      for (int64_t s = 0; s < strips.count; s++) {
        const int64_t height = strips.height(s), top = strips.begin(s);
        const Operand x{x_block + top * elements, 1, height};
        const auto multiply = tile_of<kTileVecs, kTerms>(height);
        multiply(x, panels + panel * kPanelSize, kTileCols, elements,
                 sums + (panel * rows + top) * kTileCols, kTileCols, d > 0);
      }
    }
  }
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.backward) {
      store_backward<T, Codes>(a, begin, end, column, sums);
    } else {
      store_forward<T>(a, begin, end, column, sums);
    }
  });
}

// strip [depth, height] = x [height, depth], transposed.
template <class T>
void pack_strip(const T* x, int64_t stride, int64_t height, int64_t depth, float* strip) {
  constexpr int kSquares = ceil_div(kTileRows, kLanes);
  const float* end = strip + depth * height;
  for_each_vec(depth, [&](int64_t d, auto lanes) {
    Vec squares[kSquares][kLanes] = {};
    for (int64_t i = 0; i < height; i++) {
      squares[i / kLanes][i % kLanes] = load(x + i * stride + d, lanes);
    }
    for (auto& square : squares) transpose(square);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, depth - d); i++) {
      for (int64_t top = 0; top < height; top += kLanes) {
        float* target = strip + (d + i) * height + top;
        const Vec v = squares[top / kLanes][i];
        // What a whole vector writes too much, the next one overwrites.
        if (target + kLanes <= end) {
          store(target, v, Full{});
        } else {
          store(target, v, Tail{static_cast<int>(std::min<int64_t>(kLanes, height - top))});
        }
      }
    }
  });
}

}  // namespace

void quant_linear_pack(const QuantLinear& a, int64_t begin, int64_t end, int64_t block,
                       float* packed) {
  const int64_t rows = end - begin, first = block * kDepthBlock;
  const int64_t depth = std::min(kDepthBlock, a.depth() - first);
  const Strips strips(rows);
  const auto pack = [&](auto element, int terms) {
    using T = decltype(element);
    for (int64_t s = 0; s < strips.count; s++) {
      const int64_t height = strips.height(s), top = strips.begin(s);
      const T* x = static_cast<const T*>(a.x) + ((begin + top) * a.depth() + first) / terms;
      pack_strip(x, a.depth() / terms, height, depth / terms,
                 packed + (first * rows + top * depth) / terms);
    }
  };
  if (terms_of(a) == 2) {
    pack(float{}, 2);  // two numbers are moved as one: nothing is done to them
  } else {
    with_dtype(a.dtype, [&](auto element) { pack(element, 1); });
  }
}

void quant_linear_block(const QuantLinear& a, int64_t begin, int64_t end, int64_t block,
                        const float* packed) {
  with_codes(a.format, [&](auto codes) {
    using Codes = decltype(codes);
    if constexpr (kMostTerms == 2 && Codes::kIsBFloat16) {
      if (terms_of(a) == 2) {
        return multiply_block<Codes, 2>(a, begin, end, block * kColumnBlock, packed);
      }
    }
    multiply_block<Codes, 1>(a, begin, end, block * kColumnBlock, packed);
  });
}

}  // namespace glmkern::CPU_ISA
