// linear_cross_entropy on NVIDIA GPUs: a chunk of labelled rows at a time goes through the output
// layer, the softmax and, for the gradient, back. The products are quant_linear's, the rest is in
// cuda/kernels/linear_cross_entropy.cu.
#include <algorithm>

#include "cuda/kernels/linear_cross_entropy_cuda.h"
#include "cuda/library.h"
#include "cuda/quant_linear_cuda_run.h"
#include "cuda/torch_calls.h"
#include "ops/ceil_div.h"
#include "ops/linear_cross_entropy_binding.h"

namespace glmkern {
namespace {

// Logits of a chunk: few beside the weight's elements. A product with fewer rows would wait for the
// weight: a chip does 150 to 300 multiplications and additions for every number that it reads.
constexpr int64_t kChunkElements = 1 << 22;
constexpr int64_t kLeastChunkRows = 512;

// The rows that have a label, in order.
struct Labelled {
  int64_t count;
  std::optional<Tensor> rows;  // int64 [count]; none: all there are
  Tensor labels, weight;       // [count], the weight float32
};

Tensor rows_of(const Tensor& x, const Tensor& rows) {
  return call_torch("aten::index_select", "", x, int64_t{0}, rows);
}

// How many rows have a label decides the shapes of all that follows. So the host waits for the
// device to count them, once a call, unless the caller has left the others out.
Labelled find_labelled(const LinearCrossEntropyForward& a, const Tensor& like) {
  Labelled result{a.tokens, std::nullopt,
                  view_of(a.labels, ScalarType::Long, {a.tokens}, {1}, like), Tensor()};
  if (a.ignore_index.has_value()) {
    const int64_t ignored = *a.ignore_index;
    const Tensor number = torch::stable::from_blob(
        const_cast<int64_t*>(&ignored), {}, {},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long);
    const Tensor found =
        call_torch("aten::nonzero", "", call_torch("aten::ne", "Tensor", result.labels, number));
    result.count = found.size(0);
    result.rows = torch::stable::view(found, {result.count});
    result.labels = rows_of(result.labels, *result.rows);
  }
  if (a.token_weight == nullptr) {
    result.weight = torch::stable::new_empty(like, {result.count}, ScalarType::Float);
    torch::stable::fill_(result.weight, 1.0 / std::max<int64_t>(result.count, 1));
  } else {
    const Tensor all = view_of(a.token_weight, ScalarType::Float, {a.tokens}, {1}, like);
    result.weight = result.rows ? rows_of(all, *result.rows) : all;
  }
  return result;
}

// Memory of a chunk, used again by the next one.
struct ChunkMemory {
  Tensor logits;  // [rows, classes], then the gradient's
  Tensor hidden;  // [rows, hidden_size], the gradient before the row's weight
};

// Labelled rows first to first + count, whose losses go to loss [count].
void chunk(const LinearCrossEntropyForward& a, const Labelled& labelled, int64_t first,
           int64_t count, const ChunkMemory& memory, float* loss, const Tensor& like,
           void* stream) {
  const ScalarType type = scalar_type_of(a.dtype);
  const int64_t width = a.hidden_size;
  const int64_t* labels = static_cast<const int64_t*>(labelled.labels.const_data_ptr()) + first;
  const float* weight = static_cast<const float*>(labelled.weight.const_data_ptr()) + first;
  const int64_t* rows = nullptr;
  QuantLinear product = a.weight;
  product.dtype = a.dtype;
  product.rows = count;

  std::optional<Tensor> gathered;
  if (labelled.rows) {
    rows = static_cast<const int64_t*>(labelled.rows->const_data_ptr()) + first;
    gathered = rows_of(view_of(a.hidden, type, {a.tokens, width}, {width, 1}, like),
                       view_of(rows, ScalarType::Long, {count}, {1}, like));
    product.x = gathered->const_data_ptr();
  } else {
    product.x = static_cast<const char*>(a.hidden) + first * width * bytes_of(a.dtype);
  }
  product.y = memory.logits.mutable_data_ptr();
  quant_linear_run(product, like);

  cuda::cross_entropy_rows({a.dtype, count, a.classes, product.y, labels, weight, loss,
                            a.label_smoothing, a.dhidden != nullptr},
                           stream);
  if (a.dhidden == nullptr) return;

  product.backward = true;
  product.x = memory.logits.const_data_ptr();
  product.y = memory.hidden.mutable_data_ptr();
  quant_linear_run(product, like);
  // The row's weight comes after the product: a small one would underflow in half.
  float* to = rows != nullptr ? a.dhidden : a.dhidden + first * width;
  cuda::scatter_rows({a.dtype, count, width, product.y, weight, rows, to}, stream);
}

struct LinearCrossEntropyCuda {
  static void forward(const LinearCrossEntropyForward& a, const Tensor& like) {
    on_device_of(like, [&](void* stream) {
      const Labelled labelled = find_labelled(a, like);
      const int64_t count = labelled.count;
      const int64_t most =
          std::max(kChunkElements / std::max<int64_t>(a.classes, 1), kLeastChunkRows);
      const int64_t chunks = ceil_div(count, most);
      const Tensor loss = torch::stable::new_empty(like, {count}, ScalarType::Float);
      if (chunks > 0) {
        const int64_t rows = ceil_div(count, chunks);
        const ChunkMemory memory{
            torch::stable::new_empty(like, {rows, a.classes}),
            torch::stable::new_empty(like, {a.dhidden != nullptr ? rows : 0, a.hidden_size})};
        for (int64_t i = 0; i < chunks; i++) {
          const int64_t first = i * count / chunks, end = (i + 1) * count / chunks;
          chunk(a, labelled, first, end - first, memory, floats_of(loss) + first, like, stream);
        }
      }
      Tensor sum = view_of(a.loss, ScalarType::Float, {}, {}, like);
      torch::stable::sum_out(sum, loss);
    });
  }

  static void backward(const LinearCrossEntropyBackward& a, const Tensor& like) {
    on_device_of(like, [&](void* stream) { cuda::linear_cross_entropy_bwd(a, stream); });
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cuda, GLMKERN_CUDA_KEY, m) {
  using glmkern::LinearCrossEntropyCuda;
  m.impl("linear_cross_entropy_fwd",
         TORCH_BOX(&glmkern::linear_cross_entropy_fwd<LinearCrossEntropyCuda>));
  m.impl("linear_cross_entropy_bwd",
         TORCH_BOX(&glmkern::linear_cross_entropy_bwd<LinearCrossEntropyCuda>));
}
