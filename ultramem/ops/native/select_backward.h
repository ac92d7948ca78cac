// Gradients of the kept scores: of both sides, written whole, and of the cores. The same bits on any number of threads.
#pragma once

#include "select.h"

namespace ultramem {

// Adds numbers at places of rows that are 0 elsewhere, in the order of the numbers.
template <class Element>
class Scatter {
 public:
  using Acc = Accumulator<Element>;

  explicit Scatter(std::int64_t length) : length_(length), sums_(in_place ? 0 : length) {
    if (!in_place) std::fill_n(sums_.data(), length, Acc(0));
  }

  void operator()(Element* row, const std::uint32_t* places, const Acc* numbers, std::int64_t count) {
    std::memset(static_cast<void*>(row), 0, static_cast<std::size_t>(length_) * sizeof(Element));
    if constexpr (in_place) {
      for (std::int64_t i = 0; i < count; ++i) row[places[i]] += numbers[i];
    } else {  // narrower elements are rounded once, when all is added up
      for (std::int64_t i = 0; i < count; ++i) sums_[places[i]] += numbers[i];
      for (std::int64_t i = 0; i < count; ++i) narrow(sums_ + places[i], row + places[i], 1);
      for (std::int64_t i = 0; i < count; ++i) sums_[places[i]] = 0;
    }
  }

 private:
  static constexpr bool in_place = std::is_same_v<Element, Acc>;
  std::int64_t length_;
  Buffer<Acc> sums_;
};

// Rows and columns of addresses.
class Places {
 public:
  explicit Places(std::int64_t k) : rows_(k), cols_(k) {}

  void split(const std::int64_t* addresses, std::int64_t k, std::int64_t n) {
    for (std::int64_t i = 0; i < k; ++i) {
      const auto address = static_cast<std::uint32_t>(addresses[i]), side = static_cast<std::uint32_t>(n);
      rows_[i] = address / side;
      cols_[i] = address % side;
    }
  }
  const std::uint32_t* rows() const { return rows_.data(); }
  const std::uint32_t* cols() const { return cols_.data(); }

 private:
  Buffer<std::uint32_t> rows_, cols_;
};

// The gradients of one (token, head) pair after another; those of the cores add up in the lanes of `core_sums`.
template <class Score>
class TuckerGradients {
 public:
  using Acc = Accumulator<Score>;

  explicit TuckerGradients(const SelectSizes& size)
      : size_(size), stride_(vectors_of<Acc>(size.k) * kLanes<Acc>), places_(size.k), scatter_(size.n),
        grads_(zeros(size.c)), rows_(zeros(size.r)), cols_(zeros(size.r)), grad_rows_(zeros(size.r)),
        grad_cols_(zeros(size.r)), core_sums_(size.c * size.r * size.r) {}

  void start_block() { std::fill_n(core_sums_.data(), size_.c * size_.r * size_.r, Vector<Acc>{}); }

  void add(const Score* grad_scores, const Score* row_scores, const Score* col_scores, const Acc* cores,
           const std::int64_t* addresses, Score* grad_row_scores, Score* grad_col_scores) {
    const std::int64_t c = size_.c, r = size_.r, n = size_.n;
    places_.split(addresses, size_.k, n);
    for (std::int64_t k = 0; k < size_.k; ++k) {
      for (std::int64_t i = 0; i < c; ++i) grads_[i * stride_ + k] = widen(grad_scores[k * c + i]);
      for (std::int64_t i = 0; i < r; ++i) {
        rows_[i * stride_ + k] = widen(row_scores[i * n + places_.rows()[k]]);
        cols_[i * stride_ + k] = widen(col_scores[i * n + places_.cols()[k]]);
      }
    }
    std::fill_n(grad_rows_.data(), r * stride_, Acc(0));
    std::fill_n(grad_cols_.data(), r * stride_, Acc(0));
    for (std::int64_t k = 0; k < size_.k; k += kLanes<Acc>) add_slots(cores, k);
    for (std::int64_t i = 0; i < r; ++i) {
      scatter_(grad_row_scores + i * n, places_.rows(), grad_rows_ + i * stride_, size_.k);
      scatter_(grad_col_scores + i * n, places_.cols(), grad_cols_ + i * stride_, size_.k);
    }
  }

  void finish_block(Acc* grad_cores) const {
    for (std::int64_t i = 0; i < size_.c * size_.r * size_.r; ++i) {
      Acc sum = 0;
      for (int lane = 0; lane < kLanes<Acc>; ++lane) sum += core_sums_[i][lane];
      grad_cores[i] = sum;
    }
  }

