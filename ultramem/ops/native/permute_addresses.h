// The keyed bijection of ultramem/ops/permute_addresses.py, address by address.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace ultramem {

// Constants of one (size, seed): a * b addresses are a grid, `keys` are 4 numbers below 2^31 a round.
struct Permutation {
  static constexpr int kPasses = 2, kRounds = 4, kKeys = 4 * kPasses * kRounds;
  std::int64_t size, a, b;
  std::int64_t keys[kKeys];
};

// An integer in [0, side) from one below 2^31.5.
ULTRAMEM_INLINE std::int64_t hash_half(std::int64_t half, std::int64_t side, const std::int64_t* key) {
  constexpr std::int64_t low_31 = (std::int64_t{1} << 31) - 1;
  std::int64_t mixed = (half * key[0] + key[1]) & low_31;
  mixed = (mixed * mixed >> 16) & low_31;
  mixed = ((mixed * key[2] + key[3]) >> 16) & low_31;
  return mixed * side >> 31;
}

ULTRAMEM_INLINE std::int64_t add_modulo(std::int64_t x, std::int64_t y, std::int64_t side) {
  const std::int64_t sum = x + y;
  return sum >= side ? sum - side : sum;
}

ULTRAMEM_INLINE std::int64_t subtract_modulo(std::int64_t x, std::int64_t y, std::int64_t side) {
  const std::int64_t difference = x - y;
  return difference < 0 ? difference + side : difference;
}

ULTRAMEM_INLINE std::int64_t permute(const Permutation& plan, std::int64_t address) {
  for (int pass = 0; pass < Permutation::kPasses; ++pass) {
    if (pass > 0) address = add_modulo(address, plan.size / 2, plan.size);
    if (address >= plan.a * plan.b) continue;
    std::int64_t high = address / plan.b, low = address - high * plan.b;
    for (int round = 0; round < Permutation::kRounds; ++round) {
      const std::int64_t* key = plan.keys + 4 * (pass * Permutation::kRounds + round);
      if (round % 2 == 0) {
        high = add_modulo(high, hash_half(low, plan.a, key), plan.a);
      } else {
        low = add_modulo(low, hash_half(high, plan.b, key), plan.b);
      }
    }
    address = high * plan.b + low;
  }
  return address;
}

// The same steps undone, the last one first.
ULTRAMEM_INLINE std::int64_t permute_back(const Permutation& plan, std::int64_t address) {
  for (int pass = Permutation::kPasses - 1; pass >= 0; --pass) {
    if (address < plan.a * plan.b) {
      std::int64_t high = address / plan.b, low = address - high * plan.b;
      for (int round = Permutation::kRounds - 1; round >= 0; --round) {
        const std::int64_t* key = plan.keys + 4 * (pass * Permutation::kRounds + round);
        if (round % 2 == 0) {
          high = subtract_modulo(high, hash_half(low, plan.a, key), plan.a);
        } else {
          low = subtract_modulo(low, hash_half(high, plan.b, key), plan.b);
        }
      }
      address = high * plan.b + low;
    }
    if (pass > 0) address = subtract_modulo(address, plan.size / 2, plan.size);
  }
  return address;
}

// Where slots point: virtual indices as they are, or the permutation of addresses.
class SlotIndices {
 public:
  SlotIndices(const std::int64_t* indices, const Permutation* permutation = nullptr)
      : indices_(indices), permutation_(permutation) {}

  ULTRAMEM_INLINE std::int64_t operator[](std::int64_t slot) const {
    return permutation_ ? permute(*permutation_, indices_[slot]) : indices_[slot];
  }

 private:
  const std::int64_t* indices_;
  const Permutation* permutation_;
};

// Addresses that are worth waking a thread for: one takes about 20 ns.
constexpr std::int64_t kAddressesAThread = 512;

template <class Parallel>
void permute_addresses(const Permutation& plan, std::int64_t count, const std::int64_t* addresses,
                       std::int64_t* permuted, const Parallel& parallel) {
  parallel(count, kAddressesAThread, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) permuted[i] = permute(plan, addresses[i]);
  });
}

template <class Parallel>
void permute_addresses_back(const Permutation& plan, std::int64_t count, const std::int64_t* permuted,
                            std::int64_t* addresses, const Parallel& parallel) {
  parallel(count, kAddressesAThread, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) addresses[i] = permute_back(plan, permuted[i]);
  });
}

}  // namespace ultramem
