// Takes the place of csrc/cuda/library.cpp where the CUDA kernels run on the host: tensors of the
// CPU have no stream.
#include <algorithm>
#include <iterator>

#include "cuda/library.h"

#include "cuda/forced_splits.h"
#include "cuda/kernels/quant_linear/mma.h"
#include "cuda/quant_linear_cuda_run.h"

namespace glmkern {

void on_device_of(const Tensor&, const std::function<void(void* stream)>& f) { f(nullptr); }

}  // namespace glmkern

// The variant's number, or -1 for the one that quant_linear chooses.
extern "C" [[gnu::visibility("default")]] void cuda_on_host_force_quant_linear(int variant) {
  glmkern::forced_variant.reset();
  if (variant >= 0) glmkern::forced_variant = static_cast<glmkern::Variant>(variant);
}

// Into how many splits sums go, or 0 for as many as the ops see fit.
extern "C" [[gnu::visibility("default")]] void cuda_on_host_force_splits(int splits) {
  glmkern::forced_splits = splits;
}

// How a product of `rows` tokens with weights [n, k] of 4 bits is shared out among blocks: `plan`
// gets the tokens, warps and depth of one, the blocks of tokens and of results, steps and splits.
extern "C" [[gnu::visibility("default")]] void cuda_on_host_plan_mma(int64_t rows, int64_t n,
                                                                     int64_t k, bool backward,
                                                                     int* plan) {
  glmkern::QuantLinear a{};
  a.rows = rows, a.n = n, a.k = k, a.row_bytes = k / 2, a.backward = backward;
  a.format = glmkern::WeightFormat::kInt4;
  const glmkern::cuda::MmaPlan found = glmkern::cuda::plan_mma(a);
  const int numbers[] = {found.tile.tokens,  found.tile.warps,    found.tile.depth,
                         found.token_blocks, found.result_blocks, found.steps,
                         found.splits};
  std::copy(std::begin(numbers), std::end(numbers), plan);
}
