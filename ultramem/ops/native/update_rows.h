// One pass over the touched rows of a table: what they missed is made up, then the optimiser's step. Rows are unique.
//
// N rows, D columns, U touched rows. `Value` is the table's element, `Acc` that of the update and of the moments.
#pragma once

#include <cmath>

#include "lookup.h"
#include "top.h"

namespace ultramem {

ULTRAMEM_INLINE Floats square_root(Floats x) {
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
ULTRAMEM_INLINE Doubles square_root(Doubles x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
}

// f(first column, columns): vector by vector; the number of columns is a constant but for the last.
template <class Acc, class F>
ULTRAMEM_INLINE void over_columns(std::int64_t d, const F& f) {
  constexpr std::int64_t lanes = kLanes<Acc>;
  std::int64_t x = 0;
  for (; x + lanes <= d; x += lanes) f(x, std::integral_constant<std::int64_t, lanes>{});
  if (x < d) f(x, d - x);
}

template <class Element, class Columns>
ULTRAMEM_INLINE auto load_columns(const Element* from, Columns columns) {
  if constexpr (std::is_same_v<Columns, std::int64_t>) return load_first(from, columns);
  else return load(from);
}

template <class Element, class Lanes, class Columns>
ULTRAMEM_INLINE void store_columns(Element* to, Lanes from, Columns columns) {
  if constexpr (std::is_same_v<Columns, std::int64_t>) store_first(to, from, columns);
  else store(to, from);
}

// base^n: the product of base^(2^i) over the bits of n. As exact as pow to a few roundings, and several times faster.
class Power {
 public:
  explicit Power(double base) {
    for (int i = 0; i < 32; ++i) squares_[i] = std::pow(base, std::ldexp(1.0, i));
  }

  double operator()(std::uint32_t n) const {
    double product = 1;
    for (int i = 0; n; ++i, n >>= 1) product *= n & 1 ? squares_[i] : 1.0;
    return product;
  }

 private:
  double squares_[32];
};

// What a row owes: p <- decay (p - drift m / (sqrt(v) + eps)). See ultramem/ops/catch_up.py.
template <class Acc>
struct Debt {
  Acc decay, drift, eps;
};

// Row i is as it was after step last_step[i]; `step` is now. schedule: [S,3].
struct Schedule {
  const double* schedule;
  const std::int32_t* last_step;
  std::int64_t step;
  double eps;

  template <class Acc>
  Debt<Acc> debt(std::int64_t row) const {
    const double *now = schedule + 3 * step, *then = schedule + 3 * last_step[row];
    const double drift = then[1], scale = drift > 0 ? then[2] / drift : 1.0;
    return {static_cast<Acc>(std::exp(now[0] - then[0])), static_cast<Acc>(drift), static_cast<Acc>(eps * scale)};
  }
};

template <class Lanes, class Acc>
ULTRAMEM_INLINE Lanes made_up(Lanes value, Lanes exp_avg, Lanes exp_avg_sq, const Debt<Acc>& debt) {
  const Lanes direction = exp_avg / (square_root(exp_avg_sq) + broadcast(debt.eps));
  return (value - broadcast(debt.drift) * direction) * broadcast(debt.decay);
}

// Rounds a row: to nearest, but stochastically where float32 becomes bfloat16.
// The bits of ultramem/ops/round_stochastically.py: a function of (seed, step, row, column).
template <class Value>
class RowRounding {
 public:
  RowRounding(std::int64_t seed, std::int64_t step) : seed_(seed), step_(step) {}

  void start_row(std::int64_t row) {
    if constexpr (stochastic) {
      const auto word = [](std::int64_t from, int shift) { return static_cast<std::uint32_t>(from >> shift); };
      row_ = 0;
      for (const std::uint32_t part : {word(seed_, 0), word(seed_, 32), word(step_, 0), word(row, 0), word(row, 32)}) {
        row_ = mix((row_ ^ part) + 0x9E3779B9u);
      }
    }
  }

  template <class Lanes, class Columns>
  ULTRAMEM_INLINE void write(Value* to, Lanes from, std::int64_t column, Columns columns) const {
    if constexpr (stochastic) {
      Words lane;
      for (int i = 0; i < kLanes<float>; ++i) lane[i] = static_cast<std::uint32_t>(i);
      const Words random = mix(row_ + (lane + static_cast<std::uint32_t>(column)) * 0x9E3779B1u) & 0xffffu;
      const Words bits = bits_of<Words>(from), is_finite = bits_of<Words>((bits & 0x7f800000u) != 0x7f800000u);
      // Of what is not finite the dropped bits decide nothing: the store then cuts them off exactly.
      from = bits_of<Floats>((bits + (random & is_finite)) & ~(is_finite & 0xffffu));
    }
    store_columns(to, from, columns);
  }

 private:
  static constexpr bool stochastic = std::is_same_v<Value, bfloat16>;

  // "lowbias32": https://nullprogram.com/blog/2018/07/31/
  template <class Word>
  static ULTRAMEM_INLINE Word mix(Word x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  std::int64_t seed_, step_;
  std::uint32_t row_ = 0;
};

// f(i, row) for each touched row, with the rows that follow on their way: `fetch(row)`. As many as hide the latency of
// memory and are still in the first-level cache when their turn comes.
template <class Parallel, class Fetch, class F>
void over_rows(const std::int64_t* rows, std::int64_t count, std::int64_t bytes_a_row, const Parallel& parallel,
               const Fetch& fetch, const F& f) {
  const std::int64_t ahead = std::clamp<std::int64_t>(8192 / std::max<std::int64_t>(bytes_a_row, 1), 2, 16);
  const std::int64_t grain = std::max<std::int64_t>(16384 / std::max<std::int64_t>(bytes_a_row, 1), 1);
  parallel(count, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < std::min(begin + ahead, end); ++i) fetch(rows[i]);
    auto work = f();
    for (std::int64_t i = begin; i < end; ++i) {
      if (i + ahead < end) fetch(rows[i + ahead]);
      work(i, rows[i]);
    }
  });
}

// to[i] = row rows[i] of the table, up to date. Moments may be null: the decay alone is owed.
template <class Value, class Acc, class Parallel>
void catch_up_rows(const Value* values, const Acc* exp_avg, const Acc* exp_avg_sq, const Schedule& schedule,
                   const std::int64_t* rows, std::int64_t count, std::int64_t d, Acc* to, const Parallel& parallel) {
  const bool drifts = exp_avg != nullptr;
  const auto value_bytes = d * static_cast<std::int64_t>(sizeof(Value));
  const auto moment_bytes = drifts ? d * static_cast<std::int64_t>(sizeof(Acc)) : 0;
  const auto fetch = [&](std::int64_t row) {
    prefetch(values + row * d, value_bytes);
    if (drifts) prefetch(exp_avg + row * d, moment_bytes);
    if (drifts) prefetch(exp_avg_sq + row * d, moment_bytes);
  };
  over_rows(rows, count, value_bytes + 2 * moment_bytes, parallel, fetch, [&] {
    return [&](std::int64_t i, std::int64_t row) {
      const Debt<Acc> debt = schedule.debt<Acc>(row);
      const Value* value = values + row * d;
      if (drifts && debt.drift != 0) {
        over_columns<Acc>(d, [&](std::int64_t x, auto columns) {
          const auto m = load_columns(exp_avg + row * d + x, columns), v = load_columns(exp_avg_sq + row * d + x, columns);
          store_columns(to + i * d + x, made_up(load_columns(value + x, columns), m, v, debt), columns);
        });
      } else {
        over_columns<Acc>(d, [&](std::int64_t x, auto columns) {
          store_columns(to + i * d + x, load_columns(value + x, columns) * broadcast(debt.decay), columns);
        });
      }
    };
  });
}

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
};

