// Parts of a weight of 4 or 8 bits as numbers, for torch's product, on NVIDIA GPUs from sm_75. The
// result is written to the L2 cache and read from there, and memory bounds the rest.
//
// Writing is most of it: a half is four times its code of 4 bits. So a thread has the codes of 16
// bytes of the result, 2, 4 or 8 bytes. What the lanes of a warp read and what they write are then
// both one piece without gaps. A warp takes kRows rows of a tile of 32 such pieces, and loads the
// codes of all before it converts the first, to wait for memory once:
//
//     row         0 1 2 ... 7   8 9 10 ... 15   16 ... 31
//     warp        0 1 2 ... 7   0 1 2 ... 7      0 ...  7
//
// Where such pieces do not fit (odd lengths, an unaligned weight) the same kernel takes bytes.
#include "cuda/device/float_codes.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/row_tiles.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/kernels/quant_linear/quant_linear_cuda.h"
#include "ops/ceil_div.h"

namespace glmkern::cuda {
namespace {

constexpr int kRows = 4;  // 32 warps a multiprocessor then wait for 16 KB of codes

template <int kBytes>
__device__ void load_bytes(const uint8_t* p, uint32_t (&words)[(kBytes + 3) / 4]) {
  using Word =
      std::conditional_t<kBytes == 8, uint64_t,
                         std::conditional_t<kBytes == 4, uint32_t,
                                            std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>;
  static_assert(sizeof(Word) == kBytes);
  const Word word = *reinterpret_cast<const Word*>(p);
  words[0] = static_cast<uint32_t>(word);
  if constexpr (kBytes == 8) words[1] = static_cast<uint32_t>(word >> 32);
}

template <class T, int kBits, int kWidth>
__global__ void __launch_bounds__(kTileThreads) dequantize_kernel(Slab a, unsigned tiles) {
  constexpr int kBytes = kWidth * kBits / 8;
  const RowTile mine(a.rows, kGroups * kRows, tiles);
  const int64_t column = column_of<kWidth>(mine.tile);
  if (column >= a.columns) return;
  const int64_t first = mine.begin + threadIdx.x / kWarp;
  const uint8_t* __restrict__ codes = a.codes + column * kBits / 8;
  const float* __restrict__ scale = a.scale;

  uint32_t words[kRows][(kBytes + 3) / 4];
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const int64_t row = first + i * kGroups;
    if (row < mine.end) load_bytes<kBytes>(codes + row * a.row_bytes, words[i]);
  }
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const int64_t row = first + i * kGroups;
    if (row >= mine.end) return;
    float code[kWidth];
    decode<kBits>(words[i], code);
    Vec<T, kWidth> result;
#pragma unroll
    for (int k = 0; k < kWidth; k++) result.element[k] = from_float<T>(code[k] * scale[row]);
    T* to = static_cast<T*>(a.result) + row * a.columns + column;
    if constexpr (kWidth == kVectorWidth<T>) {
      store(to, result);
    } else {
      for (int k = 0; k < kWidth; k++) to[k] = result.element[k];
    }
  }
}

template <class T, int kBits>
void dequantize_codes(const Slab& a, void* stream) {
  constexpr int kWide = kVectorWidth<T>, kBytes = kWide * kBits / 8;
  const bool wide = fits_wide_rows<T>(a.columns, {a.result}) && a.row_bytes % kBytes == 0 &&
                    reinterpret_cast<uintptr_t>(a.codes) % kBytes == 0;
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t tiles = tiles_of_row<kWidth>(a.columns);
    launch("dequantize", dequantize_kernel<T, kBits, kWidth>,
           tiles * ceil_div(a.rows, kGroups * kRows), kTileThreads, stream, a,
           static_cast<unsigned>(tiles));
  };
  wide ? run(Int<kWide>{}) : run(Int<8 / kBits>{});
}

}  // namespace

int64_t l2_bytes() {
  int device = 0, bytes = 0;
  require_success("dequantize", cudaGetDevice(&device));
  require_success("dequantize", cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return bytes;
}

void dequantize(const Slab& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    a.bits == 4 ? dequantize_codes<T, 4>(a, stream) : dequantize_codes<T, 8>(a, stream);
  });
}

}  // namespace glmkern::cuda
