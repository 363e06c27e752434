#include "cpu/scratch.h"

#include <memory>
#include <new>

namespace glmkern {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct Free {
  void operator()(float* p) const { ::operator delete[](p, kCacheLine); }
};

}  // namespace

float* thread_scratch(int64_t count) {
  thread_local std::unique_ptr<float[], Free> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(::operator new[](count * sizeof(float), kCacheLine)));
    size = count;
  }
  return memory.get();
}

}  // namespace glmkern
