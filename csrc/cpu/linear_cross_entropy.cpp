// linear_cross_entropy on the CPU: a chunk of labelled rows at a time goes through the output
// layer, the softmax and, for the gradient, back. The products are quant_linear's.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels/linear_cross_entropy_cpu.h"
#include "cpu/parallel.h"
#include "cpu/quant_linear_run.h"
#include "ops/ceil_div.h"
#include "ops/linear_cross_entropy_binding.h"

namespace glmkern {
namespace {

constexpr int64_t kChunkRows = 128;  // enough to hide reading the weight: 33 MB of 65,024 logits

struct LabelledRows {
  std::vector<int64_t> rows, labels;
};

LabelledRows labelled_rows(const LinearCrossEntropyForward& a) {
  LabelledRows result;
  for (int64_t row = 0; row < a.tokens; row++) {
    if (a.labels[row] == a.ignore_index) continue;
    result.rows.push_back(row);
    result.labels.push_back(a.labels[row]);
  }
  const std::string ignored =
      a.ignore_index ? " (all are " + std::to_string(*a.ignore_index) + ")" : "";
  require_value(!result.rows.empty(), "linear_cross_entropy: no row carries a label" + ignored +
                                          ", so there is no loss; leave such rows out");
  const auto [low, high] = std::minmax_element(result.labels.begin(), result.labels.end());
  require_value(0 <= *low && *high < a.classes,
                "linear_cross_entropy: labels run from " + std::to_string(*low) + " to " +
                    std::to_string(*high) + ", but the classes are 0 to " +
                    std::to_string(a.classes - 1));
  return result;
}

Tensor new_floats(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

// from [hidden] to to [hidden] for every pair of rows that `pair(i)` names.
template <class Pair>
void copy_rows(int64_t count, int64_t hidden, DType from_type, DType to_type, Pair pair) {
  const auto copy = GLMKERN_PICK_KERNEL(scaled_copy);
  for_each_row(count, hidden, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const auto [from, factor, to] = pair(i);
      copy(from_type, from, factor, to_type, to, 0, hidden);
    }
  });
}

struct LinearCrossEntropyCpu {
  static void forward(const LinearCrossEntropyForward& a, const Tensor& like) {
    const LabelledRows labelled = labelled_rows(a);
    const int64_t count = labelled.rows.size(), chunks = ceil_div(count, kChunkRows);
    const int64_t most = ceil_div(count, chunks), width = a.hidden_size;
    const auto weight_of = [&](int64_t i) {
      return a.token_weight != nullptr ? a.token_weight[labelled.rows[i]] : 1.0f / count;
    };
    const Tensor rows = new_floats(like, most, width), logits = new_floats(like, most, a.classes);
    const Tensor row_loss = new_floats(like, 1, most);
    QuantLinear product = a.weight;
    product.dtype = DType::kFloat;

    double loss = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t first = chunk * count / chunks;
      product.rows = (chunk + 1) * count / chunks - first;
      copy_rows(product.rows, width, a.dtype, DType::kFloat, [&](int64_t i) {
        const char* from = static_cast<const char*>(a.hidden);
        return std::tuple(from + labelled.rows[first + i] * width * bytes_of(a.dtype), 1.0f,
                          floats_of(rows) + i * width);
      });
      product.backward = false;
      product.x = floats_of(rows);
      product.y = floats_of(logits);
      quant_linear_run(product, like);

      const CrossEntropyRows softmax{
          a.classes,           floats_of(logits), labelled.labels.data() + first,
          floats_of(row_loss), a.label_smoothing, a.dhidden != nullptr};
      const auto kernel = GLMKERN_PICK_KERNEL(cross_entropy_rows);
      for_each_row(product.rows, a.classes,
                   [&](int64_t begin, int64_t end) { kernel(softmax, begin, end); });
      for (int64_t i = 0; i < product.rows; i++) loss += weight_of(first + i) * softmax.loss[i];
      if (a.dhidden == nullptr) continue;

      product.backward = true;
      product.x = floats_of(logits);
      product.y = floats_of(rows);
      quant_linear_run(product, like);
      copy_rows(product.rows, width, DType::kFloat, DType::kFloat, [&](int64_t i) {
        return std::tuple(floats_of(rows) + i * width, weight_of(first + i),
                          a.dhidden + labelled.rows[first + i] * width);
      });
    }
    *a.loss = static_cast<float>(loss);
  }

  static void backward(const LinearCrossEntropyBackward& a, const Tensor&) {
    const auto copy = GLMKERN_PICK_KERNEL(scaled_copy);
    for_each_row(a.elements, 1, [&](int64_t begin, int64_t end) {
      copy(DType::kFloat, a.dhidden, *a.dloss, a.dtype, a.result, begin, end);
    });
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::LinearCrossEntropyCpu;
  m.impl("linear_cross_entropy_fwd",
         TORCH_BOX(&glmkern::linear_cross_entropy_fwd<LinearCrossEntropyCpu>));
  m.impl("linear_cross_entropy_bwd",
         TORCH_BOX(&glmkern::linear_cross_entropy_bwd<LinearCrossEntropyCpu>));
}
