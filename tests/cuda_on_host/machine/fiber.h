// Fibers: stacks that take turns on one thread of the machine.
//
//   Fiber fiber;
//   fiber.start(f, stack);            f() is what it runs, from its beginning, on kStackBytes
//   fiber.resume();                   the scheduler: returns when the fiber yields
//   fiber.yield();                    the fiber: back to the scheduler
//
// A fiber that is started again forgets where it was. f must not return, nor throw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__  // as GCC has it
#endif
#endif

// ucontext's switch makes two system calls; this one is ten times as fast. AddressSanitizer knows
// ucontext only.
#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_HOST_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace cuda_on_host {

constexpr size_t kStackBytes = 128 * 1024;

#ifdef CUDA_ON_HOST_OWN_SWITCH

// Saves what a call must keep on this stack, and this stack in *from; goes on where `to` was saved.
//
//     saved stack, upwards:   r15 r14 r13 r12 rbx rbp, address to go on from
[[gnu::naked, gnu::noinline]] inline void switch_stacks([[maybe_unused]] void** from,
                                                        [[maybe_unused]] void* to) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov %rsi, %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n"
      "ret");
}

class Fiber {
 public:
  void start(void (*f)(), char* stack) {
    // f finds the stack as after a call: 8 bytes below a multiple of 16, a return address on top.
    auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) / 16 * 16;
    auto* slots = reinterpret_cast<uintptr_t*>(top) - 8;
    for (int i = 0; i < 8; i++) slots[i] = 0;
    slots[6] = reinterpret_cast<uintptr_t>(f);
    own_ = slots;
  }
  void resume() { switch_stacks(&scheduler_, own_); }
  void yield() { switch_stacks(&own_, scheduler_); }

 private:
  void* own_ = nullptr;
  void* scheduler_ = nullptr;
};

#else

class Fiber {
 public:
  void start(void (*f)(), char* stack) {
    getcontext(own_.get());
    own_->uc_stack.ss_sp = stack;
    own_->uc_stack.ss_size = kStackBytes;
    own_->uc_link = nullptr;
    makecontext(own_.get(), f, 0);
  }
  void resume() { swapcontext(scheduler_.get(), own_.get()); }
  void yield() { swapcontext(own_.get(), scheduler_.get()); }

 private:
  // A context has pointers to itself, and fibers lie in a vector that grows.
  std::unique_ptr<ucontext_t> own_{new ucontext_t}, scheduler_{new ucontext_t};
};

#endif

}  // namespace cuda_on_host
