// swiglu on the CPU: how its elements are shared between threads, and its registration.
#include <algorithm>

#include "cpu/kernels/swiglu_cpu.h"
#include "cpu/parallel.h"
#include "cpu/swiglu_run.h"
#include "ops/swiglu_binding.h"

namespace glmkern {
namespace {

// f(begin, end) over pieces of whole cache lines, so that no two threads write to the same one.
template <class F>
void share(int64_t elements, F f) {
  constexpr int64_t kLine = 64;
  for_each_row(ceil_div(elements, kLine), kLine, [&](int64_t begin, int64_t end) {
    f(begin * kLine, std::min(elements, end * kLine));
  });
}

}  // namespace

void SwigluCpu::forward(const SwigluForward& a, const Tensor&) {
  const auto kernel = GLMKERN_PICK_KERNEL(swiglu_fwd);
  share(a.rows * a.width, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void SwigluCpu::backward(const SwigluBackward& a, const Tensor&) {
  const auto kernel = GLMKERN_PICK_KERNEL(swiglu_bwd);
  share(a.rows * a.width, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::SwigluCpu;
  m.impl("swiglu_fwd", TORCH_BOX(&glmkern::swiglu_fwd<SwigluCpu>));
  m.impl("swiglu_bwd", TORCH_BOX(&glmkern::swiglu_bwd<SwigluCpu>));
}
