// quant_linear on the tensor cores of sm_80 and newer chips. mma_forward.cuh and mma_backward.cuh
// explain the kernels.
#include "cuda/kernels/quant_linear/mma_launch.cuh"

namespace glmkern::cuda {

void mma_sm80(const QuantLinear& a, const MmaPlan& plan, float* partial, void* stream) {
  a.dtype == DType::kHalf ? launch_plan<Sm80, __half>(a, plan, partial, stream)
                          : launch_plan<Sm80, __nv_bfloat16>(a, plan, partial, stream);
}

}  // namespace glmkern::cuda
