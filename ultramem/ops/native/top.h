// The m largest of many scores, by a threshold that few others pass. Of equal scores the lower address wins.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "simd.h"

namespace ultramem {

template <class Element>
class Buffer {
 public:
  explicit Buffer(std::int64_t count) : data_(new Element[static_cast<std::size_t>(count)]) {}
  Element* data() const { return data_.get(); }
  Element& operator[](std::int64_t i) const { return data_[static_cast<std::size_t>(i)]; }
  friend Element* operator+(const Buffer& buffer, std::int64_t offset) { return buffer.data() + offset; }

 private:
  std::unique_ptr<Element[]> data_;
};

// The numbers as elements of another type.
template <class Acc, class Element>
ULTRAMEM_INLINE void narrow(const Acc* from, Element* to, std::int64_t count) {
  std::int64_t x = 0;
  for (; x + kLanes<Acc> <= count; x += kLanes<Acc>) store(to + x, load(from + x));
  if (x < count) store_first(to + x, load_first(from + x, count - x), count - x);
}

// One number per (score, address), ordered as (score, then lower address first).
template <class Acc>
using Packed = std::conditional_t<std::is_same_v<Acc, double>, __int128, std::int64_t>;

template <class Acc>
ULTRAMEM_INLINE Packed<Acc> pack(Acc score, std::uint32_t address) {
  using Key = std::conditional_t<std::is_same_v<Acc, double>, std::int64_t, std::int32_t>;
  const Key bits = bits_of<Key>(score + Acc(0));  // -0 and 0 are a tie
  const Key ordered = bits < 0 ? bits ^ std::numeric_limits<Key>::max() : bits;
  return static_cast<Packed<Acc>>(ordered) * (std::int64_t{1} << 32) + ~address;
}

template <class Number>
ULTRAMEM_INLINE std::uint32_t address_of(Number packed) {
  return ~static_cast<std::uint32_t>(packed);
}

// A bit for each lane that is not below `bound`; NaN is not.
ULTRAMEM_INLINE unsigned not_below(Floats scores, Floats bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(scores), reinterpret_cast<__m512>(bound), _CMP_NLT_UQ);
#elif defined(__AVX__)
  return static_cast<unsigned>(_mm256_movemask_ps(
      _mm256_cmp_ps(reinterpret_cast<__m256>(scores), reinterpret_cast<__m256>(bound), _CMP_NLT_UQ)));
#else
  unsigned bits = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) bits |= static_cast<unsigned>(!(scores[lane] < bound[lane])) << lane;
  return bits;
#endif
}

ULTRAMEM_INLINE unsigned not_below(Doubles scores, Doubles bound) {
  unsigned bits = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) bits |= static_cast<unsigned>(!(scores[lane] < bound[lane])) << lane;
  return bits;
}

// For each byte, the places of its bits, the lowest first.
struct BitPlaces {
  std::uint8_t of[256][8] = {};

  constexpr BitPlaces() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0, count = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) of[byte][count++] = static_cast<std::uint8_t>(bit);
      }
    }
  }
};
inline constexpr BitPlaces kBitPlaces;

// The scores that passed a bound, with their addresses.
template <class Acc>
class Passed {
 public:
  using Addresses = typename VectorOf<std::uint32_t, kLanes<Acc>>::type;

  explicit Passed(std::int64_t capacity)
      : capacity_(capacity + kSpare), scores_(capacity_), addresses_(capacity_), packed_(capacity_) {}

  void clear() { count_ = 0; }
  std::int64_t count() const { return count_; }

  void reserve(std::int64_t more) {
    if (count_ + more + kSpare <= capacity_) return;
    Passed wider(2 * (count_ + more));
    std::copy_n(scores_.data(), count_, wider.scores_.data());
    std::copy_n(addresses_.data(), count_, wider.addresses_.data());
    wider.count_ = count_;
    *this = std::move(wider);
  }

