// The slots of all tokens in the order of their rows: what makes the gradient of a row one sum, always in one order.
#pragma once

#include "lookup.h"

namespace ultramem {

class SortedSlots {
 public:
  // Whether rows, slots and blocks fit side by side in 64 bits.
  static bool fit(const LookupSizes& size) { return bits(size.n) + bits(size.t * size.k) + bits(size.e) <= 64; }

  template <class Parallel>
  SortedSlots(const LookupSizes& size, const std::int64_t* indices, const Parallel& parallel)
      : block_bits_(bits(size.e)), slot_bits_(bits(size.t * size.k)),
        packed_(static_cast<std::size_t>(size.t * size.k)) {
    const auto count = static_cast<std::int64_t>(packed_.size());
    parallel(count, kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t slot = begin; slot < end; ++slot) {
        const Place place = locate(indices[slot], size.n);
        packed_[slot] = ((static_cast<std::uint64_t>(place.row) << slot_bits_ | static_cast<std::uint64_t>(slot)) << block_bits_) |
                        static_cast<std::uint64_t>(place.block);
      }
    });
    if (count < kGrain) {
      std::sort(packed_.begin(), packed_.end());
    } else {
      radix_sort(bits(size.n), parallel);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      if (i == 0 || row(i) != row(i - 1)) first_.push_back(i);
    }
    first_.push_back(count);
  }

  std::int64_t count() const { return static_cast<std::int64_t>(packed_.size()); }
  std::int64_t rows() const { return static_cast<std::int64_t>(first_.size()) - 1; }
  // Where the slots of the u-th touched row begin; u = rows(): where all end.
  std::int64_t first(std::int64_t u) const { return first_[u]; }
  // The touched row whose slots hold position i.
  std::int64_t row_at(std::int64_t i) const {
    return std::upper_bound(first_.begin(), first_.end(), i) - first_.begin() - 1;
  }

  // Of the slot at position i.
  ULTRAMEM_INLINE std::int64_t row(std::int64_t i) const {
    return static_cast<std::int64_t>(packed_[i] >> block_bits_ >> slot_bits_);
  }
  ULTRAMEM_INLINE std::int64_t slot(std::int64_t i) const {
    return static_cast<std::int64_t>(packed_[i] >> block_bits_ & ((std::uint64_t{1} << slot_bits_) - 1));
  }
  ULTRAMEM_INLINE std::int64_t block(std::int64_t i) const {
    return static_cast<std::int64_t>(packed_[i] & ((std::uint64_t{1} << block_bits_) - 1));
  }

 private:
  static constexpr std::int64_t kGrain = 8192;
  static constexpr int kDigit = 11, kDigits = 1 << kDigit;  // a pass over 2^11 counters that fit in the first-level cache

  static int bits(std::int64_t count) {
    int bits = 0;
    while (bits < 63 && std::int64_t{1} << bits < count) ++bits;
    return bits;
  }

  // Stable, from the lowest digit of the row up; the slots are in order to begin with. However many pieces the threads
  // take, the order is the same.
  template <class Parallel>
  void radix_sort(int row_bits, const Parallel& parallel) {
    const std::int64_t count = this->count(), pieces = std::clamp<std::int64_t>(count / kGrain, 1, parallel.threads());
    const std::int64_t size = (count + pieces - 1) / pieces;
    std::vector<std::uint64_t> other(packed_.size());
    std::vector<std::int64_t> next(static_cast<std::size_t>(pieces * kDigits));
    for (int shift = block_bits_ + slot_bits_, done = 0; done < row_bits; done += kDigit, shift += kDigit) {
      const auto digit = [&](std::int64_t i) { return packed_[i] >> shift & (kDigits - 1); };
      const auto for_pieces = [&](const auto& f) {
        parallel(pieces, 1, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t piece = begin; piece < end; ++piece) {
            std::int64_t* counts = next.data() + piece * kDigits;
            for (std::int64_t i = piece * size; i < std::min(count, (piece + 1) * size); ++i) f(i, counts[digit(i)]);
          }
        });
      };
      std::fill(next.begin(), next.end(), 0);
      for_pieces([](std::int64_t, std::int64_t& counter) { ++counter; });
      for (std::int64_t value = 0, sum = 0; value < kDigits; ++value) {
        for (std::int64_t piece = 0; piece < pieces; ++piece) sum += std::exchange(next[piece * kDigits + value], sum);
      }
      for_pieces([&](std::int64_t i, std::int64_t& counter) { other[counter++] = packed_[i]; });
      packed_.swap(other);
    }
  }

  int block_bits_, slot_bits_;
  std::vector<std::uint64_t> packed_;
  std::vector<std::int64_t> first_;
};

}  // namespace ultramem
