// What the two directions of quant_linear on tensor cores share.
//
// A product's larger operand is the weight, and it takes the place of the instruction's A, 16 rows
// by 16; tokens are its 8 columns. So every warp has rows (backward: columns) of the weight to
// itself: it reads them from global memory into registers, once, and decodes them there, while the
// tokens that all warps need come through shared memory.
//
// The instruction's sum runs over 16 numbers, in which order does not matter. What lane t of a
// group of four supplies of both operands may therefore be any four that suit memory.
#pragma once

#include <cstdint>

#include "cuda/device/codes.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/device/staged_tile.cuh"
#include "cuda/kernels/quant_linear/mma.h"

namespace glmkern::cuda {

// Blocks take `kTokens` tokens by some results each; `splits` of them share a sum of `steps` steps.
// With more than one, partial [splits, rows, columns] gets their sums, without scale and bias.
struct MmaArguments {
  QuantLinear a;
  float* partial;
  int64_t columns;  // of y
  int splits, steps, token_blocks, result_blocks;
};

// What this block has of the above: the token blocks of one piece of weight follow each other, so
// that it is read from the L2 cache.
struct MmaBlock {
  __device__ explicit MmaBlock(const MmaArguments& m)
      : token(blockIdx.x % m.token_blocks),
        result(blockIdx.x / m.token_blocks % m.result_blocks),
        split(blockIdx.x / m.token_blocks / m.result_blocks),
        begin(split * m.steps / m.splits),
        end((split + 1) * m.steps / m.splits) {}

  int token, result, split, begin, end;
};

// Of the i-th chunk of a tile, token by token.
template <class Tile>
__device__ int place_of_chunk(int i) {
  const int chunk = i % Tile::kChunks;
  return i - chunk + Tile::place(i / Tile::kChunks, chunk);
}

// The bytes at p of which `left` exist, as words; zeros, the code 0, for the rest.
template <bool kWide>
__device__ uint32_t load_word(const uint8_t* p, int left) {
  uint32_t word = 0;
  if constexpr (kWide) {
    if (left > 0) word = __ldg(reinterpret_cast<const uint32_t*>(p));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i < left) word |= uint32_t{p[i]} << 8 * i;
    }
  }
  return word;
}
template <bool kWide>
__device__ void load_words(const uint8_t* p, int left, uint32_t (&words)[4]) {
  if constexpr (kWide) {
    uint4 v{};
    if (left > 0) v = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(words, &v, sizeof words);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = load_word<false>(p + 4 * i, left - 4 * i);
  }
}

// Results of one token from `column` on, sums over this block's steps, to where they belong.
// finish(i, sum) makes the i-th's sum over all steps a result.
template <class T, int kCount, class Finish>
__device__ void write_results(const MmaArguments& m, const MmaBlock& block, int token, int column,
                              float (&sums)[kCount], Finish finish) {
  const int left = static_cast<int>(m.columns) - column;
  if (token >= m.a.rows || left <= 0) return;
  const int64_t at = token * m.columns + column;
  if (m.splits > 1) {
    write_row(m.partial + block.split * m.a.rows * m.columns + at, left, sums);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) sums[i] = finish(i, sums[i]);
  write_row(static_cast<T*>(m.a.y) + at, left, sums);
}

// Adds the sums of kDepth warps, each over [kTokens, kResults], in their order. for_each(f) calls
// f(token, result, sums) for each four that are this lane's; write(token, result, sums) gets the
// totals. kStride is how many fours the results of lanes g and g + 1 are apart.
template <int kDepth, int kTokens, int kResults, int kStride, class Each, class Write>
__device__ void add_depths(Each for_each, Write write) {
  constexpr int kFours = kResults / 4;
  // Two lanes g and the four lanes t beside them store at once: t decides the two lowest bits of a
  // four's place that g leaves alone, so that all eight are in different banks.
  const auto place = [](int depth, int token, int four) {
    const int t = token / 2 % 4;
    constexpr int kLow = kStride == 1 ? 2 : 1, kHigh = kStride == 4 ? 2 : 4;
    return (depth * kTokens + token) * kFours + (four ^ (t % 2 * kLow + t / 2 * kHigh));
  };
  __syncthreads();  // no warp needs a tile any more that these take the place of
  for_each([&](int token, int result, const float (&sums)[4]) {
    memcpy(dynamic_shared_memory + place(threadIdx.x / kWarp, token, result / 4), sums, 16);
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kFours; i += kDepth * kWarp) {
    const int token = i / kFours, four = i % kFours;
    float totals[4] = {};
#pragma unroll
    for (int depth = 0; depth < kDepth; depth++) {
      float sums[4];
      memcpy(sums, dynamic_shared_memory + place(depth, token, four), 16);
#pragma unroll
      for (int k = 0; k < 4; k++) totals[k] += sums[k];
    }
    write(token, 4 * four, totals);
  }
}

}  // namespace glmkern::cuda
