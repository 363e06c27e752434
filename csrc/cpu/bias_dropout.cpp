// bias_dropout_add on the CPU: how its rows are shared between threads, and its registration.
#include "cpu/column_sums.h"
#include "cpu/kernels/bias_dropout_cpu.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"
#include "ops/bias_dropout_binding.h"

namespace glmkern {
namespace {

void require_spans(const DropoutRows& dropout, int64_t rows) {
  Spans("bias_dropout_add", dropout.sequences, rows);
}

struct BiasDropoutCpu {
  static void forward(const BiasDropoutForward& a, const Tensor&) {
    if (a.dropout.p > 0) require_spans(a.dropout, a.rows);
    const auto kernel = GLMKERN_PICK_KERNEL(bias_dropout_add_fwd);
    for_each_row(a.rows, a.hidden, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }

  static void backward(const BiasDropoutBackward& a, const Tensor&) {
    require_spans(a.dropout, a.rows);
    const auto kernel = GLMKERN_PICK_KERNEL(bias_dropout_add_bwd);
    if (a.partial == nullptr) {
      for_each_row(a.rows, a.hidden,
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end, nullptr); });
      return;
    }
    const auto sum = GLMKERN_PICK_KERNEL(bias_dropout_add_dbias);
    sum_columns(
        a.rows, a.hidden, a.splits, a.partial,
        [&](int64_t begin, int64_t end, float* piece) { kernel(a, begin, end, piece); },
        [&](int64_t begin, int64_t end) { sum(a, begin, end); });
  }

  static int64_t bias_grad_splits(int64_t rows) { return column_sum_splits(rows); }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::BiasDropoutCpu;
  m.impl("bias_dropout_add_fwd", TORCH_BOX(&glmkern::bias_dropout_add_fwd<BiasDropoutCpu>));
  m.impl("bias_dropout_add_bwd", TORCH_BOX(&glmkern::bias_dropout_add_bwd<BiasDropoutCpu>));
}
