// The sequences of a packed batch as the kernels see them; glmkern/ops/sequences.py says what they
// are.
//
//     token        0 1 2 3 4 5 6 7 8     cu_seqlens  0 4 6 9
//     sequence     0 0 0 0 1 1 2 2 2     count       3
#pragma once

#include <cstdint>

namespace glmkern {

struct PackedSequences {
  int64_t count;
  const int32_t* cu_seqlens;  // [count + 1]: where each one starts, then the number of tokens
  const int64_t* ids;         // [count]: what dropout knows each one by
};

}  // namespace glmkern
