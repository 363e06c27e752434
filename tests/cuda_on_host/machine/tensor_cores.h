// The instructions of tensor cores, whose operands are spread over the lanes of a warp.
//
// The layouts are those of the PTX manual ("Matrix fragments for mma.m16n8k8" and "m16n8k16", and
// "ldmatrix"). A register holds two neighbouring numbers of 16 bits, or is one float. With
// group = lane / 4 and t = lane % 4, a fragment's register r holds
//
//     row  group + row[r],   columns  2 t + column[r]  and the next one
//
// A is [16, k]; B is [8, k], the columns of a column-major [k, 8]; C is [16, 8] floats, in pairs.
#pragma once

#include <cstdint>

namespace cuda_on_host {

struct Fragment {
  int registers, row[4], column[4];
};
constexpr Fragment kA16{4, {0, 8, 0, 8}, {0, 0, 8, 8}};
constexpr Fragment kB16{2, {0, 0}, {0, 8}};
constexpr Fragment kA8{2, {0, 8}, {0, 0}};
constexpr Fragment kB8{1, {0}, {0}};
constexpr Fragment kC{2, {0, 8}, {0, 0}};  // pairs of floats

enum class Half { kFloat16, kBFloat16 };

// c += a b by the running thread's warp: m16n8k16, and m16n8k8 in half.
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half type);
void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b);

// ldmatrix of 1, 2 or 4 matrices of 8 rows of 16 bytes, whose addresses lanes 0 to 7, 8 to 15 and
// so on give. Register i gets matrix i: row `group`, columns 2 t and 2 t + 1; transposed: column
// `group` of it, rows 2 t and 2 t + 1.
void load_matrices(uint32_t* registers, int count, const void* row, bool transposed);

}  // namespace cuda_on_host
