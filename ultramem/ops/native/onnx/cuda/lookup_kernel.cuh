// The lookup on a GPU: out[t,e] = sum over the slots k of token t in block e of concat_c(score[t,k,c] * row(k)[core c]).
//
// A thread block works on one block of one token. It lists the token's slots that are in the block, and groups of
// threads as wide as a row take listed rows in turn, 16 bytes a thread. Sums are float32, groups are added in order: the
// same bits every time. This file includes nothing, so that NVRTC takes it as it is.
#pragma once

namespace ultramem::cuda {

using Int64 = long long;
using Word = unsigned int;

struct Half {
  unsigned short bits;
};
struct Bfloat {
  unsigned short bits;
};
// Two int4 columns, the even one in the low half.
struct Int4Pair {
  unsigned char bits;
};

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

struct Sizes {
  Int64 n, k;
  int d, core_columns, cores, blocks;
};

__device__ inline float as_float(Word bits) {
  union {
    Word bits;
    float number;
  } both{bits};
  return both.number;
}

__device__ inline Word as_bits(float number) {
  union {
    float number;
    Word bits;
  } both{number};
  return both.bits;
}

__device__ inline float widen(float from) { return from; }
__device__ inline float widen(Bfloat from) { return as_float(static_cast<Word>(from.bits) << 16); }
__device__ inline float widen(Half from);
__device__ inline void narrow(float from, Half& to);
#if !defined(ULTRAMEM_CUDA_ON_CPU)  // a test has its own
__device__ inline float widen(Half from) {
  float to;
  asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(from.bits));
  return to;
}
__device__ inline void narrow(float from, Half& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(from)); }
#endif
__device__ inline void narrow(float from, float& to) { to = from; }
__device__ inline void narrow(float from, Bfloat& to) {
  const Word bits = as_bits(from);
  const Word rounded = from == from ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u;
  to.bits = static_cast<unsigned short>(rounded >> 16);
}

// How the columns of `Stored` elements lie in a word of 4 bytes.
template <class Stored>
struct Columns;

template <>
struct Columns<float> {
  static constexpr int kInWord = 1, kInElement = 1;
  __device__ static float of(Word word, int) { return as_float(word); }
};
template <>
struct Columns<Half> {
  static constexpr int kInWord = 2, kInElement = 1;
  __device__ static float of(Word word, int i) { return widen(Half{static_cast<unsigned short>(word >> 16 * i)}); }
};
template <>
struct Columns<Bfloat> {
  static constexpr int kInWord = 2, kInElement = 1;
  __device__ static float of(Word word, int i) { return as_float(i ? word & 0xffff0000u : word << 16); }
};
template <>
struct Columns<signed char> {
  static constexpr int kInWord = 4, kInElement = 1;
  __device__ static float of(Word word, int i) { return static_cast<float>(static_cast<int>(word << (24 - 8 * i)) >> 24); }
};
template <>
struct Columns<Int4Pair> {
  static constexpr int kInWord = 8, kInElement = 2;
  __device__ static float of(Word word, int i) { return static_cast<float>(static_cast<int>(word << (28 - 4 * i)) >> 28); }
};

__device__ inline Word word_of(float from) { return as_bits(from); }
__device__ inline Word word_of(Half from) { return from.bits; }
__device__ inline Word word_of(Bfloat from) { return from.bits; }
__device__ inline Word word_of(signed char from) { return static_cast<unsigned char>(from); }
__device__ inline Word word_of(Int4Pair from) { return from.bits; }

// Columns of a thread: 16 bytes of them, or an element where cores end elsewhere than at a multiple of 16 bytes.
template <class Stored, bool kWide>
constexpr int kThreadColumns = kWide ? 4 * Columns<Stored>::kInWord : Columns<Stored>::kInElement;

// sums += weight * the columns at `from`.
template <class Stored, bool kWide>
__device__ inline void add_row(const Stored* from, float weight, float* sums) {
  using In = Columns<Stored>;
  if constexpr (kWide) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const Word each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kThreadColumns<Stored, true>; ++i) {
      sums[i] += weight * In::of(each[i / In::kInWord], i % In::kInWord);
    }
  } else {
#pragma unroll
    for (int i = 0; i < In::kInElement; ++i) sums[i] += weight * In::of(word_of(*from), i);
  }
}

