// Registers the CUDA kernels under glmkern_cuda, through libtorch's stable ABI. They run on the
// tensors' device and on its current stream.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels/rms_norm_cuda.h"
#include "ops/rms_norm_binding.h"

namespace glmkern {
namespace {

// f(stream) with `tensor`'s device current.
template <class F>
void on_device_of(const Tensor& tensor, F f) {
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  f(stream);
}

struct RmsNorm {
  static void forward(const RmsNormForward& a, const Tensor& x) {
    on_device_of(x, [&](void* stream) { cuda::rms_norm_fwd(a, stream); });
  }

  static void backward(const RmsNormBackward& a, const Tensor& x) {
    on_device_of(x, [&](void* stream) { cuda::rms_norm_bwd(a, stream); });
  }

  // A split is a block: eight rows for one keep every chip busy from about a thousand rows.
  static int64_t weight_grad_splits(int64_t rows) {
    return rows <= 8 ? 1 : rows >= 8 * 1024 ? 1024 : (rows + 7) / 8;
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cuda, CUDA, m) {
  using glmkern::RmsNorm;
  m.impl("rms_norm_fwd", TORCH_BOX(&glmkern::rms_norm_fwd<RmsNorm>));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&glmkern::add_rms_norm_fwd<RmsNorm>));
  m.impl("rms_norm_bwd", TORCH_BOX(&glmkern::rms_norm_bwd<RmsNorm>));
}
