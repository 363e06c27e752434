// Which sequence of a packed batch a token, or a block of its rows, belongs to.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "ops/sequences.h"

namespace glmkern::cuda {

// The sequence of one token after another, in ascending order: a binary search for the first one,
// then a comparison each. It never leaves the sequences, whatever cu_seqlens holds.
class SequenceCursor {
 public:
  __device__ SequenceCursor(const PackedSequences& sequences, int64_t token)
      : sequences_(sequences), last_(static_cast<int>(sequences.count) - 1) {
    int first = 0, last = last_;
    while (first < last) {
      const int middle = first + (last - first) / 2;
      if (sequences.cu_seqlens[middle + 1] <= token) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    enter(first);
  }

  __device__ void move_to(int64_t token) {
    while (end <= token && sequence_ < last_) enter(sequence_ + 1);
  }

  int64_t id = 0;  // where ids are given
  int begin, end;

 private:
  __device__ void enter(int sequence) {
    sequence_ = sequence;
    if (sequences_.ids != nullptr) id = sequences_.ids[sequence];
    begin = sequences_.cu_seqlens[sequence];
    end = sequences_.cu_seqlens[sequence + 1];
  }

  const PackedSequences& sequences_;
  int sequence_, last_;
};

// The tile of a sequence that a slot stands for; an idle slot's lies outside the sequence.
//
// Sequence b, of `heads` rows a token, begins at slot start_b * heads / rows + b. Its slots suffice
// for its tiles of `rows` rows, and no other sequence need be known. The slots after its last tile
// are idle. In all there are slots_of(..).
struct SequenceTile {
  int sequence, first_token, tokens, tile;
};

inline int64_t slots_of(int64_t tokens, int64_t heads, int64_t rows, int64_t sequences) {
  return tokens * heads / rows + sequences;
}

// Token and row numbers are below 2^31. Sequences never leave the batch, whatever cu_seqlens holds;
// a slot before the first one has a negative tile.
__device__ inline SequenceTile find_tile(const PackedSequences& sequences, int tokens, int heads,
                                         int rows, int slot) {
  const auto start = [&](int b) {
    const int token = sequences.cu_seqlens[b];
    return token < 0 ? 0 : token < tokens ? token : tokens;
  };
  const auto first_slot = [&](int b) { return start(b) * heads / rows + b; };
  int first = 0, last = static_cast<int>(sequences.count) - 1;
  while (first < last) {
    const int middle = last - (last - first) / 2;
    if (first_slot(middle) <= slot) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  const int begin = start(first);
  return {first, begin, start(first + 1) - begin, slot - first_slot(first)};
}

}  // namespace glmkern::cuda