  // Append the lanes whose bits are set. Branches on scores would be guessed wrong too often.
  ULTRAMEM_INLINE void append(Vector<Acc> scores, Addresses addresses, unsigned bits) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Acc, float>) {
      const auto mask = static_cast<__mmask16>(bits);
      const __m512i kept_scores = _mm512_maskz_compress_epi32(mask, bits_of<__m512i>(scores));
      const __m512i kept_addresses = _mm512_maskz_compress_epi32(mask, bits_of<__m512i>(addresses));
      std::memcpy(scores_ + count_, &kept_scores, sizeof kept_scores);
      std::memcpy(addresses_ + count_, &kept_addresses, sizeof kept_addresses);
      count_ += __builtin_popcount(bits);
      return;
    }
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<Acc, float>) {
      const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitPlaces.of[bits])));
      const __m256i kept_scores = _mm256_permutevar8x32_epi32(bits_of<__m256i>(scores), order);
      const __m256i kept_addresses = _mm256_permutevar8x32_epi32(bits_of<__m256i>(addresses), order);
      std::memcpy(scores_ + count_, &kept_scores, sizeof kept_scores);
      std::memcpy(addresses_ + count_, &kept_addresses, sizeof kept_addresses);
      count_ += __builtin_popcount(bits);
      return;
    }
#endif
    for (; bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      scores_[count_] = scores[lane];
      addresses_[count_++] = addresses[lane];
    }
  }

  // All of them as packed numbers.
  Packed<Acc>* pack_all() {
    for (std::int64_t i = 0; i < count_; ++i) packed_[i] = pack<Acc>(scores_[i], addresses_[i]);
    return packed_.data();
  }

 private:
  static constexpr std::int64_t kSpare = 32;  // whole vectors are stored, and whole blocks of them ranked
  std::int64_t capacity_, count_ = 0;
  Buffer<Acc> scores_;
  Buffer<std::uint32_t> addresses_;
  Buffer<Packed<Acc>> packed_;
};

template <class Lanes>
ULTRAMEM_INLINE Lanes larger(Lanes a, Lanes b) {
  return a > b ? a : b;
}

template <class Acc>
constexpr Acc kLowest = -std::numeric_limits<Acc>::infinity();

// A bound that at least m scores reach and not many more, from the maxima of disjoint groups of scores: where m groups
// have a score that high, so many scores are. With 4 m groups about 1.2 m scores pass. Lanes of no group hold -inf.
template <class Acc>
Acc threshold(const Vector<Acc>* maxima, std::int64_t count, std::int64_t m) {
  const auto reached = [&](Acc bound) {
    const Vector<Acc> bounds = broadcast(bound);
    std::int64_t groups = 0;
    for (std::int64_t i = 0; i < count; ++i) groups += __builtin_popcount(not_below(maxima[i], bounds));
    return groups;
  };
  const Vector<Acc> none = broadcast(kLowest<Acc>);
  Vector<Acc> highest = none, lowest = -none;
  for (std::int64_t i = 0; i < count; ++i) {
    highest = larger(maxima[i], highest);
    const Vector<Acc> group = maxima[i] == none ? -none : maxima[i];
    lowest = group < lowest ? group : lowest;
  }
  Acc high = highest[0], low = lowest[0];
  for (int lane = 1; lane < kLanes<Acc>; ++lane) {
    high = std::max<Acc>(high, highest[lane]);
    low = std::min<Acc>(low, lowest[lane]);
  }
  if (reached(low) < m) return kLowest<Acc>;
  if (reached(high) >= m) return high;
  // Any bound that m groups reach is right; a few more scores cost less than a few more rounds.
  for (int round = 0; round < 40; ++round) {
    const Acc middle = low / 2 + high / 2;
    if (!(middle > low && middle < high)) break;
    const std::int64_t groups = reached(middle);
    (groups >= m ? low : high) = middle;
    if (groups >= m && groups <= m + m / 8 + 1) break;
  }
  return low;
}

// So few that counting what is larger than each beats sorting.
constexpr std::int64_t kFew = 160;

// places[i] = how many of `count` <= kFew numbers are larger than the i-th. Both arrays are whole blocks long.
inline void rank(const std::int64_t* numbers, std::int64_t count, std::int64_t* places) {
  constexpr int lanes = kVectorBytes / 8, block = 4 * lanes;  // four vectors share what is loaded of the others
  using Longs = VectorOf<std::int64_t, lanes>::type;
  for (std::int64_t first = 0; first < count; first += block) {
    Longs mine[4], larger[4] = {};
    for (int v = 0; v < 4; ++v) mine[v] = load_bits<Longs>(numbers + first + v * lanes);
    for (std::int64_t i = 0; i < count; ++i) {
      const Longs other = Longs{} + numbers[i];
      for (int v = 0; v < 4; ++v) larger[v] -= other > mine[v];
    }
    std::memcpy(places + first, larger, sizeof larger);
  }
}

