// prefix_attention backward on the CPU. The batch is cut into units of about equal work, each with
// its own sums of dk, dv and dPrefix; at the end they are added in order and rounded once.
#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/prefix_attention_rows.h"
#include "ops/prefix_attention_binding.h"

namespace glmkern {
namespace {

// Units times groups: enough for 16 threads, few enough to keep the sums small.
constexpr int64_t kUnits = 16;
constexpr int64_t kLeastRows = 256;  // a unit's sums of the prefix cost as much as a few rows

// Consecutive tokens of one or more sequences.
struct Unit {
  int64_t begin, end;
  int64_t first_key;  // where the first of its sequences begins
  int64_t own_sums;   // where its sums are in the working memory: [groups, 2, keys, channels]
  int64_t keys() const { return end - first_key; }
};

// A token costs as much as it sees. The cuts depend on the shapes only.
std::vector<Unit> cut_into_units(const AttentionShape& shape, const Spans& spans) {
  const int64_t wanted = std::clamp<int64_t>(
      std::min(kUnits / shape.groups, shape.tokens * shape.heads / kLeastRows), 1, shape.tokens);
  int64_t total = 0;
  for (int64_t b = 0; b < spans.count(); b++) {
    const int64_t length = spans.length(b);
    total += length * shape.prefix + length * (length + 1) / 2;
  }
  std::vector<Unit> units;
  int64_t cost = 0;
  for (int64_t b = 0; b < spans.count(); b++) {
    for (int64_t token = spans.begin(b); token < spans.end(b); token++) {
      if (cost * wanted >= total * static_cast<int64_t>(units.size())) {
        if (!units.empty()) units.back().end = token;
        units.push_back({token, shape.tokens, spans.begin(b), 0});
      }
      cost += shape.prefix + token - spans.begin(b) + 1;
    }
  }
  return units;
}

class Backward {
 public:
  Backward(const PrefixAttentionBackward& arguments, const Tensor& like)
      : arguments_(arguments),
        shape_(arguments.shape),
        spans_("prefix_attention", arguments.sequences, arguments.shape.tokens),
        prefix_(arguments.shape, arguments.prefix),
        units_(cut_into_units(shape_, spans_)) {
    prefix_.drop(arguments_.sequences, like);
    allocate_sums(like);
  }

  void run() const {
    if (arguments_.token_grad || arguments_.prefix_grad) {
      for_each_task(units() * shape_.groups,
                    [&](int64_t task) { run_unit(task / shape_.groups, task % shape_.groups); });
    }
    if (arguments_.token_grad) add_token_sums();
    if (arguments_.prefix_grad) add_prefix_sums();
  }

 private:
  int64_t units() const { return units_.size(); }

  // [units, groups, 2, prefix, padded channels], twice under dropout, then the units' own sums. Of
  // one long sequence and two groups those are five times k and v in float32, less than q.
  void allocate_sums(const Tensor& like) {
    const int64_t channels = padded_channels(shape_.channels);
    prefix_size_ = arguments_.prefix_grad ? 2 * shape_.prefix * channels : 0;
    int64_t size = units() * shape_.groups * prefix_size_ * (prefix_.is_dropped() ? 2 : 1);
    for (Unit& unit : units_) {
      unit.own_sums = size;
      size += arguments_.token_grad ? shape_.groups * 2 * unit.keys() * channels : 0;
    }
    sums_.emplace(torch::stable::new_empty(like, {size}, ScalarType::Float));
  }

  KeySums prefix_sums(int64_t unit, int64_t group, bool of_one_sequence = false) const {
    if (!arguments_.prefix_grad) return {nullptr, nullptr};
    const int64_t place = (of_one_sequence ? units() : 0) + unit;
    float* keys = floats_of(*sums_) + (place * shape_.groups + group) * prefix_size_;
    return {keys, keys + prefix_size_ / 2};
  }

  // From the unit's first key on.
  KeySums own_sums(const Unit& unit, int64_t group) const {
    const int64_t size = unit.keys() * padded_channels(shape_.channels);
    float* keys = floats_of(*sums_) + unit.own_sums + group * 2 * size;
    return {keys, keys + size};
  }

