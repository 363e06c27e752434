// prefix_attention backward on the CPU, panel by panel and block by block as the forward:
//
//   P = 2^(scale * log2(e) * q k^T - log2(e) * lse)   dS = P * (dO v^T - D)   D = rowsum(dO * O)
//   dq += scale * dS k      dk += scale * dS^T q      dv += P^T dO
//
// The sums of dk leave out the factor `scale`; prefix_attention_sum applies it.
#include "cpu/kernels/prefix_attention_tiles.h"
#include "cpu/scratch.h"

namespace glmkern::CPU_ISA {
namespace {

// A panel's rows in the layouts that the products take.
struct PanelMemory {
  float *q, *dout;            // [channels, kTileCols], q times scale * log2(e)
  float *q_rows, *dout_rows;  // [padded_channels / kTileCols, kTileCols rows, kTileCols]
  float* dq;                  // [channels, kTileCols]
  float *lse, *lse_rest;      // [kTileCols], their sum is lse times log2(e)
  float* dot;                 // [kTileCols], D

  PanelMemory(float* memory, int64_t channels, int64_t panel) {
    const int64_t columns = channels * kTileCols, rows = padded_channels(channels) * kTileCols;
    q = memory + panel * size(channels);
    dout = q + columns;
    dq = dout + columns;
    q_rows = dq + columns;
    dout_rows = q_rows + rows;
    lse = dout_rows + rows;
    lse_rest = lse + kTileCols;
    dot = lse_rest + kTileCols;
  }

