// The product of quant_linear for other ops' drivers.
#pragma once

#include "ops/binding.h"
#include "ops/quant_linear.h"

namespace glmkern {

// Computes `a` on all threads; working memory is allocated where `like` lies.
void quant_linear_run(const QuantLinear& a, const Tensor& like);

}  // namespace glmkern
