// Every cpu/kernels/<op>.cpp is compiled once per instruction set, in a namespace of that name.
// This header declares the versions of a kernel and picks the one that the chip runs.
#pragma once

namespace glmkern {

// kAvx512Bf16 is kAvx512 with products of bfloat16. Kernels without such products run as kAvx512.
enum class Isa { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

// The best one that this chip has. Each is a superset of the ones before it.
Isa best_isa();

// The one whose kernels run: best_isa(), or what GLMKERN_CPU_ISA (default, avx2, avx512,
// avx512_bf16) or set_cpu_isa names.
// Throws std::runtime_error where that name is unknown or the chip lacks it.
Isa cpu_isa();
void set_cpu_isa(const char* name);
const char* isa_name(Isa isa);

}  // namespace glmkern

// clang-format off
#if defined(__x86_64__)
#define GLMKERN_CPU_KERNEL(...)            \
  namespace DEFAULT { __VA_ARGS__; }       \
  namespace AVX2 { __VA_ARGS__; }          \
  namespace AVX512 { __VA_ARGS__; }
#define GLMKERN_PICK_KERNEL(kernel)                                \
  (::glmkern::cpu_isa() >= ::glmkern::Isa::kAvx512 ? AVX512::kernel \
   : ::glmkern::cpu_isa() == ::glmkern::Isa::kAvx2 ? AVX2::kernel   \
                                                   : DEFAULT::kernel)
#define GLMKERN_CPU_BF16_KERNEL(...) \
  GLMKERN_CPU_KERNEL(__VA_ARGS__)    \
  namespace AVX512_BF16 { __VA_ARGS__; }
#define GLMKERN_PICK_BF16_KERNEL(kernel)                                    \
  (::glmkern::cpu_isa() == ::glmkern::Isa::kAvx512Bf16 ? AVX512_BF16::kernel \
                                                       : GLMKERN_PICK_KERNEL(kernel))
#else
#define GLMKERN_CPU_KERNEL(...) \
  namespace DEFAULT { __VA_ARGS__; }
#define GLMKERN_PICK_KERNEL(kernel) (::glmkern::cpu_isa(), DEFAULT::kernel)
#define GLMKERN_CPU_BF16_KERNEL GLMKERN_CPU_KERNEL
#define GLMKERN_PICK_BF16_KERNEL GLMKERN_PICK_KERNEL
#endif
// clang-format on
