// Two-phase top-k over a grid of scores: the best rows and columns, then the best cells where they cross.
#pragma once

#include <cmath>
#include <optional>

#include "top_cells.h"

namespace ultramem {

// T tokens, H heads, R ranks, N the side of the grid, C cores, K kept slots.
struct SelectSizes {
  std::int64_t t, h, r, n, c, k;
};

enum class Tails { one, two };

// (Token, head) pairs that are worth waking a thread for: about 1 us each where sides are short.
constexpr std::int64_t pairs_a_thread(std::int64_t scores) { return std::max<std::int64_t>(16384 / std::max<std::int64_t>(scores, 1), 1); }

// sums[x] = sum over R of weights[r] * scores[r][x], and -inf up to a whole number of vectors.
template <class Score, class Acc>
void weigh(const Score* scores, const Acc* weights, std::int64_t ranks, std::int64_t n, Acc* sums) {
  constexpr std::int64_t lanes = kLanes<Acc>;
  std::int64_t x = 0;
  for (; x + lanes <= n; x += lanes) {
    Vector<Acc> sum = broadcast(weights[0]) * load(scores + x);
    for (std::int64_t r = 1; r < ranks; ++r) sum += broadcast(weights[r]) * load(scores + r * n + x);
    store(sums + x, sum);
  }
  if (x < n) {
    Vector<Acc> sum = broadcast(weights[0]) * load_first(scores + x, n - x);
    for (std::int64_t r = 1; r < ranks; ++r) sum += broadcast(weights[r]) * load_first(scores + r * n + x, n - x);
    store(sums + x, sum);
    std::fill(sums + n, sums + x + lanes, kLowest<Acc>);
  }
}

template <class Score, class Acc>
void widen_row(const Score* scores, std::int64_t n, Acc* to) {
  const Acc one = 1;
  weigh(scores, &one, 1, n, to);
}

template <class Acc>
void negate(Acc* numbers, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) numbers[i] = -numbers[i];
}

// values[r] = scores[r] at the side's positions.
template <class Score, class Acc>
void gather(const Score* scores, std::int64_t ranks, std::int64_t n, Side<Acc>& side) {
  for (std::int64_t r = 0; r < ranks; ++r) {
    for (std::int64_t i = 0; i < side.count; ++i) {
      side.values[r * side.stride + i] = widen(scores[r * n + side.positions[i]]);
    }
  }
}

// limits[i] = -inf where `positions` are in both sides, else inf; ascending positions.
template <class Acc>
void limit_shared(const Side<Acc>& side, const Side<Acc>& other, Acc* limits) {
  for (std::int64_t i = 0, j = 0; i < side.count; ++i) {
    while (j < other.count && other.positions[j] < side.positions[i]) ++j;
    const bool shared = j < other.count && other.positions[j] == side.positions[i];
    limits[i] = shared ? kLowest<Acc> : -kLowest<Acc>;
  }
}

// One tail of both sides: the candidates, and their cells.
template <class Acc, int R>
struct Tail {
  Side<Acc> rows, cols;
  std::int64_t ranks;

  Tail(std::int64_t length, std::int64_t r) : rows(length, r), cols(length, r), ranks(r) {}

  ProductCells<Acc, R> cells() const { return {rows, cols, ranks}; }

  // The rows' scores, then times the core: left[s] = sum over r of core[r][s] * row[r].
  template <class Score>
  void fill(const Score* row_scores, const Score* col_scores, const Acc* core, std::int64_t n, Acc* scratch) {
    gather(col_scores, ranks, n, cols);
    gather(row_scores, ranks, n, rows);
    for (std::int64_t i = 0; i < rows.stride; i += kLanes<Acc>) {
      for (std::int64_t s = 0; s < ranks; ++s) {
        Vector<Acc> sum = broadcast(core[s]) * load(rows.values + i);
        for (std::int64_t r = 1; r < ranks; ++r) {
          sum += broadcast(core[r * ranks + s]) * load(rows.values + r * rows.stride + i);
        }
        store(scratch + s * kLanes<Acc>, sum);
      }
      for (std::int64_t s = 0; s < ranks; ++s) store(rows.values + s * rows.stride + i, load(scratch + s * kLanes<Acc>));
    }
  }
};

