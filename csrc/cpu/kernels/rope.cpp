// rope on the CPU, token by token: the heads of a token share its row of the table, which stays in
// the L1 cache. A vector holds whole pairs: y = x * cos + swapped(x) * (-sin, sin).
#include "cpu/kernels/rope_cpu.h"

#include "cpu/kernels/vec.h"

namespace glmkern::CPU_ISA {
namespace {

// The table as it is stored holds cos and sin of one angle after another, as x holds its pairs.
#if defined(__AVX512F__)
inline Vec swapped(Vec v) {
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
inline Vec cosines(Vec v) {
  return __builtin_shufflevector(v, v, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
}
inline Vec sines(Vec v) {  // -sin, sin
  return __builtin_shufflevector(v, -v, 17, 1, 19, 3, 21, 5, 23, 7, 25, 9, 27, 11, 29, 13, 31, 15);
}
#elif defined(__AVX2__)
inline Vec swapped(Vec v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6); }
inline Vec cosines(Vec v) { return __builtin_shufflevector(v, v, 0, 0, 2, 2, 4, 4, 6, 6); }
inline Vec sines(Vec v) { return __builtin_shufflevector(v, -v, 9, 1, 11, 3, 13, 5, 15, 7); }
#else
inline Vec swapped(Vec v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2); }
inline Vec cosines(Vec v) { return __builtin_shufflevector(v, v, 0, 0, 2, 2); }
inline Vec sines(Vec v) { return __builtin_shufflevector(v, -v, 5, 1, 7, 3); }
#endif

template <class T, class Table, bool kBias>
void rotate_token(const Rope& a, const RopeHeads& heads, int64_t token) {
  const Table* angles = static_cast<const Table*>(a.cos_sin) + a.positions[token] * 2 * a.pairs;
  const int64_t width = heads.rotated ? 2 * a.pairs : 0;
  const float direction = a.inverse ? -1.0f : 1.0f;
  const int64_t slot = heads.slots != nullptr ? heads.slots[token] : token;
  for (int64_t head = 0; head < heads.count; head++) {
    const int64_t head_start = head * heads.x.head_stride;
    const T* x = static_cast<const T*>(heads.x.data) + token * heads.x.token_stride + head_start;
    const T* bias = static_cast<const T*>(heads.bias) + (kBias ? head_start : 0);
    T* y = static_cast<T*>(heads.y.data) + slot * heads.y.token_stride + head * heads.y.head_stride;
    const auto biased = [&](int64_t i, auto lanes) {
      Vec v = load(x + i, lanes);
      if constexpr (kBias) v += load(bias + i, lanes);
      return v;
    };
    for_each_vec(width, [&](int64_t i, auto lanes) {
      const Vec v = biased(i, lanes), angle = load(angles + i, lanes);
      store(y + i, v * cosines(angle) + swapped(v) * (sines(angle) * direction), lanes);
    });
    for_each_vec(a.channels - width, [&](int64_t i, auto lanes) {
      store(y + width + i, biased(width + i, lanes), lanes);
    });
  }
}

template <class T, class Table>
void rotate_tokens(const Rope& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; token++) {
    for (int group = 0; group < a.groups; group++) {
      const RopeHeads& heads = a.heads[group];
      const auto rotate =
          heads.bias != nullptr ? rotate_token<T, Table, true> : rotate_token<T, Table, false>;
      rotate(a, heads, token);
    }
  }
}

}  // namespace

void rope(const Rope& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto element) {
    with_dtype(a.table_dtype, [&](auto table_element) {
      rotate_tokens<decltype(element), decltype(table_element)>(a, begin, end);
    });
  });
}

}  // namespace glmkern::CPU_ISA
