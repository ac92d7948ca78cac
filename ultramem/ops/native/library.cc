// The kernels as PyTorch ops, by the stable ABI: a build serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "lookup_reduce.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace ultramem;

// The threads of torch itself: torch.set_num_threads holds, and no second pool fights for the cores.
struct TorchThreads {
  int threads() const { return static_cast<int>(torch::stable::get_num_threads()); }

  template <class F>
  void operator()(std::int64_t count, std::int64_t grain, const F& f) const {
    torch::stable::parallel_for(0, count, grain, f);
  }
};

template <class Element>
const Element* read(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "ultramem_native ops take contiguous tensors");
  return static_cast<const Element*>(tensor.const_data_ptr());
}

template <class Element>
Element* write(const Tensor& tensor) {
  return static_cast<Element*>(tensor.mutable_data_ptr());
}

// f(Element{}) for the element type of a tensor.
template <class F>
void for_element(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default: STD_TORCH_CHECK(false, "ultramem_native ops take float32, float64, bfloat16 and float16");
  }
}

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
