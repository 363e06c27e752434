// quant_linear on NVIDIA GPUs: its variants, the choice between them, and its registration. The
// kernels are in cuda/kernels/quant_linear/.
#include <algorithm>

#include "cuda/forced_splits.h"
#include "cuda/kernels/quant_linear/mma.h"
#include "cuda/kernels/quant_linear/quant_linear_cuda.h"
#include "cuda/library.h"
#include "cuda/quant_linear_cuda_run.h"
#include "cuda/swiglu_cuda_run.h"
#include "cuda/torch_calls.h"
#include "ops/ceil_div.h"
#include "ops/quant_linear_binding.h"
#include "ops/swiglu_binding.h"

namespace glmkern {
namespace {

ScalarType type_of_dense(WeightFormat format) {
  switch (format) {
    case WeightFormat::kHalf: return ScalarType::Half;
    case WeightFormat::kBFloat16: return ScalarType::BFloat16;
    default: return ScalarType::Float;
  }
}

void gemv(const QuantLinear& a, const Tensor& like, void* stream) {
  if (!a.backward) return cuda::gemv_fp32_fwd(a, stream);
  const int64_t splits = cuda::gemv_fp32_bwd_splits(a);
  const int64_t partial_sums = splits > 1 ? splits * a.rows * a.k : 0;
  const Tensor partial = torch::stable::new_empty(like, {partial_sums}, ScalarType::Float);
  cuda::gemv_fp32_bwd(a, splits, floats_of(partial), stream);
}

void mma(const QuantLinear& a, const Tensor& like, void* stream) {
  cuda::MmaPlan plan = cuda::plan_mma(a);
  if (forced_splits > 0) plan.splits = std::min(forced_splits, plan.steps);
  const int64_t partial_sums = plan.splits > 1 ? plan.splits * a.rows * a.columns() : 0;
  const Tensor partial = torch::stable::new_empty(like, {partial_sums}, ScalarType::Float);
  cuda::mma(a, plan, floats_of(partial), stream);
}

// The widest tile of a matrix product's: slabs of whole tiles leave none half empty. And columns
// that give all multiprocessors of a small chip a tile.
constexpr int64_t kSlabMultiple = 128, kSlabColumns = 1024;

// How many of `length` rows or columns a slab has: at most half the L2 cache, and all slabs about
// equal, as a product's last tiles would wait for those of a short slab. Where a small cache holds
// few columns, up to sixteen times as much: what a slab costs a T4's memory is a quarter of what
// tiles that keep few multiprocessors busy cost it.
int64_t slab_size(int64_t length, int64_t bytes_each, int64_t l2_bytes) {
  const int64_t cached = l2_bytes / 2 / std::max<int64_t>(bytes_each, 1);
  int64_t most = std::max(cached, std::min(kSlabColumns, 16 * cached));
  const int64_t multiple = most >= kSlabMultiple ? kSlabMultiple : 2;  // even: two columns a byte
  most = std::max<int64_t>(most / multiple, 1) * multiple;
  const int64_t slabs = ceil_div(length, most);
  return std::min(length, ceil_div(ceil_div(length, slabs), multiple) * multiple);
}

// The product's columns begin to end, of the part of the weight that they need: [end - begin, k],
// backward [n, end - begin]. It is rounded once, after the bias.
void torch_product(const QuantLinear& a, const Tensor& x, const Tensor& weight, int64_t begin,
                   int64_t end) {
  const ScalarType type = scalar_type_of(a.dtype);
  const auto from_begin = [&](const void* data) {
    return static_cast<const char*>(data) + begin * bytes_of(a.dtype);
  };
  const Tensor y = view_of(from_begin(a.y), type, {a.rows, end - begin}, {a.columns(), 1}, x);
  if (a.backward) {
    call_torch("aten::mm", "out", x, weight, y);
    return;
  }
  std::optional<Tensor> bias;
  if (a.bias != nullptr) bias = view_of(from_begin(a.bias), type, {end - begin}, {1}, x);
  call_torch("aten::linear", "out", x, weight, bias, y);
}

// The part of the weight that the product's columns begin to end need, in `memory`.
Tensor write_part(const QuantLinear& a, int64_t begin, int64_t end, void* memory,
                  const Tensor& like, void* stream) {
  const int64_t rows = a.backward ? a.n : end - begin, columns = a.backward ? end - begin : a.k;
  const int64_t first_row = a.backward ? 0 : begin, first_column = a.backward ? begin : 0;
  const uint8_t* row = a.weight + first_row * a.row_bytes;
  Tensor part = view_of(memory, scalar_type_of(a.dtype), {rows, columns}, {columns, 1}, like);
  if (a.has_codes()) {
    const int bits = a.format == WeightFormat::kInt4 ? 4 : 8;
    cuda::dequantize({a.dtype, bits, rows, columns, row + first_column * bits / 8, a.row_bytes,
                      a.scale + first_row, memory},
                     stream);
  } else {
    const uint8_t* from = row + first_column * (a.format == WeightFormat::kFloat ? 4 : 2);
    torch::stable::copy_(part,
                         view_of(from, type_of_dense(a.format), {rows, columns}, {a.k, 1}, like));
  }
  return part;
}

// The next slab overwrites the last one. Each gives columns of the result, so nothing is added up.
void slab(const QuantLinear& a, const Tensor& like, void* stream) {
  const ScalarType type = scalar_type_of(a.dtype);
  const Tensor x = view_of(a.x, type, {a.rows, a.depth()}, {a.depth(), 1}, like);
  if (!a.has_codes() && type_of_dense(a.format) == type) {
    return torch_product(a, x, view_of(a.weight, type, {a.n, a.k}, {a.k, 1}, like), 0, a.columns());
  }
  const int64_t size = slab_size(a.columns(), a.depth() * bytes_of(a.dtype), cuda::l2_bytes());
  const Tensor memory = torch::stable::new_empty(like, {size * a.depth()}, type);
  for (int64_t begin = 0; begin < a.columns(); begin += size) {
    const int64_t end = std::min(begin + size, a.columns());
    const Tensor part = write_part(a, begin, end, memory.mutable_data_ptr(), like, stream);
    torch_product(a, x, part, begin, end);
  }
}

struct QuantLinearCuda {
  static void run(const QuantLinear& a, const Tensor& like) { quant_linear_run(a, like); }
};

Tensor quant_linear_swiglu_fwd(const Tensor& x, const Tensor& packed,
                               const std::optional<Tensor>& scale, int64_t bits,
                               const std::optional<Tensor>& bias) {
  return swiglu_fwd<SwigluCuda>(quant_linear_fwd<QuantLinearCuda>(x, packed, scale, bits, bias));
}

}  // namespace

constexpr int64_t kMmaTokens = 512;

// float32: a slab costs 8 bytes a weight in the L2 cache, written once and read once: 1.5 ps at
// 5.5 TB/s. Its decoding and torch's product come on top, with an FMA a token and weight, as the
// gemv has it. The gemv's loops for sm_90 have seven instructions a weight at one token and
// fourteen at eight. An H100, with 2.9e13 instructions a second, needs 0.24 and 0.5 ps for them,
// and 0.15 ps to read a code. So the gemv is the faster one wherever it can serve.
//
// Half and bfloat16: bench/results/cuda_products.md expects 0.67 to 0.90 of the tensor cores' rate
// at 192 and 512 tokens, which torch's product reaches too (0.7 to 0.8). A slab costs 4 bytes a
// weight in the L2 cache and the reading of its codes besides: 5 ps on a T4 at 1.2 TB/s and 1.1 ps
// on an A100, a quarter of a product of 512 tokens, 20 and 4.7 ps. With more tokens that share
// falls, while our loop decodes the weight again for every 64.
//
// A dense weight of x's own dtype is torch's product alone; one of another dtype is converted, slab
// by slab.
Variant choose(const QuantLinear& a) {
  const bool few = a.rows <= cuda::kGemvTokens;
  if (a.dtype == DType::kFloat && a.has_codes() && few) return Variant::kGemv;
  return a.rows <= kMmaTokens && a.depth() > 0 && cuda::mma_serves(a) ? Variant::kMma
                                                                      : Variant::kSlab;
}

void quant_linear_run(const QuantLinear& a, const Tensor& like) {
  if (a.rows == 0 || a.columns() == 0) return;
  on_device_of(like, [&](void* stream) {
    switch (forced_variant.value_or(choose(a))) {
      case Variant::kGemv: return gemv(a, like, stream);
      case Variant::kMma: return mma(a, like, stream);
      case Variant::kSlab: return slab(a, like, stream);
    }
  });
}

}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cuda, GLMKERN_CUDA_KEY, m) {
  using glmkern::QuantLinearCuda;
  m.impl("quant_linear_fwd", TORCH_BOX(&glmkern::quant_linear_fwd<QuantLinearCuda>));
  m.impl("quant_linear_swiglu_fwd", TORCH_BOX(&glmkern::quant_linear_swiglu_fwd));
  m.impl("quant_linear_bwd", TORCH_BOX(&glmkern::quant_linear_bwd<QuantLinearCuda>));
}
