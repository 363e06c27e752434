// prefix_attention on the tensor cores of sm_80 and newer chips. attend.cuh, query_gradient.cuh
// and key_gradients.cuh explain the kernels.
#include "cuda/kernels/prefix_attention/attention_launch.cuh"

namespace glmkern::cuda {

void attend_sm80(const Attend& a, int64_t blocks, void* stream) {
  a.shape.dtype == DType::kHalf ? launch_attend<Sm80, __half>(a, blocks, stream)
                                : launch_attend<Sm80, __nv_bfloat16>(a, blocks, stream);
}

void gradients_sm80(const AttentionGradients& a, int64_t blocks, void* stream) {
  a.shape.dtype == DType::kHalf ? launch_gradients<Sm80, __half>(a, blocks, stream)
                                : launch_gradients<Sm80, __nv_bfloat16>(a, blocks, stream);
}

}  // namespace glmkern::cuda