// A step of AdamW, number schedule.step + 1.
template <class Value, class Acc, class Grad, class Parallel>
void adamw_rows(Value* values, Acc* exp_avg, Acc* exp_avg_sq, std::int32_t* last_step, const Schedule& schedule,
                const AdamW& rule, std::int64_t seed, const std::int64_t* rows, const Grad* grads, std::int64_t count,
                std::int64_t d, const Parallel& parallel) {
  const auto now = static_cast<double>(schedule.step + 1);
  const Power power1(rule.beta1), power2(rule.beta2);
  const auto each = [](double x) { return broadcast(static_cast<Acc>(x)); };
  const Vector<Acc> rest1 = each(1 - rule.beta1), rest2 = each(1 - rule.beta2), eps = each(rule.eps);
  const Vector<Acc> root_scale = each(1 / std::sqrt(1 - std::pow(rule.beta2, now)));
  const Vector<Acc> decay = each(1 - rule.lr * rule.weight_decay), rate = each(rule.lr / (1 - std::pow(rule.beta1, now)));
  const auto value_bytes = d * static_cast<std::int64_t>(sizeof(Value));
  const auto moment_bytes = d * static_cast<std::int64_t>(sizeof(Acc));
  const auto fetch = [&](std::int64_t row) {
    prefetch(values + row * d, value_bytes);
    prefetch(exp_avg + row * d, moment_bytes);
    prefetch(exp_avg_sq + row * d, moment_bytes);
  };
  over_rows(rows, count, value_bytes + 2 * moment_bytes, parallel, fetch, [&] {
    return [&, rounding = RowRounding<Value>(seed, schedule.step + 1)](std::int64_t i, std::int64_t row) mutable {
      const auto missed = static_cast<std::uint32_t>(schedule.step - last_step[row]);
      const Debt<Acc> debt = schedule.debt<Acc>(row);
      const Vector<Acc> shrink1 = each(power1(missed)), shrink2 = each(power2(missed + 1));
      Value* value = values + row * d;
      Acc *first = exp_avg + row * d, *second = exp_avg_sq + row * d;
      const Grad* grad = grads + i * d;
      rounding.start_row(row);
      over_columns<Acc>(d, [&](std::int64_t x, auto columns) {
        Vector<Acc> p = load_columns(value + x, columns), m = load_columns(first + x, columns);
        Vector<Acc> v = load_columns(second + x, columns);
        const Vector<Acc> g = load_columns(grad + x, columns);
        if (missed) p = made_up(p, m, v, debt);
        m *= shrink1;
        m += (g - m) * rest1;
        v = v * shrink2 + g * g * rest2;
        p = p * decay - rate * m / (square_root(v) * root_scale + eps);
        rounding.write(value + x, p, x, columns);
        store_columns(first + x, m, columns);
        store_columns(second + x, v, columns);
      });
      last_step[row] = static_cast<std::int32_t>(schedule.step + 1);
    };
  });
}

