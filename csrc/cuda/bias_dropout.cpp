// bias_dropout_add on NVIDIA GPUs: its registration. The kernels are in
// cuda/kernels/bias_dropout.cu.
#include "cuda/kernels/bias_dropout_cuda.h"
#include "cuda/library.h"
#include "ops/bias_dropout_binding.h"

namespace glmkern {
namespace {

struct BiasDropoutCuda {
  static void forward(const BiasDropoutForward& a, const Tensor& like) {
    on_device_of(like, [&](void* stream) { cuda::bias_dropout_add_fwd(a, stream); });
  }

  static void backward(const BiasDropoutBackward& a, const Tensor& like) {
    on_device_of(like, [&](void* stream) { cuda::bias_dropout_add_bwd(a, stream); });
  }

  static int64_t bias_grad_splits(int64_t rows) { return cuda::bias_dropout_splits(rows); }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cuda, GLMKERN_CUDA_KEY, m) {
  using glmkern::BiasDropoutCuda;
  m.impl("bias_dropout_add_fwd", TORCH_BOX(&glmkern::bias_dropout_add_fwd<BiasDropoutCuda>));
  m.impl("bias_dropout_add_bwd", TORCH_BOX(&glmkern::bias_dropout_add_bwd<BiasDropoutCuda>));
}
