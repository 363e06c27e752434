// prefix_attention forward and decode on the CPU: how their rows and keys are shared between
// threads, and their registration.
#include "cpu/prefix_attention_rows.h"

#include <tuple>
#include <vector>

namespace glmkern {
namespace {

// A decode row with few queries has its keys split, so that all threads have work. Only its own
// lengths decide, lest a row's bits depend on its neighbours.
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

std::tuple<Tensor, Tensor> forward(const Tensor& any_q, const Tensor& any_k, const Tensor& any_v,
                                   const std::optional<Tensor>& prefix_k,
                                   const std::optional<Tensor>& prefix_v, const Tensor& cu_seqlens,
                                   const Tensor& sequence_ids, const std::optional<Tensor>& seed,
                                   double scale, double p) {
  const AttentionShape shape =
      attention_shape("prefix_attention_fwd", any_q, any_k, any_v, prefix_k, prefix_v);
  const Tensor q = with_dense_heads(any_q), k = with_dense_heads(any_k),
               v = with_dense_heads(any_v);
  const Spans spans(cu_seqlens, sequence_ids, shape.tokens);
  Prefix prefix(shape, prefix_k, prefix_v);
  prefix.drop(sequence_ids, seed, p);
  const int64_t query_heads = shape.groups * shape.heads;
  Tensor out = torch::stable::new_empty(q, {shape.tokens, query_heads, shape.channels});
  Tensor lse = torch::stable::new_empty(q, {shape.tokens, query_heads}, ScalarType::Float);
  std::vector<Task> tasks;
  for (int64_t b = 0; b < spans.count(); b++) {
    const int64_t token = spans.begin(b), length = spans.length(b);
    for (int64_t group = 0; group < shape.groups; group++) {
      AttentionRows a = query_rows(shape, scale, q, token * q.stride(0), out, lse, token, group);
      a.prefix = prefix.of(b, group);
      a.own = key_run(shape, k, v, token * k.stride(0), token * v.stride(0), length, group);
      a.visible = 1;
      append_sets(a, length * shape.heads, tasks);
    }
  }
  run(tasks, nullptr);
  return {out, lse};
}

// Queries and cache entries of every row of a decode batch.
struct Lengths {
  Lengths(const Tensor& any_cache_lens, const Tensor& any_q_lens, const Tensor& q,
          const Tensor& k_cache)
      : cache_lens(torch::stable::contiguous(any_cache_lens)),
        q_lens(torch::stable::contiguous(any_q_lens)) {
    const char* op = "prefix_attention_decode_fwd";
    const int64_t rows = q.size(0), widest = q.size(1), longest = k_cache.size(1);
    require_like(op, "cache_lens", cache_lens, q, ScalarType::Long, rows);
    require_like(op, "q_lens", q_lens, q, ScalarType::Long, rows);
    for (int64_t b = 0; b < rows; b++) {
      const int64_t queries = of(q_lens, b), entries = of(cache_lens, b);
      require_value(
          0 < queries && queries <= std::min(entries, widest) && entries <= longest,
          "prefix_attention_decode: row " + std::to_string(b) + " has " + std::to_string(queries) +
              " of " + std::to_string(widest) + " queries and " + std::to_string(entries) + " of " +
              std::to_string(longest) + " cache entries; 1 <= queries <= entries must hold");
    }
  }

  static int64_t of(const Tensor& lens, int64_t row) {
    return static_cast<const int64_t*>(lens.const_data_ptr())[row];
  }

  Tensor cache_lens, q_lens;
};

Tensor decode(const Tensor& any_q, const Tensor& any_k, const Tensor& any_v,
              const Tensor& cache_lens, const std::optional<Tensor>& prefix_k,
              const std::optional<Tensor>& prefix_v, const Tensor& q_lens, double scale) {
  const char* op = "prefix_attention_decode_fwd";
  const AttentionShape shape = attention_shape(op, any_q, any_k, any_v, prefix_k, prefix_v);
  require(any_q.dim() == 4 && any_k.size(0) == any_q.size(0) && any_v.size(0) == any_q.size(0),
          std::string(op) + ": q and the caches must have the same number of rows");
  const Tensor q = with_dense_heads(any_q), k = with_dense_heads(any_k),
               v = with_dense_heads(any_v);
  const Lengths lengths(cache_lens, q_lens, q, k);
  const Prefix prefix(shape, prefix_k, prefix_v);
  Tensor out = torch::stable::new_zeros(
      q, {q.size(0), shape.tokens, shape.groups * shape.heads, shape.channels});
  std::vector<Task> tasks;
  std::vector<Task> split;  // the first task of every row whose keys are split
  int64_t partials = 0;
  for (int64_t b = 0; b < q.size(0); b++) {
    const int64_t queries = Lengths::of(lengths.q_lens, b);
    const int64_t entries = Lengths::of(lengths.cache_lens, b);
    for (int64_t group = 0; group < shape.groups; group++) {
      AttentionRows a =
          query_rows(shape, scale, q, b * q.stride(0), out, std::nullopt, b * shape.tokens, group);
      a.prefix = prefix.of(0, group);
      a.own = key_run(shape, k, v, b * k.stride(0), b * v.stride(0), entries, group);
      a.visible = entries - queries + 1;
      const int64_t rows = queries * shape.heads;
      if (rows > kSetRows || a.prefix.count + entries <= kSplitKeys) {
        append_sets(a, rows, tasks);
        continue;
      }
      const size_t first = tasks.size();
      append_splits(a, rows, tasks);
      for (size_t i = first; i < tasks.size(); i++) tasks[i].partial += partials;
      split.push_back(tasks[first]);
      partials += tasks.size() - first;
    }
  }
  const Tensor memory =
      torch::stable::new_empty(q, {partials * partial_size(shape.channels)}, ScalarType::Float);
  run(tasks, floats_of(memory));
  const auto combine = GLMKERN_PICK_KERNEL(prefix_attention_combine);
  for_each_task(split.size(), [&](int64_t i) {
    const AttentionRows& a = split[i].rows;
    combine(a, ceil_div(a.prefix.count + a.own.count, kSplitKeys),
            floats_of(memory) + split[i].partial * partial_size(a.channels));
  });
  return out;
}

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  m.impl("prefix_attention_fwd", TORCH_BOX(&glmkern::forward));
  m.impl("prefix_attention_decode_fwd", TORCH_BOX(&glmkern::decode));
}
