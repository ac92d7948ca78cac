// Kinds of tables: how a row is found and how its columns become vectors of the accumulator.
#pragma once

#include <array>

#include "lookup.h"

namespace ultramem {

// Rows of floating-point values. The quantised ones have the same members.
template <class Value>
struct FloatRows {
  using Element = Value;
  using Acc = Accumulator<Value>;
  static constexpr std::int64_t kPartColumns = kPartBytes / static_cast<std::int64_t>(sizeof(Value));
  static constexpr std::int64_t kLineColumns = kLineBytes / static_cast<std::int64_t>(sizeof(Value));

  const Value* values;
  std::int64_t d;

  ULTRAMEM_INLINE const Value* row(std::int64_t index) const { return values + index * d; }
  void prefetch_scale(std::int64_t) const {}
  ULTRAMEM_INLINE Acc scale(std::int64_t) const { return Acc(1); }
  ULTRAMEM_INLINE static std::int64_t elements(std::int64_t columns) { return columns; }
  // kLanes columns from there on, or the first `count` of them.
  ULTRAMEM_INLINE static Vector<Acc> lanes(const Value* from) { return load(from); }
  ULTRAMEM_INLINE static Vector<Acc> lanes(const Value* from, std::int64_t count) { return load_first(from, count); }
};

// Rows of small integers with a scale each.
template <class Stored>
struct ScaledRows {
  using Element = Stored;
  using Acc = float;

  const Stored* values;
  const float* scales;
  std::int64_t row_elements;

  ULTRAMEM_INLINE const Stored* row(std::int64_t index) const { return values + index * row_elements; }
  ULTRAMEM_INLINE void prefetch_scale(std::int64_t index) const { __builtin_prefetch(scales + index, 0, 3); }
  ULTRAMEM_INLINE float scale(std::int64_t index) const { return scales[index]; }
};

struct Int8Rows : ScaledRows<std::int8_t> {
  static constexpr std::int64_t kPartColumns = kPartBytes;
  static constexpr std::int64_t kLineColumns = kLineBytes;

  ULTRAMEM_INLINE static std::int64_t elements(std::int64_t columns) { return columns; }
  ULTRAMEM_INLINE static Floats lanes(const std::int8_t* from) {
    return __builtin_convertvector(load_integers(from), Floats);
  }
  ULTRAMEM_INLINE static Floats lanes(const std::int8_t* from, std::int64_t count) {
    std::int8_t padded[kLanes<float>] = {};
    std::memcpy(padded, from, static_cast<std::size_t>(count));
    return lanes(padded);
  }
};

// Two columns a byte, the even one in the low half, in two's complement.
struct Int4Rows : ScaledRows<std::uint8_t> {
  static constexpr std::int64_t kPartColumns = 2 * kPartBytes;
  static constexpr std::int64_t kLineColumns = 2 * kLineBytes;

  ULTRAMEM_INLINE static std::int64_t elements(std::int64_t columns) { return columns / 2; }
  ULTRAMEM_INLINE static Floats lanes(const std::uint8_t* from) {
    // Each lane gets the word that holds its column, moves the column to the top, and brings it down with its sign.
    constexpr int lanes = kLanes<float>;
    Integers words{}, shifts{}, is_late{};
    for (int lane = 0; lane < lanes; ++lane) {
      shifts[lane] = 28 - lane % 8 * 4;
      is_late[lane] = lane < 8 ? 0 : -1;
    }
    if constexpr (lanes == 16) {
      const auto [early, late] = load_bits<std::array<std::int32_t, 2>>(from);
      words = is_late ? words + late : words + early;
    } else if constexpr (lanes == 8) {
      words += load_bits<std::int32_t>(from);
    } else {
      words += load_bits<std::int16_t>(from);
    }
    return __builtin_convertvector((words << shifts) >> 28, Floats);
  }
  ULTRAMEM_INLINE static Floats lanes(const std::uint8_t* from, std::int64_t count) {
    std::uint8_t padded[kLanes<float> / 2] = {};
    std::memcpy(padded, from, static_cast<std::size_t>(count / 2));
    return lanes(padded);
  }
};

template <class Rows>
std::int64_t bytes_of(std::int64_t columns) {
  return Rows::elements(columns) * static_cast<std::int64_t>(sizeof(typename Rows::Element));
}

}  // namespace ultramem
