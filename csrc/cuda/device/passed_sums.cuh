// Sums of products that one warp of a block passes to another. Lanes have the same places in all
// fragments of a shape, so a lane gets what the same lane has put.
#pragma once

#include <cstring>

#include "cuda/device/reduce.cuh"

namespace glmkern::cuda {

// Of each warp, [16 kRowTiles, 8 kTiles]. Between put and get all warps are to meet.
template <int kRowTiles, int kTiles>
class PassedSums {
 public:
  static constexpr int kBytes = kRowTiles * kTiles * kWarp * 16;  // of a warp

  __device__ explicit PassedSums(uint4* memory) : memory_(memory) {}

  __device__ void put(int warp, const float (&x)[kRowTiles][kTiles][4]) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        uint4 bits;
        memcpy(&bits, x[i][j], sizeof bits);
        *place(warp, i, j) = bits;
      }
    }
  }

  // f(x, y) for each number x[i][j][e] and the one that `warp` has put for it.
  template <class F>
  __device__ void get(int warp, float (&x)[kRowTiles][kTiles][4], F f) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        const uint4 bits = *place(warp, i, j);
        float y[4];
        memcpy(y, &bits, sizeof bits);
#pragma unroll
        for (int e = 0; e < 4; e++) f(x[i][j][e], y[e]);
      }
    }
  }

 private:
  __device__ uint4* place(int warp, int i, int j) const {
    return memory_ + ((warp * kRowTiles + i) * kTiles + j) * kWarp + threadIdx.x % kWarp;
  }

  uint4* memory_;
};

}  // namespace glmkern::cuda
