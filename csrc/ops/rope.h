// rope as the kernels see it; glmkern/ops/rope.py defines the ops.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace glmkern {

// [tokens, heads, channels] with contiguous channels; strides in elements.
struct StridedHeads {
  void* data;
  int64_t token_stride, head_stride;
};

struct RopeHeads {
  int64_t count;
  bool rotated;    // false: copied
  StridedHeads x;  // only read
  StridedHeads y;
  const void* bias;      // added to x before the rotation; laid out as one token of x, or null
  const int64_t* slots;  // [tokens], where in y each token goes, or null: in order
};

// Rotates the first 2 * pairs channels of every head by its token's angles, or by the negative
// angles (`inverse`). The q, k and v of a token are three groups of heads.
struct Rope {
  DType dtype, table_dtype;
  bool inverse;
  int64_t tokens, channels, pairs;
  const void* cos_sin;       // [table, pairs, 2]
  const int64_t* positions;  // [tokens]
  int groups;
  RopeHeads heads[3];
};

}  // namespace glmkern
