// quant_linear's forward on tensor cores: y [M, N] = x [M, K] (codes [N, K] * scale [N])^T + bias.
//
// A warp has 32 rows of the weight, lane (g, t) = (lane / 4, lane % 4) four of them, 4 g to 4 g +
// 3, and in a step 16 bytes of each, which the lanes t share out. With 4 bits a step is 128
// columns:
//
//     columns   0 ........ 31   32 ....... 63   64 ....... 95   96 ...... 127
//     lane t         0               1               2               3
//
// An instruction takes four columns of each lane's, as two pairs: rows 4 g and 4 g + 1 in its rows
// g and g + 8, rows 4 g + 2 and 4 g + 3 in another instruction. So a lane ends with four
// neighbouring results of a token. Of x, lane (g, t) holds the same columns of token g: 16 bytes of
// shared memory are two instructions' worth.
//
// kDepth warps of a block have the same rows and take turns at the steps; their sums are added in
// shared memory, in order. That keeps enough loads under way where tokens, and so blocks, are few.
#pragma once

#include "cuda/kernels/quant_linear/mma.cuh"

namespace glmkern::cuda {

template <class T, int kBits, int kTokens, int kRowWarps, int kDepth>
struct ForwardTile {
  static constexpr int kRows = 32;                     // of the weight, a warp
  static constexpr int kLaneColumns = 16 * 8 / kBits;  // 16 bytes
  static constexpr int kColumns = 4 * kLaneColumns;    // a step of one warp
  static constexpr int kThreads = kRowWarps * kDepth * kWarp;
  static constexpr int kChunks = kColumns / 8;  // of a token in a step of one warp
  static constexpr int kLaneChunks = kChunks / 4;
  static constexpr int kSumBytes = kDepth > 1 ? kDepth * kTokens * kRows * 4 : 0;

  template <class Policy, bool kWide>
  using Tokens = StagedTile<Policy, T, kDepth * kTokens * kChunks, kThreads, kWide>;

  // Where a token's chunk is. The eight lanes that shared memory serves at once read chunks
  // kLaneChunks apart of two tokens, and write neighbouring ones: either way these places have no
  // bank in common.
  static __device__ int place(int token, int chunk) {
    const int parity = token % 2;
    return kLaneChunks == 4 ? chunk ^ chunk / 8 ^ 2 * parity : chunk ^ parity;
  }
};

template <class Policy, class T, int kBits, int kTokens, int kRowWarps, int kDepth, bool kWide>
__device__ void mma_forward(const MmaArguments& m) {
  using Tile = ForwardTile<T, kBits, kTokens, kRowWarps, kDepth>;
  using Tokens = typename Tile::template Tokens<Policy, kWide>;
  constexpr int kRowTiles = 2, kTokenTiles = kTokens / 8;
  const QuantLinear& a = m.a;
  const MmaBlock block(m);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int depth = threadIdx.x / kWarp % kDepth, row_warp = threadIdx.x / kWarp / kDepth;
  const int row_of_warp = (block.result * kRowWarps + row_warp) * Tile::kRows;

  // A step's tokens are kDepth tiles [kTokens, kColumns].
  Tokens tokens(dynamic_shared_memory);
  const int first_token = block.token * kTokens, columns = static_cast<int>(a.k);
  const int tokens_left = static_cast<int>(a.rows) - first_token;
  const T* const x = static_cast<const T*>(a.x) + first_token * a.k;
  const auto source = [&](int step) {
    return [&, step](int i) {
      const int token = i / Tile::kChunks % kTokens;
      const int column =
          (step * kDepth + i / (kTokens * Tile::kChunks)) * Tile::kColumns + i % Tile::kChunks * 8;
      return Chunk<T>{x + token * columns + column, token < tokens_left ? columns - column : 0};
    };
  };

  // The 16 bytes of each of this lane's rows.
  const int row_bytes = static_cast<int>(a.row_bytes);
  const int rows_left = static_cast<int>(a.n) - row_of_warp - 4 * g;
  const uint8_t* const weight = a.weight + (row_of_warp + 4 * g) * a.row_bytes;
  const auto load_weights = [&](int step, uint32_t (&words)[4][4]) {
    const int byte = ((step * kDepth + depth) * 4 + t) * 16;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      load_words<kWide>(weight + r * row_bytes + byte, r < rows_left ? row_bytes - byte : 0,
                        words[r]);
    }
  };

