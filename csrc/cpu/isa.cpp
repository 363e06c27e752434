#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace glmkern {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

Isa isa_of(const char* name) {
  const Isa best = best_isa();
  for (int i = 0; i < 4; i++) {
    if (std::string(name) != kNames[i]) continue;
    if (i <= static_cast<int>(best)) return static_cast<Isa>(i);
    throw std::runtime_error("GLMKERN_CPU_ISA is " + std::string(name) +
                             ", but this chip runs at most " + isa_name(best));
  }
  throw std::runtime_error("GLMKERN_CPU_ISA is \"" + std::string(name) +
                           "\"; it can be default, avx2, avx512 or avx512_bf16");
}

Isa isa_of_environment() {
  const char* name = std::getenv("GLMKERN_CPU_ISA");
  return name == nullptr || *name == '\0' ? best_isa() : isa_of(name);
}

// Every call of a kernel asks; nothing else follows from its value, so that no order is needed.
std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> isa{isa_of_environment()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

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

Isa cpu_isa() { return chosen_isa().load(std::memory_order_relaxed); }

void set_cpu_isa(const char* name) { chosen_isa().store(isa_of(name), std::memory_order_relaxed); }

}  // namespace glmkern
