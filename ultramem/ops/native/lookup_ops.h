// The lookups as PyTorch ops; ultramem/ops/lookup_*.py says what they compute.
#pragma once

#include "lookup_backward.h"
#include "lookup_dot.h"
#include "lookup_reduce.h"
#include "permute_ops.h"
#include "torch_ops.h"

namespace {

// f(Value{}, Score{}): scores have the type of the table or float32.
template <class F>
void for_elements(const Tensor& values, const Tensor& scores, const F& f) {
  for_element(values.scalar_type(), [&](auto value) {
    if (scores.scalar_type() == values.scalar_type()) return f(value, value);
    STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float, "scores have the dtype of the table or float32");
    f(value, float{});
  });
}

const std::int64_t* read_indices(const Tensor& indices) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "indices are int64");
  return read<std::int64_t>(indices);
}

LookupSizes lookup_sizes(const Tensor& values, const Tensor& indices, std::int64_t cores, std::int64_t blocks) {
  return {values.size(0), values.size(1), indices.size(0), indices.size(1), cores, blocks};
}

// `permutation`: of the addresses that `indices` then are (see permute_ops.h); empty: they are virtual indices.
Tensor lookup_reduce_op(const Tensor& values, const Tensor& indices, const Tensor& scores, std::int64_t num_blocks,
                        std::vector<std::int64_t> permutation) {
  const LookupSizes size = lookup_sizes(values, indices, scores.size(2), num_blocks);
  Tensor out = torch::stable::new_empty(values, {size.t, size.e, size.d});
  const PermutedIndices permuted(read_indices(indices), permutation);
  for_elements(values, scores, [&](auto value, auto score) {
    using Value = decltype(value);
    using Score = decltype(score);
    lookup_reduce(size, FloatRows<Value>{read<Value>(values), size.d}, permuted.indices(), read<Score>(scores),
                  write<Value>(out), TorchThreads{});
  });
  return out;
}

Tensor lookup_reduce_quantized_op(const Tensor& rows, const Tensor& scales, const Tensor& indices, const Tensor& scores,
                                  std::int64_t num_blocks, std::vector<std::int64_t> permutation) {
  const bool packed = rows.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(packed || rows.scalar_type() == ScalarType::Char, "rows are int8, or int4 packed in uint8");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float, "scales are float32");
  LookupSizes size = lookup_sizes(rows, indices, scores.size(2), num_blocks);
  if (packed) size.d *= 2;
  Tensor out = torch::stable::new_empty(scores, {size.t, size.e, size.d});
  const PermutedIndices permuted(read_indices(indices), permutation);
  for_element(scores.scalar_type(), [&](auto score) {
    using Score = decltype(score);
    if constexpr (std::is_same_v<Score, double>) {
      STD_TORCH_CHECK(false, "quantised rows take scores of float32, bfloat16 and float16");
    } else {
      const auto pool = [&](const auto& table) {
        lookup_reduce(size, table, permuted.indices(), read<Score>(scores), write<Score>(out), TorchThreads{});
      };
      if (packed) {
        pool(Int4Rows{{read<std::uint8_t>(rows), read<float>(scales), rows.size(1)}});
      } else {
        pool(Int8Rows{{read<std::int8_t>(rows), read<float>(scales), rows.size(1)}});
      }
    }
  });
  return out;
}

Tensor lookup_dot_op(const Tensor& rows, const Tensor& indices, const Tensor& queries) {
  const LookupSizes size = lookup_sizes(rows, indices, 1, 1);
  STD_TORCH_CHECK(queries.scalar_type() == rows.scalar_type(), "queries have the dtype of the rows");
  Tensor out = torch::stable::new_empty(rows, {size.t, size.k});
  for_element(rows.scalar_type(), [&](auto value) {
    using Value = decltype(value);
    lookup_dot<false>(size, read<Value>(rows), read_indices(indices), read<Value>(queries), write<Value>(out),
                      TorchThreads{});
  });
  return out;
}

// f(SortedSlots) and what it needs, for both gradients of the table.
SortedSlots sorted_slots(const LookupSizes& size, const Tensor& indices) {
  STD_TORCH_CHECK(SortedSlots::fit(size), "rows, slots and blocks are too many to be numbered in 64 bits");
  return SortedSlots(size, read_indices(indices), TorchThreads{});
}