  float sum[kRowTiles][kTokenTiles][4] = {};
  const auto multiply = [&](int step, const uint32_t (&words)[4][4]) {
    constexpr int kPairs = 16 / kBits, kWordsOfChunk = kBits / 4;
#pragma unroll
    for (int c = 0; c < Tile::kLaneChunks; c++) {  // eight columns each
      uint32_t pairs[4][4];
#pragma unroll
      for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int w = 0; w < kWordsOfChunk; w++) {
          uint32_t decoded[kPairs];
          decode_columns<T, kBits>(words[r][c * kWordsOfChunk + w], decoded);
#pragma unroll
          for (int p = 0; p < kPairs; p++) pairs[r][w * kPairs + p] = decoded[p];
        }
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; j++) {
        const int token = depth * kTokens + 8 * j + g;
        const uint4 x = tokens.chunks(
            step)[token * Tile::kChunks + Tile::place(token, t * Tile::kLaneChunks + c)];
#pragma unroll
        for (int i = 0; i < kRowTiles; i++) {
          const uint32_t (&even)[4] = pairs[2 * i], (&odd)[4] = pairs[2 * i + 1];
          Policy::mma(sum[i][j], {even[0], odd[0], even[1], odd[1]}, {x.x, x.y}, T{});
          Policy::mma(sum[i][j], {even[2], odd[2], even[3], odd[3]}, {x.z, x.w}, T{});
        }
      }
    }
  };

  const int steps = block.end - block.begin;
  uint32_t words[4][4], next_words[4][4] = {};
  load_weights(block.begin, words);
#pragma unroll
  for (int step = 0; step < Policy::kStages - 1; step++) {
    if (step < steps) tokens.start(step, source(block.begin + step), place_of_chunk<Tile>);
    tokens.finish(step, place_of_chunk<Tile>);
    end_of_starts<Policy>();
  }
  for (int step = 0; step < steps; step++) {
    wait_for_tiles<Policy>();
    __syncthreads();
    const int ahead = step + Policy::kStages - 1;
    if (ahead < steps) tokens.start(ahead, source(block.begin + ahead), place_of_chunk<Tile>);
    end_of_starts<Policy>();
    if (step + 1 < steps) load_weights(block.begin + step + 1, next_words);
    multiply(step, words);
    if (ahead < steps) tokens.finish(ahead, place_of_chunk<Tile>);
    memcpy(words, next_words, sizeof words);
  }

  // f(token, row, sums) for the four results of this lane that belong to each of its tokens.
  const auto for_each_four = [&](auto f) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float sums[4] = {sum[0][j][e], sum[0][j][2 + e], sum[1][j][e], sum[1][j][2 + e]};
        f(8 * j + 2 * t + e, 4 * g, sums);
      }
    }
  };
  // What this thread writes are the same four rows of each of its tokens.
  const int first = row_of_warp + 4 * (kDepth == 1 ? g : threadIdx.x % (Tile::kRows / 4));
  float scale[4] = {}, bias[4] = {};
  if (m.splits == 1) {
    read_row(a.scale + first, static_cast<int>(a.n) - first, scale);
    if (a.bias != nullptr) {
      read_row(static_cast<const T*>(a.bias) + first, static_cast<int>(a.n) - first, bias);
    }
  }
  const auto write = [&](int token, int, float (&sums)[4]) {
    write_results<T>(m, block, first_token + token, first, sums,
                     [&](int i, float total) { return total * scale[i] + bias[i]; });
  };
  if constexpr (kDepth == 1) {
    for_each_four(write);
  } else {
    static_assert(kRowWarps == 1);
    add_depths<kDepth, kTokens, Tile::kRows, 1>(for_each_four, write);
  }
}

}  // namespace glmkern::cuda
