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
//       ...                          work on tile.chunks(step)
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

// Wide chunks exist as a whole or not at all, and are aligned to 16 bytes.
template <bool kWide, class T>
__device__ uint4 read_chunk(const Chunk<T>& chunk) {
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

// Chunk k * kThreads + thread of a tile: the thread's k-th.
template <int kThreads>
struct ChunkNumber {
  unsigned k, thread;

  __device__ operator unsigned() const { return k * kThreads + thread; }
};

template <class Policy, class T, int kChunks, int kThreads, bool kWide>
class StagedTile {
 public:
  static constexpr int kBytes = Policy::kStages * kChunks * 16;

  __device__ explicit StagedTile(uint4* memory) : memory_(memory) {}

  // source(i) is the Chunk i of this tile, place(i) its place from 0 to kChunks - 1.
  template <class Source, class Place>
  __device__ void start(int step, Source source, Place place) {
    for_each([&](ChunkNumber<kThreads> i) {
      const Chunk<T> chunk = source(i);
      if constexpr (kWide && Policy::kAsyncCopies) {
        copy_async(chunks(step) + place(i), chunk.from, chunk.count > 0 ? 16 : 0);
      } else if constexpr (Policy::kAsyncCopies) {
        chunks(step)[place(i)] = read_chunk<kWide>(chunk);
      } else {
        held_[i.k] = read_chunk<kWide>(chunk);
      }
    });
  }

  template <class Place>
  __device__ void finish(int step, Place place) {
    if constexpr (!Policy::kAsyncCopies) {
      for_each([&](ChunkNumber<kThreads> i) { chunks(step)[place(i)] = held_[i.k]; });
    }
  }

  __device__ uint4* chunks(int step) const { return memory_ + step % Policy::kStages * kChunks; }

 private:
  static constexpr int kEach = (kChunks + kThreads - 1) / kThreads;

  // f(i) for each chunk that is this thread's.
  template <class F>
  static __device__ void for_each(F f) {
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      const unsigned thread = threadIdx.x % kThreads;  // says that it is below kThreads
      if (kChunks % kThreads == 0 || k * kThreads + thread < kChunks) {
        f(ChunkNumber<kThreads>{unsigned(k), thread});
      }
    }
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