 private:
  // A vector of slots, each with a core of its own: the cores weighted by the gradients of their scores.
  void add_slots(const Acc* cores, std::int64_t k) {
    const std::int64_t r = size_.r;
    for (std::int64_t i = 0; i < r; ++i) {
      const Vector<Acc> row = load(rows_ + i * stride_ + k);
      Vector<Acc> grad_row = {};
      for (std::int64_t j = 0; j < r; ++j) {
        const Vector<Acc> col = load(cols_ + j * stride_ + k), cell = row * col;
        Vector<Acc> core = {};
        for (std::int64_t c = 0; c < size_.c; ++c) {
          const std::int64_t at = (c * r + i) * r + j;
          const Vector<Acc> grad = load(grads_ + c * stride_ + k);
          core += grad * broadcast(cores[at]);
          core_sums_[at] += grad * cell;
        }
        grad_row += core * col;
        Acc* grad_col = grad_cols_ + j * stride_ + k;
        store(grad_col, load(grad_col) + core * row);
      }
      store(grad_rows_ + i * stride_ + k, grad_row);
    }
  }

  Buffer<Acc> zeros(std::int64_t rows) const {
    Buffer<Acc> buffer(rows * stride_);
    std::fill_n(buffer.data(), rows * stride_, Acc(0));
    return buffer;
  }

  SelectSizes size_;
  std::int64_t stride_;
  Places places_;
  Scatter<Score> scatter_;
  Buffer<Acc> grads_, rows_, cols_, grad_rows_, grad_cols_;
  Buffer<Vector<Acc>> core_sums_;
};

// Tokens whose gradients of a core are added up before those of other tokens join them.
constexpr std::int64_t kTokensABlock = 16;

template <class Score, class Acc, class Parallel>
void tucker_topk_backward(const SelectSizes& size, const Score* grad_scores, const Score* row_scores,
                          const Score* col_scores, const Acc* cores, const std::int64_t* addresses,
                          Score* grad_row_scores, Score* grad_col_scores, Acc* grad_cores, const Parallel& parallel) {
  const std::int64_t blocks = (size.t + kTokensABlock - 1) / kTokensABlock, core = size.c * size.r * size.r;
  const std::int64_t side = size.r * size.n;
  Buffer<Acc> parts(blocks * size.h * core);
  parallel(blocks * size.h, 1, [&](std::int64_t begin, std::int64_t end) {
    TuckerGradients<Score> gradients(size);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t block = i / size.h, head = i % size.h;
      gradients.start_block();
      for (std::int64_t t = block * kTokensABlock; t < std::min(size.t, (block + 1) * kTokensABlock); ++t) {
        const std::int64_t pair = t * size.h + head;
        gradients.add(grad_scores + pair * size.k * size.c, row_scores + pair * side, col_scores + pair * side,
                      cores + head * core, addresses + pair * size.k, grad_row_scores + pair * side,
                      grad_col_scores + pair * side);
      }
      gradients.finish_block(parts + i * core);
    }
  });
  for (std::int64_t i = 0; i < size.h * core; ++i) {
    double sum = 0;
    for (std::int64_t block = 0; block < blocks; ++block) sum += parts[block * size.h * core + i];
    grad_cores[i] = static_cast<Acc>(sum);
  }
}

template <class Score, class Parallel>
void product_topk_backward(const SelectSizes& size, const Score* grad_scores, const std::int64_t* addresses,
                           Score* grad_row_scores, Score* grad_col_scores, const Parallel& parallel) {
  using Acc = Accumulator<Score>;
  parallel(size.t * size.h, pairs_a_thread(size.n), [&](std::int64_t begin, std::int64_t end) {
    Places places(size.k);
    Scatter<Score> scatter(size.n);
    Buffer<Acc> grads(size.k);
    for (std::int64_t pair = begin; pair < end; ++pair) {
      places.split(addresses + pair * size.k, size.k, size.n);
      for (std::int64_t k = 0; k < size.k; ++k) grads[k] = widen(grad_scores[pair * size.k + k]);
      scatter(grad_row_scores + pair * size.n, places.rows(), grads.data(), size.k);
      scatter(grad_col_scores + pair * size.n, places.cols(), grads.data(), size.k);
    }
  });
}

}  // namespace ultramem
