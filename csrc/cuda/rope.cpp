// rope on NVIDIA GPUs: its registration. The kernel is in cuda/kernels/rope.cu.
#include "cuda/kernels/rope_cuda.h"
#include "cuda/library.h"
#include "ops/rope_binding.h"

namespace glmkern {
namespace {

struct RopeCuda {
  // Positions and slots are preconditions here: the host would wait for the GPU to read them.
  static void check_positions(const int64_t*, int64_t, int64_t) {}
  static void check_slots(const int64_t*, int64_t, int64_t) {}

  static void run(const Rope& a, const Tensor& like) {
    on_device_of(like, [&](void* stream) { cuda::rope(a, stream); });
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cuda, GLMKERN_CUDA_KEY, m) {
  using glmkern::RopeCuda;
  m.impl("rope_fwd", TORCH_BOX(&glmkern::rope_fwd<RopeCuda>));
  m.impl("rope_bwd", TORCH_BOX(&glmkern::rope_bwd<RopeCuda>));
  m.impl("qkv_rope_fwd", TORCH_BOX(&glmkern::qkv_rope_fwd<RopeCuda>));
  m.impl("qkv_rope_cache_fwd", TORCH_BOX(&glmkern::qkv_rope_cache_fwd<RopeCuda>));
  m.impl("qkv_rope_bwd", TORCH_BOX(&glmkern::qkv_rope_bwd<RopeCuda>));
}
