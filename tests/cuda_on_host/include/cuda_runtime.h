// Stands in for the CUDA toolkit's header of this name, so that a C++ compiler can build csrc/cuda
// and a CPU run it. The threads of a block are fibers, which take turns until they wait or end; one
// block runs after another, and one kernel after another, whatever thread launches it. A thread
// that waits for something that never comes is an error that names it: a barrier or a shuffle that
// not every thread reaches.
//
// Not emulated: anything that depends on how fast threads are. Kernels with PTX need their ptx.cuh
// wrappers emulated here as well.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block at a time, so its shared memory can be static. As on a GPU, it holds at first what the
// previous block left.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kEnded };
inline const char* const kStateNames[] = {"is ready", "waits at __syncthreads",
                                          "waits for its warp", "has ended"};

struct Thread {
  Fiber fiber;
  State state;
  unsigned warp_mask;
  int shuffles;           // how many it has taken part in
  uint64_t exchanged[2];  // what it offers; two, so that a fast lane's next offer spares the last
};

inline std::vector<Thread> threads;
inline std::function<void()> kernel_call;
inline int current;
inline std::exception_ptr failure;  // what a thread of the block has thrown
inline std::mutex one_kernel;       // that runs, for all of the above is shared

inline void wait(State state) {
  const int me = current;
  threads[me].state = state;
  threads[me].fiber.yield();
}

inline void thread_main() {
  try {  // an exception can't leave a fiber
    kernel_call();
  } catch (...) {
    failure = std::current_exception();
  }
  wait(State::kEnded);
}

inline void start_block(int count) {
  failure = nullptr;
  if (static_cast<int>(threads.size()) < count) threads.resize(count);
  for (int i = 0; i < count; i++) {
    Thread& thread = threads[i];
    thread.fiber.start(thread_main);
    thread.state = State::kReady;
    thread.shuffles = 0;
  }
}

inline void resume(int i) {
  current = i;
  threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  threads[i].fiber.resume();
}

// Resumes the lanes of the warp at `first` whose mask has arrived as a whole; false if none.
inline bool release_warp(int first, int end) {
  bool released = false;
  for (int i = first; i < end; i++) {
    if (threads[i].state != State::kAtWarpBarrier) continue;
    const unsigned mask = threads[i].warp_mask;
    bool complete = true;
    for (int lane = 0; lane < kWarp; lane++) {
      if (!(mask >> lane & 1)) continue;
      const int other = first + lane;
      complete = complete && other < end && threads[other].state == State::kAtWarpBarrier &&
                 threads[other].warp_mask == mask;
    }
    for (int lane = 0; complete && lane < kWarp; lane++) {
      if (mask >> lane & 1) threads[first + lane].state = State::kReady;
    }
    released = released || complete;
  }
  return released;
}

inline std::string describe(int count) {
  std::string text = "the block " + std::to_string(blockIdx.x) + " is stuck:";
  for (int i = 0; i < count; i++) {
    if (i > 0 && threads[i].state == threads[i - 1].state) continue;
    text += " thread " + std::to_string(i) + " " + kStateNames[static_cast<int>(threads[i].state)] +
            ";";
  }
  return text;
}

// Every warp runs as far as it can before the next one starts, in an order that turns round at
// every barrier: what a missing barrier lets a fast warp overwrite, it does overwrite.
inline void run_block(int count) {
  start_block(count);
  const int warps = (count + kWarp - 1) / kWarp;
  for (bool forwards = true;; forwards = !forwards) {
    for (int k = 0; k < warps; k++) {
      const int first = (forwards ? k : warps - 1 - k) * kWarp;
      const int end = first + kWarp < count ? first + kWarp : count;
      do {
        for (int i = first; i < end; i++) {
          if (threads[i].state == State::kReady) resume(i);
          if (failure) std::rethrow_exception(failure);
        }
      } while (release_warp(first, end));
    }
    int ended = 0, at_barrier = 0;
    for (int i = 0; i < count; i++) {
      ended += threads[i].state == State::kEnded;
      at_barrier += threads[i].state == State::kAtBlockBarrier;
    }
    if (ended == count) return;
    if (at_barrier != count) throw std::runtime_error(describe(count));
    for (int i = 0; i < count; i++) threads[i].state = State::kReady;
  }
}

// Waits for the lanes in `mask`, then returns what lane `source` of this warp offered. As on a GPU,
// a lane that is not there returns its own.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int me = current, first = me - me % kWarp;
  const int slot = threads[me].shuffles++ % 2;
  if (!(mask >> (me % kWarp) & 1)) throw std::logic_error("a lane shuffles outside its own mask");
  memcpy(&threads[me].exchanged[slot], &value, sizeof value);
  threads[me].warp_mask = mask;
  wait(State::kAtWarpBarrier);
  if (source >= 0 && source < kWarp && (mask >> source & 1)) {
    memcpy(&value, &threads[first + source].exchanged[slot], sizeof value);
  }
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::State::kAtBlockBarrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_host::shuffle(mask, 0, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_host::shuffle(mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::current % cuda_on_host::kWarp ^ distance);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::current % cuda_on_host::kWarp + distance);
}

struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};
template <class T>
T __ldcs(const T* p) {
  return *p;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::lock_guard<std::mutex> lock(cuda_on_host::one_kernel);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  if (count == 0 || count > 1024 || gridDim.y > 65535 || gridDim.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  cuda_on_host::kernel_call = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < gridDim.z; z++) {
    for (unsigned y = 0; y < gridDim.y; y++) {
      for (unsigned x = 0; x < gridDim.x; x++) {
        blockIdx = dim3(x, y, z);
        cuda_on_host::run_block(static_cast<int>(count));
      }
    }
  }
  return cudaSuccess;
}
