// quant_linear for up to eight tokens in float32 on NVIDIA GPUs from sm_75, which have no tensor
// cores for it: every code is read once, becomes a float in registers (float_codes.cuh), and meets
// each token in one FMA. Sums are float32, in an order that depends on the shapes alone.
//
// Forward: a warp has a few rows of the weight. Its lanes read 16 bytes of each, side by side, for
// a chunk of columns; with 4 bits and 32 lanes:
//
//     columns of a chunk   0 ... 31   32 ... 63   64 ... 95   ...   992 ... 1023
//     lane                 0          1           2                 31
//
// A block's warps share x, which is put into shared memory chunk by chunk. Four neighbouring
// columns are read at once, by all lanes from their own place. So what lane l needs at its step j
// lies at [j][l], and each step reads 512 bytes without a gap; the padding behind a step lets the
// writers, who come in the order of columns, meet other banks:
//
//     step 0   | lane 0: columns 0 ... 3 | lane 1: 32 ... 35 | lane 2: 64 ... 67 | ... | padding |
//     step 1   | lane 0: columns 4 ... 7 | lane 1: 36 ... 39 | lane 2: 68 ... 71 | ... | padding |
//
// Backward: a lane has the columns of one word, a warp those of 32 side by side, for as many rows
// as the block's split has (row_tiles.cuh). It takes 32 rows at a time: lane l loads dy * scale of
// row l, and all read it from shared memory. The warps' sums are added in order, then the splits'.
//
// Rows that 16-byte accesses do not fit (an odd length, an unaligned tensor) take the same kernels
// with kNarrow, which read byte by byte.
#include "cuda/device/column_sums.cuh"
#include "cuda/device/float_codes.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/kernels/quant_linear/quant_linear_cuda.h"
#include "ops/ceil_div.h"

namespace glmkern::cuda {
namespace {

constexpr int kGemvThreads = 256;
constexpr int kGemvWarps = kGemvThreads / kWarp;
// Blocks of the backward that keep all multiprocessors of a large chip busy. The number is fixed,
// so that the order of a sum does not depend on the chip.
constexpr int64_t kBackwardBlocks = 512;
constexpr int kRowsInFlight = 4;

// kBytes of a row's codes from `byte` on, zeros past its end; they are read once.
template <bool kNarrow, int kBytes>
__device__ void load_codes(const uint8_t* row, int byte, int row_bytes,
                           uint32_t (&words)[kBytes / 4]) {
#pragma unroll
  for (int w = 0; w < kBytes / 4; w++) words[w] = 0;
  if constexpr (kNarrow) {
#pragma unroll
    for (int b = 0; b < kBytes; b++) {
      if (byte + b < row_bytes) words[b / 4] |= static_cast<uint32_t>(row[byte + b]) << b % 4 * 8;
    }
  } else if (byte < row_bytes) {
    if constexpr (kBytes == 16) {
      const Vec<uint8_t, 16> v = load_once<16>(row + byte);
      memcpy(words, &v, sizeof words);
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(row + byte);
    }
  }
}

// Four columns of x, zeros past its row's end.
template <bool kNarrow>
__device__ Vec<float, 4> load_quad(const float* row, int column, int columns) {
  Vec<float, 4> quad{};
  if constexpr (kNarrow) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (column + e < columns) quad.element[e] = row[column + e];
    }
  } else {
    if (column < columns) quad = load<4>(row + column);
  }
  return quad;
}

template <int kTokens>
constexpr int kRowsOfWarp = kTokens <= 2 ? 2 : 4;

