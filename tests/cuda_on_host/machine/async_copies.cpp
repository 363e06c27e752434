#include "async_copies.h"

#include "counters.h"
#include "machine.h"
#include "shared_memory.h"

namespace cuda_on_host {

[[gnu::noinline]] void copy_async(void* shared, const void* global, int bytes) {
  const Pc pc = pc_of(__builtin_return_address(0));
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!aligned(shared) || !aligned(global) || !shared_memory.contains(shared)) {
    return fail("thread " + std::to_string(place.index) +
                " gives cp.async addresses that are no multiples of 16, or not of shared memory, "
                "at " +
                where(pc));
  }
  shared_memory.copy_async(shared, global, bytes, pc);
  counters.access(Kind::kSharedWrite, shared, 16, place.index, pc);
  if (bytes > 0) counters.access(Kind::kGlobalRead, global, bytes, place.index, pc);
}

void commit_copies() { shared_memory.commit_async(); }

[[gnu::noinline]] void wait_for_copies(int pending) {
  const Pc pc = pc_of(__builtin_return_address(0));
  counters.barrier_at(pc);
  if (pc != removed_barrier) shared_memory.wait_async(pending);
}

}  // namespace cuda_on_host
