// The last step of a sum over rows: cpu/column_sums.h says how the rows were split.
#pragma once

#include "cpu/kernels/vec.h"

namespace glmkern::CPU_ISA {
namespace {

// Columns begin <= column < end of result [hidden] from partial [splits, hidden].
template <class T>
void sum_splits(const float* partial, int64_t splits, int64_t hidden, T* result, int64_t begin,
                int64_t end) {
  for_each_vec(end - begin, [&](int64_t i, auto lanes) {
    Vec sums[4] = {};
    for (int64_t split = 0; split < splits; split++) {
      sums[split % 4] += load(partial + split * hidden + begin + i, lanes);
    }
    store(result + begin + i, (sums[0] + sums[1]) + (sums[2] + sums[3]), lanes);
  });
}

}  // namespace
}  // namespace glmkern::CPU_ISA
