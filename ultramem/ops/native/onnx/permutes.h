// Node PermuteAddresses.
#pragma once

#include <cmath>

#include "../permute_addresses.h"
#include "lookups.h"

namespace ultramem::ort {

class PermuteAddresses {
 public:
  static constexpr const char* kName = "PermuteAddresses";
  static constexpr const char* kProvider = kCpu;
  static constexpr std::array kInputs{kType<std::int64_t>};
  static constexpr std::array kOutputs{kType<std::int64_t>};

  explicit PermuteAddresses(const Attributes& attributes) {
    plan_.size = attributes.integer("size");
    if (plan_.size < 1 || plan_.size > std::int64_t{1} << 62) fail("size must be in [1, 2^62], got ", plan_.size);
    const auto sides = attributes.integers("sides"), keys = attributes.integers("keys");
    // Sides of a square, as near as may be: what keeps the products below 2^63.
    auto root = static_cast<std::int64_t>(std::sqrt(static_cast<double>(plan_.size)));
    while (root * root > plan_.size) --root;
    while ((root + 1) * (root + 1) <= plan_.size) ++root;
    plan_.a = root;
    plan_.b = plan_.size / root;
    if (sides.size() != 2 || sides[0] != plan_.a || sides[1] != plan_.b) {
      fail("sides must be ", plan_.a, ", ", plan_.b, " for size ", plan_.size);
    }
    if (keys.size() != Permutation::kKeys) fail("keys must be ", Permutation::kKeys, " numbers, got ", keys.size());
    for (const std::int64_t key : keys) {
      if (key < 0 || key >= std::int64_t{1} << 31) fail("keys must be in [0, 2^31), got ", key);
    }
    std::copy(keys.begin(), keys.end(), plan_.keys);
  }

  void compute(const Context& context) const {
    const Input addresses = context.input(0, "addresses");
    require_in_range(addresses, plan_.size);
    permute_addresses(plan_, addresses.count(), addresses.read<std::int64_t>(),
                      context.output<std::int64_t>(0, addresses.shape), context);
  }

 private:
  Permutation plan_{};
};

}  // namespace ultramem::ort
