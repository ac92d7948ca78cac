// The library: every kernel as a PyTorch op.
#include "lookup_reduce.h"
#include "select_ops.h"
#include "torch_ops.h"
#include "update_ops.h"

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

LookupSizes lookup_sizes(const Tensor& values, const Tensor& indices, const Tensor& scores, std::int64_t blocks) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "indices are int64");
  return {values.size(0), values.size(1), indices.size(0), indices.size(1), scores.size(2), blocks};
}

Tensor lookup_reduce_op(const Tensor& values, const Tensor& indices, const Tensor& scores, std::int64_t num_blocks) {
  const LookupSizes size = lookup_sizes(values, indices, scores, num_blocks);
  Tensor out = torch::stable::new_empty(values, {size.t, size.e, size.d});
  for_elements(values, scores, [&](auto value, auto score) {
    using Value = decltype(value);
    using Score = decltype(score);
    lookup_reduce(size, FloatRows<Value>{read<Value>(values), size.d}, read<std::int64_t>(indices),
                  read<Score>(scores), write<Value>(out), TorchThreads{});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(ultramem_native, m) {
  m.def("lookup_reduce(Tensor values, Tensor indices, Tensor scores, int num_blocks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ultramem_native, CPU, m) { m.impl("lookup_reduce", TORCH_BOX(&lookup_reduce_op)); }
