// The shared memory of a block, and what is known of each of its bytes.
//
// A __shared__ variable is thread_local here, so that all of them, and nothing else, are one known
// range of addresses. Errors, each with its kernel, its line and both threads:
//
//   a race       two threads access a byte, one of them writes, and since the first access no
//                barrier of the block, or of both threads' warp, has ordered them
//   unwritten    a read of what no thread of this block has written
//   outside      an access past the dynamic shared memory that the launch asked for
//   in flight    an access to what cp.async copies, before the thread that copies has waited
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "machine.h"
#include "symbols.h"

namespace cuda_on_host {

class SharedMemory {
 public:
  void find_this_threads();
  void start_block(int threads, size_t dynamic_bytes);
  void end_block();
  void order_block() { epoch_++; }
  void order_warp(int warp) { warp_epochs_[warp]++; }

  bool contains(const void* address) const { return offset_of(address) < size_; }
  void read(const void* address, int size, int thread, Pc pc);
  void write(const void* address, int size, int thread, Pc pc);

  // cp.async by the running thread: 16 bytes, of which `bytes` are read and the rest are zeros. The
  // copies since the last commit are a group; wait lands all but the latest `pending` groups.
  void copy_async(void* to, const void* from, int bytes, Pc pc);
  void commit_async();
  void wait_async(int pending);

  // Of all variables that the block has written, and of dynamic memory.
  size_t used_bytes() const { return dynamic_bytes_ + static_bytes_; }

 private:
  struct Touch {
    uint32_t epoch = 0, warp_epoch = 0, pc = 0;
    int32_t thread = 0;
  };
  struct Byte {
    Touch written, read;
    Touch read_before;   // the last read by another thread than read's, by another warp if any
    uint32_t block = 0;  // that has written it
    uint32_t copying_block = 0;
    int32_t copying_thread = 0;
  };
  struct Copy {
    void* to;
    char data[16];
    Pc pc;
  };
  // One thread's: the groups that it has committed, and what it has not.
  struct Copies {
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> uncommitted;
  };

  uintptr_t offset_of(const void* address) const {
    return reinterpret_cast<uintptr_t>(address) - begin_;
  }
  bool inside(const void* address, int size, const char* what, int thread, Pc pc);
  bool usable(const Byte& byte, const char* what, int thread, Pc pc);
  Touch touch(int thread, Pc pc) const;
  bool unordered(const Touch& before, int thread) const;
  void report(const char* what, int thread, Pc pc, const char* before, const Touch& touch);

  uintptr_t begin_ = 0, size_ = 0, dynamic_begin_ = 0;
  size_t dynamic_bytes_ = 0, static_bytes_ = 0;
  uint32_t epoch_ = 1;  // between two barriers of a block; never the same in another block
  uint32_t block_ = 0;  // a number of its own for each block
  std::vector<uint32_t> warp_epochs_ = std::vector<uint32_t>(kMaxThreads / kWarp);
  std::vector<Byte> bytes_;
  std::vector<Copies> copies_;  // by thread
};

extern SharedMemory shared_memory;

}  // namespace cuda_on_host
