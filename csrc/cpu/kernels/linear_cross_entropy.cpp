// The softmax of linear_cross_entropy on the CPU; its products are quant_linear's.
#include "cpu/kernels/linear_cross_entropy_cpu.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/vec.h"

namespace glmkern::CPU_ISA {
namespace {

float largest_of(const float* row, int64_t n) {
  if (n < kLanes) return *std::max_element(row, row + n);
  Vec most = load(row + n - kLanes, Full{});  // the last vector may overlap the one before
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) most = largest(most, load(row + i, Full{}));
  float lanes[kLanes];
  store(lanes, most, Full{});
  return *std::max_element(lanes, lanes + kLanes);
}

}  // namespace

void cross_entropy_rows(const CrossEntropyRows& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    float* row = a.logits + r * a.classes;
    const float most = largest_of(row, a.classes), of_label = row[a.labels[r]];
    float offset = most, below = 0;  // of the logits; the sum of their distances to the largest
    if (a.smoothing > 0) {
      below = sum_over(a.classes, [&](int64_t i, auto lanes) {
        store(row + i, load(row + i, lanes) - most, lanes);
        return load(row + i, lanes);  // zero past a tail
      });
      offset = 0;
    }
    const float sum = sum_over(a.classes, [&](int64_t i, auto lanes) {
      store(row + i, exp(load(row + i, lanes) - offset), lanes);
      return load(row + i, lanes);  // zero past a tail, where the exponential is not
    });
    a.loss[r] =
        (1 - a.smoothing) * (most - of_label) - a.smoothing * (below / a.classes) + std::log(sum);
    if (!a.gradient) continue;
    const float each = a.smoothing / a.classes;
    for_each_vec(a.classes, [&](int64_t i, auto lanes) {
      store(row + i, load(row + i, lanes) * (1.0f / sum) - each, lanes);
    });
    row[a.labels[r]] -= 1 - a.smoothing;
  }
}

void scaled_copy(DType from_type, const void* from, float factor, DType to_type, void* to,
                 int64_t begin, int64_t end) {
  with_dtype(from_type, [&](auto source) {
    with_dtype(to_type, [&](auto target) {
      const auto* in = static_cast<const decltype(source)*>(from) + begin;
      auto* out = static_cast<decltype(target)*>(to) + begin;
      for_each_vec(end - begin, [&](int64_t i, auto lanes) {
        store(out + i, load(in + i, lanes) * factor, lanes);
      });
    });
  });
}

}  // namespace glmkern::CPU_ISA
