// Which sequence of a packed batch a token belongs to.
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

  int64_t id;
  int begin, end;

 private:
  __device__ void enter(int sequence) {
    sequence_ = sequence;
    id = sequences_.ids[sequence];
    begin = sequences_.cu_seqlens[sequence];
    end = sequences_.cu_seqlens[sequence + 1];
  }

  const PackedSequences& sequences_;
  int sequence_, last_;
};

}  // namespace glmkern::cuda
