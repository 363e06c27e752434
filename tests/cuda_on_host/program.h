// What the test programs share. A program gets numbers on its command line and its input tensors,
// one after another, on stdin; it writes its output tensors to stdout.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

// Exactly the bytes of a tensor on the heap, so that AddressSanitizer sees the first byte outside.
// `offset` bytes before it make it unaligned; what is not read is poisoned with NaN.
class HostTensor {
 public:
  HostTensor(size_t bytes, size_t offset) : bytes_(bytes + offset, '\xff'), offset_(offset) {}

  HostTensor& read() {
    if (size() && fread(data(), 1, size(), stdin) != size())
      throw std::runtime_error("stdin is too short");
    return *this;
  }
  void write() const {
    if (size()) fwrite(bytes_.data() + offset_, 1, size(), stdout);
  }

  void* data() { return bytes_.data() + offset_; }
  float* floats() { return static_cast<float*>(data()); }

 private:
  size_t size() const { return bytes_.size() - offset_; }

  std::vector<char> bytes_;
  size_t offset_;
};

// main: runs `program`, and prints what it throws.
template <class F>
int run_program(F program) {
  try {
    program();
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
