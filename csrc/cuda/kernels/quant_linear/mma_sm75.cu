// quant_linear on Turing's tensor cores. mma_forward.cuh and mma_backward.cuh explain the kernels.
#include "cuda/kernels/quant_linear/mma_launch.cuh"

namespace glmkern::cuda {

void mma_sm75(const QuantLinear& a, const MmaPlan& plan, float* partial, void* stream) {
  launch_plan<Sm75, __half>(a, plan, partial, stream);
}

}  // namespace glmkern::cuda
