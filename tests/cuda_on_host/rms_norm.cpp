// rms_norm fwd|bwd DTYPE ROWS HIDDEN EPS RESIDUAL SPLITS OFFSET, with DTYPE 0 float, 1 half,
// 2 bfloat16; RESIDUAL 0 or 1; SPLITS 0 for no weight gradient; OFFSET in bytes.
#include <string>

#include "cuda/kernels/rms_norm_cuda.h"
#include "program.h"

namespace {

using namespace glmkern;

void forward(DType dtype, int64_t rows, int64_t hidden, float eps, bool residual, size_t offset) {
  const size_t row = hidden * (dtype == DType::kFloat ? 4 : 2);
  HostTensor x(rows * row, offset), r(residual ? rows * row : 0, offset), weight(row, offset);
  HostTensor y(rows * row, offset), h(residual ? rows * row : 0, offset), rstd(rows * 4, 0);
  x.read(), r.read(), weight.read();
  RmsNormForward a{dtype,   rows,          hidden,   eps,     x.data(),
                   nullptr, weight.data(), y.data(), nullptr, rstd.floats()};
  if (residual) a.residual = r.data(), a.h = h.data();
  cuda::rms_norm_fwd(a, nullptr);
  y.write(), h.write(), rstd.write();
}

void backward(DType dtype, int64_t rows, int64_t hidden, bool residual, int64_t splits,
              size_t offset) {
  const size_t row = hidden * (dtype == DType::kFloat ? 4 : 2);
  HostTensor dy(rows * row, offset), x(rows * row, offset), weight(row, offset), rstd(rows * 4, 0);
  HostTensor dresidual(residual ? rows * row : 0, offset), dx(rows * row, offset);
  HostTensor dweight(splits ? row : 0, offset), partial(splits * hidden * 4, 0);
  dy.read(), x.read(), weight.read(), rstd.read(), dresidual.read();
  RmsNormBackward a{dtype,         rows,          hidden,  splits,    dy.data(), x.data(),
                    weight.data(), rstd.floats(), nullptr, dx.data(), nullptr,   nullptr};
  if (residual) a.dresidual = dresidual.data();
  if (splits) a.dweight = dweight.data(), a.partial = partial.floats();
  cuda::rms_norm_bwd(a, nullptr);
  dx.write(), dweight.write();
}

}  // namespace

int main(int, char** argv) {
  return run_program([&] {
    const auto dtype = static_cast<DType>(atoi(argv[2]));
    const int64_t rows = atoll(argv[3]), hidden = atoll(argv[4]), splits = atoll(argv[7]);
    const bool residual = atoi(argv[6]) != 0;
    const size_t offset = atoll(argv[8]);
    if (argv[1] == std::string("fwd")) {
      forward(dtype, rows, hidden, static_cast<float>(atof(argv[5])), residual, offset);
    } else {
      backward(dtype, rows, hidden, residual, splits, offset);
    }
  });
}
