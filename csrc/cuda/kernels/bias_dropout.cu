// bias_dropout_add on NVIDIA GPUs from sm_75. Memory bounds it: each element is read and written
// once, 16 bytes at a time, and the factors of dropout are drawn in registers meanwhile.
//
// Without dropout a thread has one vector (flat.cuh). The draws leave little time beside a fast
// memory, so that with dropout a thread keeps its columns for several rows (row_tiles.cuh):
// Philox's keys, the bias and the place in the batch are found once. dbias is summed on the way.
//
// An element's index counts from the start of its sequence. Rows that allow 16 bytes at a time are
// whole counters of Philox:
//
//     hidden 8       row 0         row 1              hidden 6     row 0         row 1
//     element        0 ..... 7     8 ..... 15         element      0 ..... 5     6 ..... 11
//     counter        0000 1111     2222 3333          counter      0000 11       11 2222
//
// All others take the same kernels with single elements. There a row may start amid a counter, and
// an element draws the whole counter that it belongs to.
#include "cuda/kernels/bias_dropout_cuda.h"

#include <algorithm>

#include "cuda/device/column_sums.cuh"
#include "cuda/device/flat.cuh"
#include "cuda/device/philox.cuh"
#include "cuda/device/row_tiles.cuh"
#include "cuda/device/sequences.cuh"
#include "cuda/device/vec.cuh"

namespace glmkern::cuda {
namespace {

// y = x + bias + residual
template <class T, int kWidth, bool kBias>
__global__ void __launch_bounds__(kFlatThreads) bias_add_kernel(BiasDropoutForward a) {
  using V = Vec<T, kWidth>;
  const int64_t i = flat_element<kWidth>();
  if (i >= a.rows * a.hidden) return;
  const V x = load_once<kWidth>(static_cast<const T*>(a.x) + i);
  const V residual = load_once<kWidth>(static_cast<const T*>(a.residual) + i);
  V bias, y;
  if constexpr (kBias) bias = load<kWidth>(static_cast<const T*>(a.bias) + i % a.hidden);
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    float value = to_float(x.element[k]);
    if constexpr (kBias) value += to_float(bias.element[k]);
    y.element[k] = from_float<T>(value + to_float(residual.element[k]));
  }
  store(static_cast<T*>(a.y) + i, y);
}

// Draws the factors of one row after another, in ascending order.
class RowFactors {
 public:
  __device__ RowFactors(const DropoutRows& rows, const Dropout& dropout, int64_t hidden,
                        int64_t first_row)
      : philox_(rows.seed),
        sequence_(rows.sequences, first_row),
        dropout_(dropout),
        hidden_(hidden) {}

  template <int kWidth>
  __device__ void draw(int64_t row, int64_t column, float (&factors)[kWidth]) {
    sequence_.move_to(row);
    const int64_t i = (row - sequence_.begin) * hidden_ + column;
    draw_factors(philox_, dropout_, sequence_.id, i, factors);
  }

 private:
  Philox philox_;
  SequenceCursor sequence_;
  const Dropout& dropout_;
  int64_t hidden_;
};

template <class T, int kWidth, bool kBias>
__global__ void __launch_bounds__(kTileThreads)
    dropout_forward_kernel(BiasDropoutForward a, Dropout dropout, int64_t piece, unsigned tiles) {
  using V = Vec<T, kWidth>;
  const RowTile mine(a.rows, piece, tiles);
  const int64_t column = column_of<kWidth>(mine.tile);
  if (column >= a.hidden || mine.begin >= mine.end) return;
  V bias;
  if constexpr (kBias) bias = load<kWidth>(static_cast<const T*>(a.bias) + column);
  RowFactors row_factors(a.dropout, dropout, a.hidden, mine.begin);
  for_each_row(mine.begin, mine.end, [&](int64_t row) {
    const int64_t i = row * a.hidden + column;
    const V x = load_once<kWidth>(static_cast<const T*>(a.x) + i);
    const V residual = load_once<kWidth>(static_cast<const T*>(a.residual) + i);
    float factors[kWidth];
    row_factors.draw(row, column, factors);
    V y;
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      float value = to_float(x.element[k]);
      if constexpr (kBias) value += to_float(bias.element[k]);
      y.element[k] = from_float<T>(value * factors[k] + to_float(residual.element[k]));
    }
    store(static_cast<T*>(a.y) + i, y);
  });
}

