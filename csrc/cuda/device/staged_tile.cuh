// Tiles of a matrix that pass through shared memory, some steps ahead of their use.
//
// A tile is kChunks chunks of 16 bytes. With a policy of asynchronous copies it has kStages places,
// and a copy starts kStages - 1 steps before its use; else it has two, and a tile waits in
// registers while the one before it is used:
//
//     for each step:
//       wait_for_tiles<Policy>()     this thread's part of the step's tiles is there
//       __syncthreads()              all threads' parts are; nobody reads the step before any more
//       tile.start(step + kStages - 1, ...); end_of_starts<Policy>()
//       ...                          work on tile.chunk(step, ...)
//       tile.finish(step + kStages - 1, ...)
#pragma once

#include "cuda/device/policy.cuh"
#include "cuda/device/vec.cuh"

namespace glmkern::cuda {

// Eight halves or four floats: `count` of them exist at `from`, the rest are zeros.
template <class T>
struct Chunk {
  const T* from;
  int count;
};

template <class Policy, class T, int kChunks, int kThreads, bool kWide>
class StagedTile {
 public:
  static constexpr int kBytes = Policy::kStages * kChunks * 16;

  __device__ explicit StagedTile(uint4* memory) : memory_(memory) {}

  // source(i) is the Chunk i of this tile, place(i) its place from 0 to kChunks - 1. Wide chunks
  // exist as a whole or not at all, and are aligned to 16 bytes.
  template <class Source, class Place>
  __device__ void start(int step, Source source, Place place) {
    for_each([&](int k, int i) {
      const Chunk<T> chunk = source(i);
      if constexpr (kWide && Policy::kAsyncCopies) {
        copy_async(memory_ + at(step, place(i)), chunk.from, chunk.count > 0 ? 16 : 0);
      } else if constexpr (Policy::kAsyncCopies) {
        memory_[at(step, place(i))] = read(chunk);
      } else {
        held_[k] = read(chunk);
      }
    });
  }

  template <class Place>
  __device__ void finish(int step, Place place) {
    if constexpr (!Policy::kAsyncCopies) {
      for_each([&](int k, int i) { memory_[at(step, place(i))] = held_[k]; });
    }
  }

  __device__ uint4 chunk(int step, int place) const { return memory_[at(step, place)]; }

 private:
  static constexpr int kEach = (kChunks + kThreads - 1) / kThreads;

  // f(k, i) for each chunk i that is this thread's, its k-th.
  template <class F>
  static __device__ void for_each(F f) {
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      const int i = k * kThreads + threadIdx.x;
      if (kChunks % kThreads == 0 || i < kChunks) f(k, i);
    }
  }

  static __device__ int at(int step, int place) { return step % Policy::kStages * kChunks + place; }

  static __device__ uint4 read(const Chunk<T>& chunk) {
    constexpr int kCount = kVectorWidth<T>;
    Vec<T, kCount> v{};
    if constexpr (kWide) {
      if (chunk.count > 0) v = load<kCount>(chunk.from);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; k++) {
        if (k < chunk.count) v.element[k] = chunk.from[k];
      }
    }
    uint4 bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
  }

  uint4* memory_;
  uint4 held_[Policy::kAsyncCopies ? 1 : kEach];
};

// Of copies that a step starts, which are none at the end: groups are counted.
template <class Policy>
__device__ void end_of_starts() {
  if constexpr (Policy::kAsyncCopies) commit_copies();
}

template <class Policy>
__device__ void wait_for_tiles() {
  if constexpr (Policy::kAsyncCopies) wait_for_copies<Policy::kStages - 2>();
}

}  // namespace glmkern::cuda
