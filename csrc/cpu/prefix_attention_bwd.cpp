// prefix_attention backward on the CPU. The batch is cut into units of about equal work, each with
// its own sums of dk, dv and dPrefix; at the end they are added in order and rounded once.
#include "cpu/prefix_attention_rows.h"

#include <tuple>
#include <vector>

namespace glmkern {
namespace {

// Units times groups: enough for 16 threads, few enough to keep the sums small.
constexpr int64_t kUnits = 16;
constexpr int64_t kLeastRows = 256;  // a unit's sums of the prefix cost as much as a few rows

// Consecutive tokens, perhaps of several sequences.
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
  Backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
           const std::optional<Tensor>& prefix_k, const std::optional<Tensor>& prefix_v,
           const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
           const Tensor& sequence_ids, const std::optional<Tensor>& seed, double scale, double p,
           bool token_grad, bool prefix_grad)
      : shape_(attention_shape("prefix_attention_bwd", q, k, v, prefix_k, prefix_v)),
        dout_(with_dense_heads(dout)),
        q_(with_dense_heads(q)),
        k_(with_dense_heads(k)),
        v_(with_dense_heads(v)),
        out_(out),
        lse_(lse),
        spans_(cu_seqlens, sequence_ids, shape_.tokens),
        prefix_(shape_, prefix_k, prefix_v),
        scale_(scale),
        p_(p),
        token_grad_(token_grad),
        prefix_grad_(prefix_grad && prefix_k.has_value()),
        units_(cut_into_units(shape_, spans_)) {
    const char* op = "prefix_attention_bwd";
    require_like(op, "out", out, q, q.scalar_type(), q.numel());
    require_like(op, "lse", lse, q, ScalarType::Float, q.numel() / shape_.channels);
    require(dout.scalar_type() == q.scalar_type() && dout.device() == q.device() &&
                dout.dim() == 3 && dout.numel() == q.numel() && dout.size(2) == q.size(2),
            std::string(op) + ": dout must be like q");
    prefix_.drop(sequence_ids, seed, p);
    allocate_sums();
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run() {
    const Tensor dq = gradient_of(q_, token_grad_), dk = gradient_of(k_, token_grad_),
                 dv = gradient_of(v_, token_grad_);
    if (token_grad_ || prefix_grad_) {
      for_each_task(units() * shape_.groups, [&](int64_t task) {
        run_unit(task / shape_.groups, task % shape_.groups, dq);
      });
    }
    if (token_grad_) add_token_sums(dk, dv);
    if (!prefix_grad_) return {dq, dk, dv, gradient_of(q_, false), gradient_of(q_, false)};
    const Tensor dprefix_k = prefix_.new_like(), dprefix_v = prefix_.new_like();
    add_prefix_sums(dprefix_k, dprefix_v);
    return {dq, dk, dv, dprefix_k, dprefix_v};
  }

 private:
  int64_t units() const { return units_.size(); }

  static Tensor gradient_of(const Tensor& x, bool wanted) {
    if (!wanted) return torch::stable::new_empty(x, {0});
    return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  }

  // [units, groups, 2, prefix, padded channels], twice under dropout, then the units' own sums. Of
  // one long sequence and two groups those are five times k and v in float32, less than q.
  void allocate_sums() {
    const int64_t channels = padded_channels(shape_.channels);
    prefix_size_ = prefix_grad_ ? 2 * shape_.prefix * channels : 0;
    int64_t size = units() * shape_.groups * prefix_size_ * (prefix_.is_dropped() ? 2 : 1);
    for (Unit& unit : units_) {
      unit.own_sums = size;
      size += token_grad_ ? shape_.groups * 2 * unit.keys() * channels : 0;
    }
    sums_.emplace(torch::stable::new_empty(q_, {size}, ScalarType::Float));
  }

  KeySums prefix_sums(int64_t unit, int64_t group, bool of_one_sequence = false) const {
    if (!prefix_grad_) return {nullptr, nullptr};
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

  void run_unit(int64_t index, int64_t group, const Tensor& dq) const {
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_bwd);
    const Unit& unit = units_[index];
    const int64_t channels = padded_channels(shape_.channels);
    const KeySums prefix = prefix_sums(index, group), own = own_sums(unit, group);
    if (prefix_grad_) std::fill_n(prefix.keys, prefix_size_, 0.0f);
    if (token_grad_) std::fill_n(own.keys, 2 * unit.keys() * channels, 0.0f);
    for (int64_t b = spans_.sequence_of(unit.begin); b < spans_.count(); b++) {
      const int64_t token = spans_.begin(b);
      if (token >= unit.end) break;
      const int64_t end = std::min(unit.end, spans_.end(b)) - token;
      AttentionGradient a{};
      a.rows = query_rows(shape_, scale_, q_, token * q_.stride(0), out_, lse_, token, group);
      a.rows.begin = std::max<int64_t>(unit.begin - token, 0) * shape_.heads;
      a.rows.end = end * shape_.heads;
      a.rows.prefix = prefix_.of(b, group);
      a.rows.own = key_run(shape_, k_, v_, token * k_.stride(0), token * v_.stride(0), end, group);
      a.rows.visible = 1;
      const int64_t first = group * shape_.heads * shape_.channels;
      a.dout = element_of(dout_, token * dout_.stride(0) + first);
      a.dout_stride = dout_.stride(0);
      if (token_grad_) {
        const int64_t row = shape_.groups * shape_.heads * shape_.channels;
        a.dq = mutable_element_of(dq, token * row + first);
        const int64_t behind = (token - unit.first_key) * channels;
        a.own = {own.keys + behind, own.values + behind};
      }
      a.prefix = prefix;
      if (prefix_grad_ && prefix_.is_dropped()) {
        a.prefix = prefix_sums(index, group, true);
        std::fill_n(a.prefix.keys, prefix_size_, 0.0f);
      }
      kernel(a);
      if (a.prefix.keys != prefix.keys) add_kept(a.rows.prefix, a.prefix, prefix);
    }
  }

  void add_kept(const KeyRun& dropped, const KeySums& more, const KeySums& sums) const {
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_add_kept);
    const float factor = 1.0f / static_cast<float>(1.0 - p_);
    kernel(static_cast<const float*>(dropped.keys), dropped.key_stride, dropped.count,
           shape_.channels, factor, more.keys, sums.keys);
    kernel(static_cast<const float*>(dropped.values), dropped.value_stride, dropped.count,
           shape_.channels, factor, more.values, sums.values);
  }

