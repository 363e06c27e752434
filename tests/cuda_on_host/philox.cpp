// cuda/device/philox.cuh alone: philox WIDTH COUNT P. Reads seed [2], sequence ids [COUNT] and
// first elements [COUNT], all int64; writes the factors, float [COUNT, WIDTH].
#include "cuda/device/philox.cuh"

#include "cuda/device/launch.cuh"
#include "program.h"

namespace {

using namespace glmkern::cuda;

template <int kWidth>
void factors_kernel(const int64_t* seed, const int64_t* ids, const int64_t* firsts, Dropout dropout,
                    float* result) {
  const unsigned i = blockIdx.x;
  float factors[kWidth];
  draw_factors(Philox(seed), dropout, ids[i], firsts[i], factors);
  for (int k = 0; k < kWidth; k++) result[i * kWidth + k] = factors[k];
}

template <int kWidth>
void run(int count, double p) {
  HostTensor seed(2 * 8, 0), ids(count * 8, 0), firsts(count * 8, 0), result(count * kWidth * 4, 0);
  seed.read(), ids.read(), firsts.read();
  const auto integers = [](HostTensor& x) { return static_cast<const int64_t*>(x.data()); };
  launch("factors", factors_kernel<kWidth>, count, 1, nullptr, integers(seed), integers(ids),
         integers(firsts), Dropout(p), result.floats());
  result.write();
}

}  // namespace

int main(int, char** argv) {
  return run_program([&] {
    const int width = atoi(argv[1]), count = atoi(argv[2]);
    const double p = atof(argv[3]);
    width == 1 ? run<1>(count, p) : width == 4 ? run<4>(count, p) : run<8>(count, p);
  });
}
