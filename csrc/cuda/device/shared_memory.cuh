// The shared memory whose size the launch decides.
#pragma once

#include <cuda_runtime.h>

namespace glmkern::cuda {

extern __shared__ uint4 dynamic_shared_memory[];

}  // namespace glmkern::cuda
