// The sequences of a packed batch in host memory, whose bounds are checked before they are used.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "ops/binding.h"
#include "ops/sequences.h"

namespace glmkern {

class Spans {
 public:
  // ValueError for an empty sequence or a total that is not `tokens`; `op` begins the sentence.
  Spans(const std::string& op, const PackedSequences& sequences, int64_t tokens)
      : count_(sequences.count), ends_(sequences.cu_seqlens) {
    const auto text = [](int64_t value) { return std::to_string(value); };
    require_value(ends_[0] == 0 && ends_[count_] == tokens,
                  op + ": cu_seqlens must run from 0 to the number of tokens, " + text(tokens) +
                      ", not from " + text(ends_[0]) + " to " + text(ends_[count_]));
    for (int64_t b = 0; b < count_; b++) {
      require_value(length(b) > 0, op + ": sequence " + text(b) +
                                       " is empty (cu_seqlens goes from " + text(begin(b)) +
                                       " to " + text(end(b)) + "); leave it out of the batch");
    }
  }

  int64_t count() const { return count_; }
  int64_t begin(int64_t sequence) const { return ends_[sequence]; }
  int64_t end(int64_t sequence) const { return ends_[sequence + 1]; }
  int64_t length(int64_t sequence) const { return end(sequence) - begin(sequence); }

  int64_t sequence_of(int64_t token) const {
    return std::upper_bound(ends_, ends_ + count_ + 1, token) - ends_ - 1;
  }

 private:
  int64_t count_;
  const int32_t* ends_;  // [count + 1]
};

}  // namespace glmkern