  void run_unit(int64_t index, int64_t group) const {
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_bwd);
    const Unit& unit = units_[index];
    const int64_t channels = padded_channels(shape_.channels);
    const KeySums prefix = prefix_sums(index, group), own = own_sums(unit, group);
    if (arguments_.prefix_grad) std::fill_n(prefix.keys, prefix_size_, 0.0f);
    if (arguments_.token_grad) std::fill_n(own.keys, 2 * unit.keys() * channels, 0.0f);
    for (int64_t b = spans_.sequence_of(unit.begin); b < spans_.count(); b++) {
      const int64_t token = spans_.begin(b);
      if (token >= unit.end) break;
      const int64_t end = std::min(unit.end, spans_.end(b)) - token;
      AttentionGradient a{};
      // The kernel only reads out and lse.
      a.rows = query_rows(shape_, arguments_.scale, arguments_.q, 0, token,
                          const_cast<void*>(arguments_.out), const_cast<float*>(arguments_.lse),
                          token, group);
      a.rows.begin = std::max<int64_t>(unit.begin - token, 0) * shape_.heads;
      a.rows.end = end * shape_.heads;
      a.rows.prefix = prefix_.of(b, group);
      a.rows.own = key_run(shape_, arguments_.k, arguments_.v, 0, token, end, group);
      a.rows.visible = 1;
      a.dout = element_of(shape_, arguments_.dout, 0, token, group * shape_.heads);
      a.dout_stride = arguments_.dout.stride;
      if (arguments_.token_grad) {
        const int64_t first_head = (token * shape_.groups + group) * shape_.heads;
        a.dq = element_of(arguments_.dq, shape_.dtype, first_head * shape_.channels);
        const int64_t offset = (token - unit.first_key) * channels;
        a.own = {own.keys + offset, own.values + offset};
      }
      a.prefix = prefix;
      if (arguments_.prefix_grad && prefix_.is_dropped()) {
        a.prefix = prefix_sums(index, group, true);
        std::fill_n(a.prefix.keys, prefix_size_, 0.0f);
      }
      kernel(a);
      if (a.prefix.keys != prefix.keys) add_kept(a.rows.prefix, a.prefix, prefix);
    }
  }

  void add_kept(const KeyRun& dropped, const KeySums& more, const KeySums& sums) const {
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_add_kept);
    const float factor = 1.0f / static_cast<float>(1.0 - arguments_.prefix.p);
    kernel(static_cast<const float*>(dropped.keys), dropped.key_stride, dropped.count,
           shape_.channels, factor, more.keys, sums.keys);
    kernel(static_cast<const float*>(dropped.values), dropped.value_stride, dropped.count,
           shape_.channels, factor, more.values, sums.values);
  }

  void add_token_sums() const {
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_sum);
    const int64_t channels = shape_.channels, row = padded_channels(channels);
    for_each_row(shape_.tokens, 2 * shape_.groups * channels, [&](int64_t begin, int64_t end) {
      std::vector<const float*> keys, values;
      for (int64_t token = begin; token < end; token++) {
        for (int64_t group = 0; group < shape_.groups; group++) {
          keys.clear();
          values.clear();
          for (const Unit& unit : units_) {
            if (token < unit.first_key || token >= unit.end) continue;
            const KeySums sums = own_sums(unit, group);
            keys.push_back(sums.keys + (token - unit.first_key) * row);
            values.push_back(sums.values + (token - unit.first_key) * row);
          }
          const int64_t first = (token * shape_.groups + group) * channels, count = keys.size();
          kernel(shape_.dtype, channels, arguments_.scale, keys.data(), count,
                 element_of(arguments_.dk, shape_.dtype, first));
          kernel(shape_.dtype, channels, 1.0f, values.data(), count,
                 element_of(arguments_.dv, shape_.dtype, first));
        }
      }
    });
  }

  void add_prefix_sums() const {
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_sum);
    const int64_t channels = shape_.channels, row = padded_channels(channels);
    const int64_t rows = shape_.prefix * shape_.groups;
    for_each_row(rows, 2 * units() * channels, [&](int64_t begin, int64_t end) {
      std::vector<const float*> keys(units()), values(units());
      for (int64_t i = begin; i < end; i++) {
        const int64_t key = i / shape_.groups, group = i % shape_.groups;
        for (int64_t unit = 0; unit < units(); unit++) {
          const KeySums sums = prefix_sums(unit, group);
          keys[unit] = sums.keys + key * row;
          values[unit] = sums.values + key * row;
        }
        kernel(shape_.prefix_dtype, channels, arguments_.scale, keys.data(), units(),
               element_of(arguments_.dprefix_k, shape_.prefix_dtype, i * channels));
        kernel(shape_.prefix_dtype, channels, 1.0f, values.data(), units(),
               element_of(arguments_.dprefix_v, shape_.prefix_dtype, i * channels));
      }
    });
  }

  PrefixAttentionBackward arguments_;
  AttentionShape shape_;
  Spans spans_;
  PrefixKeys prefix_;
  std::vector<Unit> units_;
  std::optional<Tensor> sums_;
  int64_t prefix_size_ = 0;  // floats of one unit's sums of one group
};

struct PrefixAttentionBackwardCpu {
  static void backward(const PrefixAttentionBackward& a, const Tensor& like) {
    Backward(a, like).run();
  }
};

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  using glmkern::PrefixAttentionBackwardCpu;
  m.impl("prefix_attention_bwd",
         TORCH_BOX(&glmkern::prefix_attention_bwd<PrefixAttentionBackwardCpu>));
}