template <int kBits, int kTokens, bool kNarrow>
__global__ void __launch_bounds__(kGemvThreads, kNarrow ? 1 : 2)
    gemv_forward_kernel(QuantLinear a) {
  constexpr int kCodes = 128 / kBits;  // of 16 bytes
  constexpr int kChunk = kWarp * kCodes, kSteps = kCodes / 4;
  constexpr int kRows = kRowsOfWarp<kTokens>;
  __shared__ Vec<float, 4> staged[kTokens][kSteps][kWarp + 1];
  const int lane = threadIdx.x % kWarp;
  const int k = static_cast<int>(a.k), row_bytes = static_cast<int>(a.row_bytes);
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * kGemvWarps + threadIdx.x / kWarp) * kRows;
  const float* __restrict__ x = static_cast<const float*>(a.x);
  const uint8_t* __restrict__ weight = a.weight;

  float sum[kTokens][kRows] = {};
  for (int chunk = 0; chunk < k; chunk += kChunk) {
    uint32_t words[kRows][4];
    const int byte = (chunk / kCodes + lane) * 16;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t row = first + r;
      load_codes<kNarrow, 16>(weight + row * a.row_bytes, byte, row < a.n ? row_bytes : 0,
                              words[r]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * kChunk / 4; i += kGemvThreads) {
      const int token = i / (kChunk / 4), quad = i % (kChunk / 4);
      const Vec<float, 4> of_token =
          load_quad<kNarrow>(x + token * a.k, chunk + quad * 4, token < a.rows ? k : 0);
      staged[token][quad % kSteps][quad / kSteps] = of_token;
    }
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      float code[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const uint32_t of_step = words[r][step * kBits / 8] >> step * 4 * kBits % 32;
        decode<kBits>(&of_step, code[r]);
      }
#pragma unroll
      for (int token = 0; token < kTokens; token++) {
        const Vec<float, 4> quad = staged[token][step][lane];
#pragma unroll
        for (int e = 0; e < 4; e++) {
#pragma unroll
          for (int r = 0; r < kRows; r++) sum[token][r] += quad.element[e] * code[r][e];
        }
      }
    }
  }

  // Each of the warp's results to a lane of its own.
  float mine = 0;
#pragma unroll
  for (int token = 0; token < kTokens; token++) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float total = warp_reduce(sum[token][r], Sum{});
      if (lane == token * kRows + r) mine = total;
    }
  }
  const int token = lane / kRows;
  const int64_t row = first + lane % kRows;
  if (token < a.rows && token < kTokens && row < a.n) {
    const float bias = a.bias == nullptr ? 0 : static_cast<const float*>(a.bias)[row];
    static_cast<float*>(a.y)[token * a.n + row] = mine * a.scale[row] + bias;
  }
}

// result [splits, rows, k]; a split is `piece` rows of the weight.
template <int kBits, int kTokens, bool kNarrow>
__global__ void __launch_bounds__(kTileThreads)
    gemv_backward_kernel(QuantLinear a, int64_t piece, unsigned tiles, float* result) {
  constexpr int kCodes = 32 / kBits;
  __shared__ Vec<float, kTokens> scaled[kGroups][kWarp];
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const RowTile mine(a.n, piece, tiles);
  const int byte = (static_cast<int>(mine.tile) * kWarp + lane) * 4;
  const int row_bytes = static_cast<int>(a.row_bytes);
  const int rows = static_cast<int>(mine.end - mine.begin);  // none in a split past the end
  const float* __restrict__ dy = static_cast<const float*>(a.x) + mine.begin;
  const float* __restrict__ scale = a.scale + mine.begin;
  const uint8_t* __restrict__ weight = a.weight + mine.begin * a.row_bytes;

  float sum[kTokens][kCodes] = {};
  for (int first = group * kWarp; first < rows; first += kTileThreads) {
    const int own = first + lane;
    const float scale_of_own = own < rows ? scale[own] : 0;
    __syncwarp();
#pragma unroll
    for (int token = 0; token < kTokens; token++) {
      const bool there = own < rows && token < a.rows;
      scaled[group][lane].element[token] = there ? dy[token * a.n + own] * scale_of_own : 0;
    }
    __syncwarp();
    for (int r = 0; r < kWarp && first + r < rows; r += kRowsInFlight) {
      uint32_t word[kRowsInFlight][1];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; i++) {
        const int row = first + r + i;
        load_codes<kNarrow, 4>(weight + row * a.row_bytes, byte, row < rows ? row_bytes : 0,
                               word[i]);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; i++) {
        float code[kCodes];
        decode<kBits>(word[i], code);
        const Vec<float, kTokens> factor = scaled[group][r + i];
#pragma unroll
        for (int token = 0; token < kTokens; token++) {
#pragma unroll
          for (int c = 0; c < kCodes; c++) sum[token][c] += factor.element[token] * code[c];
        }
      }
    }
  }

  float* mine_of_split = result + mine.split * a.rows * a.k;
