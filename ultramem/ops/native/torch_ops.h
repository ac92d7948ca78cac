// What makes PyTorch ops of the kernels, by the stable ABI: a build serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "simd.h"

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
  STD_TORCH_CHECK(tensor.is_contiguous(), "ultramem_native ops write contiguous tensors");
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

}  // namespace
