// prefix_attention forward on the CPU. A set of panels goes through the keys block by block: the
// block, packed once, stays in the L2 cache for all of them, a panel's scores in the L1 cache.
#include "cpu/kernels/prefix_attention_cpu.h"

#include "cpu/kernels/philox.h"
#include "cpu/kernels/prefix_attention_tiles.h"
#include "cpu/scratch.h"

namespace glmkern::CPU_ISA {
namespace {

// The running softmax of a panel: out [channels, kTileCols] = sum of 2^(score - largest) * value,
// and per row the largest score and the sum of 2^(score - largest).
struct Softmax {
  float *out, *largest, *sum;

  Softmax(float* memory, int64_t channels, int64_t panel)
      : out(memory + panel * size(channels)),
        largest(out + channels * kTileCols),
        sum(largest + kTileCols) {}

  static int64_t size(int64_t channels) { return (channels + 2) * kTileCols; }

  void clear() const {
    std::fill(out, largest, 0.0f);
    std::fill_n(largest, kTileCols, kUnseen);
    std::fill_n(sum, kTileCols, 0.0f);
  }
};
static_assert(kPanels * kTileCols == kSetRows, "partial_size counts whole panels");

// scores -> 2^(score - largest) in place, for the columns of one vector; returns the factor for
// what was summed up to now. A key's place decides which of four sums it joins.
inline Vec exponentiate(float* scores, int64_t keys, float* top_score, float* sum) {
  const Vec before = load(top_score, Full{});
  Vec top = before;
  for (int64_t key = 0; key < keys; key++) {
    top = largest(top, load(scores + key * kTileCols, Full{}));
  }
  Vec sums[4] = {};
  const auto add = [&](int64_t key, Vec& total) {
    const Vec weight = exp2(load(scores + key * kTileCols, Full{}) - top);
    store(scores + key * kTileCols, weight, Full{});
    total += weight;
  };
  int64_t key = 0;
  for (; key + 4 <= keys; key += 4) {
    for (int i = 0; i < 4; i++) add(key + i, sums[i]);
  }
  for (int i = 0; key + i < keys; i++) add(key + i, sums[i]);
  const Vec factor = exp2(before - top);
  store(top_score, top, Full{});
  store(sum, load(sum, Full{}) * factor + ((sums[0] + sums[1]) + (sums[2] + sums[3])), Full{});
  return factor;
}

// One block of keys for one panel. q [channels, kTileCols], scores [kBlockKeys, kTileCols].
template <int kVecs>
void attend(const Panel& panel, const Block& block, int64_t channels, const float* q, float* scores,
            const Softmax& state) {
  const int64_t keys = block.seen_by(panel);
  if (keys <= 0) return;
  multiply_channels<kVecs>(keys, block.keys, q, channels, scores);
  mask_later<kVecs>(panel, block, scores);
  for (int j = 0; j < kVecs; j++) {
    const int64_t column = j * kLanes;
    const Vec factor =
        exponentiate(scores + column, keys, state.largest + column, state.sum + column);
    for (float* out = state.out + column; out < state.largest; out += kTileCols) {
      store(out, load(out, Full{}) * factor, Full{});
    }
  }
  multiply<kVecs>(channels, Operand{block.values, 1, block_stride(channels)}, scores, kTileCols,
                  keys, state.out, kTileCols, true);
}

// out / sum in the output's dtype and layout; lse in natural logarithms.
template <class T>
void finish(const AttentionRows& a, const Panel& panel, const Softmax& state) {
  const int64_t token_stride = a.groups * a.heads * a.channels;
  float factors[kTileCols];
  for (int i = 0; i < kTileCols; i++) factors[i] = 1.0f / state.sum[i];
  unpack_transposed(state.out, factors, panel,
                    HeadRows<T>{static_cast<T*>(a.out), token_stride, a.heads, a.channels});
  if (a.lse == nullptr) return;
  const HeadRows<float> lse{a.lse, a.groups * a.heads, a.heads, 1};
  for (int64_t i = 0; i < panel.count; i++) {
    const double natural = state.largest[i] / kExactLog2E + __builtin_logf(state.sum[i]);
    *lse[panel.first + i] = static_cast<float>(natural);
  }
}

template <class F>
void for_each_panel(const AttentionRows& a, F f) {
  for (int64_t i = 0; a.begin + i * kTileCols < a.end; i++) f(i, Panel(a, a.begin + i * kTileCols));
}

// Working memory, with 128 channels: queries 64 KB, softmax 65 KB, scores 14 KB, block 126 KB.
template <class T>
void forward(const AttentionRows& a, int64_t key_begin, int64_t key_end, float* partial) {
  const int64_t channels = a.channels;
  const int64_t queries = kSetRows * channels, states = partial_size(channels);
  const int64_t scores_size = kBlockKeys * kTileCols;
  float* q =
      thread_scratch(queries + states + scores_size + 2 * kBlockKeys * block_stride(channels));
  float* state = partial != nullptr ? partial : q + queries;
  float* scores = q + queries + states;
  const HeadRows<const T> rows{static_cast<const T*>(a.q), a.q_stride, a.heads, channels};
  for_each_panel(a, [&](int64_t i, const Panel& panel) {
    pack_transposed(rows, panel, a.scale * kLog2E, q + i * channels * kTileCols);
    Softmax(state, channels, i).clear();
  });
  const auto attend_block = [&](const Block& block) {
    for_each_panel(a, [&](int64_t i, const Panel& panel) {
      with_vecs(panel.count, [&](auto vecs) {
        attend<vecs()>(panel, block, channels, q + i * channels * kTileCols, scores,
                       Softmax(state, channels, i));
      });
    });
  };
  float* memory = scores + scores_size;
  const int64_t own_keys = a.visible + (a.end - 1) / a.heads;
  for_each_block<T>(a.prefix, false, channels, key_begin, std::min(key_end, a.prefix.count), memory,
                    attend_block);
  for_each_block<T>(a.own, true, channels, std::max<int64_t>(key_begin - a.prefix.count, 0),
                    std::min(key_end - a.prefix.count, own_keys), memory, attend_block);
  if (partial != nullptr) return;
  for_each_panel(
      a, [&](int64_t i, const Panel& panel) { finish<T>(a, panel, Softmax(state, channels, i)); });
}

// The softmax over all keys, in place of the first split's.
inline void combine(int64_t channels, int64_t panel, int64_t splits, float* partials) {
  const auto state_of = [&](int64_t split) {
    return Softmax(partials + split * partial_size(channels), channels, panel);
  };
  const Softmax first = state_of(0);
  for (int64_t column = 0; column < kTileCols; column += kLanes) {
    Vec top = load(first.largest + column, Full{});
    for (int64_t split = 1; split < splits; split++) {
      top = largest(top, load(state_of(split).largest + column, Full{}));
    }
    for (int64_t split = 0; split < splits; split++) {
      const Softmax state = state_of(split);
      const Vec factor = exp2(load(state.largest + column, Full{}) - top);
      const auto add = [&](float* total, const float* more) {
        const Vec part = load(more, Full{}) * factor;
        store(total, split == 0 ? part : load(total, Full{}) + part, Full{});
      };
      for (int64_t c = 0; c < channels; c++) {
        add(first.out + c * kTileCols + column, state.out + c * kTileCols + column);
      }
      add(first.sum + column, state.sum + column);
    }
    store(first.largest + column, top, Full{});
  }
}

// `Stored` is the prefix's own type.
template <class T, class Stored>
void drop(const DroppedPrefix& a, int64_t begin, int64_t end) {
  const Dropout dropout(a.seed, a.p);
  float* factors = thread_scratch(end - begin + 3);
  for (int64_t kv = 0; kv < 2; kv++) {
    const Stored* source = static_cast<const Stored*>(kv == 0 ? a.keys : a.values) + begin;
    float* result = a.result + kv * a.count + begin;
    const int64_t first = kv * a.count + begin, aligned = first / 4 * 4;
    dropout.factors(a.sequence_id, aligned, end - begin + first - aligned, factors);
    for_each_vec(end - begin, [&](int64_t i, auto lanes) {
      const Vec factor = load(factors + (first - aligned) + i, lanes);
      // Adding 0 turns the -0 of an element that was kept into 0.
      const Vec kept = round_to<T>(round_to<T>(load(source + i, lanes)) * factor) + 0.0f;
      store(result + i, factor == Vec{} ? broadcast(-0.0f) : kept, lanes);
    });
  }
}

}  // namespace

void prefix_attention_fwd(const AttentionRows& a, int64_t key_begin, int64_t key_end,
                          float* partial) {
  with_dtype(a.dtype,
             [&](auto element) { forward<decltype(element)>(a, key_begin, key_end, partial); });
}

void prefix_attention_combine(const AttentionRows& a, int64_t splits, float* partials) {
  with_dtype(a.dtype, [&](auto element) {
    for_each_panel(a, [&](int64_t i, const Panel& panel) {
      combine(a.channels, i, splits, partials);
      finish<decltype(element)>(a, panel, Softmax(partials, a.channels, i));
    });
  });
}

void prefix_attention_drop(const DroppedPrefix& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    (a.prefix_dtype == DType::kFloat ? drop<T, float> : drop<T, T>)(a, begin, end);
  });
}

}  // namespace glmkern::CPU_ISA
