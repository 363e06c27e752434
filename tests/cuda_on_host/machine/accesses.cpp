// The calls that a compiler puts before accesses to memory with -fsanitize=thread, as functions of
// this machine instead of ThreadSanitizer's.
#include <cstddef>
#include <cstdint>
#include <string>

#include "counters.h"
#include "machine.h"
#include "shared_memory.h"
#include "stacks.h"
#include "symbols.h"

namespace cuda_on_host {
namespace {

enum class Alignment { kNatural, kAny };

void report(const void* address, size_t size, bool write, Alignment alignment, const void* code) {
  if (!stacks.contain(__builtin_frame_address(0))) return;  // code of the host
  const int bytes = static_cast<int>(size), thread = place.index;
  const Pc pc = pc_of(code);
  if (alignment == Alignment::kNatural && reinterpret_cast<uintptr_t>(address) % size != 0) {
    fail("thread " + std::to_string(thread) + " accesses " + std::to_string(size) +
         " bytes at an address that is no multiple of that, at " + where(pc));
  }
  if (shared_memory.contains(address)) {
    write ? shared_memory.write(address, bytes, thread, pc)
          : shared_memory.read(address, bytes, thread, pc);
    counters.access(write ? Kind::kSharedWrite : Kind::kSharedRead, address, bytes, thread, pc);
  } else if (!in_image(address)) {
    counters.access(write ? Kind::kGlobalWrite : Kind::kGlobalRead, address, bytes, thread, pc);
  }
}

// Most accesses are to a thread's registers, which are on its stack here.
inline void access(const void* address, size_t size, bool write, Alignment alignment,
                   const void* code) {
  if (!stacks.contain(address)) report(address, size, write, alignment, code);
}

}  // namespace
}  // namespace cuda_on_host

extern "C" {

#define ACCESSES(size)                                                      \
  void __tsan_read##size(void* p) {                                         \
    cuda_on_host::access(p, size, false, cuda_on_host::Alignment::kNatural, \
                         __builtin_return_address(0));                      \
  }                                                                         \
  void __tsan_write##size(void* p) {                                        \
    cuda_on_host::access(p, size, true, cuda_on_host::Alignment::kNatural,  \
                         __builtin_return_address(0));                      \
  }
#define UNALIGNED_ACCESSES(size)                                        \
  void __tsan_unaligned_read##size(void* p) {                           \
    cuda_on_host::access(p, size, false, cuda_on_host::Alignment::kAny, \
                         __builtin_return_address(0));                  \
  }                                                                     \
  void __tsan_unaligned_write##size(void* p) {                          \
    cuda_on_host::access(p, size, true, cuda_on_host::Alignment::kAny,  \
                         __builtin_return_address(0));                  \
  }

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
UNALIGNED_ACCESSES(2)
UNALIGNED_ACCESSES(4)
UNALIGNED_ACCESSES(8)
UNALIGNED_ACCESSES(16)

void __tsan_read_range(void* p, size_t size) {
  cuda_on_host::access(p, size, false, cuda_on_host::Alignment::kAny, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  cuda_on_host::access(p, size, true, cuda_on_host::Alignment::kAny, __builtin_return_address(0));
}
// Of the launching code; kernels have none.
int __tsan_atomic32_load(const volatile int* p, int order) { return __atomic_load_n(p, order); }
void __tsan_atomic32_store(volatile int* p, int value, int order) {
  __atomic_store_n(p, value, order);
}
void __tsan_init() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
}
