// The sequences of a packed batch as the kernels see them; glmkern/ops/sequences.py says what they
// are. Used with host memory: on a GPU the values are preconditions.
#pragma once

#include <cstdint>
#include <string>

#include "ops/binding.h"

namespace glmkern {

// ValueError for an empty sequence or a wrong total. cu_seqlens: [sequences + 1].
inline void require_spans(const std::string& op, const int32_t* cu_seqlens, int64_t sequences,
                          int64_t tokens) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  const int64_t first = cu_seqlens[0], last = cu_seqlens[sequences];
  require_value(first == 0 && last == tokens,
                op + ": cu_seqlens must run from 0 to the number of tokens, " + text(tokens) +
                    ", not from " + text(first) + " to " + text(last));
  for (int64_t b = 0; b < sequences; b++) {
    const int64_t start = cu_seqlens[b], end = cu_seqlens[b + 1];
    require_value(start < end, op + ": sequence " + text(b) + " is empty (cu_seqlens goes from " +
                                   text(start) + " to " + text(end) +
                                   "); leave it out of the batch");
  }
}

}  // namespace glmkern