  void add_token_sums(const Tensor& dk, const Tensor& dv) const {
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
          kernel(shape_.dtype, channels, static_cast<float>(scale_), keys.data(), count,
                 mutable_element_of(dk, first));
          kernel(shape_.dtype, channels, 1.0f, values.data(), count, mutable_element_of(dv, first));
        }
      }
    });
  }

  void add_prefix_sums(const Tensor& dprefix_k, const Tensor& dprefix_v) const {
    const auto kernel = GLMKERN_PICK_KERNEL(prefix_attention_sum);
    const int64_t channels = shape_.channels, row = padded_channels(channels);
    for_each_row(shape_.prefix * shape_.groups, 2 * units() * channels,
                 [&](int64_t begin, int64_t end) {
                   std::vector<const float*> keys(units()), values(units());
                   for (int64_t i = begin; i < end; i++) {
                     const int64_t key = i / shape_.groups, group = i % shape_.groups;
                     for (int64_t unit = 0; unit < units(); unit++) {
                       const KeySums sums = prefix_sums(unit, group);
                       keys[unit] = sums.keys + key * row;
                       values[unit] = sums.values + key * row;
                     }
                     kernel(shape_.prefix_dtype, channels, static_cast<float>(scale_), keys.data(),
                            units(), mutable_element_of(dprefix_k, i * channels));
                     kernel(shape_.prefix_dtype, channels, 1.0f, values.data(), units(),
                            mutable_element_of(dprefix_v, i * channels));
                   }
                 });
  }

  AttentionShape shape_;
  Tensor dout_, q_, k_, v_, out_, lse_;
  Spans spans_;
  Prefix prefix_;
  double scale_, p_;
  bool token_grad_, prefix_grad_;
  std::vector<Unit> units_;
  std::optional<Tensor> sums_;
  int64_t prefix_size_ = 0;  // floats of one unit's sums of one group
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& prefix_k, const std::optional<Tensor>& prefix_v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens, const Tensor& sequence_ids,
    const std::optional<Tensor>& seed, double scale, double p, bool token_grad, bool prefix_grad) {
  return Backward(dout, q, k, v, prefix_k, prefix_v, out, lse, cu_seqlens, sequence_ids, seed,
                  scale, p, token_grad, prefix_grad)
      .run();
}

}  // namespace
}  // namespace glmkern

STABLE_TORCH_LIBRARY_IMPL(glmkern_cpu, CPU, m) {
  m.impl("prefix_attention_bwd", TORCH_BOX(&glmkern::backward));
}
