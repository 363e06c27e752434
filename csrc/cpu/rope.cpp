// rope on the CPU: how its tokens are shared between threads, and its registration.
#include <algorithm>

#include "cpu/kernels/rope_cpu.h"
#include "cpu/parallel.h"
#include "ops/rope_binding.h"

namespace glmkern {
namespace {

struct RopeCpu {
  static void check_positions(const int64_t* positions, int64_t tokens, int64_t table) {
    if (tokens == 0) return;
    const auto [low, high] = std::minmax_element(positions, positions + tokens);
    require_value(*low >= 0 && *high < table, "rope: positions run from " + std::to_string(*low) +
                                                  " to " + std::to_string(*high) +
                                                  ", but the table holds positions 0 to " +
                                                  std::to_string(table - 1));
  }

  static void check_slots(const int64_t* slots, int64_t tokens, int64_t entries) {
    if (tokens == 0) return;
    const auto [low, high] = std::minmax_element(slots, slots + tokens);
    require_value(*low >= 0 && *high < entries,
                  "rope: slots run from " + std::to_string(*low) + " to " + std::to_string(*high) +
                      ", but the cache has 0 to " + std::to_string(entries - 1));
  }

  static void run(const Rope& a, const Tensor&) {
    const auto kernel = GLMKERN_PICK_KERNEL(rope);
    int64_t heads = 0;
    for (int group = 0; group < a.groups; group++) heads += a.heads[group].count;
    for_each_row(a.tokens, heads * a.channels,
                 [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::RopeCpu;
  m.impl("rope_fwd", TORCH_BOX(&glmkern::rope_fwd<RopeCpu>));
  m.impl("rope_bwd", TORCH_BOX(&glmkern::rope_bwd<RopeCpu>));
  m.impl("qkv_rope_fwd", TORCH_BOX(&glmkern::qkv_rope_fwd<RopeCpu>));
  m.impl("qkv_rope_cache_fwd", TORCH_BOX(&glmkern::qkv_rope_cache_fwd<RopeCpu>));
  m.impl("qkv_rope_bwd", TORCH_BOX(&glmkern::qkv_rope_bwd<RopeCpu>));
}