struct Adagrad {
  double lr, eps, weight_decay;
};

// A step of Adagrad with one accumulator a row, number schedule.step + 1.
template <class Value, class Acc, class Grad, class Parallel>
void adagrad_rows(Value* values, Acc* row_sum, std::int32_t* last_step, const Schedule& schedule, const Adagrad& rule,
                  std::int64_t seed, const std::int64_t* rows, const Grad* grads, std::int64_t count, std::int64_t d,
                  const Parallel& parallel) {
  const auto value_bytes = d * static_cast<std::int64_t>(sizeof(Value));
  const auto fetch = [&](std::int64_t row) { prefetch(values + row * d, value_bytes); };
  over_rows(rows, count, value_bytes, parallel, fetch, [&] {
    return [&, rounding = RowRounding<Value>(seed, schedule.step + 1)](std::int64_t i, std::int64_t row) mutable {
      Value* value = values + row * d;
      const Grad* grad = grads + i * d;
      Vector<Acc> squares = {};
      over_columns<Acc>(d, [&](std::int64_t x, auto columns) {
        const Vector<Acc> g = load_columns(grad + x, columns);
        squares += g * g;
      });
      Acc sum = 0;
      for (int lane = 0; lane < kLanes<Acc>; ++lane) sum += squares[lane];
      row_sum[row] += sum / static_cast<Acc>(d);
      const Acc root = std::sqrt(row_sum[row]);
      const Vector<Acc> rate = broadcast(static_cast<Acc>(rule.lr) / (root + static_cast<Acc>(rule.eps)));
      const Vector<Acc> decay =
          broadcast(schedule.debt<Acc>(row).decay * static_cast<Acc>(1 - rule.lr * rule.weight_decay));
      rounding.start_row(row);
      over_columns<Acc>(d, [&](std::int64_t x, auto columns) {
        const Vector<Acc> p = load_columns(value + x, columns) * decay - load_columns(grad + x, columns) * rate;
        rounding.write(value + x, p, x, columns);
      });
      last_step[row] = static_cast<std::int32_t>(schedule.step + 1);
    };
  });
}

}  // namespace ultramem
