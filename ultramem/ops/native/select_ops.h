// Selection as PyTorch ops. Cores and singular vectors come in the dtype in which scores are added up.
#pragma once

#include <tuple>

#include "select_backward.h"
#include "torch_ops.h"

namespace {

SelectSizes tucker_sizes(const Tensor& side, const Tensor& cores, std::int64_t k) {
  return {side.size(0), side.size(1), side.size(2), side.size(3), cores.size(1), k};
}

std::tuple<Tensor, Tensor> tucker_topk_op(const Tensor& row_scores, const Tensor& col_scores, const Tensor& cores,
                                          const Tensor& u, const Tensor& t, std::int64_t k, std::int64_t tail,
                                          bool two_tails) {
  const SelectSizes size = tucker_sizes(row_scores, cores, k);
  Tensor scores = torch::stable::new_empty(row_scores, {size.t, size.h, k, size.c});
  Tensor addresses = torch::stable::new_empty(row_scores, {size.t, size.h, k}, ScalarType::Long);
  for_element(row_scores.scalar_type(), [&](auto element) {
    using Score = decltype(element);
    using Acc = Accumulator<Score>;
    tucker_topk(size, two_tails ? Tails::two : Tails::one, tail, read<Score>(row_scores), read<Score>(col_scores),
                read<Acc>(cores), read<Acc>(u), read<Acc>(t), write<Score>(scores), write<std::int64_t>(addresses),
                TorchThreads{});
  });
  return {scores, addresses};
}

std::tuple<Tensor, Tensor, Tensor> tucker_topk_backward_op(const Tensor& grad_scores, const Tensor& row_scores,
                                                           const Tensor& col_scores, const Tensor& cores,
                                                           const Tensor& addresses) {
  const SelectSizes size = tucker_sizes(row_scores, cores, addresses.size(2));
  Tensor grad_row = torch::stable::empty_like(row_scores), grad_col = torch::stable::empty_like(col_scores);
  Tensor grad_cores = torch::stable::empty_like(cores);
  for_element(row_scores.scalar_type(), [&](auto element) {
    using Score = decltype(element);
    using Acc = Accumulator<Score>;
    tucker_topk_backward(size, read<Score>(grad_scores), read<Score>(row_scores), read<Score>(col_scores),
                         read<Acc>(cores), read<std::int64_t>(addresses), write<Score>(grad_row),
                         write<Score>(grad_col), write<Acc>(grad_cores), TorchThreads{});
  });
  return {grad_row, grad_col, grad_cores};
}

std::tuple<Tensor, Tensor> product_topk_op(const Tensor& row_scores, const Tensor& col_scores, std::int64_t k) {
  const SelectSizes size{row_scores.size(0), row_scores.size(1), 1, row_scores.size(2), 1, k};
  Tensor scores = torch::stable::new_empty(row_scores, {size.t, size.h, k});
  Tensor addresses = torch::stable::new_empty(row_scores, {size.t, size.h, k}, ScalarType::Long);
  for_element(row_scores.scalar_type(), [&](auto element) {
    using Score = decltype(element);
    product_topk(size, read<Score>(row_scores), read<Score>(col_scores), write<Score>(scores),
                 write<std::int64_t>(addresses), TorchThreads{});
  });
  return {scores, addresses};
}

std::tuple<Tensor, Tensor> product_topk_backward_op(const Tensor& grad_scores, const Tensor& addresses,
                                                    std::int64_t n) {
  const SelectSizes size{grad_scores.size(0), grad_scores.size(1), 1, n, 1, grad_scores.size(2)};
  Tensor grad_row = torch::stable::new_empty(grad_scores, {size.t, size.h, n});
  Tensor grad_col = torch::stable::new_empty(grad_scores, {size.t, size.h, n});
  for_element(grad_scores.scalar_type(), [&](auto element) {
    using Score = decltype(element);
    product_topk_backward(size, read<Score>(grad_scores), read<std::int64_t>(addresses), write<Score>(grad_row),
                          write<Score>(grad_col), TorchThreads{});
  });
  return {grad_row, grad_col};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ultramem_native, m) {
  m.def(
      "tucker_topk(Tensor row_scores, Tensor col_scores, Tensor cores, Tensor u, Tensor t, int k, int tail, "
      "bool two_tails) -> (Tensor, Tensor)");
  m.def(
      "tucker_topk_backward(Tensor grad_scores, Tensor row_scores, Tensor col_scores, Tensor cores, "
      "Tensor addresses) -> (Tensor, Tensor, Tensor)");
  m.def("product_topk(Tensor row_scores, Tensor col_scores, int k) -> (Tensor, Tensor)");
  m.def("product_topk_backward(Tensor grad_scores, Tensor addresses, int n) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ultramem_native, CPU, m) {
  m.impl("tucker_topk", TORCH_BOX(&tucker_topk_op));
  m.impl("tucker_topk_backward", TORCH_BOX(&tucker_topk_backward_op));
  m.impl("product_topk", TORCH_BOX(&product_topk_op));
  m.impl("product_topk_backward", TORCH_BOX(&product_topk_backward_op));
}
