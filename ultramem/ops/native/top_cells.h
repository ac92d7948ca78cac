// The best cells of one or two grids, each of them rows crossed with columns, without writing a grid.
#pragma once

#include <optional>

#include "top.h"

namespace ultramem {

// Some rows (or columns) of a grid of scores, ascending, and what a cell's score is made of, [R][stride].
template <class Acc>
struct Side {
  std::int64_t count, stride;
  Buffer<std::uint32_t> positions;
  Buffer<Acc> values;

  Side(std::int64_t most, std::int64_t ranks)
      : count(most), stride(vectors_of<Acc>(most) * kLanes<Acc>), positions(stride), values(ranks * stride) {
    std::fill_n(values.data(), ranks * stride, Acc(0));
  }
};

// cells(row, col): the scores of a row in a vector of columns. R = 0: ranks known at run time alone.
template <class Acc, int R>
struct ProductCells {
  const Side<Acc>&left, &right;
  std::int64_t ranks;

  ULTRAMEM_INLINE Vector<Acc> operator()(std::int64_t row, std::int64_t col) const {
    Vector<Acc> sum = broadcast(left.values[row]) * load(right.values + col);
    for (std::int64_t r = 1; r < (R ? R : ranks); ++r) {
      sum += broadcast(left.values[r * left.stride + row]) * load(right.values + r * right.stride + col);
    }
    return sum;
  }
};

template <class Acc>
struct SumCells {
  const Side<Acc>&left, &right;

  ULTRAMEM_INLINE Vector<Acc> operator()(std::int64_t row, std::int64_t col) const {
    return broadcast(left.values[row]) + load(right.values + col);
  }
};

// -inf where neither the row nor the column lifts the limit.
template <class Acc, class Cells>
struct LimitedCells {
  Cells cells;
  const Acc *row_limits, *col_limits;

  ULTRAMEM_INLINE Vector<Acc> operator()(std::int64_t row, std::int64_t col) const {
    const Vector<Acc> limit = larger(broadcast(row_limits[row]), load(col_limits + col)), cell = cells(row, col);
    return cell > limit ? limit : cell;
  }
};

template <class Acc>
class TopCells {
 public:
  TopCells(std::int64_t n, std::int64_t k) : n_(n), k_(k), passed_(k), kept_(k) {}

  // First for each grid: the maxima of groups of its cells, which are the lanes of its columns in eight bands of rows.
  template <class Cells>
  void measure(const Side<Acc>& rows, const Side<Acc>& cols, const Cells& cells) {
    for (std::int64_t col = 0; col < cols.count; col += kLanes<Acc>) {
      for (std::int64_t band = 0; band < kBands; ++band) {
        Vector<Acc> most = broadcast(kLowest<Acc>);
        const std::int64_t end = (band + 1) * rows.count / kBands;
        for (std::int64_t row = band * rows.count / kBands; row < end; ++row) most = larger(cells(row, col), most);
        for (std::int64_t lane = cols.count - col; lane < kLanes<Acc>; ++lane) most[lane] = kLowest<Acc>;
        maxima_.push_back(most);
      }
    }
  }

  // Then for each grid: the cells that may be among the best.
  template <class Cells>
  void collect(const Side<Acc>& rows, const Side<Acc>& cols, const Cells& cells) {
    if (!bound_) bound_ = threshold<Acc>(maxima_.data(), static_cast<std::int64_t>(maxima_.size()), k_);
    const Vector<Acc> bounds = broadcast(*bound_);
    for (std::int64_t col = 0; col < cols.count; col += kLanes<Acc>) {
      const unsigned inside = cols.count - col < kLanes<Acc> ? (1u << (cols.count - col)) - 1 : ~0u;
      const auto positions = load_bits<typename Passed<Acc>::Addresses>(cols.positions + col);
      passed_.reserve(rows.count * kLanes<Acc>);
      for (std::int64_t row = 0; row < rows.count; ++row) {
        const Vector<Acc> cell = cells(row, col);
        const auto first = static_cast<std::uint32_t>(rows.positions[row] * n_);
        passed_.append(cell, positions + first, not_below(cell, bounds) & inside);
      }
    }
  }

  // The best k, best first. What follows is another token.
  const Packed<Acc>* finish() {
    sort_largest(passed_.pack_all(), passed_.count(), k_, kept_.data());
    passed_.clear();
    maxima_.clear();
    bound_.reset();
    return kept_.data();
  }

 private:
  static constexpr std::int64_t kBands = 8;
  std::int64_t n_, k_;
  std::optional<Acc> bound_;
  std::vector<Vector<Acc>> maxima_;
  Passed<Acc> passed_;
  Buffer<Packed<Acc>> kept_;
};

}  // namespace ultramem
