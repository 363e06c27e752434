// A product of matrices as the package's kernels do it, right or with one fault that a GPU would
// not name: planted FAULT ROWS DEPTH.
//
//     c [rows, 8] = a [rows, depth] b [8, depth]^T     a, b in half, c in float
//
// A block of four warps takes 16 rows. 64 columns a step come to shared memory by cp.async while
// the tensor cores work on those before; every warp takes 16 of them, and the four sums are added
// through shared memory.
#include <string>

#include "cuda/device/launch.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/shared_memory.cuh"
#include "program.h"

namespace {

using namespace glmkern::cuda;

enum Fault {
  kNone,
  kNoBarrierBeforeRead,   // after the copies have landed
  kNoBarrierBeforeWrite,  // before a stage is copied to again
  kNoBarrierBeforeSum,
  kNoWait,
  kOneStageTooFew,  // waits for one group fewer than it must
  kRowsSwapped,     // a's fragments 1 and 2
  kTransposed,      // loads b's matrices transposed
  kNoWrite,         // leaves the last rows of b as they are
  kTooFar,          // one row past the dynamic memory
  kMisaligned,      // 16 bytes at a multiple of 8
  kFaults,
};
const char* const kNames[kFaults] = {"none",
                                     "no_barrier_before_read",
                                     "no_barrier_before_write",
                                     "no_barrier_before_sum",
                                     "no_wait",
                                     "one_stage_too_few",
                                     "rows_swapped",
                                     "transposed",
                                     "no_write",
                                     "too_far",
                                     "misaligned"};

constexpr int kRows = 16, kColumns = 8, kDepth = 64, kStages = 2, kWarps = 4;
constexpr int kStride = kDepth + 8;  // in shared memory: eight rows start in different banks
constexpr int kStageNumbers = (kRows + kColumns) * kStride;

template <Fault kFault>
void product_kernel(const __half* a, const __half* b, float* c, int depth) {
  __shared__ float sums[kWarps][kRows][kColumns];
  auto* const memory = reinterpret_cast<__half*>(dynamic_shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.x * kRows;
  const auto row_of = [&](int stage, int row) {
    return memory + stage * kStageNumbers + row * kStride;
  };

  // Rows of a, then of b; a thread copies 8 numbers of each eighth row.
  const auto copy = [&](int step) {
    for (int row = threadIdx.x / 8; row < kRows + kColumns; row += 16) {
      if (kFault == kNoWrite && row == kRows + kColumns - 1) continue;
      const int column = threadIdx.x % 8 * 8;
      const __half* from = row < kRows ? a + (first + row) * depth : b + (row - kRows) * depth;
      __half* to = row_of(step % kStages, row + (kFault == kTooFar)) + column;
      if (kFault == kMisaligned) to += 4;
      copy_async(to, from + step * kDepth + column);
    }
    commit_copies();
  };

  float sum[4] = {};
  const int steps = depth / kDepth;
  copy(0);
  for (int step = 0; step < steps; step++) {
    if (kFault != kNoBarrierBeforeWrite) __syncthreads();
    if (step + 1 < steps) copy(step + 1);
    if (kFault == kOneStageTooFew || step + 1 < steps) {
      if (kFault != kNoWait) wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    if (kFault != kNoBarrierBeforeRead) __syncthreads();
    const int column = warp * 16;
    uint32_t a_fragment[4], b_fragment[2];
    load_matrices(a_fragment, row_of(step % kStages, lane % 16) + column + lane / 16 * 8);
    const __half* b_row = row_of(step % kStages, kRows + lane % 8) + column + lane / 8 % 2 * 8;
    kFault == kTransposed ? load_transposed(b_fragment, b_row) : load_matrices(b_fragment, b_row);
    if (kFault == kRowsSwapped) std::swap(a_fragment[1], a_fragment[2]);
    mma_m16n8k16(sum, a_fragment, b_fragment, __half{});
  }
  for (int i = 0; i < 4; i++) sums[warp][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = sum[i];
  if (kFault != kNoBarrierBeforeSum) __syncthreads();
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  float total = 0;
  for (int w = 0; w < kWarps; w++) total += sums[w][row][column];
  c[(first + row) * kColumns + column] = total;
}

template <int kFault>
void run(const std::string& fault, int rows, int depth) {
  if constexpr (kFault < kFaults) {
    if (fault != kNames[kFault]) return run<kFault + 1>(fault, rows, depth);
    HostTensor a(rows * depth * 2, 0), b(kColumns * depth * 2, 0), c(rows * kColumns * 4, 0);
    a.read(), b.read();
    launch_with_shared("product", product_kernel<static_cast<Fault>(kFault)>, rows / kRows,
                       kWarps * 32, kStages * kStageNumbers * sizeof(__half), nullptr,
                       static_cast<const __half*>(a.data()), static_cast<const __half*>(b.data()),
                       c.floats(), depth);
    c.write();
  }
}

}  // namespace

int main(int, char** argv) {
  return run_program([&] { run<0>(argv[1], atoi(argv[2]), atoi(argv[3])); });
}