inline void rank(const __int128* numbers, std::int64_t count, std::int64_t* places) {
  for (std::int64_t i = 0; i < count; ++i) {
    places[i] = std::count_if(numbers, numbers + count, [&](__int128 other) { return other > numbers[i]; });
  }
}

// The m largest of different numbers, largest first.
template <class Number>
void sort_largest(const Number* numbers, std::int64_t count, std::int64_t m, Number* sorted) {
  if (count > kFew) {
    std::partial_sort_copy(numbers, numbers + count, sorted, sorted + m, [](Number a, Number b) { return a > b; });
    return;
  }
  std::int64_t places[kFew];
  rank(numbers, count, places);
  for (std::int64_t i = 0; i < count; ++i) {
    if (places[i] < m) sorted[places[i]] = numbers[i];
  }
}

// Vectors in a group of scores: about 4 m groups, and no more than there are vectors.
template <class Acc>
std::int64_t group_vectors(std::int64_t vectors, std::int64_t m) {
  const std::int64_t wanted = std::max<std::int64_t>(4 * m / kLanes<Acc>, 8);
  return std::max<std::int64_t>(vectors / wanted, 1);
}

template <class Acc>
constexpr std::int64_t vectors_of(std::int64_t count) {
  return (count + kLanes<Acc> - 1) / kLanes<Acc>;
}

// What `top_positions` works in, for up to n scores.
template <class Acc>
struct TopScratch {
  Buffer<Vector<Acc>> maxima;
  Passed<Acc> passed;

  explicit TopScratch(std::int64_t n) : maxima(vectors_of<Acc>(n)), passed(n) {}
};

// Ascending positions of the m largest of n scores, which are followed by -inf to a whole number of vectors.
template <class Acc>
void top_positions(const Acc* scores, std::int64_t n, std::int64_t m, TopScratch<Acc>& scratch, std::uint32_t* top) {
  constexpr std::int64_t lanes = kLanes<Acc>;
  const std::int64_t vectors = vectors_of<Acc>(n), group = group_vectors<Acc>(vectors, m);
  Vector<Acc>* maxima = scratch.maxima.data();
  std::int64_t groups = 0;
  for (std::int64_t v = 0; v < vectors; v += group) {
    Vector<Acc> most = load(scores + v * lanes);
    const std::int64_t end = std::min(v + group, vectors);
    for (std::int64_t w = v + 1; w < end; ++w) most = larger(load(scores + w * lanes), most);
    maxima[groups++] = most;
  }
  const Acc bound = threshold<Acc>(maxima, groups, m);
  const Vector<Acc> bounds = broadcast(bound);
  typename Passed<Acc>::Addresses lane = {};
  for (int i = 0; i < lanes; ++i) lane[i] = static_cast<std::uint32_t>(i);
  scratch.passed.clear();
  for (std::int64_t g = 0; g < groups; ++g) {
    if (!not_below(maxima[g], bounds)) continue;
    const std::int64_t end = std::min((g + 1) * group, vectors);
    for (std::int64_t v = g * group; v < end; ++v) {
      unsigned bits = not_below(load(scores + v * lanes), bounds);
      if (n - v * lanes < lanes) bits &= (1u << (n - v * lanes)) - 1;
      scratch.passed.append(load(scores + v * lanes), lane + static_cast<std::uint32_t>(v * lanes), bits);
    }
  }
  const std::int64_t count = scratch.passed.count();
  Packed<Acc>* passed = scratch.passed.pack_all();
  std::int64_t kept = 0;
  if (count <= kFew) {
    std::int64_t places[kFew] = {};
    if (count > m) rank(passed, count, places);
    for (std::int64_t i = 0; i < count; ++i) {
      if (places[i] < m) top[kept++] = address_of(passed[i]);
    }
    return;
  }
  std::nth_element(passed, passed + m - 1, passed + count, [](auto a, auto b) { return a > b; });
  for (; kept < m; ++kept) top[kept] = address_of(passed[kept]);
  std::sort(top, top + m);
}

}  // namespace ultramem
