#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace glmkern {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* name = std::getenv("GLMKERN_CPU_ISA");
  if (name == nullptr || *name == '\0') return best;
  for (int i = 0; i < 4; i++) {
    if (std::string(name) != kNames[i]) continue;
    if (i <= static_cast<int>(best)) return static_cast<Isa>(i);
    throw std::runtime_error("GLMKERN_CPU_ISA is " + std::string(name) +
                             ", but this chip runs at most " + isa_name(best));
  }
  throw std::runtime_error("GLMKERN_CPU_ISA is \"" + std::string(name) +
                           "\"; it can be default, avx2, avx512 or avx512_bf16");
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace glmkern
