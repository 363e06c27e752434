// What prefix_attention's forward and backward share. Scores are computed transposed, [keys, rows]:
// the lanes of a vector are query rows, so that a softmax needs no sum over lanes, and what one
// product leaves is laid out as the next one takes it. A panel is the kTileCols rows that a tile
// spans.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/prefix_attention_cpu.h"
#include "cpu/kernels/tile.h"
#include "cpu/kernels/transpose.h"

namespace glmkern::CPU_ISA {
namespace {

// Keys of a block: whole tiles, and few enough that a panel's scores share the L1 cache with its
// queries. 128 keys were 4 % slower backward.
constexpr int64_t kBlockKeys = 8 * 14;
constexpr int64_t kPanels = kSetRows / kTileCols;
constexpr int64_t kRun = 32;  // channels that a product sums at a time: short sums round less
constexpr double kExactLog2E = 1.4426950408889634;
constexpr float kLog2E = static_cast<float>(kExactLog2E);

// The score of a key that a row does not see, and the largest score before the first key: finite,
// so that a difference of two is a number, and so low that 2^(it - any score) is 0.
constexpr float kUnseen = -1e30f;

// The distance of a block's keys: an odd number of cache lines, or one column of a block would lie
// in a few sets of the L1 cache only.
inline int64_t block_stride(int64_t channels) { return padded_channels(channels) + 16; }

// Rows of a tensor in which the heads of a group lie side by side.
template <class T>
struct HeadRows {
  T* data;
  int64_t token_stride, heads, channels;
  T* operator[](int64_t row) const {
    return data + row / heads * token_stride + row % heads * channels;
  }
};

// The rows first <= row < first + count.
struct Panel {
  int64_t first, count;
  int64_t fewest, most;       // own keys that its first and its last row see
  uint32_t limit[kTileCols];  // own keys that each row sees

  Panel(const AttentionRows& a, int64_t first)
      : first(first), count(std::min<int64_t>(a.end - first, kTileCols)) {
    for (int64_t i = 0; i < kTileCols; i++) {
      limit[i] = a.visible + (first + std::min(i, count - 1)) / a.heads;
    }
    fewest = limit[0];
    most = limit[kTileCols - 1];
  }
};

// f(std::integral_constant<int, n>) with the number of vectors that `count` columns take.
template <class F>
inline void with_vecs(int64_t count, F f) {
  if (count > kLanes) return f(std::integral_constant<int, kTileVecs>{});
  f(std::integral_constant<int, 1>{});
}

// f(column, first channel, channels, square of [channel][row]) for all squares of a panel; rows and
// channels past the last are zero.
template <class T, class F>
inline void for_each_square(HeadRows<const T> rows, const Panel& panel, F f) {
  for (int64_t column = 0; column < panel.count; column += kLanes) {
    const int64_t count = std::min<int64_t>(panel.count - column, kLanes);
    const T* row[kLanes];
    for (int64_t i = 0; i < count; i++) row[i] = rows[panel.first + column + i];
    for_each_vec(rows.channels, [&](int64_t c, auto lanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) square[i] = i < count ? load(row[i] + c, lanes) : Vec{};
      transpose(square);
      f(column, c, std::min<int64_t>(rows.channels - c, kLanes), square);
    });
  }
}

// result [channels, kTileCols] = factor * the panel's rows, transposed.
template <class T>
inline void pack_transposed(HeadRows<const T> rows, const Panel& panel, float factor,
                            float* result) {
  for_each_square(rows, panel, [&](int64_t column, int64_t c, int64_t channels, Vec* square) {
    for (int64_t i = 0; i < channels; i++) {
      store(result + (c + i) * kTileCols + column, square[i] * factor, Full{});
    }
  });
}

// The panel's rows from columns [channels, kTileCols], row i multiplied by factors[i].
template <class T>
inline void unpack_transposed(const float* columns, const float* factors, const Panel& panel,
                              HeadRows<T> rows) {
  for (int64_t column = 0; column < panel.count; column += kLanes) {
    const int64_t count = std::min<int64_t>(panel.count - column, kLanes);
    const Vec factor = load(factors + column, Full{});
    for_each_vec(rows.channels, [&](int64_t c, auto lanes) {
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; i++) {
        square[i] = c + i < rows.channels
                        ? load(columns + (c + i) * kTileCols + column, Full{}) * factor
                        : Vec{};
      }
      transpose(square);
      for (int64_t i = 0; i < count; i++) {
        store(rows[panel.first + column + i] + c, square[i], lanes);
      }
    });
  }
}

