// Sums over rows, the gradients of a weight or a bias: in pieces of rows, then over the pieces. The
// number of pieces depends on the rows alone, so the bits do not depend on the threads.
//
//     row     0 1 2 3 4 5 6     3 splits of ceil(7 / 3) rows
//     piece   0 0 0 1 1 1 2     result = piece 0 + piece 1 + piece 2
#pragma once

#include <algorithm>

#include "cpu/parallel.h"

namespace glmkern {

// Short pieces round less, and 16 rows are enough to make a piece's sum cheap beside its rows.
inline int64_t column_sum_splits(int64_t rows) {
  return std::clamp<int64_t>(ceil_div(rows, 16), 1, 512);
}

// add(begin, end, piece) adds rows begin <= row < end to piece [hidden], for every piece of partial
// [splits, hidden]; then finish(begin, end) makes those columns of the result from all pieces.
template <class Add, class Finish>
void sum_columns(int64_t rows, int64_t hidden, int64_t splits, float* partial, Add add,
                 Finish finish) {
  const int64_t length = std::max<int64_t>(1, ceil_div(rows, splits));
  for_each_row(splits, length * hidden, [&](int64_t begin, int64_t end) {
    for (int64_t split = begin; split < end; split++) {
      float* piece = partial + split * hidden;
      std::fill_n(piece, hidden, 0.0f);
      add(std::min(rows, split * length), std::min(rows, (split + 1) * length), piece);
    }
  });
  for_each_row(hidden, splits, finish);
}

}  // namespace glmkern