template <class T, int kWidth, bool kBiasGrad>
__global__ void __launch_bounds__(kTileThreads)
    dropout_backward_kernel(BiasDropoutBackward a, Dropout dropout, int64_t piece, unsigned tiles) {
  using V = Vec<T, kWidth>;
  const RowTile mine(a.rows, piece, tiles);
  const int64_t column = column_of<kWidth>(mine.tile);
  RowFactors row_factors(a.dropout, dropout, a.hidden, mine.begin);
  // dx = factor * dy, and its sum without the rounding
  const auto backward = [&](int64_t row, float (&sum)[kWidth]) {
    const int64_t i = row * a.hidden + column;
    const V dy = load_once<kWidth>(static_cast<const T*>(a.dy) + i);
    float factors[kWidth];
    row_factors.draw(row, column, factors);
    V dx;
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      const float gradient = to_float(dy.element[k]) * factors[k];
      sum[k] += gradient;
      dx.element[k] = from_float<T>(gradient);
    }
    store(static_cast<T*>(a.dx) + i, dx);
  };
  if constexpr (kBiasGrad) {
    float* partial = a.partial + mine.split * a.hidden;
    sum_columns<kWidth>(mine.tile, a.hidden, mine.begin, mine.end, backward,
                        [&](int64_t c, float sum) { partial[c] = sum; });
  } else if (column < a.hidden) {
    float unused[kWidth] = {};
    for_each_row(mine.begin, mine.end, [&](int64_t row) { backward(row, unused); });
  }
}

template <int kWidth, class Arguments>
void launch_dropout(const char* name, void (*kernel)(Arguments, Dropout, int64_t, unsigned),
                    const Arguments& a, int64_t splits, void* stream) {
  if (a.dropout.sequences.count == 0) {
    throw std::runtime_error(std::string(name) + ": dropout needs at least one sequence");
  }
  const int64_t tiles = tiles_of_row<kWidth>(a.hidden);
  launch(name, kernel, splits * tiles, kTileThreads, stream, a, Dropout(a.dropout.p),
         ceil_div(a.rows, splits), static_cast<unsigned>(tiles));
}

template <class T, bool kBias>
void forward(const BiasDropoutForward& a, void* stream) {
  with_width<T>(a.hidden, {a.x, a.bias, a.residual, a.y}, [&](auto w) {
    constexpr int kWidth = decltype(w)::value;
    const char* name = "bias_dropout_add_fwd";
    if (a.dropout.p == 0) {
      launch_flat<kWidth>(name, bias_add_kernel<T, kWidth, kBias>, a.rows * a.hidden, stream, a);
    } else {
      launch_dropout<kWidth>(name, dropout_forward_kernel<T, kWidth, kBias>, a,
                             bias_dropout_splits(a.rows), stream);
    }
  });
}

template <class T, bool kBiasGrad>
void backward(const BiasDropoutBackward& a, void* stream) {
  with_width<T>(a.hidden, {a.dy, a.dx}, [&](auto w) {
    constexpr int kWidth = decltype(w)::value;
    launch_dropout<kWidth>("bias_dropout_add_bwd", dropout_backward_kernel<T, kWidth, kBiasGrad>, a,
                           kBiasGrad ? a.splits : bias_dropout_splits(a.rows), stream);
  });
  if constexpr (kBiasGrad) {
    launch_split_sums<T>("bias_dropout_add_dbias", a.partial, a.splits, a.hidden, a.dbias, stream);
  }
}

}  // namespace

// Two rows a warp, up to as many blocks as fill every chip; beyond that four, for which what a
// thread finds once pays more.
int64_t bias_dropout_splits(int64_t rows) {
  const int64_t splits = std::max(std::min<int64_t>(ceil_div(rows, 2 * kGroups), 64),
                                  std::min<int64_t>(ceil_div(rows, 4 * kGroups), 512));
  return std::max<int64_t>(splits, 1);
}

void bias_dropout_add_fwd(const BiasDropoutForward& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    a.bias != nullptr ? forward<T, true>(a, stream) : forward<T, false>(a, stream);
  });
}

void bias_dropout_add_bwd(const BiasDropoutBackward& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    a.dbias != nullptr ? backward<T, true>(a, stream) : backward<T, false>(a, stream);
  });
}

}  // namespace glmkern::cuda
