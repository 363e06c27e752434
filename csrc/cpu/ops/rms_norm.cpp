// rms_norm on the CPU: how its rows are shared between threads, and its registration.
#include "../rms_norm.h"

#include <algorithm>

#include "../../rms_norm_binding.h"
#include "../parallel.h"

namespace glmkern {
namespace {

struct RmsNorm {
  static void forward(const RmsNormForward& a, const Tensor&) {
    const auto kernel = GLMKERN_PICK_KERNEL(rms_norm_fwd);
    for_each_row(a.rows, a.hidden,
                 [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }

  static void backward(const RmsNormBackward& a, const Tensor&) {
    const auto kernel = GLMKERN_PICK_KERNEL(rms_norm_bwd);
    if (a.partial == nullptr) {
      for_each_row(a.rows, a.hidden,
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end, nullptr); });
      return;
    }
    const int64_t piece = std::max<int64_t>(1, ceil_div(a.rows, a.splits));
    for_each_row(a.splits, piece * a.hidden, [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; split++) {
        float* partial = a.partial + split * a.hidden;
        std::fill_n(partial, a.hidden, 0.0f);
        kernel(a, std::min(a.rows, split * piece), std::min(a.rows, (split + 1) * piece), partial);
      }
    });
    const auto sum = GLMKERN_PICK_KERNEL(rms_norm_dweight);
    for_each_row(a.hidden, a.splits,
                 [&](int64_t begin, int64_t end) { sum(a, begin, end); });
  }

  // Short pieces round less, and 16 rows are enough to make a piece's sum cheap beside its rows.
  static int64_t weight_grad_splits(int64_t rows) {
    return std::clamp<int64_t>(ceil_div(rows, 16), 1, 512);
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::RmsNorm;
  m.impl("rms_norm_fwd", TORCH_BOX(&glmkern::rms_norm_fwd<RmsNorm>));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&glmkern::add_rms_norm_fwd<RmsNorm>));
  m.impl("rms_norm_bwd", TORCH_BOX(&glmkern::rms_norm_bwd<RmsNorm>));
}
