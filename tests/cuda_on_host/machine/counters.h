// What a kernel asks of memory, counted as a GPU would: by the accesses of a whole warp.
//
// The k-th time that each lane of a warp comes to an instruction is one access of that warp. Shared
// memory serves it in wavefronts, each of which gives one word of 4 bytes from each of 32 banks: to
// 32 lanes up to 4 bytes, to 16 lanes 8, to 8 lanes 16. Where these want several words of one bank,
// each takes a wavefront. Global memory moves whole sectors of 32 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "symbols.h"

namespace cuda_on_host {

enum class Kind { kSharedRead, kSharedWrite, kGlobalRead, kGlobalWrite };

class Counters {
 public:
  // Counting takes time and memory, so it is off at first.
  void start();
  // What was counted, a line each:
  //   kernel NAME-PC BLOCKS BARRIERS SHARED-BYTES
  //   barrier NAME-PC PC
  //   access NAME-PC PC KIND ACCESSES BYTES WAVEFRONTS LEAST-WAVEFRONTS SECTORS
  std::string stop();

  void start_kernel(const void* kernel) { kernel_ = pc_of(kernel); }
  void end_block(size_t shared_bytes);
  void barrier() {
    if (counting_) kernels_[kernel_].barriers++;
  }
  void barrier_at(Pc pc) {
    if (counting_) kernels_[kernel_].barrier_sites.insert(pc);
  }

  // An access of `size` bytes by one lane.
  void access(Kind kind, const void* address, int size, int thread, Pc pc) {
    if (counting_) log(kind, reinterpret_cast<uintptr_t>(address), size, thread, pc);
  }

 private:
  struct LaneAccess {
    int lane;
    uintptr_t address;
    int size;
  };
  // One instruction of a kernel: `times[t]` says how often thread t has come to it in this block,
  // `accesses[k, warp]` what the lanes of a warp want the k-th time.
  struct Site {
    std::vector<uint32_t> times;
    std::map<std::pair<uint32_t, int>, std::vector<LaneAccess>> accesses;
    uint64_t count = 0, bytes = 0, wavefronts = 0, least_wavefronts = 0, sectors = 0;
  };
  struct Kernel {
    uint64_t blocks = 0, barriers = 0;
    size_t shared_bytes = 0;
    std::set<Pc> barrier_sites;
    std::map<std::pair<Pc, Kind>, Site> sites;
  };

  void log(Kind kind, uintptr_t address, int size, int thread, Pc pc);
  static void count_shared(const std::vector<LaneAccess>& lanes, Site& site);
  static void count_global(const std::vector<LaneAccess>& lanes, Site& site);

  bool counting_ = false;
  Pc kernel_ = 0;
  std::map<Pc, Kernel> kernels_;
};

extern Counters counters;

}  // namespace cuda_on_host
