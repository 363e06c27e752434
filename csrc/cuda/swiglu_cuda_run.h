// swiglu for other ops' drivers.
#pragma once

#include "ops/binding.h"
#include "ops/swiglu.h"

namespace glmkern {

// The Device of ops/swiglu_binding.h: runs on `like`'s device.
struct SwigluCuda {
  static void forward(const SwigluForward& a, const Tensor& like);
  static void backward(const SwigluBackward& a, const Tensor& like);
};

}  // namespace glmkern