#pragma unroll
  for (int token = 0; token < kTokens; token++) {
    if (token >= a.rows) break;
    if (token > 0) __syncthreads();
    sum_groups<kCodes>(mine.tile, a.k, sum[token], [&](int64_t column, float total) {
      mine_of_split[token * a.k + column] = total;
    });
  }
}

// f(bits, tokens, narrow), types that hold constants. Narrow rows are rare: one size is enough.
template <class F>
void with_kernel(const QuantLinear& a, bool narrow, F f) {
  if (a.dtype != DType::kFloat || !a.has_codes() || a.rows > kGemvTokens) {
    throw std::runtime_error("quant_linear: the gemv takes codes and up to 8 rows of float32");
  }
  if (a.n > 1 << 30 || a.k > 1 << 30) {
    throw std::runtime_error("quant_linear: more than 2^30 rows or columns");
  }
  const auto with_tokens = [&](auto bits) {
    if (narrow) return f(bits, Int<kGemvTokens>{}, std::true_type{});
    if (a.rows <= 1) return f(bits, Int<1>{}, std::false_type{});
    if (a.rows <= 2) return f(bits, Int<2>{}, std::false_type{});
    if (a.rows <= 4) return f(bits, Int<4>{}, std::false_type{});
    return f(bits, Int<kGemvTokens>{}, std::false_type{});
  };
  a.format == WeightFormat::kInt4 ? with_tokens(Int<4>{}) : with_tokens(Int<8>{});
}

int64_t words_of_row(const QuantLinear& a) { return ceil_div(a.row_bytes, 4); }

// The rows of a split: as many for each warp.
int64_t piece_of(int64_t rows, int64_t splits) {
  return ceil_div(rows > 0 ? rows : 1, splits * kTileThreads) * kTileThreads;
}

}  // namespace

void gemv_fp32_fwd(const QuantLinear& a, void* stream) {
  const bool narrow =
      !fits_wide_rows<float>(a.k, {a.x}) || !fits_wide_rows<uint8_t>(a.row_bytes, {a.weight});
  with_kernel(a, narrow, [&](auto bits, auto tokens, auto is_narrow) {
    constexpr int kTokens = decltype(tokens)::value;
    launch("quant_linear_gemv_fwd",
           gemv_forward_kernel<decltype(bits)::value, kTokens, decltype(is_narrow)::value>,
           ceil_div(a.n, kGemvWarps * kRowsOfWarp<kTokens>), kGemvThreads, stream, a);
  });
}

int64_t gemv_fp32_bwd_splits(const QuantLinear& a) {
  const int64_t tiles = ceil_div(words_of_row(a), kWarp);
  const int64_t most = kBackwardBlocks / (tiles > 0 ? tiles : 1);
  const int64_t splits = ceil_div(a.n, piece_of(a.n, most > 1 ? most : 1));
  return splits > 1 ? splits : 1;
}

void gemv_fp32_bwd(const QuantLinear& a, int64_t splits, float* partial, void* stream) {
  const bool narrow = a.row_bytes % 4 != 0 || reinterpret_cast<uintptr_t>(a.weight) % 4 != 0;
  const int64_t tiles = ceil_div(words_of_row(a), kWarp), piece = piece_of(a.n, splits);
  float* result = splits > 1 ? partial : static_cast<float*>(a.y);
  with_kernel(a, narrow, [&](auto bits, auto tokens, auto is_narrow) {
    launch("quant_linear_gemv_bwd",
           gemv_backward_kernel<decltype(bits)::value, decltype(tokens)::value,
                                decltype(is_narrow)::value>,
           tiles * splits, kTileThreads, stream, a, piece, static_cast<unsigned>(tiles), result);
  });
  if (splits > 1) {
    launch_split_sums<float>("quant_linear_gemv_bwd", partial, splits, a.rows * a.k, a.y, stream);
  }
}

}  // namespace glmkern::cuda
