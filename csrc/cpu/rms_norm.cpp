// rms_norm on the CPU: how its rows are shared between threads, and its registration.
#include "cpu/column_sums.h"
#include "cpu/kernels/rms_norm_cpu.h"
#include "cpu/parallel.h"
#include "ops/rms_norm_binding.h"

namespace glmkern {
namespace {

struct RmsNormCpu {
  static void forward(const RmsNormForward& a, const Tensor&) {
    const auto kernel = GLMKERN_PICK_KERNEL(rms_norm_fwd);
    for_each_row(a.rows, a.hidden, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }

  static void backward(const RmsNormBackward& a, const Tensor&) {
    const auto kernel = GLMKERN_PICK_KERNEL(rms_norm_bwd);
    if (a.partial == nullptr) {
      for_each_row(a.rows, a.hidden,
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end, nullptr); });
      return;
    }
    const auto sum = GLMKERN_PICK_KERNEL(rms_norm_dweight);
    sum_columns(
        a.rows, a.hidden, a.splits, a.partial,
        [&](int64_t begin, int64_t end, float* piece) { kernel(a, begin, end, piece); },
        [&](int64_t begin, int64_t end) { sum(a, begin, end); });
  }

  static int64_t weight_grad_splits(int64_t rows) { return column_sum_splits(rows); }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::RmsNormCpu;
  m.impl("rms_norm_fwd", TORCH_BOX(&glmkern::rms_norm_fwd<RmsNormCpu>));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&glmkern::add_rms_norm_fwd<RmsNormCpu>));
  m.impl("rms_norm_bwd", TORCH_BOX(&glmkern::rms_norm_bwd<RmsNormCpu>));
}
