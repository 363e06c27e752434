// How work is shared between threads. No result may depend on it: a task writes what is its own.
#pragma once

#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "ops/ceil_div.h"

namespace glmkern {

using torch::stable::parallel_for;

constexpr int64_t kElementsPerTask = 8192;  // below that, waking a thread costs more than it saves

// f(begin, end) over pieces of `rows` rows, each of `elements` elements.
template <class F>
void for_each_row(int64_t rows, int64_t elements, F f) {
  parallel_for(0, rows, ceil_div(kElementsPerTask, elements > 0 ? elements : 1), f);
}

// f(task) for every task below `count`, of unequal cost: a thread that is free takes the next one.
template <class F>
void for_each_task(int64_t count, F f) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(task);
  });
}

}  // namespace glmkern
