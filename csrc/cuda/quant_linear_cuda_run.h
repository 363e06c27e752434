// The product of quant_linear for other ops' drivers.
#pragma once

#include <optional>

#include "ops/binding.h"
#include "ops/quant_linear.h"

namespace glmkern {

enum class Variant {
  kGemv,  // up to eight rows of x in float32: codes are decoded in registers
  kMma,   // tensor cores: codes are decoded on their way there
  kSlab,  // torch's product, over a weight that is dequantised a slab at a time
};

// The variant for `a`; quant_linear.cpp says why.
Variant choose(const QuantLinear& a);

// Taken instead of what `choose` says, for tests.
inline std::optional<Variant> forced_variant;

// Computes `a` on the device of `like`, where working memory is allocated too.
void quant_linear_run(const QuantLinear& a, const Tensor& like);

}  // namespace glmkern
