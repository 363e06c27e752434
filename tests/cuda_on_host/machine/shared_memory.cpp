#include "shared_memory.h"

#include <link.h>

#include <algorithm>
#include <cstring>

#include "cuda/device/shared_memory.cuh"

namespace glmkern::cuda {
thread_local uint4 dynamic_shared_memory[cuda_on_host::kMaxSharedBytes / sizeof(uint4)];
}

namespace cuda_on_host {

// Without the calls of accesses.cpp, only what the machine itself writes.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kWritesAreSeen = false;
#else
constexpr bool kWritesAreSeen = true;
#endif

SharedMemory shared_memory;

namespace {

struct ThreadLocals {
  uintptr_t begin = 0, size = 0;
};

// Finds the thread_local variables of the object that has `dynamic_shared_memory` among them.
int find_thread_locals(dl_phdr_info* object, size_t, void* result) {
  const auto inside = reinterpret_cast<uintptr_t>(glmkern::cuda::dynamic_shared_memory);
  for (int i = 0; i < object->dlpi_phnum; i++) {
    const auto& part = object->dlpi_phdr[i];
    const auto begin = reinterpret_cast<uintptr_t>(object->dlpi_tls_data);
    if (part.p_type != PT_TLS || begin == 0 || inside - begin >= part.p_memsz) continue;
    *static_cast<ThreadLocals*>(result) = {begin, part.p_memsz};
    return 1;
  }
  return 0;
}

int warp_of(int thread) { return thread / kWarp; }

std::string byte_at(uintptr_t offset, int size) {
  return std::to_string(size) + " bytes of shared memory at " + std::to_string(offset);
}

}  // namespace

void SharedMemory::find_this_threads() {
  ThreadLocals found;
  dynamic_begin_ = reinterpret_cast<uintptr_t>(glmkern::cuda::dynamic_shared_memory);
  dl_iterate_phdr(find_thread_locals, &found);
  begin_ = found.begin;
  size_ = found.size;
  bytes_.resize(size_);
}

// Memory holds NaNs until it is written: a build without accesses.cpp finds wrong numbers.
void SharedMemory::start_block(int threads, size_t dynamic_bytes) {
  dynamic_bytes_ = dynamic_bytes;
  const uintptr_t dynamic_end = dynamic_begin_ + kMaxSharedBytes;
  memset(reinterpret_cast<void*>(begin_), 0xff, dynamic_begin_ + dynamic_bytes - begin_);
  memset(reinterpret_cast<void*>(dynamic_end), 0xff, begin_ + size_ - dynamic_end);
  block_++;
  epoch_++;
  static_bytes_ = 0;
  copies_.assign(threads, {});
}

void SharedMemory::end_block() {
  for (size_t thread = 0; thread < copies_.size(); thread++) {
    bool landed = copies_[thread].uncommitted.empty();
    for (const auto& group : copies_[thread].groups) landed = landed && group.empty();
    if (!landed) fail("thread " + std::to_string(thread) + " ends before its copies have landed");
  }
}

// Whether no barrier has come between an earlier access and one that `thread` makes now.
bool SharedMemory::unordered(const Touch& before, int thread) const {
  if (before.epoch != epoch_ || before.thread == thread) return false;
  const int warp = warp_of(thread);
  return warp_of(before.thread) != warp || before.warp_epoch == warp_epochs_[warp];
}

SharedMemory::Touch SharedMemory::touch(int thread, Pc pc) const {
  return {epoch_, warp_epochs_[warp_of(thread)], static_cast<uint32_t>(pc), thread};
}

void SharedMemory::report(const char* what, int thread, Pc pc, const char* before,
                          const Touch& touch) {
  fail("a race: thread " + std::to_string(thread) + " " + what + " at " + where(pc) +
       " what thread " + std::to_string(touch.thread) + " has " + before + " at " +
       where(touch.pc) + ", and no barrier orders them");
}

bool SharedMemory::inside(const void* address, int size, const char* what, int thread, Pc pc) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(address) - dynamic_begin_ + size;
  if (past > kMaxSharedBytes || past <= dynamic_bytes_) return true;
  fail("thread " + std::to_string(thread) + " " + what + " at " + where(pc) + " " +
       byte_at(past - size, size) + ", but the launch asked for " + std::to_string(dynamic_bytes_));
  return false;
}

bool SharedMemory::usable(const Byte& byte, const char* what, int thread, Pc pc) {
  if (byte.copying_block != block_) return true;
  fail("thread " + std::to_string(thread) + " " + what + " at " + where(pc) +
       " what cp.async of thread " + std::to_string(byte.copying_thread) +
       " still copies: that thread has not waited");
  return false;
}

void SharedMemory::read(const void* address, int size, int thread, Pc pc) {
  if (!inside(address, size, "reads", thread, pc)) return;
  for (uintptr_t i = offset_of(address); i < offset_of(address) + size; i++) {
    Byte& byte = bytes_[i];
    if (!usable(byte, "reads", thread, pc)) return;
    if (!kWritesAreSeen) continue;
    if (byte.block != block_) {
      fail("thread " + std::to_string(thread) + " reads at " + where(pc) + " " + byte_at(i, size) +
           " that this block has not written");
      return;
    }
    if (unordered(byte.written, thread)) {
      return report("reads", thread, pc, "written", byte.written);
    }
    const Touch& last = byte.read;
    const bool from_another_warp =
        byte.read_before.epoch == epoch_ && warp_of(byte.read_before.thread) != warp_of(thread);
    if (warp_of(last.thread) != warp_of(thread) || (last.thread != thread && !from_another_warp)) {
      byte.read_before = last;
    }
    byte.read = touch(thread, pc);
  }
}

void SharedMemory::write(const void* address, int size, int thread, Pc pc) {
  if (!inside(address, size, "writes", thread, pc)) return;
  for (uintptr_t i = offset_of(address); i < offset_of(address) + size; i++) {
    Byte& byte = bytes_[i];
    if (!usable(byte, "writes", thread, pc)) return;
    if (unordered(byte.written, thread)) {
      return report("writes", thread, pc, "written", byte.written);
    }
    for (const Touch& read : {byte.read, byte.read_before}) {
      if (unordered(read, thread)) return report("writes", thread, pc, "read", read);
    }
    byte.written = touch(thread, pc);
    if (byte.block == block_) continue;
    byte.block = block_;
    static_bytes_ += begin_ + i - dynamic_begin_ >= kMaxSharedBytes;
  }
}

void SharedMemory::copy_async(void* to, const void* from, int bytes, Pc pc) {
  const int thread = place.index;
  write(to, 16, thread, pc);
  if (!inside(to, 16, "writes", thread, pc)) return;
  Copy copy{to, {}, pc};
  memcpy(copy.data, from, bytes);
  memset(to, 0xff, 16);
  copies_[thread].uncommitted.push_back(copy);
  for (int i = 0; i < 16; i++) {
    bytes_[offset_of(to) + i].copying_block = block_;
    bytes_[offset_of(to) + i].copying_thread = thread;
  }
}

void SharedMemory::commit_async() {
  Copies& mine = copies_[place.index];
  mine.groups.push_back({});
  mine.groups.back().swap(mine.uncommitted);
}

void SharedMemory::wait_async(int pending) {
  auto& groups = copies_[place.index].groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      memcpy(copy.to, copy.data, 16);
      for (int i = 0; i < 16; i++) bytes_[offset_of(copy.to) + i].copying_block = 0;
      write(copy.to, 16, place.index, copy.pc);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda_on_host
