// The permutation of addresses as a PyTorch op, and as an argument of the lookups.
#pragma once

#include <optional>
#include <vector>

#include "permute_addresses.h"
#include "torch_ops.h"

namespace {

// Of the numbers that `native_permutation` in ultramem/ops/permute_addresses.py gives: size, a, b, then the keys.
Permutation permutation_of(const std::vector<std::int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 3 + Permutation::kKeys, "a permutation is size, a, b and its keys");
  Permutation plan{numbers[0], numbers[1], numbers[2], {}};
  STD_TORCH_CHECK(plan.a >= 1 && plan.b >= 1 && plan.size >= plan.a * plan.b, "a permutation has sides of at least 1");
  std::copy(numbers.begin() + 3, numbers.end(), plan.keys);
  return plan;
}

// Indices of slots, and the permutation that they go through, if any.
class PermutedIndices {
 public:
  PermutedIndices(const std::int64_t* indices, const std::vector<std::int64_t>& numbers) : indices_(indices) {
    if (!numbers.empty()) plan_ = permutation_of(numbers);
  }

  // Valid for as long as this.
  SlotIndices indices() const { return {indices_, plan_ ? &*plan_ : nullptr}; }

 private:
  const std::int64_t* indices_;
  std::optional<Permutation> plan_;
};

Tensor permute_addresses_op(const Tensor& addresses, std::vector<std::int64_t> permutation, bool inverse) {
  STD_TORCH_CHECK(addresses.scalar_type() == ScalarType::Long, "addresses are int64");
  const Permutation plan = permutation_of(permutation);
  Tensor permuted = torch::stable::new_empty(addresses, addresses.sizes());
  (inverse ? permute_addresses_back<TorchThreads> : permute_addresses<TorchThreads>)(
      plan, addresses.numel(), read<std::int64_t>(addresses), write<std::int64_t>(permuted), TorchThreads{});
  return permuted;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ultramem_native, m) {
  m.def("permute_addresses(Tensor addresses, int[] permutation, bool inverse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ultramem_native, CPU, m) { m.impl("permute_addresses", TORCH_BOX(&permute_addresses_op)); }