  static int64_t size(int64_t channels) {
    return (3 * channels + 2 * padded_channels(channels) + 3) * kTileCols;
  }
};

// The rows as they are, in strips of kTileCols channels; zero past the last channel.
template <class T>
void pack_strips(HeadRows<const T> rows, const Panel& panel, float* result) {
  for (int64_t i = 0; i < panel.count; i++) {
    const T* row = rows[panel.first + i];
    for (int64_t c = 0; c < padded_channels(rows.channels); c += kLanes) {
      const int64_t left = rows.channels - c;
      const Vec v = left >= kLanes ? load(row + c, Full{})
                    : left > 0     ? load(row + c, Tail{static_cast<int>(left)})
                                   : Vec{};
      store(result + (c / kTileCols * kTileCols + i) * kTileCols + c % kTileCols, v, Full{});
    }
  }
}

template <class T>
void pack_panel(const AttentionGradient& a, const Panel& panel, const PanelMemory& memory) {
  const AttentionRows& r = a.rows;
  const int64_t token_stride = r.groups * r.heads * r.channels;
  const HeadRows<const T> q{static_cast<const T*>(r.q), r.q_stride, r.heads, r.channels};
  const HeadRows<const T> dout{static_cast<const T*>(a.dout), a.dout_stride, r.heads, r.channels};
  const HeadRows<const T> out{static_cast<const T*>(r.out), token_stride, r.heads, r.channels};
  const HeadRows<const float> lse{r.lse, r.groups * r.heads, r.heads, 1};
  pack_transposed(q, panel, r.scale * kLog2E, memory.q);
  pack_transposed(dout, panel, 1.0f, memory.dout);
  pack_strips(q, panel, memory.q_rows);
  pack_strips(dout, panel, memory.dout_rows);
  for (int64_t i = 0; i < kTileCols; i++) {
    // Rounded to one float, it would put the weights of a whole row wrong by the same factor.
    const double exponent = i < panel.count ? *lse[panel.first + i] * kExactLog2E : 0;
    memory.lse[i] = static_cast<float>(exponent);
    memory.lse_rest[i] = static_cast<float>(exponent - memory.lse[i]);
  }
  // Summed as multiply_channels does dO v^T: where out is v itself, the two are equal.
  float* columns = memory.dq;  // not in use yet
  pack_transposed(out, panel, 1.0f, columns);
  for (int64_t column = 0; column < panel.count; column += kLanes) {
    Vec total = {};
    for (int64_t run = 0; run < r.channels; run += kRun) {
      Vec sum = {};
      for (int64_t c = run; c < std::min(r.channels, run + kRun); c++) {
        const int64_t i = c * kTileCols + column;
        sum += load(columns + i, Full{}) * load(memory.dout + i, Full{});
      }
      total += sum;
    }
    store(memory.dot + column, total, Full{});
  }
  std::fill_n(memory.dq, r.channels * kTileCols, 0.0f);
}

// scores -> P, and dweights = dO v^T -> dS, both [keys, kTileCols], in place.
template <int kVecs>
void differentiate(int64_t keys, const PanelMemory& panel, float* scores, float* dweights) {
  for (int j = 0; j < kVecs; j++) {
    const Vec lse = load(panel.lse + j * kLanes, Full{});
    const Vec lse_rest = load(panel.lse_rest + j * kLanes, Full{});
    const Vec dot = load(panel.dot + j * kLanes, Full{});
    for (int64_t i = j * kLanes; i < keys * kTileCols; i += kTileCols) {
      const Vec weight = exp2((load(scores + i, Full{}) - lse) - lse_rest);
      store(scores + i, weight, Full{});
      store(dweights + i, weight * (load(dweights + i, Full{}) - dot), Full{});
    }
  }
}

// sums [keys, padded_channels] += weights [keys, kTileCols] times a panel's strips of rows.
void add_product(int64_t keys, const Panel& panel, int64_t channels, const float* weights,
                 const float* rows, float* sums) {
  for (int64_t c = 0; c < channels; c += kTileCols) {
    with_vecs(channels - c, [&](auto vecs) {
      multiply<vecs()>(keys, Operand{weights, kTileCols, 1}, rows + c * kTileCols, kTileCols,
                       panel.count, sums + c, padded_channels(channels), true);
    });
  }
}

// One block of keys for one panel. scores, dweights: [kBlockKeys, kTileCols].
template <int kVecs>
void differentiate_block(const Panel& panel, const Block& block, int64_t channels,
                         const PanelMemory& memory, const KeySums& sums, bool query_grad,
                         float* scores, float* dweights) {
  const int64_t keys = block.seen_by(panel);
  if (keys <= 0) return;
  multiply_channels<kVecs>(keys, block.keys, memory.q, channels, scores);
  multiply_channels<kVecs>(keys, block.values, memory.dout, channels, dweights);
  mask_later<kVecs>(panel, block, scores);
  differentiate<kVecs>(keys, memory, scores, dweights);
  if (query_grad) {
    multiply<kVecs>(channels, Operand{block.keys, 1, block_stride(channels)}, dweights, kTileCols,
                    keys, memory.dq, kTileCols, true);
  }
  if (sums.keys == nullptr) return;
  const int64_t first = block.begin * padded_channels(channels);
  add_product(keys, panel, channels, dweights, memory.q_rows, sums.keys + first);
  add_product(keys, panel, channels, scores, memory.dout_rows, sums.values + first);
}

// Working memory, with 128 channels: four panels of 80 KB, scores and dweights 28 KB, block
// 126 KB (AVX-512; panels are narrower elsewhere, and as many rows in all).
template <class T>
void backward(const AttentionGradient& a) {
  const AttentionRows& r = a.rows;
  const int64_t channels = r.channels, panels = kPanels * PanelMemory::size(channels);
  const int64_t scores_size = kBlockKeys * kTileCols;
  float* packed =
      thread_scratch(panels + 2 * scores_size + 2 * kBlockKeys * block_stride(channels));
  float *scores = packed + panels, *dweights = scores + scores_size;
  float* block_memory = dweights + scores_size;
  const HeadRows<T> dq{static_cast<T*>(a.dq), r.groups * r.heads * channels, r.heads, channels};
  for (int64_t begin = r.begin; begin < r.end; begin += kSetRows) {
    const int64_t end = std::min(r.end, begin + kSetRows);
    const auto for_each_panel = [&](auto f) {
      for (int64_t i = 0; begin + i * kTileCols < end; i++) {
        f(Panel(r, begin + i * kTileCols), PanelMemory(packed, channels, i));
      }
    };
    for_each_panel(
        [&](const Panel& panel, const PanelMemory& memory) { pack_panel<T>(a, panel, memory); });
    const auto walk = [&](const KeyRun& run, bool causal, int64_t keys, const KeySums& sums) {
      for_each_block<T>(run, causal, channels, 0, keys, block_memory, [&](const Block& block) {
        for_each_panel([&](const Panel& panel, const PanelMemory& memory) {
          with_vecs(panel.count, [&](auto vecs) {
            differentiate_block<vecs()>(panel, block, channels, memory, sums, a.dq != nullptr,
                                        scores, dweights);
          });
        });
      });
    };
    walk(r.prefix, false, r.prefix.count, a.prefix);
    if (a.dq == nullptr) continue;
    walk(r.own, true, r.visible + (end - 1) / r.heads, a.own);
    for_each_panel([&](const Panel& panel, const PanelMemory& memory) {
      float factors[kTileCols];
      std::fill_n(factors, kTileCols, r.scale);
      unpack_transposed(memory.dq, factors, panel, dq);
    });
  }
}

}  // namespace

void prefix_attention_bwd(const AttentionGradient& a) {
  with_dtype(a.rows.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

void prefix_attention_add_kept(const float* dropped, int64_t stride, int64_t rows, int64_t channels,
                               float factor, const float* more, float* sums) {
  const Bits sign = as_bits(broadcast(-0.0f));
  for (int64_t row = 0; row < rows; row++) {
    const int64_t first = row * padded_channels(channels);
    for_each_vec(channels, [&](int64_t c, auto lanes) {
      const Bits bits = as_bits(load(dropped + row * stride + c, lanes));
      const Vec kept = load(more + first + c, lanes) * factor;
      store(sums + first + c, load(sums + first + c, lanes) + (bits == sign ? Vec{} : kept), lanes);
    });
  }
}

void prefix_attention_sum(DType dtype, int64_t channels, float factor, const float* const* parts,
                          int64_t count, void* result) {
  with_dtype(dtype, [&](auto element) {
    auto* row = static_cast<decltype(element)*>(result);
    for_each_vec(channels, [&](int64_t c, auto lanes) {
      Vec sum = {};
      for (int64_t i = 0; i < count; i++) sum += load(parts[i] + c, lanes);
      store(row + c, sum * factor, lanes);
    });
  });
}

}  // namespace glmkern::CPU_ISA
