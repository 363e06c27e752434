// rope on NVIDIA GPUs from sm_75. Memory bounds it, so the design has one aim: to read and write
// every element once, 16 bytes at a time.
//
// A block takes heads of one token and one group: its threads share all that differs between the
// groups. A vector is 16 bytes of a head, and neighbouring threads have neighbouring vectors. A
// thread has the same vector of up to kHeads heads and reads their common angles once; with 32
// heads of 16 vectors:
//
//     threads    0 to 15          16 to 31         ...   112 to 127
//     vectors    0 to 15          0 to 15          ...   0 to 15
//     heads      0, 8, 16, 24     1, 9, 17, 25     ...   7, 15, 23, 31
//
// All loads of a thread come before its first store: they wait together. Tensors that 16-byte
// accesses do not fit (odd strides, unaligned ones) take the same kernel with vectors of one pair,
// read and written element by element.
#include "cuda/kernels/rope_cuda.h"

#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec.cuh"
#include "ops/ceil_div.h"

namespace glmkern::cuda {
namespace {

constexpr int kGroups = 3;  // q, k and v
constexpr int kMaxThreads = 128;
constexpr int kHeads = 4;  // of a thread, at most
constexpr int kPair = 2;

// How blocks cover a token: each group's heads in rows, vector by vector.
struct Cover {
  int vectors;             // of a head
  int rows_of[kGroups];    // a thread's heads are so many apart
  int blocks_of[kGroups];  // of each group
  int blocks;              // of all groups
};

// cos and sin, by turns, of the angles of channels i to i + kWidth.
template <int kWidth>
__device__ void load_angles(const Rope& a, int64_t position, int i, float (&angles)[kWidth]) {
  const int64_t at = position * (2 * a.pairs) + i;
  switch (a.table_dtype) {
    case DType::kFloat: load_floats(static_cast<const float*>(a.cos_sin) + at, angles); break;
    case DType::kHalf: load_floats(static_cast<const __half*>(a.cos_sin) + at, angles); break;
    case DType::kBFloat16: load_floats(static_cast<const __nv_bfloat16*>(a.cos_sin) + at, angles);
  }
#pragma unroll
  for (int k = 1; k < kWidth; k += 2) angles[k] = a.inverse ? -angles[k] : angles[k];
}

// The channels from p on, of which `left` exist: at least kWidth, where these are 16 bytes.
template <int kWidth, class T>
__device__ Vec<T, kWidth> load_channels(const T* p, int left) {
  if constexpr (kWidth == kVectorWidth<T>) {
    return load<kWidth>(p);
  } else {
    return {p[0], left > 1 ? p[1] : T{}};
  }
}

template <int kWidth, class T>
__device__ void store_channels(T* p, const Vec<T, kWidth>& v, int left) {
  if constexpr (kWidth == kVectorWidth<T>) {
    store(p, v);
  } else {
    p[0] = v.element[0];
    if (left > 1) p[1] = v.element[1];
  }
}

// x, rotated. The products are spelt out: vectors of any width give the same bits.
template <int kWidth>
__device__ void rotate(float (&x)[kWidth], const float (&angles)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; k += kPair) {
    const float even = x[k], odd = x[k + 1], cos = angles[k], sin = angles[k + 1];
    x[k] = fmaf(even, cos, -(odd * sin));
    x[k + 1] = fmaf(odd, cos, even * sin);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads)
    rope_kernel(const __grid_constant__ Rope a, const __grid_constant__ Cover cover) {
  const int64_t token = blockIdx.x / cover.blocks;
  int block = blockIdx.x % cover.blocks, group = 0;
  while (block >= cover.blocks_of[group]) block -= cover.blocks_of[group++];
  const RopeHeads& heads = a.heads[group];

  // Of this group's heads, this thread has first, first + rows, ...: their channels i, i + 1, ...
  const unsigned unit = block * blockDim.x + threadIdx.x;
  const int i = static_cast<int>(unit % cover.vectors) * kWidth;
  const int left = static_cast<int>(a.channels) - i;
  const int count = static_cast<int>(heads.count), rows = cover.rows_of[group];
  const int first = static_cast<int>(unit / cover.vectors);
  if (first >= rows) return;

  // The table's row is known only when the position is there: what can be loaded now is.
  const bool rotated = heads.rotated && i < 2 * a.pairs;
  const int64_t position = rotated ? a.positions[token] : 0;
  const int64_t slot = heads.slots != nullptr ? heads.slots[token] : token;
  const T* x = static_cast<const T*>(heads.x.data) + token * heads.x.token_stride + i;
  const T* bias = static_cast<const T*>(heads.bias);
  Vec<T, kWidth> kept[kHeads], kept_bias[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
    const int head = first + h * rows;
    if (head >= count) continue;
    kept[h] = load_channels<kWidth>(x + head * heads.x.head_stride, left);
    if (bias != nullptr) {
      kept_bias[h] = load_channels<kWidth>(bias + head * heads.x.head_stride + i, left);
    }
  }
  float angles[kWidth] = {};
  if (rotated) load_angles(a, position, i, angles);

  T* y = static_cast<T*>(heads.y.data) + slot * heads.y.token_stride + i;
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
    const int head = first + h * rows;
    if (head >= count) continue;
    float channel[kWidth];
    Vec<T, kWidth> result;
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      channel[k] = to_float(kept[h].element[k]);
      if (bias != nullptr) channel[k] += to_float(kept_bias[h].element[k]);
    }
    if (rotated) rotate(channel, angles);
#pragma unroll
    for (int k = 0; k < kWidth; k++) result.element[k] = from_float<T>(channel[k]);
    store_channels(y + head * heads.y.head_stride, result, left);
  }
}

