#include "stacks.h"

#include <sys/mman.h>

#include <new>

namespace cuda_on_host {

Stacks stacks;

// The system gives memory only to the pages that are used.
Stacks::Stacks() {
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
}

}  // namespace cuda_on_host
