// Random numbers that a seed decides: xorshift64*.
#pragma once

#include <cstdint>

namespace cuda_on_host {

class Random {
 public:
  explicit Random(uint64_t seed = 1) : state_(seed * 0x9E3779B97F4A7C15u | 1) {}

  // From 0 to n - 1.
  int below(int n) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<int>((state_ * 0x2545F4914F6CDD1Du >> 32) * n >> 32);
  }

 private:
  uint64_t state_;
};

}  // namespace cuda_on_host
