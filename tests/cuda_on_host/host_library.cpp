// Takes the place of csrc/cuda/library.cpp where the CUDA kernels run on the host: tensors of the
// CPU have no stream.
#include "cuda/library.h"

#include "cuda/quant_linear_cuda_run.h"

namespace glmkern {

void on_device_of(const Tensor&, const std::function<void(void* stream)>& f) { f(nullptr); }

}  // namespace glmkern

// The variant's number, or -1 for the one that quant_linear chooses.
extern "C" [[gnu::visibility("default")]] void cuda_on_host_force_quant_linear(int variant) {
  glmkern::forced_variant.reset();
  if (variant >= 0) glmkern::forced_variant = static_cast<glmkern::Variant>(variant);
}
