// Working memory of one thread.
#pragma once

#include <cstdint>

namespace glmkern {

// At least `count` floats, aligned to a cache line, this thread's until it asks again. Kept for the
// thread's life: tasks are many and short, and fresh pages cost more than the work on them.
float* thread_scratch(int64_t count);

}  // namespace glmkern
