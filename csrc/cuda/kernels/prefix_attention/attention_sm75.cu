// prefix_attention on Turing's tensor cores. attend.cuh, query_gradient.cuh and key_gradients.cuh
// explain the kernels.
#include "cuda/kernels/prefix_attention/attention_launch.cuh"

namespace glmkern::cuda {

void attend_sm75(const Attend& a, int64_t blocks, void* stream) {
  launch_attend<Sm75, __half>(a, blocks, stream);
}

void gradients_sm75(const AttentionGradients& a, int64_t blocks, void* stream) {
  launch_gradients<Sm75, __half>(a, blocks, stream);
}

}  // namespace glmkern::cuda
