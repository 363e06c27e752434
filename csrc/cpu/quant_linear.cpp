// quant_linear on the CPU: how its blocks are shared between threads, and its registration.
#include "cpu/quant_linear_run.h"

#include "cpu/kernels/quant_linear_cpu.h"
#include "cpu/parallel.h"
#include "cpu/swiglu_run.h"
#include "ops/quant_linear_binding.h"
#include "ops/swiglu_binding.h"

namespace glmkern {
namespace {

void few_rows(const QuantLinear& a, const Tensor& like) {
  const Tensor arranged = torch::stable::new_empty(like, {arranged_size(a)}, ScalarType::Float);
  float* memory = floats_of(arranged);
  const FewArranged how = GLMKERN_PICK_KERNEL(quant_linear_arrange)(a, memory);
  const auto product = GLMKERN_PICK_KERNEL(quant_linear_few);
  for_each_row(a.n, a.k, [&](int64_t begin, int64_t end) { product(a, how, memory, begin, end); });
}

void many_rows(const QuantLinear& a, const Tensor& like) {
  const int64_t row_blocks = ceil_div(a.rows, kMostRows);
  const int64_t depth_blocks = ceil_div(a.depth(), kDepthBlock);
  const Tensor packed =
      torch::stable::new_empty(like, {ceil_div(a.rows, row_blocks), a.depth()}, ScalarType::Float);
  float* memory = floats_of(packed);
  const auto pack = GLMKERN_PICK_BF16_KERNEL(quant_linear_pack);
  const auto product = GLMKERN_PICK_BF16_KERNEL(quant_linear_block);
  for (int64_t i = 0; i < row_blocks; i++) {
    const int64_t begin = i * a.rows / row_blocks, end = (i + 1) * a.rows / row_blocks;
    for_each_row(depth_blocks, (end - begin) * kDepthBlock, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; block++) pack(a, begin, end, block, memory);
    });
    for_each_task(ceil_div(a.columns(), kColumnBlock),
                  [&](int64_t block) { product(a, begin, end, block, memory); });
  }
}

struct QuantLinearCpu {
  static void run(const QuantLinear& a, const Tensor& like) { quant_linear_run(a, like); }
};

Tensor quant_linear_swiglu_fwd(const Tensor& x, const Tensor& packed,
                               const std::optional<Tensor>& scale, int64_t bits,
                               const std::optional<Tensor>& bias) {
  return swiglu_fwd<SwigluCpu>(quant_linear_fwd<QuantLinearCpu>(x, packed, scale, bits, bias));
}

}  // namespace

void quant_linear_run(const QuantLinear& a, const Tensor& like) {
  if (a.rows == 0) return;
  const bool few = !a.backward && a.rows <= kFewRows;
  (few ? few_rows : many_rows)(a, like);
}

}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::QuantLinearCpu;
  m.impl("quant_linear_fwd", TORCH_BOX(&glmkern::quant_linear_fwd<QuantLinearCpu>));
  m.impl("quant_linear_swiglu_fwd", TORCH_BOX(&glmkern::quant_linear_swiglu_fwd));
  m.impl("quant_linear_bwd", TORCH_BOX(&glmkern::quant_linear_bwd<QuantLinearCpu>));
}
