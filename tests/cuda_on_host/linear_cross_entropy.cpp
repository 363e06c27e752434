// The kernels of linear_cross_entropy alone, with tensors that begin OFFSET bytes after an address
// that 16-byte accesses need:
//
//     softmax DTYPE OFFSET ROWS CLASSES SMOOTHING GRADIENT    logits, labels, row_weight from
//     stdin;
//                                                             the loss and the logits to stdout
//     scatter DTYPE OFFSET COUNT WIDTH RESULT_ROWS            gradient, row_weight, rows; the
//     result scale DTYPE OFFSET ELEMENTS                             dloss, dhidden; the result
#include <string>

#include "cuda/kernels/linear_cross_entropy.cu"
#include "program.h"

namespace {

using namespace glmkern;

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat;
  return name == "float16" ? DType::kHalf : DType::kBFloat16;
}

void softmax(DType dtype, int offset, int rows, int classes, float smoothing, bool gradient) {
  HostTensor logits(rows * classes * bytes_of(dtype), offset), labels(rows * sizeof(int64_t), 0);
  HostTensor row_weight(rows * sizeof(float), 0), loss(rows * sizeof(float), 0);
  logits.read(), labels.read(), row_weight.read();
  cuda::cross_entropy_rows(
      {dtype, rows, classes, logits.data(), static_cast<const int64_t*>(labels.data()),
       row_weight.floats(), loss.floats(), smoothing, gradient},
      nullptr);
  loss.write(), logits.write();
}

void scatter(DType dtype, int offset, int count, int width, int result_rows) {
  HostTensor gradient(count * width * bytes_of(dtype), offset), weight(count * sizeof(float), 0);
  HostTensor rows(count * sizeof(int64_t), 0), result(result_rows * width * sizeof(float), 0);
  gradient.read(), weight.read(), rows.read();
  cuda::scatter_rows({dtype, count, width, gradient.data(), weight.floats(),
                      static_cast<const int64_t*>(rows.data()), result.floats()},
                     nullptr);
  result.write();
}

void scale(DType dtype, int offset, int elements) {
  HostTensor dloss(sizeof(float), 0), dhidden(elements * sizeof(float), offset ? 4 : 0);
  HostTensor result(elements * bytes_of(dtype), offset);
  dloss.read(), dhidden.read();
  cuda::linear_cross_entropy_bwd({dtype, elements, dloss.floats(), dhidden.floats(), result.data()},
                                 nullptr);
  result.write();
}

}  // namespace

int main(int, char** argv) {
  return run_program([&] {
    const DType dtype = dtype_named(argv[2]);
    const int offset = atoi(argv[3]), count = atoi(argv[4]);
    if (argv[1] == std::string("scale")) return scale(dtype, offset, count);
    if (argv[1] == std::string("scatter")) {
      return scatter(dtype, offset, count, atoi(argv[5]), atoi(argv[6]));
    }
    softmax(dtype, offset, count, atoi(argv[5]), static_cast<float>(atof(argv[6])),
            atoi(argv[7]) != 0);
  });
}
