// quant_linear's backward on tensor cores: dx [M, K] = (dy [M, N] * scale [N]) codes [N, K].
//
// The sum runs over the weight's rows, so that its columns take the instruction's rows, without a
// transposition: the columns of a packed word are those of different instructions. Lane (g, t) =
// (lane / 4, lane % 4) has word g of a warp's eight. With 4 bits these are 64 columns, and
// instruction i takes columns i and i + 4 of each word, in its rows g and g + 8:
//
//     column of a word   0 1 2 3   4 5 6 7
//     instruction        0 1 2 3   0 1 2 3
//
// So a lane ends with 8 neighbouring results of a token. A step of a warp is 32 rows of the weight,
// 8 t to 8 t + 7 lane t's, of which an instruction takes four as two pairs; of dy, lane (g, t)
// holds the same rows of token g, 16 bytes of shared memory.
//
// Weights are rounded to the activations' type, as dequantising them does: dy * scale would fall
// below the smallest half.
//
// A tile of shared memory is two steps. Or kDepth warps of a block have the same columns and a step
// each of a tile; their sums are added in shared memory, in order.
#pragma once

#include "cuda/kernels/quant_linear/mma.cuh"

namespace glmkern::cuda {

template <class T, int kBits, int kTokens, int kColumnWarps, int kDepth>
struct BackwardTile {
  static constexpr int kTileRows = backward_rows(kDepth), kStepRows = 32;
  static constexpr int kLaneColumns = 32 / kBits;    // of a word
  static constexpr int kColumns = 8 * kLaneColumns;  // of a warp
  static constexpr int kInstructions = kLaneColumns / 2;
  static constexpr int kThreads = kColumnWarps * kDepth * kWarp;
  static constexpr int kChunks = kTileRows / 8;       // of a token
  static constexpr int kScaleChunks = kTileRows / 4;  // of four floats
  static constexpr int kSumBytes = kDepth > 1 ? kDepth * kTokens * kColumns * 4 : 0;

  template <class Policy, bool kWide>
  using Tokens = StagedTile<Policy, T, kTokens * kChunks, kThreads, kWide>;
  template <class Policy, bool kWide>
  using Scales = StagedTile<Policy, float, kScaleChunks, kThreads, kWide>;

  // As ForwardTile's: lanes t read neighbouring chunks of two tokens.
  static __device__ int place(int token, int chunk) { return chunk ^ 4 * (token % 2); }
};

template <class Policy, class T, int kBits, int kTokens, int kColumnWarps, int kDepth, bool kWide>
__device__ void mma_backward(const MmaArguments& m) {
  using Tile = BackwardTile<T, kBits, kTokens, kColumnWarps, kDepth>;
  using Tokens = typename Tile::template Tokens<Policy, kWide>;
  using Scales = typename Tile::template Scales<Policy, kWide>;
  constexpr int kTokenTiles = kTokens / 8;
  const QuantLinear& a = m.a;
  const MmaBlock block(m);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int depth = threadIdx.x / kWarp % kDepth, column_warp = threadIdx.x / kWarp / kDepth;
  const int column_of_warp = (block.result * kColumnWarps + column_warp) * Tile::kColumns;

  Tokens tokens(dynamic_shared_memory);
  Scales scales(dynamic_shared_memory + Tokens::kBytes / 16);
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
    tokens.start(stage, source, place_of_chunk<Tile>);
    scales.start(stage, scale_source, in_order);
  };
  const auto finish = [&](int stage) {
    tokens.finish(stage, place_of_chunk<Tile>);
    scales.finish(stage, in_order);
  };

  // A word of each of this lane's rows in a step.
  const int byte = (column_of_warp + g * Tile::kLaneColumns) * kBits / 8;
  const int bytes_left = static_cast<int>(a.row_bytes) - byte;
  const uint8_t* const weight = a.weight + 8 * t * a.row_bytes + byte;
  const auto load_weights = [&](int first_row, uint32_t (&words)[8]) {
    const uint8_t* row = weight + first_row * a.row_bytes;
    const int rows_left = rows - first_row - 8 * t;
#pragma unroll
    for (int r = 0; r < 8; r++) {
      words[r] = load_word<kWide>(row, r < rows_left ? bytes_left : 0);
      row += a.row_bytes;
    }
  };

