// Vectors as wide as the machine's registers, loaded from and stored to any element type, partial ones included.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "elements.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ultramem {

#define ULTRAMEM_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLineBytes = 64;

// The type in which elements are added up: float64 stays float64, everything narrower is added in float32.
template <class Element>
using Accumulator = std::conditional_t<std::is_same_v<Element, double>, double, float>;

template <class Element, int count>
struct VectorOf {
  typedef Element type __attribute__((vector_size(sizeof(Element) * count)));
};
template <class Acc>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));
template <class Acc>
using Vector = typename VectorOf<Acc, kLanes<Acc>>::type;

using Floats = Vector<float>;
using Doubles = Vector<double>;
using Integers = VectorOf<std::int32_t, kLanes<float>>::type;
using Words = VectorOf<std::uint32_t, kLanes<float>>::type;
using Halves = VectorOf<std::uint16_t, kLanes<float>>::type;

template <class To, class From>
ULTRAMEM_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class To>
ULTRAMEM_INLINE To load_bits(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

// load(p): the next kLanes elements at p, widened to the accumulator.
ULTRAMEM_INLINE Floats load(const float* from) { return load_bits<Floats>(from); }
ULTRAMEM_INLINE Doubles load(const double* from) { return load_bits<Doubles>(from); }

ULTRAMEM_INLINE Floats load(const bfloat16* from) {
  return bits_of<Floats>(__builtin_convertvector(load_bits<Halves>(from), Words) << 16);
}

ULTRAMEM_INLINE float to_float(float16 half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = half.bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero or subnormal: an integer times 2^-24
    return bits_of<float>(bits_of<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f) | sign);
  }
  const std::uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // of infinity and NaN, of the rest
  return bits_of<float>(((magnitude << 13) + exponent) | sign);
}

ULTRAMEM_INLINE Floats load(const float16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(load_bits<__m256i>(from)));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(load_bits<__m128i>(from)));
#else
  Floats to;
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = to_float(from[lane]);
  return to;
#endif
}

// store(p, v): kLanes elements at p, rounded to nearest even.
ULTRAMEM_INLINE void store(float* to, Floats from) { std::memcpy(to, &from, sizeof from); }
ULTRAMEM_INLINE void store(double* to, Doubles from) { std::memcpy(to, &from, sizeof from); }

ULTRAMEM_INLINE void store(bfloat16* to, Floats from) {
  const Words bits = bits_of<Words>(from);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;  // a NaN whose payload would round to infinity stays one
  const Words is_nan = bits_of<Words>(from != from);
  const Halves narrow = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), Halves);
  std::memcpy(to, &narrow, sizeof narrow);
}

ULTRAMEM_INLINE float16 to_float16(float single) {
  const std::uint32_t bits = bits_of<std::uint32_t>(single);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds past 65504
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the addition round to a multiple of 2^-24
    half = bits_of<std::uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(half | sign)};
}

ULTRAMEM_INLINE void store(float16* to, Floats from) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_cvtps_ph(reinterpret_cast<__m512>(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &narrow, sizeof narrow);
#elif defined(__F16C__)
  const __m128i narrow = _mm256_cvtps_ph(reinterpret_cast<__m256>(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &narrow, sizeof narrow);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = to_float16(from[lane]);
#endif
}

// The same for the first `count` < kLanes elements; lanes beyond are 0 and not stored.
template <class Element>
ULTRAMEM_INLINE auto load_first(const Element* from, std::int64_t count) {
  Element padded[kLanes<Accumulator<Element>>] = {};
  std::memcpy(padded, from, sizeof(Element) * static_cast<std::size_t>(count));
  return load(padded);
}

template <class Element, class Lanes>
ULTRAMEM_INLINE void store_first(Element* to, Lanes from, std::int64_t count) {
  Element padded[kLanes<Accumulator<Element>>];
  store(padded, from);
  std::memcpy(to, padded, sizeof(Element) * static_cast<std::size_t>(count));
}

// One element, widened.
ULTRAMEM_INLINE float widen(float from) { return from; }
ULTRAMEM_INLINE double widen(double from) { return from; }
ULTRAMEM_INLINE float widen(bfloat16 from) { return bits_of<float>(static_cast<std::uint32_t>(from.bits) << 16); }
ULTRAMEM_INLINE float widen(float16 from) { return to_float(from); }

// One element, rounded as `store` rounds.
ULTRAMEM_INLINE void narrow(float from, float& to) { to = from; }
ULTRAMEM_INLINE void narrow(double from, double& to) { to = from; }
template <class Half>
ULTRAMEM_INLINE void narrow(float from, Half& to) {
  store_first(&to, Floats{} + from, 1);
}

template <class Acc>
ULTRAMEM_INLINE Vector<Acc> broadcast(Acc value) {
  return Vector<Acc>{} + value;
}

// Bring the cache lines of [from, from + bytes) nearer.
ULTRAMEM_INLINE void prefetch(const void* from, std::int64_t bytes) {
  const char* first = static_cast<const char*>(from);
  for (std::int64_t offset = 0; offset < bytes; offset += kLineBytes) __builtin_prefetch(first + offset, 0, 3);
  __builtin_prefetch(first + bytes - 1, 0, 3);  // of rows that do not begin with a line
}

}  // namespace ultramem
