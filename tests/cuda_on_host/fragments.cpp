// One warp's tensor core instructions, registers in and out, for comparison with the PTX manual:
//
//   fragments mma16 half|bfloat16     stdin: a [32, 4], b [32, 2], stdout: c [32, 4]
//   fragments mma8                    stdin: a [32, 2], b [32, 1], stdout: c [32, 4]
//   fragments load|load_transposed 1|2|4      stdin: 32 rows of 16 bytes, stdout: m [32, count]
//   fragments lop3                    stdin: a, b, c [1], stdout: the functions 0 to 255 of them
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/device/launch.cuh"
#include "cuda/device/ptx.cuh"
#include "program.h"

namespace {

using namespace glmkern::cuda;

template <int kCount>
using Registers = uint32_t[32][kCount];

template <class T>
void mma16_kernel(const Registers<4>* a, const Registers<2>* b, float (*c)[4]) {
  const int lane = threadIdx.x;
  float sum[4] = {};
  mma_m16n8k16(sum, (*a)[lane], (*b)[lane], T{});
  memcpy(c[lane], sum, sizeof sum);
}

void mma8_kernel(const Registers<2>* a, const Registers<1>* b, float (*c)[4]) {
  const int lane = threadIdx.x;
  float sum[4] = {};
  mma_m16n8k8(sum, (*a)[lane], (*b)[lane][0]);
  memcpy(c[lane], sum, sizeof sum);
}

template <int kCount, bool kTransposed>
void load_kernel(const uint4* rows, Registers<kCount>* m) {
  __shared__ uint4 shared[32];
  const int lane = threadIdx.x;
  shared[lane] = rows[lane];
  __syncwarp();
  uint32_t registers[kCount];
  kTransposed ? load_transposed(registers, shared + lane) : load_matrices(registers, shared + lane);
  memcpy((*m)[lane], registers, sizeof registers);
}

template <int... kTables>
void lop3_kernel(const uint32_t* abc, uint32_t* results, std::integer_sequence<int, kTables...>) {
  ((results[kTables] = lop3<kTables>(abc[0], abc[1], abc[2])), ...);
}

template <class Input, class Output>
void run(void (*kernel)(const Input*, Output*), size_t input_bytes, size_t output_bytes) {
  HostTensor input(input_bytes, 0), output(output_bytes, 0);
  input.read();
  launch("load", kernel, 1, 32, nullptr, static_cast<const Input*>(input.data()),
         static_cast<Output*>(output.data()));
  output.write();
}

template <class A, class B>
void run_mma(void (*kernel)(const A*, const B*, float (*)[4])) {
  HostTensor a(sizeof(A), 0), b(sizeof(B), 0), c(32 * 4 * sizeof(float), 0);
  a.read(), b.read();
  launch("mma", kernel, 1, 32, nullptr, static_cast<const A*>(a.data()),
         static_cast<const B*>(b.data()), static_cast<float (*)[4]>(c.data()));
  c.write();
}

template <int kCount>
void run_load(bool transposed) {
  const auto kernel = transposed ? load_kernel<kCount, true> : load_kernel<kCount, false>;
  run(kernel, 32 * 16, 32 * kCount * 4);
}

void run_lop3() {
  HostTensor abc(3 * 4, 0), results(256 * 4, 0);
  abc.read();
  launch("lop3", lop3_kernel, 1, 1, nullptr, static_cast<const uint32_t*>(abc.data()),
         static_cast<uint32_t*>(results.data()), std::make_integer_sequence<int, 256>());
  results.write();
}

}  // namespace

int main(int, char** argv) {
  const std::string what = argv[1], how = argv[2];
  return run_program([&] {
    if (what == "mma16") {
      return how == "half" ? run_mma(mma16_kernel<__half>) : run_mma(mma16_kernel<__nv_bfloat16>);
    }
    if (what == "mma8") return run_mma(mma8_kernel);
    if (what == "lop3") return run_lop3();
    const bool transposed = what == "load_transposed";
    if (how == "1") return run_load<1>(transposed);
    if (how == "2") return run_load<2>(transposed);
    run_load<4>(transposed);
  });
}
