// quant_linear's backward on tensor cores: dx [M, K] = (dy [M, N] * scale [N]) codes [N, K].
//
// The sum runs over the weight's rows, so that its columns take the instruction's rows, without a
// transposition: the columns of a packed word are those of different instructions. A warp has 8
// words of two neighbours, lane (g, t) = (lane / 4, lane % 4) the words 2 g and 2 g + 1. With 4
// bits these are 128 columns, and column i of a word belongs to instruction i:
//
//     word          2 g               2 g + 1
//     column     0 1 2 ... 7       0 1 2 ... 7
//     of them    row g             row g + 8        of instructions 0 1 2 ... 7
//
// So a lane ends with 16 neighbouring results of a token. A step of a warp is 32 rows of the
// weight, 8 t to 8 t + 7 lane t's, of which an instruction takes four as two pairs; of dy, lane (g,
// t) holds the same rows of token g, 16 bytes of shared memory.
//
// Weights are rounded to the activations' type, as dequantising them does: dy * scale would fall
// below the smallest half.
//
// A tile of shared memory is 128 rows, four steps. kDepth warps of a block have the same columns
// and share the steps; their sums are added in shared memory, in order.
#pragma once

#include "cuda/kernels/quant_linear/mma.cuh"

namespace glmkern::cuda {

template <class T, int kBits, int kTokens, int kColumnWarps, int kDepth>
struct BackwardTile {
  static constexpr int kTileRows = 128, kStepRows = 32;
  static constexpr int kSteps = kTileRows / kStepRows;
  static constexpr int kInstructions = 32 / kBits;        // columns of a word
  static constexpr int kLaneColumns = 2 * kInstructions;  // 8 bytes
  static constexpr int kColumns = 8 * kLaneColumns;       // of a warp
  static constexpr int kThreads = kColumnWarps * kDepth * kWarp;
  static constexpr int kChunks = kTileRows / 8;       // of a token
  static constexpr int kScaleChunks = kTileRows / 4;  // of four floats
  static constexpr int kSumBytes = kDepth > 1 ? kDepth * kTokens * kColumns * 4 : 0;

