// swiglu on the CPU: one pass forward and one backward. A row is wide (27,392 channels in
// ChatGLM2), so that threads share a single row too, as decoding needs it.
#include "cpu/kernels/swiglu_cpu.h"

#include "cpu/kernels/vec.h"

namespace glmkern::CPU_ISA {
namespace {

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// f(row, first column, columns) for every row's part of elements begin <= element < end.
template <class F>
void for_each_part(int64_t width, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t row = begin / width, column = begin % width;
    const int64_t columns = width - column < end - begin ? width - column : end - begin;
    f(row, column, columns);
    begin += columns;
  }
}

template <class T>
void forward(const SwigluForward& a, int64_t begin, int64_t end) {
  for_each_part(a.width, begin, end, [&](int64_t row, int64_t column, int64_t columns) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width + column;
    const T* up = gate + a.width;
    T* y = static_cast<T*>(a.y) + row * a.width + column;
    for_each_vec(columns, [&](int64_t i, auto lanes) {
      const Vec g = load(gate + i, lanes);
      store(y + i, g * sigmoid(g) * load(up + i, lanes), lanes);
    });
  });
}

template <class T>
void backward(const SwigluBackward& a, int64_t begin, int64_t end) {
  for_each_part(a.width, begin, end, [&](int64_t row, int64_t column, int64_t columns) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width + column;
    const T* up = gate + a.width;
    const T* dy = static_cast<const T*>(a.dy) + row * a.width + column;
    T* dgate = static_cast<T*>(a.dx) + row * 2 * a.width + column;
    T* dup = dgate + a.width;
    for_each_vec(columns, [&](int64_t i, auto lanes) {
      const Vec g = load(gate + i, lanes), upstream = load(dy + i, lanes);
      const Vec s = sigmoid(g);
      const Vec slope = s * (1.0f + g * (1.0f - s));
      store(dgate + i, upstream * load(up + i, lanes) * slope, lanes);
      store(dup + i, upstream * (g * s), lanes);
    });
  });
}

}  // namespace

void swiglu_fwd(const SwigluForward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto element) { forward<decltype(element)>(a, begin, end); });
}

void swiglu_bwd(const SwigluBackward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto element) { backward<decltype(element)>(a, begin, end); });
}

}  // namespace glmkern::CPU_ISA
