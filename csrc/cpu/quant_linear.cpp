// quant_linear on the CPU. Both directions read the one packed weight: a block of it is decoded
// into panels of kTileCols columns, and the tiles of all rows use them from the cache. Forward the
// columns of the result are the weight's rows, so words are transposed on their way; backward they
// are its columns, and lane L of vector j stands for column L * kPerWord + j until the end.
#include "quant_linear.h"

#include <algorithm>

#include "scratch.h"
#include "tile.h"
#include "transpose.h"
#include "weight_codes.h"

namespace glmkern::CPU_ISA {
namespace {

constexpr int kVecs = kColumnBlock / kLanes;       // of a column block
constexpr int kPanels = kColumnBlock / kTileCols;  // of a column block
constexpr int64_t kPanelSize = kDepthBlock * kTileCols;

// Where vector `vec` of the columns lies in row `depth` of the decoded panels.
inline float* in_panels(float* panels, int64_t depth, int vec) {
  return panels + vec / kTileVecs * kPanelSize + depth * kTileCols + vec % kTileVecs * kLanes;
}

// Weight rows column, column + 1, ... as columns; terms first_depth, first_depth + 1, ... of them.
template <class Codes>
void decode_forward(const QuantLinear& a, int64_t first_depth, int64_t depth, int64_t column,
                    float* panels) {
  const int vecs = std::min<int64_t>(kVecs, (a.n - column + kTileCols - 1) / kTileCols * kTileVecs);
  for (int vec = 0; vec < vecs; vec++) {
    const int64_t first_row = column + vec * kLanes;
    for (int64_t d = 0; d < depth; d += kLanes * Codes::kPerWord) {
      const int64_t byte = (first_depth + d) / Codes::kPerWord * 4;
      Bits block[kLanes];
      for (int r = 0; r < kLanes; r++) {
        const int64_t row = std::min(first_row + r, a.n - 1);
        block[r] = load_words(a.weight + row * a.row_bytes + byte, a.row_bytes - byte);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int w = 0; w < kLanes; w++) {
#pragma GCC unroll 8
        for (int j = 0; j < Codes::kPerWord; j++) {
          store(in_panels(panels, d + w * Codes::kPerWord + j, vec), Codes::unpack(block[w], j),
                Full{});
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
      const Bits words = load_words(a.weight + row * a.row_bytes + byte, a.row_bytes - byte);
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
    for_each_vec(columns, [&](int64_t i, auto lanes) {
      store(y + i, load(ordered + i, Full{}), lanes);
    });
  }
}

template <class Codes>
void multiply_block(const QuantLinear& a, int64_t begin, int64_t end, int64_t column,
                    const float* packed) {
  const int64_t rows = end - begin;
  float* panels = thread_scratch(kPanels * kPanelSize + rows * kColumnBlock);
  float* sums = panels + kPanels * kPanelSize;
  const Strips strips(rows);
  const int64_t used = a.backward ? kColumnBlock : std::min(kColumnBlock, a.n - column);
  for (int64_t d = 0; d < a.depth(); d += kDepthBlock) {
    const int64_t depth = std::min(kDepthBlock, a.depth() - d);
    (a.backward ? decode_backward<Codes> : decode_forward<Codes>)(a, d, depth, column, panels);
    for (int64_t panel = 0; panel * kTileCols < used; panel++) {
      for (int64_t s = 0; s < strips.count; s++) {
        const int64_t height = strips.height(s), top = strips.begin(s);
        const Operand x{packed + d * rows + top * depth, 1, height};
        tile_of<kTileVecs>(height)(x, panels + panel * kPanelSize, kTileCols, depth,
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

// Sums of kColumns columns of the result, kRows rows each, in kSums parts.
template <int kColumns, int kRows>
struct FewSums {
  // Enough to hide the latency of additions. The bits must not depend on kColumns: which columns go
  // together is up to the threads.
  static constexpr int kSums = kRows >= 4 ? 1 : 4 / kRows;
  Vec parts[kColumns][kRows][kSums] = {};

  // Adds one vector of words of every column times the rows of x, arranged alike.
  template <class Codes>
  void add(const Bits (&words)[kColumns], const float* x, int64_t length) {
#pragma GCC unroll 8
    for (int j = 0; j < Codes::kPerWord; j++) {
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; n++) {
        const Vec w = Codes::unpack_scaled(words[n], j);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; m++) {
          parts[n][m][j % kSums] += w * load(x + m * length + j * kLanes, Full{});
        }
      }
    }
  }

  float total(int column, int row) const {
    Vec sum = parts[column][row][0];
    for (int i = 1; i < kSums; i++) sum += parts[column][row][i];
    return sum_lanes(sum);
  }
};

// One or a few rows of x: nothing is reused but x itself, so weights go from memory to registers,
// kColumns rows of them at a time. Returns how far it came.
template <class Codes, class T, int kRows, int kColumns>
int64_t stream_columns(const QuantLinear& a, const float* arranged, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = sizeof(Bits);
  constexpr int64_t kAhead = 4096;  // bytes: the hardware stops prefetching at the end of a page
  const int64_t length = padded_depth(a.k), whole = a.row_bytes / kBytes * kBytes;
  const T* bias = static_cast<const T*>(a.bias);
  int64_t first = begin;
  for (; first + kColumns <= end; first += kColumns) {
    const uint8_t* row = a.weight + first * a.row_bytes;
    FewSums<kColumns, kRows> sums;
    Bits words[kColumns];
    const float* x = arranged;
    for (int64_t byte = 0; byte < whole; byte += kBytes, x += Codes::kPerWord * kLanes) {
      for (int n = 0; n < kColumns; n++) {
        prefetch(row + n * a.row_bytes + byte + kAhead);
        words[n] = load_words(row + n * a.row_bytes + byte);
      }
      sums.template add<Codes>(words, x, length);
    }
    if (whole < a.row_bytes) {
      for (int n = 0; n < kColumns; n++) {
        words[n] = load_words(row + n * a.row_bytes + whole, a.row_bytes - whole);
      }
      sums.template add<Codes>(words, x, length);
    }
    for (int n = 0; n < kColumns; n++) {
      for (int m = 0; m < kRows; m++) {
        float y = sums.total(n, m);
        if (a.scale != nullptr) y *= a.scale[first + n];
        if (bias != nullptr) y += load(bias + first + n, Tail{1})[0];
        store(static_cast<T*>(a.y) + m * a.n + first + n, broadcast(y), Tail{1});
      }
    }
  }
  return first;
}

// Where x fills the L1 cache, two rows of weights share what comes of it from the L2 cache; where
// it does not, one stream of weights is faster than two.
template <class Codes, class T, int kRows>
void few_rows(const QuantLinear& a, const float* arranged, int64_t begin, int64_t end) {
  constexpr int64_t kL1Floats = 6144;
  if (kRows * padded_depth(a.k) > kL1Floats) {
    begin = stream_columns<Codes, T, kRows, 2>(a, arranged, begin, end);
  }
  stream_columns<Codes, T, kRows, 1>(a, arranged, begin, end);
}

// strip [depth, height] = x [height, depth], transposed.
template <class T>
void pack_strip(const T* x, int64_t stride, int64_t height, int64_t depth, float* strip) {
  constexpr int kSquares = (kTileRows + kLanes - 1) / kLanes;
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
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t s = 0; s < strips.count; s++) {
      const int64_t height = strips.height(s), top = strips.begin(s);
      const T* x = static_cast<const T*>(a.x) + (begin + top) * a.depth() + first;
      pack_strip(x, a.depth(), height, depth, packed + first * rows + top * depth);
    }
  });
}

void quant_linear_block(const QuantLinear& a, int64_t begin, int64_t end, int64_t block,
                        const float* packed) {
  with_codes(a.format, [&](auto codes) {
    multiply_block<decltype(codes)>(a, begin, end, block * kColumnBlock, packed);
  });
}

void quant_linear_arrange(const QuantLinear& a, float* arranged) {
  const int64_t length = padded_depth(a.k);
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_codes(a.format, [&](auto codes) {
      using Codes = decltype(codes);
      constexpr int64_t kPerWord = Codes::kPerWord, kWords = kLanes * kPerWord;
      float* ordered = thread_scratch(length);
      for (int64_t m = 0; m < a.rows; m++) {
        std::fill_n(ordered, length, 0.0f);
        for_each_vec(a.k, [&](int64_t i, auto lanes) {
          store(ordered + i, load(static_cast<const T*>(a.x) + m * a.k + i, lanes), lanes);
        });
        float* row = arranged + m * length;
        for (int64_t first = 0; first < length; first += kWords) {
          for (int64_t j = 0; j < kPerWord; j++) {
            const float factor = 1.0f / Codes::scale_of(j);
            for (int64_t lane = 0; lane < kLanes; lane++) {
              row[first + j * kLanes + lane] = ordered[first + lane * kPerWord + j] * factor;
            }
          }
        }
      }
    });
  });
}

void quant_linear_few(const QuantLinear& a, const float* arranged, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_codes(a.format, [&](auto codes) {
      using Codes = decltype(codes);
      constexpr decltype(&few_rows<Codes, T, 1>) kernels[kFewRows] = {
          few_rows<Codes, T, 1>, few_rows<Codes, T, 2>, few_rows<Codes, T, 3>,
          few_rows<Codes, T, 4>};
      kernels[a.rows - 1](a, arranged, begin, end);
    });
  });
}

}  // namespace glmkern::CPU_ISA
