#pragma once

#include <cstdint>

#include "../rope.h"
#include "isa.h"

namespace glmkern {

// Tokens begin <= token < end.
GLMKERN_CPU_KERNEL(void rope(const Rope&, int64_t begin, int64_t end))

}  // namespace glmkern
