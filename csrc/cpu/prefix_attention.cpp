// prefix_attention forward and decode on the CPU: how their rows and keys are shared between
// threads, and their registration.
#include <algorithm>
#include <string>
#include <vector>

#include "cpu/prefix_attention_rows.h"
#include "ops/ceil_div.h"
#include "ops/prefix_attention_binding.h"

namespace glmkern {
namespace {

// A decode row with few queries has its keys split, so that all threads have work. Only its own
// lengths decide: a row's bits must not depend on its neighbours.
constexpr int64_t kSplitKeys = 512;

struct Task {
  AttentionRows rows;  // at most kSetRows
  int64_t key_begin, key_end, partial;
};

// Appends a task for every set of the `rows` rows of `sequence`.
void append_sets(AttentionRows sequence, int64_t rows, std::vector<Task>& tasks) {
  for (int64_t row = 0; row < rows; row += kSetRows) {
    sequence.begin = row;
    sequence.end = std::min(rows, row + kSetRows);
    tasks.push_back({sequence, 0, sequence.prefix.count + sequence.own.count, -1});
  }
}

// Appends a task for every kSplitKeys keys of rows that are one set.
void append_splits(AttentionRows set, int64_t rows, std::vector<Task>& tasks) {
  const int64_t keys = set.prefix.count + set.own.count;
  set.begin = 0;
  set.end = rows;
  for (int64_t key = 0; key < keys; key += kSplitKeys) {
    tasks.push_back({set, key, std::min(keys, key + kSplitKeys), key / kSplitKeys});
  }
}

void run(const std::vector<Task>& tasks, float* partials) {
  const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_fwd);
  for_each_task(tasks.size(), [&](int64_t i) {
    const Task& task = tasks[i];
    float* partial =
        task.partial < 0 ? nullptr : partials + task.partial * partial_size(task.rows.channels);
    kernel(task.rows, task.key_begin, task.key_end, partial);
  });
}

// A row's queries and cache entries; ValueError where they do not fit the room for them.
struct RowLengths {
  RowLengths(const PrefixAttentionDecode& a, int64_t row)
      : queries(a.q_lens[row]), entries(a.cache_lens[row]) {
    const auto text = [](int64_t value) { return std::to_string(value); };
    require_value(0 < queries && queries <= std::min(entries, a.shape.tokens) && entries <= a.room,
                  "prefix_attention_decode: row " + text(row) + " has " + text(queries) + " of " +
                      text(a.shape.tokens) + " queries and " + text(entries) + " of " +
                      text(a.room) + " cache entries; 1 <= queries <= entries must hold");
  }

  int64_t queries, entries;
};

struct PrefixAttentionCpu {
  static void forward(const PrefixAttentionForward& a, const Tensor& like) {
    const Spans spans("prefix_attention", a.sequences, a.shape.tokens);
    PrefixKeys prefix(a.shape, a.prefix);
    prefix.drop(a.sequences, like);
    std::vector<Task> tasks;
    for (int64_t b = 0; b < spans.count(); b++) {
      const int64_t token = spans.begin(b), length = spans.length(b);
      for (int64_t group = 0; group < a.shape.groups; group++) {
        AttentionRows rows =
            query_rows(a.shape, a.scale, a.q, 0, token, a.out, a.lse, token, group);
        rows.prefix = prefix.of(b, group);
        rows.own = key_run(a.shape, a.k, a.v, 0, token, length, group);
        rows.visible = 1;
        append_sets(rows, length * a.shape.heads, tasks);
      }
    }
    run(tasks, nullptr);
  }

  static void decode(const PrefixAttentionDecode& a, const Tensor& like) {
    std::vector<RowLengths> lengths;
    for (int64_t b = 0; b < a.rows; b++) lengths.emplace_back(a, b);
    const PrefixKeys prefix(a.shape, a.prefix);
    std::vector<Task> tasks;
    std::vector<Task> split;  // the first task of every row whose keys are split
    int64_t partials = 0;
    for (int64_t b = 0; b < a.rows; b++) {
      const auto [queries, entries] = lengths[b];
      for (int64_t group = 0; group < a.shape.groups; group++) {
        AttentionRows set =
            query_rows(a.shape, a.scale, a.q, b, 0, a.out, nullptr, b * a.shape.tokens, group);
        set.prefix = prefix.of(0, group);
        set.own = key_run(a.shape, a.k, a.v, b, 0, entries, group);
        set.visible = entries - queries + 1;
        const int64_t rows = queries * a.shape.heads;
        if (rows > kSetRows || set.prefix.count + entries <= kSplitKeys) {
          append_sets(set, rows, tasks);
          continue;
        }
        const size_t first = tasks.size();
        append_splits(set, rows, tasks);
        for (size_t i = first; i < tasks.size(); i++) tasks[i].partial += partials;
        split.push_back(tasks[first]);
        partials += tasks.size() - first;
      }
    }
    const int64_t size = partial_size(a.shape.channels);
    const Tensor memory = torch::stable::new_empty(like, {partials * size}, ScalarType::Float);
    run(tasks, floats_of(memory));
    const auto combine = GLMKERN_PICK_KERNEL(prefix_attention_combine);
    for_each_task(split.size(), [&](int64_t i) {
      const AttentionRows& set = split[i].rows;
      combine(set, ceil_div(set.prefix.count + set.own.count, kSplitKeys),
              floats_of(memory) + split[i].partial * size);
    });
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::PrefixAttentionCpu;
  m.impl("prefix_attention_fwd", TORCH_BOX(&glmkern::prefix_attention_fwd<PrefixAttentionCpu>));
  m.impl("prefix_attention_decode_fwd",
         TORCH_BOX(&glmkern::prefix_attention_decode_fwd<PrefixAttentionCpu>));
}