template <class ToRow>
void row_gradients(const LookupSizes& size, const SortedSlots& sorted, const Tensor& grad, const Tensor& values,
                   const Tensor& scores, const Tensor& grad_scores, const Tensor& grad_rows, const ToRow& to_row) {
  STD_TORCH_CHECK(grad.scalar_type() == values.scalar_type(), "the gradient has the dtype of the table");
  for_elements(values, scores, [&](auto value, auto score) {
    using Value = decltype(value);
    using Score = decltype(score);
    Value* rows = write<Value>(grad_rows);
    RowGradients<Value, Score>(size, sorted, read<Value>(values), read<Score>(scores), read<Value>(grad),
                               grad_scores.numel() ? write<Score>(grad_scores) : nullptr)
        .run(TorchThreads{}, [&](std::int64_t u) { return rows + to_row(u) * size.d; });
  });
}

Tensor new_grad_scores(const Tensor& scores, bool needed) {
  if (!needed) return torch::stable::new_empty(scores, {0});
  return torch::stable::new_empty(scores, {scores.size(0), scores.size(1), scores.size(2)});
}

std::tuple<Tensor, Tensor> lookup_reduce_backward_op(const Tensor& grad, const Tensor& values, const Tensor& indices,
                                                     const Tensor& scores, bool need_values, bool need_scores) {
  const LookupSizes size = lookup_sizes(values, indices, scores.size(2), grad.size(1));
  Tensor grad_scores = new_grad_scores(scores, need_scores);
  if (need_values) {
    Tensor grad_values = torch::stable::new_zeros(values, {size.n, size.d});
    const SortedSlots sorted = sorted_slots(size, indices);
    row_gradients(size, sorted, grad, values, scores, grad_scores, grad_values,
                  [&](std::int64_t u) { return sorted.row(sorted.first(u)); });
    return {grad_values, grad_scores};
  }
  if (need_scores) {
    STD_TORCH_CHECK(grad.scalar_type() == values.scalar_type(), "the gradient has the dtype of the table");
    for_elements(values, scores, [&](auto value, auto score) {
      using Value = decltype(value);
      lookup_dot<true>(size, read<Value>(values), read_indices(indices), read<Value>(grad),
                       write<decltype(score)>(grad_scores), TorchThreads{});
    });
  }
  return {torch::stable::new_empty(values, {0}), grad_scores};
}

std::tuple<Tensor, Tensor, Tensor> lookup_reduce_backward_rows_op(const Tensor& grad, const Tensor& values,
                                                                  const Tensor& indices, const Tensor& scores,
                                                                  bool need_scores) {
  const LookupSizes size = lookup_sizes(values, indices, scores.size(2), grad.size(1));
  Tensor grad_scores = new_grad_scores(scores, need_scores);
  const SortedSlots sorted = sorted_slots(size, indices);
  Tensor rows = torch::stable::new_empty(indices, {sorted.rows()});
  Tensor grad_rows = torch::stable::new_empty(values, {sorted.rows(), size.d});
  std::int64_t* touched = write<std::int64_t>(rows);
  for (std::int64_t u = 0; u < sorted.rows(); ++u) touched[u] = sorted.row(sorted.first(u));
  row_gradients(size, sorted, grad, values, scores, grad_scores, grad_rows, [](std::int64_t u) { return u; });
  return {rows, grad_rows, grad_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ultramem_native, m) {
  m.def("lookup_reduce(Tensor values, Tensor indices, Tensor scores, int num_blocks, int[] permutation) -> Tensor");
  m.def(
      "lookup_reduce_quantized(Tensor rows, Tensor scales, Tensor indices, Tensor scores, int num_blocks, "
      "int[] permutation) -> Tensor");
  m.def("lookup_dot(Tensor rows, Tensor indices, Tensor queries) -> Tensor");
  m.def(
      "lookup_reduce_backward(Tensor grad, Tensor values, Tensor indices, Tensor scores, bool need_values, "
      "bool need_scores) -> (Tensor, Tensor)");
  m.def(
      "lookup_reduce_backward_rows(Tensor grad, Tensor values, Tensor indices, Tensor scores, bool need_scores) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ultramem_native, CPU, m) {
  m.impl("lookup_reduce", TORCH_BOX(&lookup_reduce_op));
  m.impl("lookup_reduce_quantized", TORCH_BOX(&lookup_reduce_quantized_op));
  m.impl("lookup_dot", TORCH_BOX(&lookup_dot_op));
  m.impl("lookup_reduce_backward", TORCH_BOX(&lookup_reduce_backward_op));
  m.impl("lookup_reduce_backward_rows", TORCH_BOX(&lookup_reduce_backward_rows_op));
}
