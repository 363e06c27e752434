// Registers the CPU kernels under glmkern_cpu, through libtorch's stable ABI: one binary for every
// Python and every torch from 2.10. Work is split over threads here; no result depends on how.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/rms_norm.h"
#include "rms_norm_binding.h"

namespace glmkern {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kElementsPerTask = 8192;  // below that, waking a thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct RmsNorm {
  static void forward(const RmsNormForward& a, const Tensor&) {
    const auto kernel = GLMKERN_PICK_KERNEL(rms_norm_fwd);
    parallel_for(0, a.rows, ceil_div(kElementsPerTask, a.hidden),
                 [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }

  static void backward(const RmsNormBackward& a, const Tensor&) {
    const auto kernel = GLMKERN_PICK_KERNEL(rms_norm_bwd);
    const int64_t grain = ceil_div(kElementsPerTask, a.hidden);
    if (a.partial == nullptr) {
      parallel_for(0, a.rows, grain,
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end, nullptr); });
      return;
    }
    const int64_t piece = std::max<int64_t>(1, ceil_div(a.rows, a.splits));
    parallel_for(0, a.splits, ceil_div(grain, piece), [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; split++) {
        float* partial = a.partial + split * a.hidden;
        std::fill_n(partial, a.hidden, 0.0f);
        kernel(a, std::min(a.rows, split * piece), std::min(a.rows, (split + 1) * piece), partial);
      }
    });
    const auto sum = GLMKERN_PICK_KERNEL(rms_norm_dweight);
    parallel_for(0, a.hidden, ceil_div(kElementsPerTask, a.splits),
                 [&](int64_t begin, int64_t end) { sum(a, begin, end); });
  }

  // Short pieces round less, and 16 rows are enough to make a piece's sum cheap beside its rows.
  static int64_t weight_grad_splits(int64_t rows) {
    return std::clamp<int64_t>(ceil_div(rows, 16), 1, 512);
  }
};

// Which version of the kernels runs: default, avx2 or avx512.
std::string isa() { return isa_name(cpu_isa()); }

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&glmkern::isa));
}

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::RmsNorm;
  m.impl("rms_norm_fwd", TORCH_BOX(&glmkern::rms_norm_fwd<RmsNorm>));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&glmkern::add_rms_norm_fwd<RmsNorm>));
  m.impl("rms_norm_bwd", TORCH_BOX(&glmkern::rms_norm_bwd<RmsNorm>));
}
