// Every cpu/<op>.cpp is compiled once per instruction set, in a namespace of that name. This header
// declares the three versions of a kernel and picks the one that the chip runs.
#pragma once

namespace glmkern {

enum class Isa { kDefault, kAvx2, kAvx512 };

// The best one the chip has, or the one that GLMKERN_CPU_ISA (default, avx2 or avx512) names.
// Throws std::runtime_error where that name is unknown or the chip lacks it.
Isa cpu_isa();
const char* isa_name(Isa isa);

}  // namespace glmkern

#if defined(__x86_64__)
#define GLMKERN_CPU_KERNEL(...)            \
  namespace DEFAULT { __VA_ARGS__; }       \
  namespace AVX2 { __VA_ARGS__; }          \
  namespace AVX512 { __VA_ARGS__; }
#define GLMKERN_PICK_KERNEL(kernel)                                \
  (::glmkern::cpu_isa() == ::glmkern::Isa::kAvx512 ? AVX512::kernel \
   : ::glmkern::cpu_isa() == ::glmkern::Isa::kAvx2 ? AVX2::kernel   \
                                                   : DEFAULT::kernel)
#else
#define GLMKERN_CPU_KERNEL(...) \
  namespace DEFAULT { __VA_ARGS__; }
#define GLMKERN_PICK_KERNEL(kernel) (::glmkern::cpu_isa(), DEFAULT::kernel)
#endif
