// Gradients of lookup_reduce for touched rows and for scores, in one pass over the rows:
// grad_row[u] = sum over its slots of concat_c(scores[t,k,c] * grad[t, block][core c]), in the order of the slots;
// grad_scores[t,k,c] = <row(k)[core c], grad[t, block of k][core c]>
#pragma once

#include "lookup_dot.h"
#include "sorted_slots.h"

namespace ultramem {

// Slots of one row that are added up at a stretch. The sums of a row with more are added in order afterwards, so that
// a row that many tokens share is the work of all threads and still the same sum.
constexpr std::int64_t kStretch = 256;

template <class Value, class Score>
class RowGradients {
  using Acc = Accumulator<Value>;
  static constexpr std::int64_t kWidth = kLanes<Acc>;

 public:
  // grad_scores: where to write them, or null. to_row(u): where the gradient of the u-th touched row goes.
  RowGradients(const LookupSizes& size, const SortedSlots& sorted, const Value* values, const Score* scores,
               const Value* grad, Score* grad_scores)
      : size_(size), sorted_(sorted), values_(values), scores_(scores), grad_(grad), grad_scores_(grad_scores),
        core_columns_(size.d / size.c) {
    for (std::int64_t u = 0; u < sorted.rows(); ++u) {
      const std::int64_t stretches = (sorted.first(u + 1) - sorted.first(u) + kStretch - 1) / kStretch;
      if (stretches < 2) continue;
      long_rows_.push_back({u, partial_sums_, stretches});
      partial_sums_ += stretches;
    }
    sums_.resize(static_cast<std::size_t>(partial_sums_ * size.d));
  }

  template <class Parallel, class ToRow>
  void run(const Parallel& parallel, const ToRow& to_row) {
    const std::int64_t bytes = size_.d * static_cast<std::int64_t>(sizeof(Value));
    parallel(sorted_.count(), std::max<std::int64_t>(kBytesWorthAThread / std::max<std::int64_t>(bytes, 1), 1),
             [&](std::int64_t begin, std::int64_t end) { add_stretches(begin, end, to_row); });
    for (const LongRow& row : long_rows_) {
      parallel(size_.d, std::max<std::int64_t>(kBytesWorthAThread / sizeof(Acc) / row.stretches, kWidth),
               [&](std::int64_t begin, std::int64_t end) { add_sums(row, begin, end, to_row(row.u)); });
    }
  }

 private:
  struct LongRow {
    std::int64_t u, first_sum, stretches;
  };

  // The stretches that begin at positions [begin, end).
  template <class ToRow>
  void add_stretches(std::int64_t begin, std::int64_t end, const ToRow& to_row) {
    std::vector<Acc> sum(static_cast<std::size_t>(size_.d));
    std::int64_t u = sorted_.row_at(begin);
    // Of a row that began before, the first stretch that begins here.
    std::int64_t from = sorted_.first(u) + (begin - sorted_.first(u) + kStretch - 1) / kStretch * kStretch;
    for (std::int64_t i = from; i < std::min(end, from + rows_ahead(size_.d * sizeof(Value))); ++i) fetch(i);
    while (from < end) {
      if (from >= sorted_.first(u + 1)) from = sorted_.first(++u);
      if (from >= end) break;
      const std::int64_t to = std::min(from + kStretch, sorted_.first(u + 1));
      if (sorted_.first(u + 1) - sorted_.first(u) <= kStretch) {
        add_stretch(from, to, sum.data());
        convert(sum.data(), to_row(u), size_.d);
      } else {
        const auto row = std::lower_bound(long_rows_.begin(), long_rows_.end(), u,
                                          [](const LongRow& one, std::int64_t other) { return one.u < other; });
        add_stretch(from, to, sums_.data() + (row->first_sum + (from - sorted_.first(u)) / kStretch) * size_.d);
      }
      from = to;
    }
  }

  const Value* gradient_at(std::int64_t i) const {
    return grad_ + (sorted_.slot(i) / size_.k * size_.e + sorted_.block(i)) * size_.d;
  }

  ULTRAMEM_INLINE void fetch(std::int64_t i) const {
    const std::int64_t bytes = size_.d * static_cast<std::int64_t>(sizeof(Value));
    prefetch(gradient_at(i), bytes);
    __builtin_prefetch(scores_ + sorted_.slot(i) * size_.c, 0, 3);
    if (grad_scores_ && (i == 0 || sorted_.row(i) != sorted_.row(i - 1))) {
      prefetch(values_ + sorted_.row(i) * size_.d, bytes);
    }
  }

  void add_stretch(std::int64_t from, std::int64_t to, Acc* sum) const {
    const std::int64_t ahead = rows_ahead(size_.d * static_cast<std::int64_t>(sizeof(Value)));
    const Value* row = values_ + sorted_.row(from) * size_.d;
    for (std::int64_t i = from; i < to; ++i) {
      if (i + ahead < sorted_.count()) fetch(i + ahead);
      const Value* grad = gradient_at(i);
      const Score* scores = scores_ + sorted_.slot(i) * size_.c;
      for (std::int64_t c = 0, column = 0; c < size_.c; ++c, column += core_columns_) {
        const Acc weight = static_cast<Acc>(widen(scores[c]));
        i == from ? add<true>(sum + column, grad + column, weight) : add<false>(sum + column, grad + column, weight);
        if (grad_scores_) {
          narrow(dot(row + column, grad + column, core_columns_), grad_scores_[sorted_.slot(i) * size_.c + c]);
        }
      }
    }
  }

  // sum += weight * grad over the columns of a core; the first time sum = weight * grad.
  template <bool first>
  ULTRAMEM_INLINE void add(Acc* sum, const Value* grad, Acc weight) const {
    const Vector<Acc> weights = broadcast(weight);
    std::int64_t x = 0;
    for (; x + kWidth <= core_columns_; x += kWidth) {
      store(sum + x, first ? weights * load(grad + x) : load(sum + x) + weights * load(grad + x));
    }
    if (const std::int64_t rest = core_columns_ - x; rest > 0) {
      const Vector<Acc> added = weights * load_first(grad + x, rest);
      store_first(sum + x, first ? added : load_first(sum + x, rest) + added, rest);
    }
  }

  void add_sums(const LongRow& row, std::int64_t begin, std::int64_t end, Value* to) const {
    const Acc* first = sums_.data() + row.first_sum * size_.d;
    for (std::int64_t x = begin; x < end; x += kWidth) {
      const std::int64_t rest = end - x;
      Vector<Acc> total = {};
      for (std::int64_t i = 0; i < row.stretches; ++i) {
        const Acc* sum = first + i * size_.d + x;
        total += rest < kWidth ? load_first(sum, rest) : load(sum);
      }
      rest < kWidth ? store_first(to + x, total, rest) : store(to + x, total);
    }
  }

  static void convert(const Acc* from, Value* to, std::int64_t count) {
    std::int64_t x = 0;
    for (; x + kWidth <= count; x += kWidth) store(to + x, load(from + x));
    if (x < count) store_first(to + x, load_first(from + x, count - x), count - x);
  }

  const LookupSizes& size_;
  const SortedSlots& sorted_;
  const Value* values_;
  const Score* scores_;
  const Value* grad_;
  Score* grad_scores_;
  std::int64_t core_columns_, partial_sums_ = 0;
  std::vector<LongRow> long_rows_;
  std::vector<Acc> sums_;
};

}  // namespace ultramem