// `count` numbers as Out, 16 bytes at a time where they are as many.
template <bool kWide, int count, class Out>
__device__ inline void store(const float* sums, Out* to) {
  constexpr int in_pack = 16 / static_cast<int>(sizeof(Out));
  if constexpr (kWide && count % in_pack == 0) {
#pragma unroll
    for (int first = 0; first < count; first += in_pack) {
      union {
        Out numbers[in_pack];
        uint4 words;
      } pack;
#pragma unroll
      for (int i = 0; i < in_pack; ++i) narrow(sums[first + i], pack.numbers[i]);
      *reinterpret_cast<uint4*>(to + first) = pack.words;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) narrow(sums[i], to[i]);
  }
}

// Launched with kThreads threads on [T, E, parts] blocks, a part being kThreads threads' columns. `scales` is null for
// rows that have none. A token with an index outside of [0, N*E) becomes NaN: the host cannot wait to look.
template <class Stored, class Score, class Out, bool kWide>
__global__ void __launch_bounds__(kThreads)
    lookup_reduce(const Stored* __restrict__ rows, const float* __restrict__ scales, const Int64* __restrict__ indices,
                  const Score* __restrict__ scores, Out* __restrict__ out, Sizes size) {
  constexpr int columns = kThreadColumns<Stored, kWide>;
  __shared__ Int64 listed_rows[kThreads];
  __shared__ int listed_slots[kThreads];
  __shared__ int in_warp[kWarps];
  __shared__ int outside;
  __shared__ float partial[kThreads * columns];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const Int64 token = blockIdx.x, block = blockIdx.y, first_row = block * size.n;
  const int wide = size.d / columns - static_cast<int>(blockIdx.z) * kThreads;
  const int lanes = wide < kThreads ? wide : kThreads, groups = kThreads / lanes;
  const int group = thread / lanes, lane = thread - group * lanes;
  const int column = (static_cast<int>(blockIdx.z) * kThreads + lane) * columns, core = column / size.core_columns;
  const Int64 row_elements = size.d / Columns<Stored>::kInElement;
  const Stored* my_column = rows + column / Columns<Stored>::kInElement;
  const Score* my_scores = scores + token * size.k * size.cores + core;
  if (thread == 0) outside = 0;
  float sums[columns] = {};
  for (Int64 base = 0; base < size.k; base += kThreads) {
    const Int64 slot = base + thread;
    const bool here = slot < size.k;
    const Int64 index = here ? indices[token * size.k + slot] : 0, row = index - first_row;
    const bool listed = here && row >= 0 && row < size.n;
    const Word warp_lists = __ballot_sync(0xffffffffu, listed);
    if (thread % kWarp == 0) in_warp[warp] = __popc(warp_lists);
    __syncthreads();
    if (here && (index < 0 || index >= size.n * size.blocks)) outside = 1;
    int place = __popc(warp_lists & ((1u << thread % kWarp) - 1)), count = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += in_warp[w];
      count += in_warp[w];
    }
    if (listed) {
      listed_rows[place] = row;
      listed_slots[place] = static_cast<int>(slot - base);
    }
    __syncthreads();
    if (group < groups) {
#pragma unroll 4
      for (int i = group; i < count; i += groups) {
        const Int64 from = listed_rows[i];
        float weight = widen(my_scores[(base + listed_slots[i]) * size.cores]);
        if (scales != nullptr) weight *= scales[from];
        add_row<Stored, kWide>(my_column + from * row_elements, weight, sums);
      }
    }
    __syncthreads();
  }
  if (group < groups) {
#pragma unroll
    for (int i = 0; i < columns; ++i) partial[i * kThreads + thread] = sums[i];
  }
  __syncthreads();
  if (group > 0) return;
#pragma unroll
  for (int i = 0; i < columns; ++i) {
    for (int g = 1; g < groups; ++g) sums[i] += partial[i * kThreads + g * lanes + lane];
    if (outside) sums[i] = as_float(0x7fc00000u);
  }
  store<kWide, columns>(sums, out + (token * size.blocks + block) * size.d + column);
}

}  // namespace ultramem::cuda