bool fits_vectors(const StridedHeads& x, int width) {
  return aligned_to_16(x.data) && x.token_stride % width == 0 && x.head_stride % width == 0;
}

// Whether vectors of `width` elements are 16 bytes of one head, all rotated or all copied.
bool fits_vectors(const Rope& a, int width) {
  bool fits = a.channels % width == 0 && 2 * a.pairs % width == 0 && aligned_to_16(a.cos_sin);
  for (int group = 0; group < a.groups; group++) {
    const RopeHeads& heads = a.heads[group];
    fits = fits && fits_vectors(heads.x, width) && fits_vectors(heads.y, width) &&
           aligned_to_16(heads.bias);
  }
  return fits;
}

template <class T, int kWidth>
void run(const Rope& a, void* stream) {
  const int64_t vectors = ceil_div(a.channels, kWidth);
  int64_t rows[kGroups] = {}, most = 0;
  for (int group = 0; group < a.groups; group++) {
    rows[group] = ceil_div(a.heads[group].count, kHeads);
    most = rows[group] > most ? rows[group] : most;
  }
  if (most * vectors > 1 << 28) throw std::runtime_error("rope: more than 2^30 vectors a token");
  const int64_t needed = ceil_div(most * vectors, kWarp) * kWarp;
  const int threads = static_cast<int>(needed < kMaxThreads ? needed : kMaxThreads);
  if (threads == 0) return;
  Cover cover{};
  cover.vectors = static_cast<int>(vectors);
  for (int group = 0; group < kGroups; group++) {
    cover.rows_of[group] = static_cast<int>(rows[group]);
    cover.blocks_of[group] = static_cast<int>(ceil_div(rows[group] * vectors, threads));
    cover.blocks += cover.blocks_of[group];
  }
  launch("rope", rope_kernel<T, kWidth>, a.tokens * cover.blocks, threads, stream, a, cover);
}

}  // namespace

void rope(const Rope& a, void* stream) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kVectorWidth<T>;
    fits_vectors(a, kWide) ? run<T, kWide>(a, stream) : run<T, kPair>(a, stream);
  });
}

}  // namespace glmkern::cuda
