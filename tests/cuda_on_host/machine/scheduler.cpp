// Runs the threads of a block, a warp at a time, in random order.
#include <algorithm>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "counters.h"
#include "fiber.h"
#include "machine.h"
#include "random.h"
#include "shared_memory.h"
#include "stacks.h"
#include "symbols.h"

namespace cuda_on_host {

Place place;
Pc removed_barrier = 0;
int l2_bytes = 4 << 20;
int code_version = 80;

namespace {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kEnded };
const char* const kStateNames[] = {"is ready", "waits at __syncthreads", "waits for its warp",
                                   "has ended"};

// What a lane waits for its warp with.
struct Meeting {
  unsigned mask = 0;
  Work work = nullptr;  // null at a __syncwarp
  void* part = nullptr;
  Pc pc = 0;
};

struct Thread {
  Fiber fiber;
  State state;
  Meeting meeting;
};

std::vector<Thread> threads(kMaxThreads);
const Launch* launched;
std::exception_ptr failure;
std::mutex one_kernel;  // that runs, for all of the above is shared
Random random;
uint64_t seed = 1;

void wait(State state) {
  Thread& me = threads[place.index];
  me.state = state;
  me.fiber.yield();
}

void wait_for_warp(const Meeting& meeting) {
  threads[place.index].meeting = meeting;
  wait(State::kAtWarpBarrier);
}

void thread_main() {
  try {  // an exception can't leave a fiber
    launched->call(launched->arguments);
  } catch (...) {
    failure = std::current_exception();
  }
  wait(State::kEnded);
}

void resume(int i) {
  const Dim3& size = place.block_size;
  place.index = i;
  place.thread = Dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
  threads[i].fiber.resume();
  if (failure) std::rethrow_exception(failure);
}

// Whether all lanes in the mask of a meeting have arrived at it.
bool complete(int first_thread, int count, const Meeting& first) {
  for (int lane = 0; lane < kWarp; lane++) {
    if (!(first.mask >> lane & 1)) continue;
    const int i = first_thread + lane;
    if (i >= count || threads[i].state != State::kAtWarpBarrier) return false;
    const Meeting& other = threads[i].meeting;
    if (other.mask != first.mask) return false;
    if (other.work != first.work) {
      throw std::runtime_error(name_of(launched->kernel) + ": lanes of one warp wait at " +
                               where(first.pc) + " and at " + where(other.pc));
    }
  }
  return true;
}

// Lets those lanes of a warp go on whose mask has arrived as a whole.
void release_warp(int warp, int count) {
  const int first_thread = warp * kWarp;
  for (int i = first_thread; i < std::min(first_thread + kWarp, count); i++) {
    if (threads[i].state != State::kAtWarpBarrier) continue;
    const Meeting first = threads[i].meeting;
    if (!complete(first_thread, count, first)) continue;
    Parts parts{};
    for (int lane = 0; lane < kWarp; lane++) {
      if (!(first.mask >> lane & 1)) continue;
      parts[lane] = threads[first_thread + lane].meeting.part;
      threads[first_thread + lane].state = State::kReady;
    }
    place.index = i;
    if (first.work != nullptr) {
      first.work(parts);
    } else if (first.mask == kAllLanes) {
      shared_memory.order_warp(warp);
    }
    if (failure) std::rethrow_exception(failure);
  }
}

std::string stuck(int count) {
  const Dim3& block = place.block;
  std::string text =
      name_of(launched->kernel) + ": the block " + std::to_string(block.x) + " is stuck:";
  for (int i = 0; i < count; i++) {
    if (i > 0 && threads[i].state == threads[i - 1].state) continue;
    text += " thread " + std::to_string(i) + " " + kStateNames[static_cast<int>(threads[i].state)] +
            ";";
  }
  return text;
}

// Resumes the ready lanes of a warp once, in random order; false if there were none.
bool run_warp(int warp, int count) {
  int ready[kWarp], n = 0;
  for (int i = warp * kWarp; i < std::min((warp + 1) * kWarp, count); i++) {
    if (threads[i].state == State::kReady) ready[n++] = i;
  }
  for (int left = n; left > 0; left--) {
    std::swap(ready[random.below(left)], ready[left - 1]);
    resume(ready[left - 1]);
  }
  return n > 0;
}

// Warps take turns at everything that they wait at.
void run_block(int count) {
  for (int i = 0; i < count; i++) {
    threads[i].fiber.start(thread_main, stacks.of(i));
    threads[i].state = State::kReady;
  }
  shared_memory.start_block(count, launched->dynamic_bytes);
  const int warps = (count + kWarp - 1) / kWarp;
  std::vector<int> order(warps);
  for (int warp = 0; warp < warps; warp++) order[warp] = warp;
  while (true) {
    bool moved = false;
    for (int left = warps; left > 0; left--) {
      std::swap(order[random.below(left)], order[left - 1]);
      if (!run_warp(order[left - 1], count)) continue;
      moved = true;
      release_warp(order[left - 1], count);
    }
    if (moved) continue;
    const auto in = [&](State state) {
      return std::all_of(threads.begin(), threads.begin() + count,
                         [&](const Thread& thread) { return thread.state == state; });
    };
    if (in(State::kEnded)) break;
    if (!in(State::kAtBlockBarrier)) throw std::runtime_error(stuck(count));
    for (int i = 0; i < count; i++) threads[i].state = State::kReady;
    shared_memory.order_block();
    counters.barrier();
  }
  shared_memory.end_block();
  counters.end_block(shared_memory.used_bytes());
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_kernel);
  launched = &launch;
  failure = nullptr;
  random = Random(seed);
  shared_memory.find_this_threads();
  counters.start_kernel(launch.kernel);
  place.grid = launch.grid;
  place.block_size = launch.block;
  const int count = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  for (unsigned z = 0; z < launch.grid.z; z++) {
    for (unsigned y = 0; y < launch.grid.y; y++) {
      for (unsigned x = 0; x < launch.grid.x; x++) {
        place.block = Dim3(x, y, z);
        run_block(count);
      }
    }
  }
}

