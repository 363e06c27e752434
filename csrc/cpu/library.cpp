// What _native.so is, for Python; cpu/<op>.cpp registers the ops. All of it goes through libtorch's
// stable ABI: one binary for every Python and every torch from 2.10.
#include <string>

#include "cpu/isa.h"
#include "ops/binding.h"

namespace glmkern {
namespace {

// Whose kernels run: default, avx2, avx512 or avx512_bf16.
std::string isa() { return isa_name(cpu_isa()); }

// Those that this chip runs, the best last, with a space between two.
std::string isas() {
  std::string names = isa_name(Isa::kDefault);
  for (int i = 1; i <= static_cast<int>(best_isa()); i++) {
    names += std::string(" ") + isa_name(static_cast<Isa>(i));
  }
  return names;
}

// For the rest of the process.
void set_isa(std::string name) { set_cpu_isa(name.c_str()); }

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&glmkern::isa));
  m.impl("isas", TORCH_BOX(&glmkern::isas));
  m.impl("set_isa", TORCH_BOX(&glmkern::set_isa));
}
