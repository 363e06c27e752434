// How quant_linear's products on tensor cores are shared out, by which kernels, and the sum of
// those that are split.
#include <algorithm>
#include <atomic>

#include "cuda/device/flat.cuh"
#include "cuda/kernels/code_version.h"
#include "cuda/kernels/quant_linear/mma.cuh"
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

// y = the sum of the splits, in order, times the row's scale, plus bias. A thread has four results,
// or one: so neighbours read neighbouring floats.
template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads)
    add_splits_kernel(const __grid_constant__ QuantLinear a, const float* __restrict__ partial,
                      int64_t columns, int splits) {
  const int64_t i = flat_element<kWidth>();
  if (i >= a.rows * columns) return;
  float sum[kWidth] = {}, terms[kWidth];
  add_splits_of(partial + i, splits, a.rows * columns, sum);
  const int64_t column = i % columns;
  if (!a.backward) {
    load_floats(a.scale + column, terms);
#pragma unroll
    for (int k = 0; k < kWidth; k++) sum[k] *= terms[k];
    if (a.bias != nullptr) {
      read_row(static_cast<const T*>(a.bias) + column, kWidth, terms);
#pragma unroll
      for (int k = 0; k < kWidth; k++) sum[k] += terms[k];
    }
  }
  write_row(static_cast<T*>(a.y) + i, kWidth, sum);
}

void add_splits(const QuantLinear& a, int splits, const float* partial, void* stream) {
  const auto launch = [&](auto kernel, auto width) {
    launch_flat<decltype(width)::value>("quant_linear_sum", kernel, a.rows * a.columns(), stream, a,
                                        partial, a.columns(), splits);
  };
  const bool half = a.dtype == DType::kHalf;
  if (a.columns() % 4 == 0 && aligned_to_16(a.scale)) {
    launch(half ? add_splits_kernel<__half, 4> : add_splits_kernel<__nv_bfloat16, 4>, Int<4>{});
  } else {
    launch(half ? add_splits_kernel<__half, 1> : add_splits_kernel<__nv_bfloat16, 1>, Int<1>{});
  }
}

// Asking the driver takes some microseconds, so that each device is asked once.
constexpr int kDevices = 64;
std::atomic<int> known_version[kDevices];

// The share of multiprocessors that have work, on the mean of a T4, an A100, an RTX 4090 and an
// H100, all blocks taking the same time.
double busy_share(int64_t blocks) {
  double sum = 0;
  for (const int64_t multiprocessors : {40, 108, 128, 132}) {
    sum += double(blocks) / double(ceil_div(blocks, multiprocessors) * multiprocessors);
  }
  return sum / 4;
}

// Splits keep more multiprocessors busy, but their sums are written and read once more, from the L2
// cache at 4.5 TB/s, by a launch that takes 2 us to start. Beside that stands what the product
// takes an A100: 2 TB/s, 250e12 flops a second. A split has `least` steps or more.
int best_splits(const QuantLinear& a, int64_t blocks, int64_t steps, int64_t least) {
  const double weights = double(a.n) * double(a.k), results = double(a.rows) * double(a.columns());
  const double product = std::max(weights / 2 / 2e12, 2 * double(a.rows) * weights / 250e12);
  int best = 1;
  double best_score = busy_share(blocks);
  for (int splits = 2; splits <= 16 && splits * least <= steps; splits++) {
    const double sums = 2e-6 + 8 * results * splits / 4.5e12;
    const double score = busy_share(blocks * splits) / (1 + sums / product);
    if (score > best_score) best = splits, best_score = score;
  }
  return best;
}

}  // namespace

int code_version() {
  int device = 0;
  require_success("of this library", cudaGetDevice(&device));
  if (device < kDevices && known_version[device] > 0) return known_version[device];
  cudaFuncAttributes attributes{};
  require_success("of this library",
                  cudaFuncGetAttributes(&attributes, add_splits_kernel<__half, 1>));
  if (device < kDevices) known_version[device] = attributes.ptxVersion;
  return attributes.ptxVersion;
}

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
  plan.splits = best_splits(a, blocks, plan.steps, plan.tile.depth > 1 ? 2 : 4);
  return plan;
}

bool mma_serves(const QuantLinear& a) {
  constexpr int64_t kMost = 1 << 24;  // places within a block's tiles are counted in 32 bits
  if (!a.has_codes() || a.dtype == DType::kFloat || std::max({a.n, a.k, a.rows}) > kMost)
    return false;
  return a.dtype == DType::kHalf || code_version() >= 80;
}

void mma(const QuantLinear& a, const MmaPlan& plan, float* partial, void* stream) {
  (code_version() >= 80 ? mma_sm80 : mma_sm75)(a, plan, partial, stream);
  if (plan.splits > 1) add_splits(a, plan.splits, partial, stream);
}

}  // namespace glmkern::cuda