template <class T, class Stored>
inline void pack_block(const Stored* source, int64_t stride, int64_t count, int64_t channels,
                       float* result) {
  for (int64_t key = 0; key < count; key++) {
    for_each_vec(channels, [&](int64_t c, auto lanes) {
      store(result + key * block_stride(channels) + c,
            round_to<T>(load(source + key * stride + c, lanes)), lanes);
    });
  }
}

// Keys, or values, begin .. begin + count - 1 of a run as floats [count, block_stride].
template <class T>
inline void pack_block(DType dtype, const void* run, int64_t stride, int64_t begin, int64_t count,
                       int64_t channels, float* result) {
  if (dtype == DType::kFloat) {
    pack_block<T>(static_cast<const float*>(run) + begin * stride, stride, count, channels, result);
  } else {
    pack_block<T>(static_cast<const T*>(run) + begin * stride, stride, count, channels, result);
  }
}

// One block of keys and values, and how much of it a panel sees.
struct Block {
  const float *keys, *values;  // [count, block_stride]
  int64_t begin, count;        // within the run
  bool causal;

  int64_t seen_by(const Panel& panel) const {
    return causal ? std::min(count, panel.most - begin) : count;
  }
  // The first key that not every row of the panel sees.
  int64_t first_masked(const Panel& panel) const {
    return causal ? std::max<int64_t>(panel.fewest - begin, 0) : count;
  }
};

// f(block) for every block of `run` with begin <= key < end; a block lies in `memory`, which has
// room for 2 * kBlockKeys * block_stride.
template <class T, class F>
inline void for_each_block(const KeyRun& run, bool causal, int64_t channels, int64_t begin,
                           int64_t end, float* memory, F f) {
  float* values = memory + kBlockKeys * block_stride(channels);
  for (; begin < end; begin += kBlockKeys) {
    const int64_t count = std::min(end - begin, kBlockKeys);
    pack_block<T>(run.dtype, run.keys, run.key_stride, begin, count, channels, memory);
    pack_block<T>(run.dtype, run.values, run.value_stride, begin, count, channels, values);
    f(Block{memory, values, begin, count, causal});
  }
}

// result [keys, kTileCols] = block [keys, block_stride] times columns [channels, kTileCols].
template <int kVecs>
inline void multiply_channels(int64_t keys, const float* block, const float* columns,
                              int64_t channels, float* result) {
  for (int64_t c = 0; c < channels; c += kRun) {
    multiply<kVecs>(keys, Operand{block + c, block_stride(channels), 1}, columns + c * kTileCols,
                    kTileCols, std::min(channels - c, kRun), result, kTileCols, c > 0);
  }
}

// Sets the scores [keys, kTileCols] of keys that their rows do not see to kUnseen.
template <int kVecs>
inline void mask_later(const Panel& panel, const Block& block, float* scores) {
  const int64_t end = block.seen_by(panel);
  for (int j = 0; j < kVecs; j++) {
    Bits limit;
    std::memcpy(&limit, panel.limit + j * kLanes, sizeof limit);
    for (int64_t key = block.first_masked(panel); key < end; key++) {
      float* p = scores + key * kTileCols + j * kLanes;
      const Bits index = Bits{} + static_cast<uint32_t>(block.begin + key);
      store(p, index < limit ? load(p, Full{}) : broadcast(kUnseen), Full{});
    }
  }
}

}  // namespace
}  // namespace glmkern::CPU_ISA
