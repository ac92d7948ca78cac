// Nodes TuckerTopK and ProductTopK.
#pragma once

#include <cmath>

#include "../select.h"
#include "op.h"

namespace ultramem::ort {

// Rows and columns of each tail of two-tailed selection, as a share of k: TAIL_SHARE of ultramem/ops/tucker_topk.py.
constexpr double kTailShare = 0.71;
constexpr std::int64_t kMostScores = 1 << 16;  // of a side: addresses of the grid are numbers of 32 bits

inline void require_k(std::int64_t k, std::int64_t n) {
  if (k > n) fail("k must be at most the ", n, " scores of a side, got ", k);
  if (n > kMostScores) fail("a side may have at most ", kMostScores, " scores, got ", n);
}

template <class Score>
class TuckerTopK {
  using Acc = Accumulator<Score>;

 public:
  static constexpr const char* kName = "TuckerTopK";
  static constexpr const char* kProvider = kCpu;
  static constexpr std::array kInputs{kType<Score>, kType<Score>, kType<Acc>, kType<Acc>, kType<Acc>};
  static constexpr std::array kOutputs{kType<Score>, kType<std::int64_t>};

  explicit TuckerTopK(const Attributes& attributes) : k_(attributes.at_least_one("k")) {
    const std::string candidates = attributes.text("candidates");
    if (candidates != "one_tailed" && candidates != "two_tailed") {
      fail("candidates must be one of one_tailed, two_tailed, got '", candidates, "'");
    }
    tails_ = candidates == "two_tailed" ? Tails::two : Tails::one;
    tail_ = tails_ == Tails::one ? k_ : static_cast<std::int64_t>(std::ceil(kTailShare * static_cast<double>(k_)));
  }

  void compute(const Context& context) const {
    const Input rows = context.input(0, "row_scores", 4), cols = context.input(1, "col_scores", 4);
    const Input cores = context.input(2, "cores", 4), u = context.input(3, "u", 2), t = context.input(4, "t", 2);
    const SelectSizes size{rows[0], rows[1], rows[2], rows[3], cores[1], k_};
    cols.require_shape({size.t, size.h, size.r, size.n}, "that of row_scores");
    cores.require_shape({size.h, size.c, size.r, size.r}, "[H,C,R,R] of row_scores");
    u.require_shape({size.h, size.r}, "[H,R] of row_scores");
    t.require_shape({size.h, size.r}, "[H,R] of row_scores");
    if (size.r < 1 || size.c < 1) fail("cores must have a rank and a core at least, got shape ", Input::text(cores.shape));
    require_k(k_, size.n);
    tucker_topk(size, tails_, tail_, rows.read<Score>(), cols.read<Score>(), cores.read<Acc>(), u.read<Acc>(),
                t.read<Acc>(), context.output<Score>(0, {size.t, size.h, k_, size.c}),
                context.output<std::int64_t>(1, {size.t, size.h, k_}), context);
  }

 private:
  std::int64_t k_, tail_;
  Tails tails_;
};

template <class Score>
class ProductTopK {
 public:
  static constexpr const char* kName = "ProductTopK";
  static constexpr const char* kProvider = kCpu;
  static constexpr std::array kInputs{kType<Score>, kType<Score>};
  static constexpr std::array kOutputs{kType<Score>, kType<std::int64_t>};

  explicit ProductTopK(const Attributes& attributes) : k_(attributes.at_least_one("k")) {}

  void compute(const Context& context) const {
    const Input rows = context.input(0, "row_scores", 3), cols = context.input(1, "col_scores", 3);
    const SelectSizes size{rows[0], rows[1], 1, rows[2], 1, k_};
    cols.require_shape({size.t, size.h, size.n}, "that of row_scores");
    require_k(k_, size.n);
    product_topk(size, rows.read<Score>(), cols.read<Score>(), context.output<Score>(0, {size.t, size.h, k_}),
                 context.output<std::int64_t>(1, {size.t, size.h, k_}), context);
  }

 private:
  std::int64_t k_;
};

}  // namespace ultramem::ort
