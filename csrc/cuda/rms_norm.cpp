// rms_norm on NVIDIA GPUs: its registration. The kernels are in cuda/kernels/rms_norm.cu.
#include <algorithm>

#include "cuda/kernels/rms_norm_cuda.h"
#include "cuda/library.h"
#include "ops/ceil_div.h"
#include "ops/rms_norm_binding.h"

namespace glmkern {
namespace {

struct RmsNormCuda {
  static void forward(const RmsNormForward& a, const Tensor& like) {
    on_device_of(like, [&](void* stream) { cuda::rms_norm_fwd(a, stream); });
  }

  static void backward(const RmsNormBackward& a, const Tensor& like) {
    on_device_of(like, [&](void* stream) { cuda::rms_norm_bwd(a, stream); });
  }

  // A split is a block: eight rows for one keep every chip busy from about a thousand rows.
  static int64_t weight_grad_splits(int64_t rows) {
    return std::clamp<int64_t>(ceil_div(rows, 8), 1, 1024);
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cuda, GLMKERN_CUDA_KEY, m) {
  using glmkern::RmsNormCuda;
  m.impl("rms_norm_fwd", TORCH_BOX(&glmkern::rms_norm_fwd<RmsNormCuda>));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&glmkern::add_rms_norm_fwd<RmsNormCuda>));
  m.impl("rms_norm_bwd", TORCH_BOX(&glmkern::rms_norm_bwd<RmsNormCuda>));
}
