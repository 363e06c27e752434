// The stacks of a block's threads, side by side: an address shows at once whether it is on one.
#pragma once

#include <cstdint>

#include "fiber.h"
#include "machine.h"

namespace cuda_on_host {

class Stacks {
 public:
  Stacks();
  char* of(int thread) const { return memory_ + thread * kStackBytes; }
  bool contain(const void* p) const {
    return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(memory_) <
           kMaxThreads * kStackBytes;
  }

 private:
  char* memory_;
};

extern Stacks stacks;

}  // namespace cuda_on_host
