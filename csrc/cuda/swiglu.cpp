// swiglu on NVIDIA GPUs: its registration. The kernels are in cuda/kernels/swiglu.cu.
#include "cuda/kernels/swiglu_cuda.h"
#include "cuda/library.h"
#include "cuda/swiglu_cuda_run.h"
#include "ops/swiglu_binding.h"

namespace glmkern {

void SwigluCuda::forward(const SwigluForward& a, const Tensor& like) {
  on_device_of(like, [&](void* stream) { cuda::swiglu_fwd(a, stream); });
}

void SwigluCuda::backward(const SwigluBackward& a, const Tensor& like) {
  on_device_of(like, [&](void* stream) { cuda::swiglu_bwd(a, stream); });
}

}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cuda, GLMKERN_CUDA_KEY, m) {
  using glmkern::SwigluCuda;
  m.impl("swiglu_fwd", TORCH_BOX(&glmkern::swiglu_fwd<SwigluCuda>));
  m.impl("swiglu_bwd", TORCH_BOX(&glmkern::swiglu_bwd<SwigluCuda>));
}