// scores[k][c] = row^T core_c col of the kept cells.
template <class Acc>
class KeptScores {
 public:
  KeptScores(const SelectSizes& size)
      : size_(size), stride_(vectors_of<Acc>(size.k) * kLanes<Acc>), rows_(size.r * stride_), cols_(size.r * stride_),
        sums_(stride_ * size.c) {
    std::fill_n(rows_.data(), size.r * stride_, Acc(0));
    std::fill_n(cols_.data(), size.r * stride_, Acc(0));
  }

  template <class Score>
  void write(const Score* row_scores, const Score* col_scores, const Acc* cores, const std::int64_t* addresses,
             Score* scores) {
    const auto n = static_cast<std::uint32_t>(size_.n);
    for (std::int64_t k = 0; k < size_.k; ++k) {
      const auto address = static_cast<std::uint32_t>(addresses[k]);
      const std::uint32_t row = address / n, col = address % n;
      for (std::int64_t r = 0; r < size_.r; ++r) {
        rows_[r * stride_ + k] = widen(row_scores[r * size_.n + row]);
        cols_[r * stride_ + k] = widen(col_scores[r * size_.n + col]);
      }
    }
    for (std::int64_t k = 0; k < size_.k; k += kLanes<Acc>) {
      for (std::int64_t c = 0; c < size_.c; ++c) {
        Vector<Acc> sum = {};
        for (std::int64_t r = 0; r < size_.r; ++r) {
          Vector<Acc> weighted = {};
          for (std::int64_t s = 0; s < size_.r; ++s) {
            weighted += broadcast(cores[(c * size_.r + r) * size_.r + s]) * load(cols_ + s * stride_ + k);
          }
          sum += load(rows_ + r * stride_ + k) * weighted;
        }
        for (std::int64_t lane = 0; lane < std::min<std::int64_t>(kLanes<Acc>, size_.k - k); ++lane) {
          sums_[(k + lane) * size_.c + c] = sum[lane];
        }
      }
    }
    narrow(sums_.data(), scores, size_.k * size_.c);
  }

 private:
  SelectSizes size_;
  std::int64_t stride_;
  Buffer<Acc> rows_, cols_, sums_;
};

// Selection uses `core`, [H,R,R], the sum of `cores`, [H,C,R,R].
template <class Acc>
struct TuckerWeights {
  const Acc *cores, *core, *u, *t;
};

template <int R, class Score, class Acc>
void tucker_topk_pairs(const SelectSizes& size, Tails tails, std::int64_t tail, const Score* row_scores,
                       const Score* col_scores, const TuckerWeights<Acc>& weights, std::int64_t begin, std::int64_t end,
                       Score* scores, std::int64_t* addresses) {
  const std::int64_t padded = vectors_of<Acc>(size.n) * kLanes<Acc>, side = size.r * size.n;
  Buffer<Acc> a(padded), b(padded), scratch(size.r * kLanes<Acc>);
  Buffer<Acc> row_limits(tail), col_limits(vectors_of<Acc>(tail) * kLanes<Acc>);
  TopScratch<Acc> top(size.n);
  Tail<Acc, R> high(tail, size.r);
  std::optional<Tail<Acc, R>> low;
  if (tails == Tails::two) low.emplace(tail, size.r);
  TopCells<Acc> cells(size.n, size.k);
  KeptScores<Acc> kept_scores(size);
  for (std::int64_t pair = begin; pair < end; ++pair) {
    const std::int64_t head = pair % size.h;
    const Score *row = row_scores + pair * side, *col = col_scores + pair * side;
    const Acc* core = weights.core + head * size.r * size.r;
    weigh(row, weights.u + head * size.r, size.r, size.n, a.data());
    weigh(col, weights.t + head * size.r, size.r, size.n, b.data());
    top_positions(a.data(), size.n, tail, top, high.rows.positions.data());
    top_positions(b.data(), size.n, tail, top, high.cols.positions.data());
    high.fill(row, col, core, size.n, scratch.data());
    cells.measure(high.rows, high.cols, high.cells());
    if (!low) {
      cells.collect(high.rows, high.cols, high.cells());
    } else {
      negate(a.data(), size.n);
      negate(b.data(), size.n);
      top_positions(a.data(), size.n, tail, top, low->rows.positions.data());
      top_positions(b.data(), size.n, tail, top, low->cols.positions.data());
      low->fill(row, col, core, size.n, scratch.data());
      // With few rows the two ends overlap; a cell that both grids hold counts once.
      limit_shared(low->rows, high.rows, row_limits.data());
      limit_shared(low->cols, high.cols, col_limits.data());
      const LimitedCells<Acc, ProductCells<Acc, R>> limited{low->cells(), row_limits.data(), col_limits.data()};
      cells.measure(low->rows, low->cols, limited);
      cells.collect(high.rows, high.cols, high.cells());
      cells.collect(low->rows, low->cols, limited);
    }
    const Packed<Acc>* kept = cells.finish();
    std::int64_t* kept_addresses = addresses + pair * size.k;
    for (std::int64_t k = 0; k < size.k; ++k) kept_addresses[k] = address_of(kept[k]);
    kept_scores.write(row, col, weights.cores + head * size.c * size.r * size.r, kept_addresses,
                      scores + pair * size.k * size.c);
  }
}

