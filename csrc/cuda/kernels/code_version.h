// Which generation's kernels run.
#pragma once

namespace glmkern::cuda {

// Which code of this library the current device runs: 80 for what was compiled for sm_80.
int code_version();

}  // namespace glmkern::cuda
