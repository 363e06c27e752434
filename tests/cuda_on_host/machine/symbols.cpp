// Asks addr2line, which is where the compiler is.
#include "symbols.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>

namespace cuda_on_host {
namespace {

int find_end(dl_phdr_info* object, size_t, void* result) {
  Image& found = *static_cast<Image*>(result);
  if (object->dlpi_addr != found.begin) return 0;
  for (int i = 0; i < object->dlpi_phnum; i++) {
    const auto& part = object->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    found.end = std::max<uintptr_t>(found.end, found.begin + part.p_vaddr + part.p_memsz);
  }
  return 1;
}

Dl_info own_file() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&own_file), &info);
  return info;
}

Image find_image() {
  Image found{reinterpret_cast<uintptr_t>(own_file().dli_fbase), 0};
  dl_iterate_phdr(find_end, &found);
  return found;
}

// Two lines for each function that is inlined at `pc`, the innermost first: its name, "file:line".
std::string addr2line(Pc pc) {
  char command[4200];
  snprintf(command, sizeof command, "addr2line -Cfie '%s' %#lx", own_file().dli_fname,
           static_cast<unsigned long>(pc));
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char buffer[4096];
    while (fgets(buffer, sizeof buffer, pipe)) text += buffer;
    pclose(pipe);
  }
  return text;
}

}  // namespace

const Image image = find_image();

std::string where(Pc pc) {
  const std::string text = addr2line(pc - 1);  // a call's return address is behind it
  std::string places;
  size_t begin = 0;
  for (int line = 0; begin < text.size(); line++) {
    const size_t end = text.find('\n', begin);
    if (line % 2 == 1) {
      const std::string place = text.substr(begin, end - begin);
      const std::string file = place.substr(place.rfind('/') + 1);
      places += (places.empty() ? "" : " < ") + file.substr(0, file.find(' '));
    }
    begin = end + 1;
  }
  return places.empty() ? "an unknown place" : places;
}

std::string name_of(const void* code) {
  const std::string text = addr2line(pc_of(code));
  return text.substr(0, text.find('\n'));
}

}  // namespace cuda_on_host
