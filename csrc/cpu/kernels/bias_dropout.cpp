// bias_dropout_add on the CPU: one pass, the factors of dropout drawn in registers between the
// loads and the store.
#include "cpu/kernels/bias_dropout_cpu.h"

#include "cpu/kernels/philox.h"
#include "cpu/kernels/split_sums.h"

namespace glmkern::CPU_ISA {
namespace {

// f(i, lanes, factors) for every vector of a row whose elements in the sequence start at `first`.
template <class F>
void for_each_factor(const Dropout& dropout, int64_t sequence_id, int64_t first, int64_t hidden,
                     F f) {
  const int64_t skipped = first % 4;
  if (skipped == 0) {
    dropout.for_each_vec(sequence_id, first, hidden, f);
    return;
  }
  // The row starts within a counter's four elements: draw from the counter's first one on.
  constexpr int64_t kChunk = 256;
  float factors[kChunk + 4];
  for (int64_t chunk = 0; chunk < hidden; chunk += kChunk) {
    const int64_t n = hidden - chunk < kChunk ? hidden - chunk : kChunk;
    dropout.factors(sequence_id, first - skipped + chunk, n + skipped, factors);
    for_each_vec(
        n, [&](int64_t i, auto lanes) { f(chunk + i, lanes, load(factors + skipped + i, lanes)); });
  }
}

// f(row, sequence id, the row's first element in that sequence) for rows begin <= row < end.
template <class F>
void for_each_dropout_row(const DropoutRows& rows, int64_t hidden, int64_t begin, int64_t end,
                          F f) {
  int64_t sequence = 0;
  for (int64_t row = begin; row < end; row++) {
    while (row >= rows.sequences.cu_seqlens[sequence + 1]) sequence++;
    f(row, rows.sequences.ids[sequence], (row - rows.sequences.cu_seqlens[sequence]) * hidden);
  }
}

template <class T, bool kBias>
void forward(const BiasDropoutForward& a, int64_t begin, int64_t end) {
  const int64_t hidden = a.hidden;
  const T* bias = static_cast<const T*>(a.bias);
  const bool streaming = worth_streaming(static_cast<T*>(a.y), a.rows, hidden);
  const auto biased = [&](const T* x, int64_t i, auto lanes) {
    Vec v = load(x + i, lanes);
    if constexpr (kBias) v += load(bias + i, lanes);
    return v;
  };
  const auto write = [&](T* y, Vec v, auto lanes) {
    streaming ? stream(y, v, lanes) : store(y, v, lanes);
  };
  const T* all_x = static_cast<const T*>(a.x);
  const T* all_residual = static_cast<const T*>(a.residual);
  T* all_y = static_cast<T*>(a.y);
  if (a.dropout.p == 0) {
    for (int64_t start = begin * hidden; start < end * hidden; start += hidden) {
      for_each_vec(hidden, [&](int64_t i, auto lanes) {
        const Vec v = biased(all_x + start, i, lanes) + load(all_residual + start + i, lanes);
        write(all_y + start + i, v, lanes);
      });
    }
  } else {
    const Dropout dropout(a.dropout.seed, a.dropout.p);
    const auto drop_row = [&](int64_t row, int64_t sequence_id, int64_t first) {
      const int64_t start = row * hidden;
      for_each_factor(dropout, sequence_id, first, hidden, [&](int64_t i, auto lanes, Vec factor) {
        const Vec v = biased(all_x + start, i, lanes) * factor;
        write(all_y + start + i, v + load(all_residual + start + i, lanes), lanes);
      });
    };
    for_each_dropout_row(a.dropout, hidden, begin, end, drop_row);
  }
  if (streaming) end_streaming();
}

template <class T, bool kBiasGrad>
void backward(const BiasDropoutBackward& a, int64_t begin, int64_t end, float* partial) {
  const int64_t hidden = a.hidden;
  const bool streaming = worth_streaming(static_cast<T*>(a.dx), a.rows, hidden);
  const Dropout dropout(a.dropout.seed, a.dropout.p);
  for_each_dropout_row(a.dropout, hidden, begin, end, [&](int64_t row, int64_t id, int64_t first) {
    const T* dy = static_cast<const T*>(a.dy) + row * hidden;
    T* dx = static_cast<T*>(a.dx) + row * hidden;
    for_each_factor(dropout, id, first, hidden, [&](int64_t i, auto lanes, Vec factor) {
      const Vec gradient = load(dy + i, lanes) * factor;
      if constexpr (kBiasGrad) store(partial + i, load(partial + i, lanes) + gradient, lanes);
      streaming ? stream(dx + i, gradient, lanes) : store(dx + i, gradient, lanes);
    });
  });
  if (streaming) end_streaming();
}

}  // namespace

void bias_dropout_add_fwd(const BiasDropoutForward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    (a.bias != nullptr ? forward<T, true> : forward<T, false>)(a, begin, end);
  });
}

void bias_dropout_add_bwd(const BiasDropoutBackward& a, int64_t begin, int64_t end,
                          float* partial) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    (partial != nullptr ? backward<T, true> : backward<T, false>)(a, begin, end, partial);
  });
}

void bias_dropout_add_dbias(const BiasDropoutBackward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto element) {
    sum_splits(a.partial, a.splits, a.hidden, static_cast<decltype(element)*>(a.dbias), begin, end);
  });
}

}  // namespace glmkern::CPU_ISA
