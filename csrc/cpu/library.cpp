// What _native.so is, for Python; cpu/ops/<op>.cpp registers the ops. All of it goes through
// libtorch's stable ABI: one binary for every Python and every torch from 2.10.
#include "cpu/isa.h"
#include "ops/binding.h"

namespace glmkern {
namespace {

// Which version of the kernels runs: default, avx2 or avx512.
std::string isa() { return isa_name(cpu_isa()); }

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&glmkern::isa));
}