[[gnu::noinline]] void block_barrier() {
  const Pc pc = pc_of(__builtin_return_address(0));
  counters.barrier_at(pc);
  if (pc != removed_barrier) wait(State::kAtBlockBarrier);
}

[[gnu::noinline]] void warp_barrier(unsigned mask) {
  const Pc pc = pc_of(__builtin_return_address(0));
  counters.barrier_at(pc);
  if (pc != removed_barrier) wait_for_warp({mask, nullptr, nullptr, pc});
}

[[gnu::noinline]] void together(unsigned mask, Work work, void* part) {
  if (!(mask >> place.lane() & 1)) {
    throw std::logic_error("a lane shuffles outside its own mask");
  }
  wait_for_warp({mask, work, part, pc_of(__builtin_return_address(0))});
}

uint64_t shuffle_bits(unsigned mask, uint64_t value, int source) {
  struct Part {
    uint64_t value, result;
    int source;
  };
  Part mine{value, value, source};
  together(
      mask,
      [](const Parts& parts) {
        for (void* part : parts) {
          if (part == nullptr) continue;
          auto& lane = *static_cast<Part*>(part);
          if (lane.source < 0 || lane.source >= kWarp || parts[lane.source] == nullptr) continue;
          lane.result = static_cast<Part*>(parts[lane.source])->value;
        }
      },
      &mine);
  return mine.result;
}

void fail(const std::string& sentence) {
  if (!failure) {
    failure =
        std::make_exception_ptr(std::runtime_error(name_of(launched->kernel) + ": " + sentence));
  }
}

}  // namespace cuda_on_host

// For the tests, which load the library of kernels: the seed of the orders of threads from now on,
// and a barrier that no thread waits at, by its place in the library (0: none).
extern "C" {
[[gnu::visibility("default")]] void cuda_on_host_seed(uint64_t seed) { cuda_on_host::seed = seed; }
[[gnu::visibility("default")]] void cuda_on_host_remove_barrier(uint64_t pc) {
  cuda_on_host::removed_barrier = pc;
}
[[gnu::visibility("default")]] void cuda_on_host_code_version(int version) {
  cuda_on_host::code_version = version;
}
[[gnu::visibility("default")]] void cuda_on_host_l2_bytes(int bytes) {
  cuda_on_host::l2_bytes = bytes;
}
}
