// linear_cross_entropy on the CPU: a chunk of labelled rows at a time goes through the output
// layer, the softmax and, for the gradient, back. The products are quant_linear's.
#include "cpu/kernels/linear_cross_entropy_cpu.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/quant_linear_run.h"
#include "ops/quant_linear_binding.h"

namespace glmkern {
namespace {

constexpr int64_t kChunkRows = 128;  // enough to hide reading the weight: 33 MB of 65,024 logits

struct LabelledRows {
  std::vector<int64_t> rows, labels;
};

LabelledRows labelled_rows(const Tensor& labels, int64_t ignore_index, int64_t classes) {
  const int64_t* label = static_cast<const int64_t*>(labels.const_data_ptr());
  LabelledRows result;
  for (int64_t row = 0; row < labels.numel(); row++) {
    if (label[row] == ignore_index) continue;
    result.rows.push_back(row);
    result.labels.push_back(label[row]);
  }
  require_value(!result.rows.empty(), "linear_cross_entropy: no row carries a label (all are " +
                                          std::to_string(ignore_index) +
                                          "), so there is no loss; leave such rows out");
  const auto [low, high] = std::minmax_element(result.labels.begin(), result.labels.end());
  require_value(0 <= *low && *high < classes,
                "linear_cross_entropy: labels run from " + std::to_string(*low) + " to " +
                    std::to_string(*high) + ", but the classes are 0 to " +
                    std::to_string(classes - 1));
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

std::tuple<Tensor, Tensor> linear_cross_entropy_fwd(const Tensor& hidden, const Tensor& packed,
                                                    const std::optional<Tensor>& scale,
                                                    int64_t bits, const Tensor& labels,
                                                    const std::optional<Tensor>& token_weight,
                                                    int64_t ignore_index, double label_smoothing,
                                                    bool hidden_grad) {
  const char* op = "linear_cross_entropy_fwd";
  require(hidden.dim() == 2, std::string(op) + ": hidden must be [T, H]");
  const int64_t tokens = hidden.size(0), width = hidden.size(1), classes = packed.size(0);
  require_like(op, "hidden", hidden, hidden, hidden.scalar_type(), tokens * width);
  std::optional<Tensor> scale_as_float;
  QuantLinear product = quant_linear_of(op, hidden, packed, scale, bits, scale_as_float);
  require(product.k == width, std::string(op) + ": hidden must be [T, H] and weight [V, H]");
  product.dtype = DType::kFloat;
  require_like(op, "labels", labels, hidden, ScalarType::Long, tokens);
  if (token_weight.has_value()) {
    require_like(op, "token_weight", *token_weight, hidden, ScalarType::Float, tokens);
  }
  const DType dtype = dtype_of(op, hidden);
  const LabelledRows labelled = labelled_rows(labels, ignore_index, classes);
  const int64_t count = labelled.rows.size(), chunks = ceil_div(count, kChunkRows);
  const int64_t most = ceil_div(count, chunks);
  const auto weight_of = [&](int64_t i) {
    return token_weight.has_value()
               ? static_cast<const float*>(token_weight->const_data_ptr())[labelled.rows[i]]
               : 1.0f / count;
  };

  const Tensor rows = new_floats(hidden, most, width), logits = new_floats(hidden, most, classes);
  const Tensor row_loss = new_floats(hidden, 1, most);
  Tensor dhidden = hidden_grad
                       ? torch::stable::new_zeros(hidden, {tokens, width}, ScalarType::Float)
                       : new_floats(hidden, 0, 0);
  if (!hidden_grad) dhidden = torch::stable::view(dhidden, {0});

  double loss = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const int64_t first = chunk * count / chunks;
    product.rows = (chunk + 1) * count / chunks - first;
    copy_rows(product.rows, width, dtype, DType::kFloat, [&](int64_t i) {
      const char* from = static_cast<const char*>(hidden.const_data_ptr());
      return std::tuple(from + labelled.rows[first + i] * width * hidden.element_size(), 1.0f,
                        floats_of(rows) + i * width);
    });
    product.backward = false;
    product.x = floats_of(rows);
    product.y = floats_of(logits);
    quant_linear_run(product, hidden);

    const CrossEntropyRows softmax{classes,
                                   floats_of(logits),
                                   labelled.labels.data() + first,
                                   floats_of(row_loss),
                                   static_cast<float>(label_smoothing),
                                   hidden_grad};
    const auto kernel = GLMKERN_PICK_KERNEL(cross_entropy_rows);
    for_each_row(product.rows, classes,
                 [&](int64_t begin, int64_t end) { kernel(softmax, begin, end); });
    for (int64_t i = 0; i < product.rows; i++) loss += weight_of(first + i) * softmax.loss[i];
    if (!hidden_grad) continue;

    product.backward = true;
    product.x = floats_of(logits);
    product.y = floats_of(rows);
    quant_linear_run(product, hidden);
    copy_rows(product.rows, width, DType::kFloat, DType::kFloat, [&](int64_t i) {
      return std::tuple(floats_of(rows) + i * width, weight_of(first + i),
                        floats_of(dhidden) + labelled.rows[first + i] * width);
    });
  }
  Tensor total = torch::stable::new_empty(hidden, {}, ScalarType::Float);
  *floats_of(total) = static_cast<float>(loss);
  return {total, dhidden};
}

Tensor linear_cross_entropy_bwd(const Tensor& dloss, const Tensor& dhidden, ScalarType dtype) {
  const char* op = "linear_cross_entropy_bwd";
  require_like(op, "dloss", dloss, dhidden, ScalarType::Float, 1);
  require_like(op, "dhidden", dhidden, dhidden, ScalarType::Float, dhidden.numel());
  Tensor result = torch::stable::new_empty(
      dhidden, {dhidden.sizes().data(), static_cast<size_t>(dhidden.dim())}, dtype);
  const float factor = *static_cast<const float*>(dloss.const_data_ptr());
  const DType type = dtype_of(op, result);
  const auto copy = GLMKERN_PICK_KERNEL(scaled_copy);
  for_each_row(dhidden.numel(), 1, [&](int64_t begin, int64_t end) {
    copy(DType::kFloat, dhidden.const_data_ptr(), factor, type, result.mutable_data_ptr(), begin,
         end);
  });
  return result;
}

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&glmkern::linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&glmkern::linear_cross_entropy_bwd));
}
