// The GPU that tests/cuda_on_host runs kernels on, as the stand-ins in include/ see it.
//
// The threads of a block are fibers, which take turns until they wait or end, in an order that a
// seed decides; one block runs after another, and one kernel after another, whatever thread
// launches it. The compiler puts a call before each access of a kernel to memory (accesses.cpp).
// What a GPU would do wrong without a word is an error here: a barrier that not every thread
// reaches, and what shared_memory.h lists. Not emulated: what depends on how fast threads are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "symbols.h"

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // that a block of an H100 may ask for

struct Dim3 {
  unsigned x, y, z;
  Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a launching program is told of the L2 cache, which is not emulated: a test sets it.
extern int l2_bytes;

// For which chips the code that runs was compiled, likewise: 80 is sm_80.
extern int code_version;

// The special registers of the thread that runs, and where it is.
struct Place {
  Dim3 thread, block, block_size, grid;
  int index;  // of the thread in its block
  int lane() const { return index % kWarp; }
  int warp() const { return index / kWarp; }
};
extern Place place;

struct Launch {
  Dim3 grid, block;
  size_t dynamic_bytes;  // of shared memory
  const void* kernel;
  void (*call)(const void* arguments);  // runs the kernel as one thread
  const void* arguments;
};

// Runs all blocks. An error of the kernel becomes a std::runtime_error that says where it is.
void run(const Launch& launch);

// __syncthreads and __syncwarp.
void block_barrier();
void warp_barrier(unsigned mask);

// A barrier, or a wait for copies, that no thread waits at: a test takes it away. 0: none.
extern Pc removed_barrier;

// What the lanes in `mask` do together. Each hands over `part`, its operands and room for its
// results. When all have arrived, `work` gets the parts by lane, null for a lane outside the mask.
// As on a GPU, this does not order the lanes' accesses to memory.
using Parts = void* [kWarp];
using Work = void (*)(const Parts& parts);
void together(unsigned mask, Work work, void* part);

// __shfl_sync: waits for the lanes in `mask`, then returns what lane `source` of this warp offered.
// As on a GPU, a lane that is not there returns its own.
uint64_t shuffle_bits(unsigned mask, uint64_t value, int source);

// Makes `sentence` the error of this launch, unless it has one. The thread goes on until it next
// waits: accesses are reported from where C++ can't throw.
void fail(const std::string& sentence);

}  // namespace cuda_on_host
