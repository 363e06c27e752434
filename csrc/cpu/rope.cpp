// rope on the CPU: how its tokens are shared between threads, and its registration.
#include <algorithm>

#include "cpu/kernels/rope_cpu.h"
#include "cpu/parallel.h"
#include "ops/rope_binding.h"

namespace glmkern {
namespace {

struct RopeCpu {
  static void check_positions(const int64_t* positions, int64_t tokens, int64_t table) {
    check_range("positions", positions, tokens, "the table holds positions", table);
  }

  static void check_slots(const int64_t* slots, int64_t tokens, int64_t entries) {
    check_range("slots", slots, tokens, "the cache has", entries);
  }

  // Indices [count], each of which must lie from 0 to size - 1.
  static void check_range(const char* name, const int64_t* indices, int64_t count, const char* held,
                          int64_t size) {
    if (count == 0) return;
    const auto [low, high] = std::minmax_element(indices, indices + count);
    require_value(*low >= 0 && *high < size, std::string("rope: ") + name + " run from " +
                                                 std::to_string(*low) + " to " +
                                                 std::to_string(*high) + ", but " + held +
                                                 " 0 to " + std::to_string(size - 1));
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
