// How quant_linear's products on tensor cores are shared out, and the sum of those that are split.
#include <algorithm>

#include "cuda/device/flat.cuh"
#include "cuda/kernels/quant_linear/mma.h"
#include "ops/ceil_div.h"

namespace glmkern::cuda {
namespace {

// The least tile with room for all tokens, or the largest one.
template <int kCount>
MmaTile tile_for(const MmaTile (&tiles)[kCount], int64_t rows) {
  for (const MmaTile& tile : tiles) {
    if (rows <= tile.tokens) return tile;
  }
  return tiles[kCount - 1];
}

bool fits_wide(const QuantLinear& a) {
  const bool fits_tokens = a.depth() % 8 == 0 && aligned_to_16(a.x);
  if (!a.backward) return fits_tokens && a.row_bytes % 16 == 0 && aligned_to_16(a.weight);
  return fits_tokens && a.row_bytes % 4 == 0 && aligned_to_16(a.weight) && aligned_to_16(a.scale);
}

// y = the sum of the splits, in order, times the row's scale, plus bias.
template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads)
    add_splits_kernel(const __grid_constant__ QuantLinear a, const float* __restrict__ partial,
                      int64_t columns, int splits) {
  const int64_t i = flat_element<kWidth>();
  if (i >= a.rows * columns) return;
  float sum[kWidth] = {};
  for (int split = 0; split < splits; split++) {
    float terms[kWidth];
    load_floats(partial + split * a.rows * columns + i, terms);
#pragma unroll
    for (int k = 0; k < kWidth; k++) sum[k] += terms[k];
  }
  const int64_t column = i % columns;
  Vec<T, kWidth> y;
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    if (!a.backward) {
      sum[k] *= a.scale[column + k];
      if (a.bias != nullptr) sum[k] += to_float(static_cast<const T*>(a.bias)[column + k]);
    }
    y.element[k] = from_float<T>(sum[k]);
  }
  store(static_cast<T*>(a.y) + i, y);
}

}  // namespace

// Splits make up to 216 blocks, two for each multiprocessor of an A100, and have four steps at
// least: a split's sums are written and read once more. With few tokens a block's warps share the
// steps already, and a second kernel costs more than idle multiprocessors.
MmaPlan plan_mma(const QuantLinear& a) {
  MmaPlan plan{};
  plan.wide = fits_wide(a);
  plan.tile = !plan.wide   ? kNarrowTile
              : a.backward ? tile_for(kBackwardTiles, a.rows)
                           : tile_for(kForwardTiles, a.rows);
  const int64_t codes = a.format == WeightFormat::kInt4 ? 2 : 1;  // of a byte
  const int64_t results = plan.tile.warps * (a.backward ? kBackwardBytes * codes : kForwardRows);
  const int64_t step =
      a.backward ? backward_rows(plan.tile.depth) : plan.tile.depth * kForwardBytes * codes;
  plan.token_blocks = static_cast<int>(ceil_div(a.rows, plan.tile.tokens));
  plan.result_blocks = static_cast<int>(ceil_div(a.columns(), results));
  plan.steps = static_cast<int>(ceil_div(a.depth(), step));
  const int64_t blocks = int64_t{plan.token_blocks} * plan.result_blocks;
  const int64_t wanted = plan.tile.depth > 1 ? 128 : 216, least_steps = plan.tile.depth > 1 ? 2 : 4;
  plan.splits = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(wanted / blocks, plan.steps / least_steps)));
  return plan;
}

void mma_add_splits(const QuantLinear& a, const MmaPlan& plan, const float* partial, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_width<T>(a.columns(), {a.y, partial}, [&](auto w) {
      constexpr int kWidth = decltype(w)::value;
      launch_flat<kWidth>("quant_linear_sum", add_splits_kernel<T, kWidth>, a.rows * a.columns(),
                          stream, a, partial, a.columns(), plan.splits);
    });
  });
}

}  // namespace glmkern::cuda
