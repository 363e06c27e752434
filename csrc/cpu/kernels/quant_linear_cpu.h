// The kernels of quant_linear for the CPU: each computes some of the blocks, on the calling thread.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "ops/ceil_div.h"
#include "ops/quant_linear.h"

namespace glmkern {

// A product is made of blocks: kDepthBlock terms of kColumnBlock columns for some rows, whose x was
// packed before. A column block's decoded weights and a row block's sums fit the L2 cache.
constexpr int64_t kDepthBlock = 256;
constexpr int64_t kColumnBlock = 128;
constexpr int64_t kMostRows = 256;  // of a row block
constexpr int64_t kFewRows = 4;     // that the forward takes without packing

// Rows begin <= row < end of x, the depth block `block` of them, to packed + block * kDepthBlock *
// (end - begin), as float and in the order in which tiles read them.
GLMKERN_CPU_BF16_KERNEL(void quant_linear_pack(const QuantLinear&, int64_t begin, int64_t end,
                                               int64_t block, float* packed))

// The results of these rows in column block `block`.
GLMKERN_CPU_BF16_KERNEL(void quant_linear_block(const QuantLinear&, int64_t begin, int64_t end,
                                                int64_t block, const float* packed))

// Forward of at most kFewRows rows: x in the order in which the weight's words hold their columns,
// as floats or as digits of integers, in arranged_size floats; then the results of columns
// begin <= n < end.
enum class FewArranged { kFloats, kDigits };
inline int64_t padded_depth(int64_t k) { return ceil_div(k, kDepthBlock) * kDepthBlock; }
inline int64_t arranged_size(const QuantLinear& a) { return a.rows * padded_depth(a.k) + 16; }
GLMKERN_CPU_KERNEL(FewArranged quant_linear_arrange(const QuantLinear&, float* arranged))
GLMKERN_CPU_KERNEL(void quant_linear_few(const QuantLinear&, FewArranged, const float* arranged,
                                         int64_t begin, int64_t end))

}  // namespace glmkern
