// Nodes LookupReduce, LookupReduceQuantized and LookupDot.
#pragma once

#include <limits>

#include "../lookup_dot.h"
#include "../lookup_reduce.h"
#include "lookup_shapes.h"
#include "op.h"

namespace ultramem::ort {

// Raise for an index outside of [0, size): the kernels read where it points.
inline void require_in_range(const Input& indices, std::int64_t size) {
  const auto* numbers = indices.read<std::int64_t>();
  const std::int64_t count = indices.count();
  std::uint64_t largest = 0;  // a negative number is a huge one
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<std::uint64_t>(numbers[i]));
  if (count > 0 && largest >= static_cast<std::uint64_t>(size)) {
    fail(indices.name, " must be in [0, ", size, "), got ", static_cast<std::int64_t>(largest));
  }
}

template <class Value, class Score>
class LookupReduce {
 public:
  static constexpr const char* kName = "LookupReduce";
  static constexpr const char* kProvider = kCpu;
  static constexpr std::array kInputs{kType<Value>, kType<std::int64_t>, kType<Score>};
  static constexpr std::array kOutputs{kType<Value>};

  explicit LookupReduce(const Attributes& attributes) : blocks_(attributes.at_least_one("num_blocks")) {}

  void compute(const Context& context) const {
    const Input values = context.input(0, "values", 2), indices = context.input(1, "indices", 2);
    const Input scores = context.input(2, "scores", 3);
    const LookupSizes size = lookup_sizes(values, indices, scores, blocks_, values[1], false);
    require_in_range(indices, size.n * size.e);
    lookup_reduce(size, FloatRows<Value>{values.read<Value>(), size.d}, indices.read<std::int64_t>(),
                  scores.read<Score>(), context.output<Value>(0, {size.t, size.e, size.d}), context);
  }

 private:
  std::int64_t blocks_;
};

// Rows: Int8Rows or Int4Rows.
template <class Rows, class Score>
class LookupReduceQuantized {
  using Stored = typename Rows::Element;
  static constexpr bool kPacked = std::is_same_v<Stored, std::uint8_t>;

 public:
  static constexpr const char* kName = "LookupReduceQuantized";
  static constexpr const char* kProvider = kCpu;
  static constexpr std::array kInputs{kType<Stored>, kType<float>, kType<std::int64_t>, kType<Score>};
  static constexpr std::array kOutputs{kType<Score>};

  explicit LookupReduceQuantized(const Attributes& attributes) : blocks_(attributes.at_least_one("num_blocks")) {
    require_bits(attributes, kPacked);
  }

  void compute(const Context& context) const {
    const Input rows = context.input(0, "rows", 2), scales = context.input(1, "scales", 1);
    const Input indices = context.input(2, "indices", 2), scores = context.input(3, "scores", 3);
    scales.require_shape({rows[0]}, "the rows of rows");
    const LookupSizes size = lookup_sizes(rows, indices, scores, blocks_, rows[1] * (kPacked ? 2 : 1), kPacked);
    require_in_range(indices, size.n * size.e);
    lookup_reduce(size, Rows{{rows.read<Stored>(), scales.read<float>(), rows[1]}}, indices.read<std::int64_t>(),
                  scores.read<Score>(), context.output<Score>(0, {size.t, size.e, size.d}), context);
  }

 private:
  std::int64_t blocks_;
};

template <class Value>
class LookupDot {
 public:
  static constexpr const char* kName = "LookupDot";
  static constexpr const char* kProvider = kCpu;
  static constexpr std::array kInputs{kType<Value>, kType<std::int64_t>, kType<Value>};
  static constexpr std::array kOutputs{kType<Value>};

  explicit LookupDot(const Attributes&) {}

  void compute(const Context& context) const {
    const Input rows = context.input(0, "rows", 2), indices = context.input(1, "indices", 2);
    const Input query = context.input(2, "query", 2);
    const LookupSizes size{rows[0], rows[1], indices[0], indices[1], 1, 1};
    query.require_shape({size.t, size.d}, "T of indices, D of rows");
    // Of any block: what is left of an index is its row.
    require_in_range(indices, size.n > 0 ? std::numeric_limits<std::int64_t>::max() : 0);
    lookup_dot<false>(size, rows.read<Value>(), indices.read<std::int64_t>(), query.read<Value>(),
                      context.output<Value>(0, {size.t, size.k}), context);
  }
};

}  // namespace ultramem::ort
