// What _native_cuda.so is beside its ops, which cuda/<op>.cpp registers under glmkern_cuda. All of
// it goes through libtorch's stable ABI.
#include "cuda/library.h"

#include <torch/csrc/stable/accelerator.h>

namespace glmkern {

void on_device_of(const Tensor& tensor, const std::function<void(void* stream)>& f) {
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  f(stream);
}

}  // namespace glmkern
