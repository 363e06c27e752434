#include "tensor_cores.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "counters.h"
#include "machine.h"
#include "shared_memory.h"

namespace cuda_on_host {
namespace {

constexpr int kM = 16, kN = 8, kMaxK = 16;

float to_float(uint16_t bits, Half type) {
  if (type == Half::kBFloat16) return __bfloat162float(__nv_bfloat16{bits});
  return __half2float(__half{bits});
}

struct MmaPart {
  float* c;
  const uint32_t *a, *b;
  Half type;
};

// f(row, column, r, half) for both numbers of each register r of a lane.
template <class F>
void for_each_number(const Fragment& fragment, int lane, F f) {
  for (int r = 0; r < fragment.registers; r++) {
    for (int half = 0; half < 2; half++) {
      f(lane / 4 + fragment.row[r], lane % 4 * 2 + fragment.column[r] + half, r, half);
    }
  }
}

// All products are exact in float. The order of their sums is not specified for a GPU.
template <int kK>
void multiply(const Parts& parts) {
  constexpr const Fragment& kA = kK == 16 ? kA16 : kA8;
  constexpr const Fragment& kB = kK == 16 ? kB16 : kB8;
  float a[kM][kMaxK], b[kN][kMaxK];
  const auto number = [](uint32_t bits, int half, Half type) {
    return to_float(static_cast<uint16_t>(bits >> 16 * half), type);
  };
  for (int lane = 0; lane < kWarp; lane++) {
    const auto& part = *static_cast<const MmaPart*>(parts[lane]);
    for_each_number(kA, lane, [&](int row, int column, int r, int half) {
      a[row][column] = number(part.a[r], half, part.type);
    });
    for_each_number(kB, lane, [&](int row, int column, int r, int half) {
      b[row][column] = number(part.b[r], half, part.type);
    });
  }
  for (int lane = 0; lane < kWarp; lane++) {
    const auto& part = *static_cast<const MmaPart*>(parts[lane]);
    for_each_number(kC, lane, [&](int row, int column, int r, int half) {
      float sum = 0;
      for (int k = 0; k < kK; k++) sum += a[row][k] * b[column][k];
      part.c[2 * r + half] += sum;
    });
  }
}

struct LoadPart {
  uint32_t* registers;
  int count;
  bool transposed;
  const void* row;
  int thread;
  Pc pc;
};

void load(const Parts& parts) {
  const auto& first = *static_cast<const LoadPart*>(parts[0]);
  for (int i = 0; i < first.count; i++) {
    for (int row = 0; row < 8; row++) {
      const auto& giver = *static_cast<const LoadPart*>(parts[8 * i + row]);
      if (reinterpret_cast<uintptr_t>(giver.row) % 16 != 0 || !shared_memory.contains(giver.row)) {
        return fail("thread " + std::to_string(giver.thread) +
                    " gives ldmatrix a row that is not 16 aligned bytes of shared memory, at " +
                    where(giver.pc));
      }
      counters.access(Kind::kSharedRead, giver.row, 16, giver.thread, giver.pc);
      for (int column = 0; column < 8; column++) {
        const int lane = first.transposed ? column * 4 + row / 2 : row * 4 + column / 2;
        const int half = first.transposed ? row % 2 : column % 2;
        const auto& taker = *static_cast<const LoadPart*>(parts[lane]);
        const char* number = static_cast<const char*>(giver.row) + 2 * column;
        shared_memory.read(number, 2, taker.thread, taker.pc);
        memcpy(reinterpret_cast<char*>(&taker.registers[i]) + 2 * half, number, 2);
      }
    }
  }
}

}  // namespace

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half type) {
  MmaPart part{c, a, b, type};
  together(kAllLanes, multiply<16>, &part);
}

void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  MmaPart part{c, a, &b, Half::kFloat16};
  together(kAllLanes, multiply<8>, &part);
}

[[gnu::noinline]] void load_matrices(uint32_t* registers, int count, const void* row,
                                     bool transposed) {
  LoadPart part{registers, count, transposed, row, place.index, pc_of(__builtin_return_address(0))};
  together(kAllLanes, load, &part);
}

}  // namespace cuda_on_host
