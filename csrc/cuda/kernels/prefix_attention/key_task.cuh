// The keys that a block of the backward has, and the rows that see them.
#pragma once

#include "cuda/kernels/prefix_attention/attention.cuh"

namespace glmkern::cuda {

// Which rows of a sequence a block has for its keys. A tile's keys are seen by rows of its own
// tokens and later ones, so the first and the last tile together have as many rows as the second
// and the one before the last. Each such pair has the same number of blocks, and a tile of it as
// many as fit its rows. Of five tiles, with four blocks a pair:
//
//     tile      0        1        2        3        4
//     seen by   5 tiles  4 tiles  3 tiles  2 tiles  1 tile of rows
//     blocks    3        3        2        1        1
struct KeyShare {
  int tile = -1, split = 0, splits = 1;  // a block of no keys has tile -1

  // How many blocks tile `tile` has.
  static __device__ int splits_of(int tile, int tokens, int tile_keys, int pair_blocks) {
    const int partner = (tokens - 1) / tile_keys - tile;
    if (partner == tile) return pair_blocks / 2;
    const int last = tile > partner ? tile : partner;
    const int few = tokens - last * tile_keys;
    if (few <= 0) return 0;  // the sequence has no such tile
    const int all = 2 * tokens - (tile + partner) * tile_keys;
    const int splits = (2 * pair_blocks * few + all) / (2 * all);  // rounded
    const int of_last = splits > 1 ? splits : 1;
    return tile == last ? of_last : pair_blocks - of_last;
  }

  // That of a pair's block `block`.
  __device__ KeyShare(int pair, int block, int tokens, int tile_keys, int pair_blocks) {
    const int partner = (tokens - 1) / tile_keys - pair;
    if (pair < 0 || pair > partner || tokens <= 0) return;
    splits = splits_of(pair, tokens, tile_keys, pair_blocks);
    if (block < splits) {
      tile = pair;
      split = block;
    } else if (pair < partner) {
      tile = partner;
      split = block - splits;
      splits = pair_blocks - splits;
    }
  }
};

// Keys `key` to key + tile_keys of a segment of `keys` keys, and packed rows begin to end.
template <class T>
struct KeyTask {
  __device__ KeyTask(const AttentionGradients& a, int block, int tile_keys, int tile_rows)
      : own(block < a.own_blocks) {
    if (!own) block -= static_cast<int>(a.own_blocks);
    const KeyGradients& segment = own ? a.token_keys : a.prefix_keys;
    const int groups = static_cast<int>(a.shape.groups);
    const int blocks = own ? segment.pair_blocks : segment.splits;
    const int slot = block / groups / blocks;
    group = block % groups;
    split = block / groups % blocks;
    heads_ = static_cast<int>(a.shape.heads);
    const int64_t channel = group * a.shape.channels;
    SequenceTile sequence{0, 0, static_cast<int>(a.shape.tokens), split};
    if (own) {
      sequence = find_tile(a.sequences, sequence.tokens, 1, 2 * tile_keys, slot);
      const KeyShare share(sequence.tile, split, sequence.tokens, tile_keys, blocks);
      first_key = sequence.first_token;
      set_keys(a.k, a.v, first_key, channel);
      split = share.split;
      key = share.tile * tile_keys;
      keys = sequence.tokens;
      const int tiles = ceil_quotient((keys - key) * heads_, tile_rows);
      const int each = ceil_quotient(tiles, share.splits) * tile_rows;
      begin = key * heads_ + split * each;
      end = begin + each;
    } else {
      if (segment.by_sequence) {
        sequence = find_tile(a.sequences, sequence.tokens, heads_, segment.rows_of_split, split);
      }
      const int64_t stride = a.shape.groups * a.shape.channels;
      const int64_t at = sequence.sequence * a.prefix.sequence_stride;
      set_keys({a.prefix.keys, stride, 0}, {a.prefix.values, stride, 0}, 0, at + channel);
      key = slot * tile_keys;
      keys = static_cast<int>(a.shape.prefix);
      begin = sequence.tile * segment.rows_of_split;
      end = begin + segment.rows_of_split;
    }
    rows = sequence.tokens * heads_;
    if (end > rows) end = rows;
    q = rows_of<T>(a, a.q, sequence.first_token * static_cast<int>(a.q.stride), group);
    dout = rows_of<T>(a, a.dout, sequence.first_token * static_cast<int>(a.dout.stride), group);
    first_number = numbers_at(a, group, sequence.first_token);

    // A split of no rows leaves zeros; one of no sequence is never read.
    idle_ = key < 0 || key >= keys || begin < 0 || (segment.by_sequence && begin >= rows);
  }

  // f(dk, dv, stride) with where the gradients of key 0 go, and the distance to those of key 1.
  template <class F>
  __device__ void with_results(const AttentionGradients& a, F f) const {
    const KeyGradients& segment = own ? a.token_keys : a.prefix_keys;
    const int64_t stride = a.shape.groups * a.shape.channels, size = segment.keys * stride;
    const int64_t at = first_key * stride + group * a.shape.channels;
    if (segment.partial != nullptr) {
      float* const dk = segment.partial + split * size + at;
      f(dk, dk + segment.splits * size, stride);
    } else {
      f(static_cast<T*>(segment.dk) + at, static_cast<T*>(segment.dv) + at, stride);
    }
  }

  __device__ bool is_idle() const { return idle_; }

  // The first row that sees a key.
  __device__ int first_row_of(int k) const { return own ? k * heads_ : 0; }

  bool own;  // of the tokens, else of the prefix
  int group, split;
  int first_key = 0;  // the sequence's, among all
  int key, keys, begin, end, rows;
  const T *k, *v;
  int k_stride, v_stride;
  PackedRows<const T> q, dout;
  int first_number;  // of row 0

 private:
  __device__ void set_keys(const AttentionTokens& ks, const AttentionTokens& vs, int first_token,
                           int64_t at) {
    k = static_cast<const T*>(ks.data) + first_token * ks.stride + at;
    v = static_cast<const T*>(vs.data) + first_token * vs.stride + at;
    k_stride = static_cast<int>(ks.stride);
    v_stride = static_cast<int>(vs.stride);
  }

  int heads_;
  bool idle_;
};

}  // namespace glmkern::cuda
