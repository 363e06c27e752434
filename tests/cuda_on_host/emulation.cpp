// Kernels that test the machine: block_sum BLOCKS | shuffle | half COUNT | bfloat16 COUNT, or the
// name of a mistake.
#include <string>

#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec.cuh"
#include "program.h"

namespace {

using namespace glmkern::cuda;

void sum_kernel(const float* x, float* sums) {
  __shared__ float partial[kMaxWarps];
  const float sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x], partial);
  if (threadIdx.x == blockDim.x - 1) sums[blockIdx.x] = sum;
}

void shuffle_kernel(const float* x, float* down, float* exchanged, float* broadcast, float* any) {
  const float mine = x[threadIdx.x];
  down[threadIdx.x] = __shfl_down_sync(0xffffffffu, mine, 3);
  exchanged[threadIdx.x] = __shfl_xor_sync(0xffffffffu, mine, 1);
  broadcast[threadIdx.x] = __shfl_sync(0xffffffffu, mine, 7);
  any[threadIdx.x] = __any_sync(0xffffffffu, mine == 40);
}

template <class T>
void convert_kernel(const float* x, T* narrow, float* wide) {
  const unsigned i = blockIdx.x;
  narrow[i] = from_float<T>(x[i]);
  wide[i] = to_float(narrow[i]);
}

void barrier_in_a_branch() {
  if (threadIdx.x < 32) __syncthreads();
}

void shuffle_in_a_branch() {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

void shuffle_outside_its_mask() { __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }

// Two sums in a row through one buffer: a fast warp's second overwrites a slow one's first.
void two_sums_in_one_buffer() {
  __shared__ float partial[kMaxWarps];
  block_sum(1.0f, partial);
  block_sum(2.0f, partial);
}

// Each lane writes its number and reads its neighbour's.
template <bool kOrdered>
void neighbours() {
  __shared__ int numbers[kWarp];
  const int lane = threadIdx.x;
  numbers[lane] = lane;
  if (kOrdered) __syncwarp();
  volatile int neighbour = numbers[lane ^ 1];
  if (kOrdered && neighbour != (lane ^ 1)) throw std::logic_error("a wrong neighbour");
}

// Lanes that wait in different places never meet.
void two_places() {
  threadIdx.x < 16 ? __shfl_xor_sync(0xffffffffu, 1.0f, 1) : (__syncwarp(), 0.0f);
}

void misaligned_access(const float* x, float* y) { store(y, load<4>(x + 1)); }

// Every thread reads, then the first writes: all readers count, not only the last one.
void write_after_reads() {
  __shared__ int number;
  if (threadIdx.x == 0) number = 1;
  __syncthreads();
  volatile int copy = number;
  (void)copy;
  if (threadIdx.x == 0) number = 2;
}

void nothing() {}

template <class T>
void convert(int count) {
  HostTensor x(count * 4, 0), narrow(count * sizeof(T), 0), wide(count * 4, 0);
  x.read();
  launch("convert", convert_kernel<T>, count, 1, nullptr, static_cast<const float*>(x.floats()),
         static_cast<T*>(narrow.data()), wide.floats());
  narrow.write(), wide.write();
}

void run(const std::string& name, int count) {
  if (name == "block_sum") {
    HostTensor x(count * 256 * 4, 0), sums(count * 4, 0);
    launch("sum", sum_kernel, count, 256, nullptr, static_cast<const float*>(x.read().floats()),
           sums.floats());
    sums.write();
  } else if (name == "shuffle") {
    HostTensor x(256, 0), down(256, 0), exchanged(256, 0), broadcast(256, 0), any(256, 0);
    launch("shuffle", shuffle_kernel, 1, 64, nullptr, static_cast<const float*>(x.read().floats()),
           down.floats(), exchanged.floats(), broadcast.floats(), any.floats());
    down.write(), exchanged.write(), broadcast.write(), any.write();
  } else if (name == "half") {
    convert<__half>(count);
  } else if (name == "bfloat16") {
    convert<__nv_bfloat16>(count);
  } else if (name == "barrier_in_a_branch") {
    launch("barrier", barrier_in_a_branch, 1, 64, nullptr);
  } else if (name == "shuffle_in_a_branch") {
    launch("shuffle", shuffle_in_a_branch, 1, 32, nullptr);
  } else if (name == "shuffle_outside_its_mask") {
    launch("shuffle", shuffle_outside_its_mask, 1, 32, nullptr);
  } else if (name == "two_sums_in_one_buffer") {
    launch("sums", two_sums_in_one_buffer, 1, 64, nullptr);
  } else if (name == "neighbours") {
    launch("neighbours", neighbours<true>, 1, kWarp, nullptr);
  } else if (name == "neighbours_without_order") {
    launch("neighbours", neighbours<false>, 1, kWarp, nullptr);
  } else if (name == "two_places") {
    launch("places", two_places, 1, kWarp, nullptr);
  } else if (name == "misaligned_access") {
    HostTensor x(32, 0), y(32, 0);
    launch("misaligned", misaligned_access, 1, 1, nullptr, static_cast<const float*>(x.floats()),
           y.floats());
  } else if (name == "write_after_reads") {
    launch("reads", write_after_reads, 1, 64, nullptr);
  } else {
    launch("nothing", nothing, 1, 2048, nullptr);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_program([&] { run(argv[1], argc > 2 ? atoi(argv[2]) : 0); });
}