  float sum[Tile::kInstructions][kTokenTiles][4] = {};
  const auto multiply_step = [&](int stage, int step, const uint32_t (&words)[8]) {
    uint32_t pairs[4][Tile::kLaneColumns];  // of rows 2 p and 2 p + 1, by column
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 bits = scales.chunks(stage)[8 * step + 2 * t + half];
      float s[4];
      memcpy(s, &bits, sizeof s);
#pragma unroll
      for (int p = 2 * half; p < 2 * half + 2; p++) {
        const uint32_t scale = rounded_pair(s[p % 2 * 2], s[p % 2 * 2 + 1], T{});
        decode_rows<T, kBits>(words[2 * p], words[2 * p + 1], pairs[p]);
#pragma unroll
        for (uint32_t& pair : pairs[p]) pair = multiply<T>(pair, scale);
      }
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; j++) {
      const int token = 8 * j + g;
      const uint4 dy =
          tokens.chunks(stage)[token * Tile::kChunks + Tile::place(token, 4 * step + t)];
#pragma unroll
      for (int i = 0; i < Tile::kInstructions; i++) {
        const int other = i + Tile::kInstructions;
        Policy::mma(sum[i][j], {pairs[0][i], pairs[0][other], pairs[1][i], pairs[1][other]},
                    {dy.x, dy.y}, T{});
        Policy::mma(sum[i][j], {pairs[2][i], pairs[2][other], pairs[3][i], pairs[3][other]},
                    {dy.z, dy.w}, T{});
      }
    }
  };

  // Turns of this warp: every kDepth-th step of each tile.
  constexpr int kTurns = Tile::kTileRows / Tile::kStepRows / kDepth;
  const auto row_of = [&](int turn) {
    return (block.begin + turn / kTurns) * Tile::kTileRows +
           (turn % kTurns * kDepth + depth) * Tile::kStepRows;
  };
  const int tiles = block.end - block.begin;
  uint32_t words[8], next_words[8] = {};
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
#pragma unroll 1
    for (int turn = 0; turn < kTurns; turn++) {
      if (tile + 1 < tiles || turn + 1 < kTurns)
        load_weights(row_of(tile * kTurns + turn + 1), next_words);
      multiply_step(tile, turn * kDepth + depth, words);
      memcpy(words, next_words, sizeof words);
    }
    if (ahead < tiles) finish(ahead);
  }

  // f(token, column, sums) for each piece of this lane's results of a token.
  constexpr int kAtOnce = kDepth == 1 ? Tile::kLaneColumns : 4;
  const auto for_each_piece = [&](auto f) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float sums[Tile::kLaneColumns];
#pragma unroll
        for (int i = 0; i < Tile::kInstructions; i++) {
          sums[i] = sum[i][j][e];
          sums[i + Tile::kInstructions] = sum[i][j][2 + e];
        }
#pragma unroll
        for (int i = 0; i < Tile::kLaneColumns; i += kAtOnce) {
          float piece[kAtOnce];
          memcpy(piece, sums + i, sizeof piece);
          f(8 * j + 2 * t + e, g * Tile::kLaneColumns + i, piece);
        }
      }
    }
  };
  const auto write = [&](int token, int column, float (&sums)[kAtOnce]) {
    write_results<T>(m, block, first_token + token, column_of_warp + column, sums,
                     [](int, float total) { return total; });
  };
  if constexpr (kDepth == 1) {
    for_each_piece(write);
  } else {
    static_assert(kColumnWarps == 1);
    add_depths<kDepth, kTokens, Tile::kColumns, Tile::kLaneColumns / 4>(for_each_piece, write);
  }
}

}  // namespace glmkern::cuda
