#include "counters.h"

#include <algorithm>
#include <array>

#include "machine.h"

namespace cuda_on_host {

Counters counters;

namespace {

constexpr int kBanks = 32, kWordBytes = 4, kSectorBytes = 32;
const char* const kKindNames[] = {"shared-read", "shared-write", "global-read", "global-write"};

}  // namespace

void Counters::start() {
  counting_ = true;
  kernels_.clear();
}

void Counters::log(Kind kind, uintptr_t address, int size, int thread, Pc pc) {
  Site& site = kernels_[kernel_].sites[{pc, kind}];
  site.times.resize(kMaxThreads);
  site.accesses[{site.times[thread]++, thread / kWarp}].push_back({thread % kWarp, address, size});
}

void Counters::count_shared(const std::vector<LaneAccess>& lanes, Site& site) {
  const int lanes_together = kBanks * kWordBytes / std::max(lanes[0].size, kWordBytes);
  std::map<int, std::array<std::set<uintptr_t>, kBanks>> words;  // by wavefront and bank
  for (const LaneAccess& lane : lanes) {
    for (int byte = 0; byte < lane.size; byte++) {
      const uintptr_t word = (lane.address + byte) / kWordBytes;
      words[lane.lane / lanes_together][word % kBanks].insert(word);
    }
  }
  for (const auto& [_, banks] : words) {
    size_t most = 0;
    for (const auto& bank : banks) most = std::max(most, bank.size());
    site.wavefronts += most;
    site.least_wavefronts++;
  }
}

void Counters::count_global(const std::vector<LaneAccess>& lanes, Site& site) {
  std::set<uintptr_t> sectors, bytes;
  for (const LaneAccess& lane : lanes) {
    for (int byte = 0; byte < lane.size; byte++) {
      bytes.insert(lane.address + byte);
      sectors.insert((lane.address + byte) / kSectorBytes);
    }
  }
  site.bytes += bytes.size();
  site.sectors += sectors.size();
}

void Counters::end_block(size_t shared_bytes) {
  if (!counting_) return;
  Kernel& kernel = kernels_[kernel_];
  kernel.blocks++;
  kernel.shared_bytes = std::max(kernel.shared_bytes, shared_bytes);
  for (auto& [key, site] : kernel.sites) {
    for (const auto& [time_and_warp, lanes] : site.accesses) {
      site.count++;
      const bool shared = key.second == Kind::kSharedRead || key.second == Kind::kSharedWrite;
      (shared ? count_shared : count_global)(lanes, site);
    }
    site.accesses.clear();
    site.times.assign(kMaxThreads, 0);
  }
}

std::string Counters::stop() {
  counting_ = false;
  std::string text;
  const auto line = [&](const char* what, std::initializer_list<uint64_t> numbers) {
    text += what;
    for (const uint64_t number : numbers) text += " " + std::to_string(number);
    text += "\n";
  };
  for (const auto& [name, kernel] : kernels_) {
    line("kernel", {name, kernel.blocks, kernel.barriers, kernel.shared_bytes});
    for (const Pc pc : kernel.barrier_sites) line("barrier", {name, pc});
    for (const auto& [key, site] : kernel.sites) {
      line(kKindNames[static_cast<int>(key.second)],
           {name, key.first, site.count, site.bytes, site.wavefronts, site.least_wavefronts,
            site.sectors});
    }
  }
  return text;
}

}  // namespace cuda_on_host

// For the tests, which load the library of kernels.
extern "C" {
[[gnu::visibility("default")]] void cuda_on_host_start_counting() {
  cuda_on_host::counters.start();
}
[[gnu::visibility("default")]] const char* cuda_on_host_stop_counting() {
  static std::string text;
  text = cuda_on_host::counters.stop();
  return text.c_str();
}
}
