// Where code is in its source.
#pragma once

#include <cstdint>
#include <string>

namespace cuda_on_host {

// An address in the library or program that holds the kernels, from its beginning.
using Pc = uint64_t;

// That library or program: its code, constants and variables.
struct Image {
  uintptr_t begin, end;
};
extern const Image image;

inline bool in_image(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - image.begin < image.end - image.begin;
}

inline Pc pc_of(const void* code) { return reinterpret_cast<uintptr_t>(code) - image.begin; }

// "file:line", and the line of each call that brought it there by inlining.
std::string where(Pc pc);

// The function at `code`, with its template arguments.
std::string name_of(const void* code);

}  // namespace cuda_on_host