  // As ForwardTile's: lanes t read neighbouring chunks of two tokens.
  static __device__ int place(int token, int chunk) { return chunk ^ 4 * (token % 2); }
};

template <class Policy, class T, int kBits, int kTokens, int kColumnWarps, int kDepth, bool kWide>
__device__ void mma_backward(const MmaArguments& m) {
  using Tile = BackwardTile<T, kBits, kTokens, kColumnWarps, kDepth>;
  using Tokens = StagedTile<Policy, T, kTokens * Tile::kChunks, Tile::kThreads, kWide>;
  using Scales = StagedTile<Policy, float, Tile::kScaleChunks, Tile::kThreads, kWide>;
  constexpr int kTokenTiles = kTokens / 8, kInstructions = Tile::kInstructions;
  const QuantLinear& a = m.a;
  const MmaBlock block(m);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int depth = threadIdx.x / kWarp % kDepth, column_warp = threadIdx.x / kWarp / kDepth;
  const int column_of_warp = (block.result * kColumnWarps + column_warp) * Tile::kColumns;

  Tokens tokens(dynamic_shared_memory);
  Scales scales(dynamic_shared_memory + Tokens::kBytes / 16);
  const auto place = [](int i) {
    const int chunk = i % Tile::kChunks;
    return i - chunk + Tile::place(i / Tile::kChunks, chunk);
  };
  const auto in_order = [](int i) { return i; };
  const int first_token = block.token * kTokens, rows = static_cast<int>(a.n);
  const int tokens_left = static_cast<int>(a.rows) - first_token;
  const T* const dy_of_block = static_cast<const T*>(a.x) + first_token * a.n;
  const auto start = [&](int stage, int tile) {
    const int first_row = tile * Tile::kTileRows;
    const auto source = [&](int i) {
      const int token = i / Tile::kChunks, row = first_row + i % Tile::kChunks * 8;
      return Chunk<T>{dy_of_block + token * rows + row, token < tokens_left ? rows - row : 0};
    };
    const auto scale_source = [&](int i) {
      const int row = first_row + 4 * i;
      return Chunk<float>{a.scale + row, rows - row};
    };
    tokens.start(stage, source, place);
    scales.start(stage, scale_source, in_order);
  };
  const auto finish = [&](int stage) {
    tokens.finish(stage, place);
    scales.finish(stage, in_order);
  };

  // Two words of each of this lane's rows in a step.
  const int byte = (column_of_warp + g * Tile::kLaneColumns) * kBits / 8;
  const int bytes_left = static_cast<int>(a.row_bytes) - byte;
  const uint8_t* const weight = a.weight + 8 * t * a.row_bytes + byte;
  const auto load_weights = [&](int first_row, uint32_t (&words)[8][2]) {
    const uint8_t* const of_step = weight + first_row * a.row_bytes;
    const int rows_left = rows - first_row - 8 * t;
#pragma unroll
    for (int r = 0; r < 8; r++) {
      load_words<8, kWide>(of_step + r * a.row_bytes, r < rows_left ? bytes_left : 0, words[r]);
    }
  };

  float sum[kInstructions][kTokenTiles][4] = {};
  // Four rows: pairs of `words` 0, 1 and 2, 3 with their scales, and the same rows of each token.
  const auto multiply_four = [&](const uint32_t (&words)[8][2], int r, const uint32_t (&scale)[2],
                                 const uint32_t (&dy)[kTokenTiles][2]) {
    constexpr int kOfByte = 8 / kBits;
    const auto multiply_byte = [&](auto byte_index) {
      constexpr int kByte = decltype(byte_index)::value;
      uint32_t pairs[2][2][kOfByte];  // of rows r and r + 2, of both words
#pragma unroll
      for (int p = 0; p < 2; p++) {
#pragma unroll
        for (int w = 0; w < 2; w++) {
          decode_rows<T, kBits, kByte>(words[r + 2 * p][w], words[r + 2 * p + 1][w], pairs[p][w]);
#pragma unroll
          for (int i = 0; i < kOfByte; i++) {
            pairs[p][w][i] = multiply<T>(pairs[p][w][i], scale[p]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kOfByte; i++) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; j++) {
          Policy::mma(sum[kByte * kOfByte + i][j],
                      {pairs[0][0][i], pairs[0][1][i], pairs[1][0][i], pairs[1][1][i]}, dy[j], T{});
        }
      }
    };
    multiply_byte(Int<0>{});
    multiply_byte(Int<1>{});
    multiply_byte(Int<2>{});
    multiply_byte(Int<3>{});
  };

  const auto multiply_step = [&](int stage, int step, const uint32_t (&words)[8][2]) {
    uint32_t dy[2][kTokenTiles][2], scale[2][2];
#pragma unroll
    for (int j = 0; j < kTokenTiles; j++) {
      const int token = 8 * j + g;
      const uint4 x = tokens.chunk(stage, token * Tile::kChunks + Tile::place(token, 4 * step + t));
      dy[0][j][0] = x.x, dy[0][j][1] = x.y, dy[1][j][0] = x.z, dy[1][j][1] = x.w;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 bits = scales.chunk(stage, 8 * step + 2 * t + half);
      float s[4];
      memcpy(s, &bits, sizeof s);
      scale[half][0] = rounded_pair(s[0], s[1], T{});
      scale[half][1] = rounded_pair(s[2], s[3], T{});
    }
#pragma unroll
    for (int half = 0; half < 2; half++) multiply_four(words, 4 * half, scale[half], dy[half]);
  };

  // Turns of this warp: every kDepth-th step of each tile.
  constexpr int kTurns = Tile::kSteps / kDepth;
  const auto row_of = [&](int turn) {
    return (block.begin + turn / kTurns) * Tile::kTileRows +
           (turn % kTurns * kDepth + depth) * Tile::kStepRows;
  };
  const int tiles = block.end - block.begin;
  uint32_t words[8][2], next_words[8][2] = {};
  load_weights(row_of(0), words);
#pragma unroll
  for (int stage = 0; stage < Policy::kStages - 1; stage++) {
    if (stage < tiles) {
      start(stage, block.begin + stage);
      finish(stage);
    }
    end_of_starts<Policy>();
  }
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_tiles<Policy>();
    __syncthreads();
    const int ahead = tile + Policy::kStages - 1;
    if (ahead < tiles) start(ahead, block.begin + ahead);
    end_of_starts<Policy>();
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      if (tile + 1 < tiles || turn + 1 < kTurns)
        load_weights(row_of(tile * kTurns + turn + 1), next_words);
      multiply_step(tile, turn * kDepth + depth, words);
      memcpy(words, next_words, sizeof words);
    }
    if (ahead < tiles) finish(ahead);
  }

  // f(token, column, sums) for each four of the 2 kInstructions results of a token.
  const auto for_each_four = [&](auto f) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int w = 0; w < 2; w++) {
#pragma unroll
          for (int i = 0; i < kInstructions; i += 4) {
            float sums[4];
#pragma unroll
            for (int k = 0; k < 4; k++) sums[k] = sum[i + k][j][2 * w + e];
            f(8 * j + 2 * t + e, g * Tile::kLaneColumns + w * kInstructions + i, sums);
          }
        }
      }
    }
  };
  const auto write = [&](int token, int column, float (&sums)[4]) {
    write_results<T>(m, block, first_token + token, column_of_warp + column, sums,
                     [](int, float total) { return total; });
  };
  if constexpr (kDepth == 1) {
    for_each_four(write);
  } else {
    static_assert(kColumnWarps == 1);
    add_depths<kDepth, kTokens, Tile::kColumns, Tile::kLaneColumns / 4>(for_each_four, write);
  }
}

}  // namespace glmkern::cuda