// `tail`: rows, and columns, that are candidates at each end.
template <class Score, class Acc, class Parallel>
void tucker_topk(const SelectSizes& size, Tails tails, std::int64_t tail, const Score* row_scores,
                 const Score* col_scores, const Acc* cores, const Acc* u, const Acc* t, Score* scores,
                 std::int64_t* addresses, const Parallel& parallel) {
  const std::int64_t squares = size.r * size.r;
  Buffer<Acc> core(size.h * squares);
  for (std::int64_t h = 0; h < size.h; ++h) {
    for (std::int64_t i = 0; i < squares; ++i) {
      Acc sum = 0;
      for (std::int64_t c = 0; c < size.c; ++c) sum += cores[(h * size.c + c) * squares + i];
      core[h * squares + i] = sum;
    }
  }
  const TuckerWeights<Acc> weights{cores, core.data(), u, t};
  parallel(size.t * size.h, pairs_a_thread(size.r * size.n), [&](std::int64_t begin, std::int64_t end) {
    const auto run = size.r == 2 ? &tucker_topk_pairs<2, Score, Acc> : &tucker_topk_pairs<0, Score, Acc>;
    run(size, tails, tail, row_scores, col_scores, weights, begin, end, scores, addresses);
  });
}

template <class Score, class Parallel>
void product_topk(const SelectSizes& size, const Score* row_scores, const Score* col_scores, Score* scores,
                  std::int64_t* addresses, const Parallel& parallel) {
  using Acc = Accumulator<Score>;
  parallel(size.t * size.h, pairs_a_thread(size.n), [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t padded = vectors_of<Acc>(size.n) * kLanes<Acc>;
    Buffer<Acc> a(padded), b(padded), sums(size.k);
    TopScratch<Acc> top(size.n);
    Side<Acc> rows(size.k, 1), cols(size.k, 1);
    TopCells<Acc> cells(size.n, size.k);
    for (std::int64_t pair = begin; pair < end; ++pair) {
      widen_row(row_scores + pair * size.n, size.n, a.data());
      widen_row(col_scores + pair * size.n, size.n, b.data());
      top_positions(a.data(), size.n, size.k, top, rows.positions.data());
      top_positions(b.data(), size.n, size.k, top, cols.positions.data());
      gather(a.data(), 1, size.n, rows);
      gather(b.data(), 1, size.n, cols);
      const SumCells<Acc> sum{rows, cols};
      cells.measure(rows, cols, sum);
      cells.collect(rows, cols, sum);
      const Packed<Acc>* kept = cells.finish();
      for (std::int64_t k = 0; k < size.k; ++k) {
        const std::uint32_t address = address_of(kept[k]), n = static_cast<std::uint32_t>(size.n);
        addresses[pair * size.k + k] = address;
        sums[k] = a[address / n] + b[address % n];
      }
      narrow(sums.data(), scores + pair * size.k, size.k);
    }
  });
}

}  // namespace ultramem
